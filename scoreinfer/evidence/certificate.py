"""Certificates: whether a batch of weighted draws can be trusted, in numbers and in words."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from scoreinfer.figures import draw_criteria, draw_evidence, draw_tail, row_of_axes
from scoreinfer.montecarlo.weights import (
    effective_sample_size,
    log_evidence,
    missed_share,
    pareto_smooth,
    unseen_excess,
)

MAX_K_HAT = 0.7
"""k-hat from which a batch is refused. Vehtari et al. 2024, arXiv 1507.02646."""
MIN_ESS = 400.0
"""Least effective sample size of a certified batch of 4000 draws or more. Chosen by judgement."""
MIN_SHARE = 0.1
"""Least effective share of a smaller certified batch (and at least 40 effective draws). Chosen by judgement."""
MAX_MISSED, FEW_MISSED = 0.03, 3
"""Largest share of the points of one source that may be missed; this many points always may. Chosen by judgement."""
MAX_SHIFT = 3.0
"""Largest distance, in standard errors, by which missed points may shift a mean. Chosen by judgement."""
MAX_UNSEEN = 0.1
"""Largest posterior mass of a mode that a certified batch may fail to see, at `CONFIDENCE`. Chosen by judgement."""
CONFIDENCE = 0.95
"""Probability with which a mode of the stated mass is seen. Chosen by judgement."""
MAX_OUTLYING = 0.01
"""Largest distance rank of an outlier: 1 % of the model's own data have such a rank. Chosen by judgement."""


class ForwardCheck(NamedTuple):
    """Evidence from points that were drawn independently of the proposal. Weights alone cannot give it.

    Args:
        log_excess: log(w / mean proposal weight) at each point; NaN at a point without information; empty if there are
            no points.
        distance_rank: share of the simulations that lie at least as far from their neighbours as the observation does.
            NaN means it is not known.
        source: the source of the points, in words.
        num_informative: effective number of independent points at the observation itself. NaN means the points belong
            to other observations near it.
        num_first: number of prior draws from which the points descend; zero if they do not come from the prior.
        shift: largest distance, in standard errors of the weighted draws, by which the missed points would shift a
            mean. NaN means it is not known.
    """

    log_excess: Float[Array | np.ndarray, " places"]
    distance_rank: Float[Array, ""] | float = np.nan
    source: str = "simulated truths near the observation"
    num_informative: float = np.nan
    num_first: int = 0
    shift: float = np.nan


class Basis(NamedTuple):
    """The numbers on which a verdict rests, for `Certificate.plot`.

    Args:
        tail: log of the largest weights over their mean, largest first: those to which k-hat is fitted.
        places: log excess of the independent points, by source.
        unseen: log excess from which a point counts as missed.
        needed: effective sample size that was asked for.
        shift: standard errors by which missed points would shift a mean; NaN if it is not known.
    """

    tail: tuple[float, ...]
    places: tuple[tuple[str, tuple[float, ...]], ...]
    unseen: float
    needed: float
    shift: float = math.nan


