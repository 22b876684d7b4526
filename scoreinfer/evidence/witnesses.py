"""Witnesses: approximate draws of one posterior that do not depend on the proposal; they are used to check it.

Many draws of the reference (usually the prior), the first draws, are weighed by the target density. If the effective
sample size is large enough, witnesses are resampled from them. Otherwise the first draws are tempered: resampled with
the largest power of the weights that keeps enough of them, then moved, in turn. If the proposal misses a mode, the
witnesses in this mode have very large weights under the proposal.

The resolution of the witnesses is known. Every witness descends from one first draw, its ancestor. Ancestor i has the
share s_i of the witnesses. The number of independent witnesses is n = 1 / sum_i s_i^2.

    P(no witness in a mode of posterior mass m) = about (1 - m)^n
    P(none of N first draws in a region of prior mass p) = (1 - p)^N

References: Del Moral, Doucet and Jasra 2006, JRSS B 68(3) (tempering); Lee and Whiteley 2018, Biometrika 105(3)
(variance from ancestors); ter Braak and Vrugt 2008, Statistics and Computing 18(4) (moves along differences).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._keys import keys_of
from scoreinfer._typing import Key
from scoreinfer.evidence.certificate import Certificate, ForwardCheck, certify_weights
from scoreinfer.montecarlo.first_draws import (
    NUM_FIRST,
    NUM_WITNESSES,
    THOROUGH,
    FirstDraws,
    dim_of,
    draw_first,
    first_power,
    resample_first,
)
from scoreinfer.montecarlo.kernel_estimate import kernel_estimate
from scoreinfer.montecarlo.langevin import LogDensity
from scoreinfer.montecarlo.moves import DifferenceMoves
from scoreinfer.montecarlo.population import num_ancestors
from scoreinfer.montecarlo.reference import AbstractReference
from scoreinfer.montecarlo.tempering import begin, walk
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence, relative_weights, unseen_excess
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted
from scoreinfer.samplers.batches import Defence, mixed, spaced, weigh_places

MIN_DIRECT = 400.0
"""Effective sample size of the first draws from which no tempering is needed. Chosen by judgement."""
MAX_DIM = 256
"""Largest dimension with tempering; moves along differences are too slow above. Chosen by judgement."""
MIN_INFORMATIVE = 60.0
"""With fewer independent witnesses, tempering is repeated with three times as many moves. Chosen by judgement."""
NUM_HELD = 512
"""Approximate number of witnesses that are weighed under the proposal. Chosen by judgement."""
LEAST_EXCESS, MIN_FITTED, SHARES = math.log(2.0), 4, (0.1, 0.5)
"""Repair: least log excess of fitted witnesses, their least number, bounds of the defence's share. By judgement."""
MAX_FITTED_DIM = 64
"""Largest dimension in which a density is fitted to missed witnesses. Chosen by judgement."""
MAX_LEFT = 0.003
"""Share of missed witnesses from which even a certified batch is drawn again: two of `NUM_HELD`. A mode of 1.3 % of the
posterior, 9 standard deviations away, shifted the mean of 4000 draws by 7 standard errors."""


class Witnesses(NamedTuple):
    """Approximate draws of a posterior, with their resolution.

    Args:
        values: the witnesses.
        num_informative: effective number of first draws from which they descend.
        num_first: number of first draws of the prior; zero if they came from another reference.
        log_evidence: their estimate of the log evidence.
    """

    values: Float[Array, "num dim"]
    num_informative: float
    num_first: int
    log_evidence: float


