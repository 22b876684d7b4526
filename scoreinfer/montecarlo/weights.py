"""Importance weights: effective sample size, evidence, Pareto smoothing."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

UNSEEN = 60.0
"""With relative weights above num / 60, a region of 5 % posterior mass expects fewer than 3 of num draws. Judgement."""
LogWeights = Float[Array | np.ndarray, " draws"]


def effective_sample_size(log_weight: LogWeights) -> float:
    """Compute Kish's effective sample size (sum w)^2 / sum w^2 of importance weights.

    Exactness: an estimate from the weights themselves. It cannot see a mode that no draw has visited.

    References: Kong, Liu and Wong 1994, JASA 89(425).

    >>> effective_sample_size(np.log([1.0, 1.0, 2.0]))
    2.6666666666666665
    """
    w = relative_weights(log_weight)
    return float(w.sum() ** 2 / (w**2).sum()) if w.any() else 0.0


def log_effective_share(log_weight: Float[Array, " num"]) -> Float[Array, ""]:
    """Compute log(effective sample size / number) within compiled code; NaN where every weight is zero.

    Exactness: as for `effective_sample_size`.
    """
    return 2 * jax.nn.logsumexp(log_weight) - jax.nn.logsumexp(2 * log_weight) - jnp.log(log_weight.size)


@jax.jit
def log_mean_weight(log_weight: Float[Array, " num"]) -> Float[Array, ""]:
    """Compute the log of the mean weight."""
    return jax.nn.logsumexp(log_weight) - jnp.log(log_weight.size)


def log_evidence(log_weight: LogWeights) -> tuple[float, float]:
    """Compute log mean weight, the log evidence, and its standard error by the delta method.

    Exactness: the mean weight is unbiased; its logarithm is consistent, biased low by half its variance.

    >>> round(log_evidence(np.log([1.0, 3.0]))[0], 3)  # log 2
    0.693
    """
    w, peak = relative_weights(log_weight), float(np.nanmax(log_weight))
    if not w.any():
        return -np.inf, np.inf
    return peak + float(np.log(w.mean())), float(w.std() / (w.mean() * np.sqrt(w.size)))


def unseen_excess(log_weight: LogWeights) -> float:
    """Compute the log excess, over the mean weight, from which a point counts as missed by the proposal.

    Its weight is more than e times the largest weight of the draws, and the proposal is expected to draw fewer than
    `UNSEEN` points there.
    """
    excess = float(np.nanmax(log_weight)) - log_evidence(log_weight)[0] + 1.0
    return max(excess, float(np.log(len(log_weight) / UNSEEN)))


def missed_share(log_excess: LogWeights, unseen: float) -> float:
    """Compute the share of points whose ``log_excess`` is above ``unseen``; NaN if no point has information.

    >>> missed_share(np.array([np.nan, 0.0, 9.0]), 4.0)
    0.5
    """
    excess = np.asarray(log_excess)
    told = ~np.isnan(excess)
    return float(np.mean(excess[told] > unseen)) if told.any() else np.nan


def relative_weights(log_weight: LogWeights) -> np.ndarray:
    """Compute weights relative to the largest; zero where one is NaN."""
    log_weight = np.asarray(log_weight, np.float64)
    log_weight = np.where(np.isnan(log_weight), -np.inf, log_weight)  # a density that failed: weight zero
    peak = log_weight.max()
    return np.exp(log_weight - peak) if np.isfinite(peak) else np.zeros_like(log_weight)


def pareto_smooth(log_weight: LogWeights) -> tuple[np.ndarray, float]:
    """Compute normalised Pareto-smoothed log weights and the tail shape k-hat, by ArviZ.

    Exactness: the smoothing trades a small bias, vanishing as num grows, for a finite variance.

    References: Vehtari et al. 2024, arXiv 1507.02646, sections 2 and 3.
    """
    import arviz

    log_weight = np.asarray(log_weight, np.float64)
    finite = np.isfinite(log_weight)
    smooth = np.where(finite, log_weight, -np.inf)
    if not finite.any():
        return smooth, np.inf
    if finite.sum() < 25:  # too few for a tail
        return smooth - np.logaddexp.reduce(smooth), np.inf
    if np.ptp(np.sort(log_weight[finite])[-5:]) == 0.0:  # as after resampling: there is no tail to fit
        return smooth - np.logaddexp.reduce(smooth), -np.inf
    if hasattr(arviz, "psislw"):
        smooth[finite], k_hat = arviz.psislw(log_weight[finite].copy())
    else:  # ArviZ 1.x wants log likelihoods, the negative of log weights
        from arviz_stats.base import array_stats

        smooth[finite], k_hat = array_stats.psislw(-log_weight[finite])
    return smooth - np.logaddexp.reduce(smooth), float(k_hat)
