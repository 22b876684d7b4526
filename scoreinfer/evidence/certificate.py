"""The verdict on a batch of weighted draws, in numbers and in words."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence, pareto_smooth

MAX_K_HAT = 0.7
MIN_ESS = 400.0
MIN_SHARE = 0.1
MAX_MISSED, FEW_MISSED = 0.03, 3
"""Share of the places of one source that may be missed, and how many may be whatever their share."""
MAX_UNSEEN = 0.1
"""Posterior mass of a mode that may go unseen, with 95 % probability, in a certified batch."""
CONFIDENCE = 0.95
MAX_OUTLYING = 0.01
"""Distance rank up to which an observation counts as an outlier: the share of the model's own data that do."""
UNSEEN = 60.0
"""A region of 5 % of the posterior whose weight exceeds num / 60 expects fewer than three of num draws."""


class ForwardCheck(NamedTuple):
    """Evidence that weights cannot give: places of the posterior that owe nothing to the proposal.

    Args:
        log_excess: log(w / mean proposal weight) at each place; NaN where it says nothing; none where none was asked.
        distance_rank: share of the simulations that lie further from their neighbours than the observation does; NaN
            where it means nothing.
        source: what the evidence is made of, in words.
        num_informative: number of independent places at the observation itself; NaN where they are only near it.
        num_first: draws of the prior in which they were looked for; zero where they come from elsewhere.
    """

    log_excess: Float[Array | np.ndarray, " places"]
    distance_rank: Float[Array, ""] | float = np.nan
    source: str = "simulated truths near the observation"
    num_informative: float = np.nan
    num_first: int = 0


class Certificate(NamedTuple):
    """Whether a batch of weighted draws can be trusted, and why.

    Args:
        certified: the verdict.
        reason: the verdict in words.
        num: number of weighted draws.
        ess: effective sample size.
        k_hat: shape of the weights' tail (Pareto-smoothed importance sampling).
        log_evidence: log p(y); NaN where the model has no density.
        log_evidence_se: its standard error.
        missed: share of the posterior, by the evidence that owes nothing to the proposal, that the proposal would
            practically never draw; NaN where there is no such evidence.
        distance_rank: share of simulations further from their neighbours than the observation; NaN likewise.
        seen_mass: a mode of this posterior mass, or a larger one, would have been seen with a probability of 95 %; NaN
            where nothing was looked for at the observation itself.
        seen_prior_mass: so would one in a corner of this prior mass, or a larger one; NaN likewise. A smaller or
            lighter mode may be missing.

    Exactness: consistent for a proposal that covers the posterior. Weights are blind to a mode no draw visits; the
    evidence from elsewhere sees one that is above both ``seen_mass`` and ``seen_prior_mass``.
    """

    certified: bool
    reason: str
    num: int
    ess: float
    k_hat: float
    log_evidence: float
    log_evidence_se: float
    missed: float = np.nan
    distance_rank: float = np.nan
    seen_mass: float = np.nan
    seen_prior_mass: float = np.nan

    def __str__(self) -> str:
        head = "certified" if self.certified else "not certified"
        return (
            f"{head}: {self.reason}\n  ESS {self.ess:.0f} of {self.num}, k-hat {self.k_hat:.2f}, "
            f"log evidence {self.log_evidence:.3f} +- {self.log_evidence_se:.3f}, missed share {self.missed:.3f}, "
            f"distance rank {self.distance_rank:.3f}\n  {self.resolution}"
        )

    @property
    def resolution(self) -> str:
        """Say which modes would have been seen."""
        if np.isnan(self.seen_mass):
            return "nothing was looked for at the observation itself: a mode that no draw visits may be missing"
        corner = (
            "" if np.isnan(self.seen_prior_mass) else f" in corners of at least {self.seen_prior_mass:.1g} of the prior"
        )
        return f"modes of at least {self.seen_mass:.2g} of the posterior{corner} would have been seen (95 %)"


def seen(num: float | int) -> float:
    """Compute the least mass that one of ``num`` independent draws hits with a probability of 95 %.

    >>> round(seen(28.4), 2)
    0.1
    """
    return float(1.0 - (1.0 - CONFIDENCE) ** (1.0 / num)) if num > 0 else 1.0