def gather(key: Key, reference: AbstractReference, target: LogDensity, *, thorough: bool = False) -> Witnesses:
    """Gather witnesses of a density.

    Args:
        key: random key.
        reference: the density of the first draws.
        target: log density up to a constant. A pytree (`jax.tree_util.Partial`) compiles once for all data.
        thorough: whether to take 16 times as many first draws and three times as many moves.

    Returns:
        The witnesses. ``num_informative`` is zero if no first draw has weight, or tempering does not reach the target.

    Exactness: consistent as the numbers of first draws and of moves grow. No gradient is needed.
    """
    for_first, for_rows, *for_attempts = keys_of(key)
    first, dim = draw_first(for_first, reference, target, NUM_FIRST * (THOROUGH if thorough else 1)), dim_of(reference)
    of_prior = first.num if reference.is_prior else 0
    ess = effective_sample_size(first.log_ratio)
    if ess == 0.0:
        return Witnesses(jnp.zeros((0, dim)), 0.0, of_prior, -math.inf)
    if ess >= MIN_DIRECT or dim > MAX_DIM:
        drawn = resample_first(for_rows, first, np.array(1.0), NUM_WITNESSES)
        return Witnesses(drawn.values, ess, of_prior, float(drawn.log_evidence))
    num_moves = (20 + 2 * dim) * (3 if thorough else 1)
    witnesses = _temper(for_attempts[0], reference, target, first, num_moves)
    if witnesses.num_informative < MIN_INFORMATIVE:
        witnesses = _temper(for_attempts[1], reference, target, first, 3 * num_moves)
    return witnesses._replace(num_first=of_prior)


def _temper(key: Key, reference: AbstractReference, target: LogDensity, first: FirstDraws, num_moves: int) -> Witnesses:
    key, for_first, *_ = keys_of(key)
    moves, power = DifferenceMoves(reference, target, np.array(num_moves)), first_power(first, NUM_WITNESSES)
    drawn = walk(key, moves, begin(moves, resample_first(for_first, first, power, NUM_WITNESSES), power))
    informative = num_ancestors(drawn.ancestors) if float(drawn.power) == 1.0 else 0.0
    return Witnesses(drawn.values, informative, first.num, float(drawn.log_evidence))


def hold_against(
    key: Key,
    proposal: AbstractProposal,
    target: Target,
    drawn: Weighted,
    witnesses: Witnesses,
    defence: Defence | None = None,
    num: int = NUM_HELD,
) -> ForwardCheck:
    """Weigh witnesses under a proposal, relative to the mean weight of the proposal's own draws.

    Args:
        key: random key.
        proposal: the proposal.
        target: the posterior of the observation.
        drawn: weighted draws of the proposal.
        witnesses: witnesses; about ``num`` of them are weighed (see `held`).
        defence: the defence that the proposal was mixed with. None means no defence.
        num: number of witnesses to weigh.

    Exactness: the weights of the witnesses are exact in the same sense as the proposal's.
    """

    def log_weight(values: Float[np.ndarray, "held dim"]) -> Float[Array, " held"]:
        weighed = weigh_places(key, proposal, target, values)
        return (weighed if defence is None else mixed(defence, weighed)).log_weight

    mean = log_evidence(drawn.log_weight)[0]
    return forward_check(drawn, witnesses, log_weight, mean, "the witnesses at the observation", num)


def forward_check(
    drawn: Weighted,
    witnesses: Witnesses,
    log_weight: Callable[[Float[np.ndarray, "held dim"]], Float[Array, " held"]],
    mean: float,
    source: str,
    num: int = NUM_HELD,
) -> ForwardCheck:
    """Hold witnesses against weighted draws.

    Args:
        drawn: the draws.
        witnesses: the witnesses; about ``num`` of them are weighed.
        log_weight: computes the log weights of given values.
        mean: the log mean weight with which these are compared.
        source: the source of the witnesses, in words.
        num: number of witnesses to weigh.

    Exactness: that of the weights.
    """
    if witnesses.num_informative == 0.0:  # tempering has not reached the target
        return ForwardCheck(jnp.zeros(0), np.nan, source, 0.0, witnesses.num_first)
    values = held(witnesses, num)
    log_excess = np.asarray(log_weight(values)) - mean
    shift = shift_of_means(drawn, values, log_excess)
    return ForwardCheck(log_excess, np.nan, source, witnesses.num_informative, witnesses.num_first, shift)


def held(witnesses: Witnesses, num: int = NUM_HELD) -> Float[np.ndarray, "held dim"]:
    """Select the witnesses that are weighed: evenly spaced, about ``num`` of them."""
    return spaced(witnesses.values, num)


