"""The verdict on a batch of weighted draws, in numbers and in words."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from scoreinfer.correct import effective_sample_size, log_evidence, pareto_smooth

MAX_K_HAT = 0.7
MIN_ESS = 400.0
MIN_SHARE = 0.1
MAX_MISSED = 0.05
MAX_OUTLYING = 0.01
"""Distance rank up to which an observation counts as an outlier: the share of the model's own data that do."""
UNSEEN = 60.0
"""A region of 5 % of the posterior whose weight exceeds num / 60 expects fewer than three of num draws."""


class ForwardCheck(NamedTuple):
    """Evidence that weights cannot give: simulated truths near the observation, and where the observation lies.

    Args:
        log_excess: log(w(z*) / mean proposal weight) of truths z* whose simulated data lie near the observation; NaN
            where a simulation says nothing; none where none was asked.
        distance_rank: share of the simulations that lie further from their neighbours than the observation does; NaN
            where it means nothing.
        source: what the evidence is made of, in words.
    """

    log_excess: Float[Array, " neighbours"]
    distance_rank: Float[Array, ""]
    source: str = "simulated truths near the observation"


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
        missed: share of simulated truths near the observation that the proposal would practically never draw; NaN
            where the model cannot be simulated.
        distance_rank: share of simulations further from their neighbours than the observation; NaN likewise.

    Exactness: consistent for a proposal that covers the posterior. Weights are blind to a mode no draw visits; the
    forward check sees one with probability 1 - (1 - mass)^neighbours, and only as near the observation as the
    simulations come.
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

    def __str__(self) -> str:
        head = "certified" if self.certified else "not certified"
        return (
            f"{head}: {self.reason}\n  ESS {self.ess:.0f} of {self.num}, k-hat {self.k_hat:.2f}, "
            f"log evidence {self.log_evidence:.3f} +- {self.log_evidence_se:.3f}, missed share {self.missed:.3f}, "
            f"distance rank {self.distance_rank:.3f}"
        )


def certify(log_weight: Float[Array | np.ndarray, " num"] | None, check: ForwardCheck | None = None) -> Certificate:
    """Judge a batch of importance weights, with the forward check where there is one.

    Args:
        log_weight: log p(z, y) - log q(z) of every draw; None where the model has no density.
        check: the forward evidence.

    Returns:
        A certificate. It refuses when k-hat >= 0.7, when the effective sample size is below 400 (for batches of
        fewer than 4000 draws: below a tenth of the batch, but never under 40), when more than 5 % of the simulated
        truths near the observation lie where the weight is larger than that of every draw and hardly any draw is
        expected, or when the observation lies further from the simulations than any of them from the others.

    >>> certify(np.zeros(1000)).certified
    True
    >>> certify(np.where(np.arange(1000) < 20, 0.0, -9.0)).reason
    'effective sample size 20 < 100'
    """
    if log_weight is None:
        reason = "uncertified: no density. The simulator is stochastic; use calibration as evidence."
        rank = np.nan if check is None else float(check.distance_rank)
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
    missed = rank = np.nan
    if check is not None:
        rank = float(check.distance_rank)
        unseen = max(log_weight.max() - evidence + 1.0, np.log(num / UNSEEN))
        excess = np.asarray(check.log_excess)
        told = ~np.isnan(excess)
        missed = float(np.mean(excess[told] > unseen)) if told.any() else np.nan
        if excess.size and not told.any():
            faults.append("weights are poor at every simulation, so none tells whether the proposal misses anything")
        if missed > MAX_MISSED:
            faults.append(f"{missed:.0%} of {check.source} are where the proposal never draws")
        if rank <= 0.0:
            faults.append("the observation is further from the simulations than any of them from the others")
    covered = "" if check is None or not np.size(check.log_excess) else f", {check.source} covered"
    reason = "; ".join(faults) or f"weights well behaved{covered}"
    return Certificate(not faults, reason, num, ess, k_hat, evidence, error, missed, rank)
