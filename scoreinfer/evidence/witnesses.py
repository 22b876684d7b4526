"""Witnesses: draws near the posterior of one observation that owe nothing to the proposal they are held against.

Many draws of the reference (the prior) are weighed by the density of the data at hand. Where too few of them carry
weight, they are tempered: resampled at the largest power of the weights that keeps enough of them, moved, and again.
A mode that the proposal misses shows as a witness of huge weight under it.

What witnesses can see is counted. A witness descends from one of the first draws, its ancestor. With shares s_i of the
witnesses by ancestor, n = 1 / sum_i s_i^2 of them are independent, and a mode of posterior mass m escapes them all with
probability about (1 - m)^n. A corner of prior mass p escapes all N first draws with probability (1 - p)^N.

References: Del Moral, Doucet and Jasra 2006, JRSS B 68(3) (tempering); Lee and Whiteley 2018, Biometrika 105(3)
(ancestors tell the variance); ter Braak and Vrugt 2008, Statistics and Computing 18(4) (moves by differences).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites
from scoreinfer.evidence.certificate import Certificate, ForwardCheck, certify
from scoreinfer.montecarlo.first_draws import (
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
from scoreinfer.montecarlo.reference import AbstractReference, Overdispersed
from scoreinfer.montecarlo.tempering import KEPT_SHARE, Tempered, advance
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence
from scoreinfer.samplers.base import Proposer, Weighted
from scoreinfer.samplers.batches import Defence, batch_shape, mixed, weigh_rows

MIN_DIRECT = 400.0
"""Effective number of first draws from which on they are witnesses as they are."""
MAX_DIM = 256
"""Dimensions up to which witnesses are tempered: moves by differences get nowhere beyond."""
MIN_INFORMATIVE = 60.0
"""Independent witnesses below which the moves are repeated, three times as many."""
MAX_TEMPERATURES = 200
NUM_HELD = 512
"""Witnesses that are weighed under the proposal."""
LEAST_EXCESS, MIN_FITTED, SHARES = math.log(2.0), 8, (0.1, 0.5)
"""Which witnesses a density is fitted to, how many at least, and bounds of the share of draws that come from it."""
MAX_FITTED_DIM = 64
MAX_LEFT = 0.01
"""Share of the witnesses that a certified batch may miss without being drawn again."""


class Witnesses(NamedTuple):
    """Draws near a posterior, and what they can see.

    Args:
        values: the witnesses.
        num_informative: the effective number of first draws that they descend from.
        num_first: first draws of the prior; zero where they came from another reference.
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
        reference: where the first draws come from.
        target: log density up to a constant; a pytree (`jax.tree_util.Partial`) compiles once for all data.
        thorough: take 16 times as many first draws, and three times as many moves.

    Exactness: consistent as first draws and moves grow in number; no gradient is asked for.
    """
    for_first, for_rows, *for_attempts = jax.random.split(key, 4)
    first, dim = draw_first(for_first, reference, target, times=THOROUGH if thorough else 1), dim_of(reference)
    of_prior = 0 if isinstance(reference, Overdispersed) else first.num
    ess = effective_sample_size(first.log_ratio)
    if ess == 0.0:
        return Witnesses(jnp.zeros((0, dim)), 0.0, of_prior, -math.inf)
    if ess >= MIN_DIRECT or dim > MAX_DIM:
        drawn = resample_first(for_rows, reference, first, jnp.ones_like(first.log_ratio[0]), NUM_WITNESSES)
        return Witnesses(drawn.values, ess, of_prior, float(drawn.log_evidence))
    num_moves = (20 + 2 * dim) * (3 if thorough else 1)
    witnesses = _temper(for_attempts[0], reference, target, first, num_moves)
    if witnesses.num_informative < MIN_INFORMATIVE:
        witnesses = _temper(for_attempts[1], reference, target, first, 3 * num_moves)
    return witnesses._replace(num_first=of_prior)


def _temper(key: Key, reference: AbstractReference, target: LogDensity, first: FirstDraws, num_moves: int) -> Witnesses:
    key, for_first = jax.random.split(key)
    moves, power = DifferenceMoves(reference, target, jnp.asarray(num_moves)), first_power(first, NUM_WITNESSES)
    drawn = Tempered(resample_first(for_first, reference, first, power, NUM_WITNESSES), power, None)
    kept_share = 1.0  # first the copies of the same draws are moved apart
    for _ in range(MAX_TEMPERATURES):
        key, for_pass = jax.random.split(key)
        drawn = advance(for_pass, moves, drawn, jnp.asarray(kept_share))
        if drawn.power == 1.0:
            return Witnesses(drawn.values, num_ancestors(drawn.ancestors), first.num, float(drawn.log_evidence))
        kept_share = KEPT_SHARE
    return Witnesses(drawn.values, 0.0, first.num, float(drawn.log_evidence))


def hold_against(
    key: Key, proposal: Proposer, y: Sites, drawn: Weighted, witnesses: Witnesses, defence: Defence | None = None
) -> ForwardCheck:
    """Weigh witnesses under a proposal, and compare with the mean weight of its own draws.

    Args:
        key: random key.
        proposal: the proposal.
        y: the observation.
        drawn: its weighted draws.
        witnesses: at most 512 of them are weighed (`held`).
        defence: what the proposal was mixed with.
    """
    source = "the witnesses at the observation"
    if witnesses.num_informative == 0.0:  # they have not arrived
        return ForwardCheck(jnp.zeros(0), np.nan, source, 0.0, witnesses.num_first)
    values = held(witnesses)
    size = batch_shape(len(values), NUM_HELD)
    weighed = in_batches(lambda i: weigh_rows(key, proposal, y, i, values[i]), len(values), size)
    weighed = weighed if defence is None else mixed(defence, weighed)
    log_excess = weighed.log_weight - log_evidence(drawn.log_weight)[0]
    return ForwardCheck(log_excess, np.nan, source, witnesses.num_informative, witnesses.num_first)


def held(witnesses: Witnesses) -> Float[Array, "held dim"]:
    """Take the witnesses that are weighed."""
    return witnesses.values[:: max(len(witnesses.values) // NUM_HELD, 1)]


class Judged(NamedTuple):
    """A batch of draws and the verdict on it.

    Args:
        drawn: the draws.
        certificate: the verdict.
        num_proposals: draws made on the way.
        witnessed: share of the draws that come from a density fitted to witnesses.
    """

    drawn: Weighted
    certificate: Certificate
    num_proposals: int
    witnessed: float = 0.0


def judge(
    key: Key,
    proposal: Proposer,
    y: Sites,
    drawn: Weighted,
    witnesses: Witnesses,
    defence: Defence | None,
    again: Callable[[Defence], Weighted] | None,
    *others: ForwardCheck,
) -> Judged:
    """Judge a batch by one half of the witnesses; where it misses any, mend it and judge it by the other half.

    Args:
        key: random key.
        proposal: the proposal.
        y: the observation.
        drawn: its weighted draws.
        witnesses: the witnesses at the observation.
        defence: what the proposal was mixed with.
        again: draws another batch, of the proposal mixed with a density fitted to what it missed; None: never mend.
        *others: further evidence.

    Exactness: the weights are exact in the same sense as the proposal's: what a batch is mixed with does not depend on
        its draws' random numbers.
    """
    one, other = (witnesses._replace(values=witnesses.values[i::2]) for i in range(2))
    check = hold_against(key, proposal, y, drawn, one, defence)
    first = Judged(drawn, certify(drawn.log_weight, check, *others), drawn.num)
    good = first.certificate.certified and first.certificate.missed < MAX_LEFT
    mending = None if good or again is None else repair(held(one), check.log_excess)
    if mending is None or again is None:
        return first
    drawn = again(mending)
    check = hold_against(key, proposal, y, drawn, other, mending)
    num = first.num_proposals + drawn.num
    mended = Judged(drawn, certify(drawn.log_weight, check, *others), num, mending.share)
    return max(first._replace(num_proposals=num), mended, key=_standing)


def _standing(judged: Judged) -> tuple[bool, float]:
    certificate = judged.certificate
    return certificate.certified, -np.nan_to_num(certificate.missed, nan=1.0)


def repair(values: Float[Array, "held dim"], log_excess: Float[Array | np.ndarray, " held"]) -> Defence | None:
    """Fit a density to the witnesses that a proposal draws less than half as often as it should; None: to too few."""
    missed = np.asarray(log_excess) > LEAST_EXCESS
    if missed.sum() < MIN_FITTED or values.shape[1] > MAX_FITTED_DIM:
        return None
    share = float(np.clip(missed.mean(), *SHARES))
    return Defence(kernel_estimate(np.asarray(values)[missed]), share)