def certify_weights(log_weight: Float[Array | np.ndarray, " num"] | None, *checks: ForwardCheck) -> Certificate:
    """Judge a batch of importance weights, with evidence from elsewhere where there is some.

    Args:
        log_weight: log p(z, y) - log q(z) of every draw; None where the model has no density.
        *checks: the evidence, source by source.

    Returns:
        A certificate. It refuses when

        - k-hat >= 0.7;
        - the effective sample size is below 400 (for batches of fewer than 4000 draws: below a tenth of the batch, but
          never under 40);
        - more than 3 % (and more than three) of the places of one source lie where the weight is larger than that of
          every draw and hardly any draw is expected;
        - all sources together could have overlooked a mode of 10 % of the posterior;
        - nothing was looked for at the observation itself, and it lies further from the simulations than any of them
          from the others.

    >>> certify_weights(np.zeros(1000)).certified
    True
    >>> certify_weights(np.where(np.arange(1000) < 20, 0.0, -9.0)).reason
    'effective sample size 20 < 100'
    """
    ranks = [float(check.distance_rank) for check in checks if not np.isnan(check.distance_rank)]
    rank = min(ranks, default=np.nan)
    if log_weight is None:
        reason = "uncertified: no density. The simulator is stochastic; use calibration as evidence."
        return Certificate(False, reason, 0, np.nan, np.nan, np.nan, np.nan, distance_rank=rank)
    log_weight = np.asarray(log_weight, np.float64)
    num, ess = log_weight.size, effective_sample_size(log_weight)
    _, k_hat = pareto_smooth(log_weight)
    evidence, error = log_evidence(log_weight)
    needed = max(min(MIN_ESS, MIN_SHARE * num), 0.1 * MIN_ESS)
    faults = []
    if np.isnan(log_weight).any():
        faults.append(f"{np.isnan(log_weight).mean():.1%} of the weights are NaN: the model's density failed there")
    if not k_hat < MAX_K_HAT:
        faults.append(f"k-hat {k_hat:.2f} >= {MAX_K_HAT}: a few draws carry the weights")
    if not ess >= needed:
        faults.append(f"effective sample size {ess:.0f} < {needed:.0f}")
    unseen = max(log_weight.max() - evidence + 1.0, np.log(num / UNSEEN))
    shares = [missed_share(check, unseen) for check in checks]
    for check, share in zip(checks, shares, strict=True):
        if np.size(check.log_excess) and np.isnan(share):
            faults.append(f"none of {check.source} tells whether the proposal misses anything")
        if share > MAX_MISSED and share * np.sum(~np.isnan(check.log_excess)) > FEW_MISSED:
            faults.append(f"{share:.0%} of {check.source} are where the proposal never draws")
    informative = [check for check in checks if not np.isnan(check.num_informative)]
    seen_mass = min((seen(check.num_informative) for check in informative), default=np.nan)
    seen_prior_mass = min((seen(check.num_first) for check in informative if check.num_first), default=np.nan)
    if seen_mass > MAX_UNSEEN:
        most = max(check.num_informative for check in informative)
        faults.append(
            f"only {most:.0f} independent witnesses: a mode of {seen_mass:.0%} of the posterior may be missing"
        )
    if rank <= 0.0 and not seen_mass <= MAX_UNSEEN:
        faults.append("the observation is further from the simulations than any of them from the others")
    covered = [check.source for check, share in zip(checks, shares, strict=True) if not np.isnan(share)]
    reason = "; ".join(faults) or ", ".join(["weights well behaved", *(f"{source} covered" for source in covered)])
    missed = float(np.nanmax(shares)) if covered else np.nan
    return Certificate(
        not faults, reason, num, ess, k_hat, evidence, error, missed, rank, seen_mass, seen_prior_mass
    )  # fmt: skip


def missed_share(check: ForwardCheck, unseen: float) -> float:
    """Compute the share of places whose log weight exceeds the mean by more than ``unseen``; NaN where none tells."""
    excess = np.asarray(check.log_excess)
    told = ~np.isnan(excess)
    return float(np.mean(excess[told] > unseen)) if told.any() else np.nan