def shift_of_means(
    drawn: Weighted, values: Float[np.ndarray, "held dim"], log_excess: Float[np.ndarray, " held"]
) -> float:
    """Compute by how many standard errors of weighted draws the missed witnesses would shift a mean.

    max_j m |mean_j(missed) - mean_j(draws)| / (sd_j / sqrt(ESS)), with the share m of missed witnesses and the standard
    deviation sd_j of all witnesses. Zero if none is missed.

    Exactness: consistent as the number of witnesses grows. Witnesses that the proposal draws do not count.
    """
    missed = log_excess > unseen_excess(drawn.log_weight)
    if not missed.any():
        return 0.0
    weight = relative_weights(drawn.log_weight)
    mean = weight @ np.nan_to_num(np.asarray(drawn.z, np.float64)) / weight.sum()
    distance = np.abs(values[missed].mean(0) - mean) / np.maximum(values.std(0), np.finfo(np.float32).tiny)
    return float(missed.mean() * distance.max() * np.sqrt(effective_sample_size(drawn.log_weight)))


class Judged(NamedTuple):
    """A batch of draws and the verdict on it.

    Args:
        drawn: the draws.
        certificate: the verdict.
        num_proposals: number of draws in all batches.
        witnessed: share of the draws that come from a density fitted to witnesses.
    """

    drawn: Weighted
    certificate: Certificate
    num_proposals: int
    witnessed: float = 0.0


def judge(
    key: Key,
    proposal: AbstractProposal,
    target: Target,
    drawn: Weighted,
    witnesses: Witnesses,
    defence: Defence | None,
    again: Callable[[Defence], Weighted] | None,
    *others: ForwardCheck,
) -> Judged:
    """Judge a batch by one half of the witnesses; if it misses some, judge a second batch by the other half.

    At first `NUM_HELD` witnesses are weighed; if some are missed, the whole half. The second batch comes from a mixture
    of the proposal and a density fitted to the missed witnesses. The better of the two batches is returned.

    Args:
        key: random key.
        proposal: the proposal.
        target: the posterior of the observation.
        drawn: weighted draws of the proposal.
        witnesses: the witnesses at the observation.
        defence: the defence that the proposal was mixed with. None means no defence.
        again: draws a second batch from the proposal mixed with the given defence. None means no second batch.
        *others: further evidence.

    Exactness: the weights are exact in the same sense as the proposal's. The fitted density does not depend on the
        random numbers of the second batch.
    """
    one, other = (witnesses._replace(values=witnesses.values[i::2]) for i in range(2))

    def judged(drawn: Weighted, part: Witnesses, defence: Defence | None, num: int) -> tuple[Certificate, ForwardCheck]:
        check = hold_against(key, proposal, target, drawn, part, defence, num)
        return certify_weights(drawn.log_weight, check, *others), check

    certificate, check = judged(drawn, one, defence, NUM_HELD)
    if certificate.certified and certificate.missed < MAX_LEFT:
        return Judged(drawn, certificate, drawn.num)
    everything = len(one.values)
    certificate, check = judged(drawn, one, defence, everything)
    mending = None if again is None else repair(held(one, everything), check.log_excess)
    if mending is None or again is None:
        return Judged(drawn, certificate, drawn.num)
    mended = again(mending)
    num = drawn.num + mended.num
    first = Judged(drawn, certificate, num)
    second = Judged(mended, judged(mended, other, mending, everything)[0], num, mending.share)
    return max(first, second, key=_standing)


def _standing(judged: Judged) -> tuple[bool, float]:
    certificate = judged.certificate
    return certificate.certified, -np.nan_to_num(certificate.missed, nan=1.0)


def repair(values: Float[np.ndarray, "held dim"], log_excess: Float[Array | np.ndarray, " held"]) -> Defence | None:
    """Fit a density to the missed witnesses: those that a proposal draws less than half as often as it should.

    None means there are fewer than `MIN_FITTED` of them, or more than `MAX_FITTED_DIM` dimensions.

    Exactness: any result is a valid defence; the weights of the mixture account for it.
    """
    missed = np.asarray(log_excess) > LEAST_EXCESS
    if missed.sum() < MIN_FITTED or values.shape[1] > MAX_FITTED_DIM:
        return None
    share = float(np.clip(missed.mean(), *SHARES))
    num = 1 << int(missed.sum() - 1).bit_length()  # some are taken twice: few shapes compile
    return Defence(kernel_estimate(np.resize(values[missed], (num, values.shape[1]))), share)