class Certificate(NamedTuple):
    """Whether a batch of weighted draws can be trusted, and why.

    Args:
        certified: the verdict.
        reason: the reasons of the verdict, in words.
        num: number of weighted draws.
        ess: effective sample size.
        k_hat: shape of the weights' tail (Pareto-smoothed importance sampling).
        log_evidence: log p(y); NaN if the model has no density.
        log_evidence_se: standard error of ``log_evidence``.
        missed: share of the posterior that the proposal practically never draws, estimated from independent evidence
            (`ForwardCheck`); NaN without such evidence.
        distance_rank: share of the simulations that lie at least as far from their neighbours as the observation does;
            NaN if it is not known.
        seen_mass: a mode of at least this posterior mass would have been seen with a probability of 95 %; NaN if no
            evidence was gathered at the observation itself.
        seen_prior_mass: the mode must also lie in a region of at least this prior mass; NaN if it is not known. A mode
            of smaller posterior or prior mass may be missing.
        basis: the numbers behind the verdict, for `plot`. None means that there were no weights.

    Exactness: consistent for a proposal that covers the posterior. Weights cannot show a mode that no draw visits. The
        independent evidence shows it with a probability of 95 % if its mass is above both ``seen_mass`` and
        ``seen_prior_mass``.
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
    basis: Basis | None = None

    def plot(self) -> Any:
        """Plot the weights' tail, the independent evidence, and each criterion as a share of its limit.

        Returns:
            Three matplotlib axes. What is red refuses.

        Raises:
            ValueError: if there were no weights.
            ImportError: if matplotlib is not installed.
        """
        if self.basis is None:
            raise ValueError(f"Expected the certificate of weighted draws, got one without weights: {self.reason}")
        axes = row_of_axes(3)
        draw_tail(axes[0], self.basis.tail, self.num, self.k_hat, MAX_K_HAT)
        draw_evidence(axes[1], dict(self.basis.places), self.basis.unseen, self.missed)
        criteria = {
            "k-hat": self.k_hat / MAX_K_HAT,
            "ESS": self.basis.needed / self.ess if self.ess else math.inf,
            "missed share": self.missed / MAX_MISSED,
            "shift of a mean": self.basis.shift / MAX_SHIFT,
            "unseen mass": self.seen_mass / MAX_UNSEEN,
        }
        draw_criteria(axes[2], criteria, "certified" if self.certified else "not certified")
        return axes

    def __str__(self) -> str:
        head = "certified" if self.certified else "not certified"
        figures = (
            f"ESS {self.ess:.0f} of {self.num}, k-hat {self.k_hat:.2f}, "
            f"log evidence {self.log_evidence:.3f} +- {self.log_evidence_se:.3f}"
        )
        measured = {"missed share": self.missed, "distance rank": self.distance_rank}
        figures += "".join(f", {name} {value:.3f}" for name, value in measured.items() if not np.isnan(value))
        return f"{head}: {self.reason}\n  {figures}\n  {self.resolution}"

    @property
    def resolution(self) -> str:
        """Describe which modes would have been seen."""
        if np.isnan(self.seen_mass):
            return "no witnesses were gathered at the observation itself: a mode that no draw visits may be missing"
        corner = (
            "" if np.isnan(self.seen_prior_mass) else f" in regions of at least {self.seen_prior_mass:.1g} of the prior"
        )
        return f"modes of at least {self.seen_mass:.2g} of the posterior{corner} would have been seen (95 %)"


def seen(num: float | int) -> float:
    """Compute the mass 1 - 0.05^(1 / num), which ``num`` independent draws hit with a probability of 95 %.

    >>> round(seen(28.4), 2)
    0.1
    """
    return float(1.0 - (1.0 - CONFIDENCE) ** (1.0 / num)) if num > 0 else 1.0


def certify_weights(log_weight: Float[Array | np.ndarray, " num"] | None, *checks: ForwardCheck) -> Certificate:
    """Judge a batch of importance weights, together with independent evidence.

    Args:
        log_weight: log p(z, y) - log q(z) of every draw. None means the model has no density.
        *checks: independent evidence, one `ForwardCheck` for each source.

    Returns:
        A certificate. It refuses if

        - ``log_weight`` is None, or any weight is NaN;

        - k-hat >= 0.7;
        - the effective sample size is below 400 (for batches of fewer than 4000 draws: below a tenth of the batch, but
          never under 40);
        - a source has points, but none with information;
        - the proposal misses more than 3 % (and more than three) of the points of one source: their weight is more than
          e times the largest weight of the draws, and the proposal is expected to draw hardly any point there;
        - the missed points (more than three) would shift a mean by more than three standard errors of the draws;
        - every source at the observation itself could fail to see a mode of more than 10 % of the posterior;
        - there is no sufficient source at the observation itself, and the observation lies further from the simulations
          than every simulation from its neighbours.

    Exactness: as for `Certificate`.

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
    faults, shift = [], np.nan
    if np.isnan(log_weight).any():
        faults.append(
            f"{np.isnan(log_weight).mean():.1%} of the weights are NaN: the model's density is NaN at these draws"
        )
    if not k_hat < MAX_K_HAT:
        faults.append(f"k-hat {k_hat:.2f} >= {MAX_K_HAT}: a few draws carry the weights")
    if not ess >= needed:
        faults.append(f"effective sample size {ess:.0f} < {needed:.0f}")
    unseen = unseen_excess(log_weight)
    shares = [missed_share(check.log_excess, unseen) for check in checks]
    for check, share in zip(checks, shares, strict=True):
        if np.size(check.log_excess) and np.isnan(share):
            faults.append(f"none of {check.source} can show whether the proposal misses a mode")
        if not share * np.sum(~np.isnan(check.log_excess)) > FEW_MISSED:
            continue
        shift = np.fmax(shift, check.shift)
        if share > MAX_MISSED:
            faults.append(f"{share:.0%} of {check.source} are where the proposal never draws")
        elif check.shift > MAX_SHIFT:
            faults.append(
                f"{share:.1%} of {check.source} are where the proposal never draws; with them a mean would shift by "
                f"{check.shift:.1f} standard errors"
            )
    informative = [check for check in checks if not np.isnan(check.num_informative)]
    seen_mass = min((seen(check.num_informative) for check in informative), default=np.nan)
    seen_prior_mass = min((seen(check.num_first) for check in informative if check.num_first), default=np.nan)
    if seen_mass > MAX_UNSEEN:
        most = max(check.num_informative for check in informative)
        faults.append(
            f"only {most:.0f} independent witnesses: a mode of {seen_mass:.0%} of the posterior may be missing"
        )
    if rank <= 0.0 and not seen_mass <= MAX_UNSEEN:
        faults.append("the observation is further from the simulations than each of these is from its neighbours")
    covered = [check.source for check, share in zip(checks, shares, strict=True) if not np.isnan(share)]
    reason = "; ".join(faults) or ", ".join(["weights well behaved", *(f"{source} covered" for source in covered)])
    missed = float(np.nanmax(shares)) if covered else np.nan
    places = tuple((check.source, tuple(np.asarray(check.log_excess).tolist())) for check in checks)
    basis = Basis(_tail(log_weight, evidence), places, unseen, needed, float(shift))
    return Certificate(
        not faults, reason, num, ess, k_hat, evidence, error, missed, rank, seen_mass, seen_prior_mass, basis
    )  # fmt: skip


def _tail(log_weight: Float[np.ndarray, " num"], log_mean: float) -> tuple[float, ...]:
    """Take the weights to which Pareto smoothing fits a tail: at most a fifth, about 3 sqrt(num) of them."""
    length = min(log_weight.size // 5, math.ceil(3 * math.sqrt(log_weight.size)))
    return tuple((np.sort(log_weight[np.isfinite(log_weight)])[::-1][:length] - log_mean).tolist())
