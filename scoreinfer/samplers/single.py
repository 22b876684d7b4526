"""Learn one posterior from its density.

Tempered particles, the explorer, move from a reference density to the posterior. Their shape makes an affine sampler.
Where its weights are not good enough, the particles train a score.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._keys import keys_of
from scoreinfer._program import run_once
from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.base import Chain, Change, pull
from scoreinfer.bijections.normalise import has_tails
from scoreinfer.errors import UnsupportedModel
from scoreinfer.montecarlo.moves import LangevinMoves, whitening_of
from scoreinfer.montecarlo.population import num_ancestors
from scoreinfer.montecarlo.reference import reference_draws, start_of
from scoreinfer.montecarlo.resampling import next_power, resample_indices
from scoreinfer.montecarlo.tempering import Tempered, advance, elsewhere
from scoreinfer.montecarlo.weights import (
    effective_sample_size,
    log_evidence,
    missed_share,
    pareto_smooth,
    unseen_excess,
)
from scoreinfer.nets import Concatenate
from scoreinfer.samplers.amortised import INFLATION, default_sampler, log_q_whitened, propose_whitened
from scoreinfer.samplers.base import AbstractDensityProposal, AbstractProposal, Target, Weighted
from scoreinfer.samplers.batches import BATCH, spaced, weigh_places, weighted_draws
from scoreinfer.samplers.diffusion import AbstractSampler, ProbabilityFlow
from scoreinfer.samplers.explorer import Effort, explore, moves_between
from scoreinfer.score import AbstractScore, GaussianScore
from scoreinfer.score.network import ConditionalScore, score_module
from scoreinfer.training.loop import FINISHED, FLAT, GOOD, INTERRUPTED, Budget, History, train
from scoreinfer.training.losses import ScoreBatch, denoising_loss, target_precision
from scoreinfer.training.simulations import blame


class SingleProposal(AbstractDensityProposal):
    """The learned sampler of one posterior: a whitening map, an unconditional score, a sampler.

    Before training it is the whitening map of a Gaussian: a flow of no steps, with the score of N(0, I).

    Exactness: as for `AmortisedProposal`.
    """

    whitening: Chain
    score: AbstractScore
    sampler: AbstractSampler
    dim: int = eqx.field(static=True)

    def context(self, target: Target) -> None:
        """Return nothing: the proposal was made for one observation."""

    def propose(self, key: Key, context: None) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""
        return propose_whitened(key, self.sampler, self.score, self.dim, self.whitening, jnp.zeros(0, jnp.float32))

    def log_q(self, key: Key, context: None, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z."""
        return log_q_whitened(key, self.sampler, self.score, self.whitening, jnp.zeros(0, jnp.float32), z)


P = TypeVar("P", bound=AbstractProposal)
EPOCH_STEPS = 250
"""Optimiser steps between two moves of the particles. Chosen by judgement."""
MAX_OCTAVES, MAX_WAVES = 6, 40
"""Most octaves of sine features of one score input, and of all together (more slow down learning). Judgement."""
DETAIL = 10.0
"""Fisher information above which a whitened coordinate gets sine features (1 for a normal one). Chosen by judgement."""
LEGS = (2, 1, 2, 5, 10, 20)
"""Lengths of the rounds of training, in fortieths of the largest number of steps. The second is short: it trains on
particles that the sampler's own draws have mixed for the first time. Chosen by judgement."""
NUM_DRAWN = 4096
"""Most draws of the sampler after a round: they judge it, and replace particles. Chosen by judgement."""
GOOD_SHARE, GOOD_K_HAT, GOOD_MISSED = 0.8, 0.5, 0.005
"""A round is good enough from this effective share on, up to this k-hat and this missed share of the particles. Further
training saves at most a fifth of later draws. k-hat is below its limit of 0.7 by a margin. Chosen by judgement."""
AFFINE_SHARE, LONG, LONG_SHARE = 0.5, 4, 0.5
"""A smaller effective share is good enough before training, where draws cost next to nothing, and from this round on,
as the next takes as long as all before together, and saves at most half of later draws. Chosen by judgement."""
LEARNING_RATE = 8e-3
"""Largest learning rate. Half of it learns slower: shares of .37 and .65 instead of .50 and .73 (SLCP after 1250 steps,
wells after 500; benchmark `single.py`)."""
LEAST_GAIN, FLAT_SHARE = 0.05, 0.5
"""Training stops if a round gains less than this in effective share, from this share on, and k-hat is good; more steps
are kept if they gain more than this. Chosen by judgement."""
MOST_STEPS = 32
"""Largest number of flow steps. K2-24's eleven periods: shares of .51, .84 and .86 with 8, 16 and 32 steps."""
FEWER_SHARE = 0.95
"""Share of the effective draws that fewer steps of the flow must keep. Chosen by judgement."""
REPLACED_SHARE = 0.3
"""Least effective share of the weights between rounds; below it they are tempered. Chosen by judgement."""
ABLE = 0.5
"""A round's evidence counts from this fraction of the largest effective sample size on. Chosen by judgement."""
REPLACED_EACH = 2
"""One of this many chains of particles is replaced; the rest keep small modes. Benchmark suite k2_24, row with two
planets."""
RIDGE = 1e-6
"""Ridge of the whitening, for the rounding of float32 alone (`scoreinfer.bijections.base.spread`)."""
NUM_PLACES = 512
"""Number of particles that are compared with a sampler. Chosen by judgement."""


class Round(NamedTuple):
    """What is known of a sampler after a round of training.

    Args:
        proposal: the sampler.
        num_steps: optimiser steps so far.
        share: effective sample size of its draws, divided by their number.
        k_hat: tail shape of their weights.
        missed: share of the explorer's particles where it practically never draws.
        log_evidence: log evidence estimated from its draws.
        error: standard error of ``log_evidence``.
    """

    proposal: Any
    num_steps: int
    share: float
    k_hat: float
    missed: float
    log_evidence: float
    error: float

    def is_good(self, share: float = GOOD_SHARE) -> bool:
        """Tell whether no further training is needed, if this effective share is enough."""
        return self.share >= share and self.k_hat <= GOOD_K_HAT and self.missed <= GOOD_MISSED

    def is_below(self, other: "Round") -> bool:
        """Tell whether its evidence is more than two standard errors below the other's: it misses posterior mass."""
        return bool(other.log_evidence - self.log_evidence > 2 * np.hypot(self.error, other.error))


class Evidence(NamedTuple):
    """Results of the explorer, independent of the sampler's own draws.

    Args:
        y: the observation.
        places: the final particles, before any was replaced.
        log_evidence: the explorer's estimate of the log evidence.
        num_gradients: evaluations of the density's gradient, including those for training.
        num_informative: effective number of first draws from which the particles descend.
    """

    y: Sites
    places: Float[Array, "num dim"]
    log_evidence: float
    num_gradients: int
    num_informative: float


class Taught(NamedTuple):
    """The rounds of a training.

    Args:
        rounds: the untrained sampler, and the sampler after every round.
        stopped: why training stopped: ``good enough``, ``flat``, ``finished`` or ``interrupted``.
        num_gradients: evaluations of the density's gradient since the explorer began.
    """

    rounds: tuple[Round, ...]
    stopped: str
    num_gradients: int

    def __str__(self) -> str:
        shares = ", ".join(f"{one.share:.2f} ({one.num_steps})" for one in self.rounds)
        return f"learning stopped: {self.stopped}; effective shares (steps): {shares}"

    @property
    def best(self) -> Round:
        """The round that `choose` chooses."""
        return choose(self.rounds)


class Learned(NamedTuple):
    """The sampler of one posterior, and what is known of it.

    Args:
        proposal: the sampler.
        evidence: the explorer's results.
        taught: the rounds of the training.
    """

    proposal: SingleProposal
    evidence: Evidence
    taught: Taught


def learn(
    key: Key,
    target: Target,
    effort: Effort = Effort(),
    *,
    start_scale: float = 5.0,
    progress_bar: bool = True,
) -> Learned:
    """Learn a sampler of the posterior of one observation from its density.

    Tempered particles move from the prior to the posterior. If the prior cannot be drawn from, they start from a t
    distribution of scale ``start_scale``. Their shape makes an affine sampler (bent, where there are tails or funnels).
    Where its weights are not good enough, the particles train an unconditional score, in rounds, until they are.
    Between rounds half of the particles are replaced by the sampler's own draws, resampled by weight and moved. The
    weights of the modes then depend less on the explorer. The other half of the particles keeps small modes that the
    explorer found.

    Args:
        key: random key.
        target: the posterior. If its density has no gradient, particles take random-walk steps.
        effort: the largest amount of work.
        start_scale: scale of the t distribution, in the unconstrained space.
        progress_bar: whether to show progress bars on a terminal.

    Returns:
        The sampler of the best round (see `choose`) with as many steps as pay (`more_steps`, `fewest_steps`), the
        explorer's results and the rounds.

    Raises:
        UnsupportedModel: if the model has no density.
        FloatingPointError: if the density or its gradient is finite at no particle, if the explorer does not reach the
            posterior, or if a round of training ends before any epoch has a finite loss.

    Exactness: the density of the sampler is biased, as that of every learned sampler. Its weighted draws, and chains
        that use it as a proposal, are exact.

    References: Del Moral, Doucet and Jasra 2006 (the explorer); De Bortoli et al. 2024, arXiv 2402.08667 (training
    with the gradient of the density); Gabrie, Rotskoff and Vanden-Eijnden 2022, PNAS 119 (training on own moves).
    """
    for_explorer, for_net, for_rounds, for_steps, *_ = keys_of(key)
    for_fewer, for_more, *_ = keys_of(for_steps)
    problem, y = target.problem, target.y
    if not problem.has_density:
        raise UnsupportedModel("One posterior is learned from its density, but the model has no density: use `fit`.")
    reference = start_of(problem, start_scale)
    try:
        particles = explore(for_explorer, reference, target, effort, progress_bar=progress_bar)
    except FloatingPointError as error:
        where = reference_draws(for_explorer, reference, 1)[0]
        raise FloatingPointError(f"{error}{blame(problem, where, y)}") from error
    whitening = _whitening(particles)
    sampler = default_sampler(problem.dim, weighed=True)
    if isinstance(sampler, ProbabilityFlow):
        sampler = sampler.with_steps(sampler.num_steps)
    affine = SingleProposal(
        whitening, _normal_score(problem.dim), ProbabilityFlow(num_steps=0, inflation=INFLATION), problem.dim
    )
    for_first, for_rounds, *_ = keys_of(for_rounds)
    first, _ = judge(for_first, affine, target, particles.values, 0)
    taught = Taught((first,), GOOD, int(particles.adapted.num_gradients))
    if not first.is_good(AFFINE_SHARE):
        pools = Pools(moves_between(reference, target, effort), target, particles, whitening, _nothing())
        octaves = () if has_tails(whitening) else choose_octaves(pools.batch())
        module = _untrained(for_net, problem.dim, octaves)

        def make(module: ConditionalScore) -> SingleProposal:
            return SingleProposal(whitening, module.score, sampler, problem.dim)

        taught = teach(for_rounds, module, make, pools, first, effort.num_steps, progress_bar=progress_bar)
        taught = more_steps(for_more, taught, target, particles.values)
    informative = num_ancestors(particles.ancestors)
    evidence = Evidence(y, particles.values, float(particles.log_evidence), taught.num_gradients, informative)
    return Learned(fewest_steps(for_fewer, taught.best, target, particles.values), evidence, taught)


def more_steps(key: Key, taught: Taught, target: Target, places: Float[Array, "num dim"]) -> Taught:
    """Double the number of steps of the best round's flow as often as its effective share grows.

    Narrow modes need more steps than training takes. Every number of steps has a program of its own, so nothing is done
    if k-hat and the missed share are good and the effective share is at least `FLAT_SHARE`.
    """
    best = taught.best
    flow = best.proposal.sampler
    if best.is_good(FLAT_SHARE) or not isinstance(flow, ProbabilityFlow):
        return taught
    num_steps = flow.num_steps
    for for_draws in keys_of(key):
        num_steps *= 2
        if num_steps > MOST_STEPS:
            break
        finer = ProbabilityFlow(flow.process, num_steps, flow.inflation).with_steps(num_steps)
        found, _ = judge(for_draws, dataclasses.replace(best.proposal, sampler=finer), target, places, best.num_steps)
        if found.share < (1 + LEAST_GAIN) * best.share or found.is_below(best):
            break
        best, taught = found, taught._replace(rounds=(*taught.rounds, found))
    return taught


def fewest_steps(key: Key, best: Round, target: Target, places: Float[Array, "num dim"]) -> SingleProposal:
    """Halve the number of steps of a round's flow as often as it stays good.

    It does if it keeps `FEWER_SHARE` of the effective share, k-hat and the missed share are good, and its evidence is
    not too low (`choose`).
    """
    proposal: SingleProposal = best.proposal
    if not isinstance(proposal.sampler, ProbabilityFlow) or best.share < REPLACED_SHARE:
        return proposal
    num_steps = proposal.sampler.num_steps
    for for_draws in keys_of(key):
        num_steps //= 2
        if not num_steps:
            break
        fewer = dataclasses.replace(proposal, sampler=proposal.sampler.with_steps(num_steps))
        found, _ = judge(for_draws, fewer, target, places, best.num_steps)
        if found.is_below(best) or not found.is_good(FEWER_SHARE * best.share):
            break
        proposal = fewer
    return proposal


def _normal_score(dim: int) -> GaussianScore:
    """Make the score of N(0, I)."""
    return GaussianScore(jnp.asarray(np.zeros(dim, np.float32)), jnp.asarray(np.eye(dim, dtype=np.float32)))


def _nothing() -> Sites:
    """Make the observation of an unconditional score."""
    return {"nothing": jnp.asarray(np.zeros(0, np.float32))}


@run_once
def _untrained(key: Key, dim: int, octaves: tuple[int, ...]) -> ConditionalScore:
    rows = jax.tree.map(lambda leaf: leaf[None], _nothing())
    return score_module(key, dim, Concatenate(), rows, octaves=octaves)


class Pools(eqx.Module):
    """Training data of every epoch: the particles after new moves, which prevents overfitting.

    Args:
        moves: moves of the particles before every epoch, with the posterior as their target.
        target: the posterior.
        particles: approximate draws of the posterior, at power 1.
        whitening: the whitening map.
        x: the standardised observation, an input of the score.

    Exactness: the moves leave the posterior invariant; the particles are approximate draws of it.
    """

    moves: LangevinMoves
    target: Target
    particles: Tempered
    whitening: Change
    x: Sites

    def moved(self, key: Key) -> "Pools":
        """Move the particles."""
        return dataclasses.replace(self, particles=advance(key, self.moves, self.particles, np.array(1.0)))

    @eqx.filter_jit
    def batch(self) -> ScoreBatch:
        """Map particles and the gradients of their log density to the whitened space."""
        u = jax.vmap(self.whitening.inverse)(self.particles.values.astype(jnp.float32))
        gradient = self.particles.seen.target_gradient.astype(jnp.float32)
        gradient = jax.vmap(partial(pull, self.whitening))(u, gradient)
        x = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (u.shape[0], *leaf.shape)), self.x)
        return ScoreBatch(u, x, gradient)


def teach(
    key: Key,
    module: ConditionalScore,
    make: Callable[[ConditionalScore], P],
    pools: Pools,
    first: Round,
    num_steps: int,
    *,
    progress_bar: bool = True,
) -> Taught:
    """Train a score in rounds on particles near the posterior, until its sampler is good enough.

    After each round, draws of the sampler, resampled by weight, replace half of the particles. Every round has new
    particles, so that none are held out.

    Args:
        key: random key.
        module: the score at the start.
        make: makes a sampler from a score.
        pools: the particles of the first round.
        first: the sampler before training, judged (`judge`).
        num_steps: largest number of optimiser steps of all rounds together.
        progress_bar: whether to show progress bars on a terminal.

    Raises:
        FloatingPointError: if a round ends before any epoch has a finite loss.

    Exactness: as for `learn`.
    """
    unit, places = -(-num_steps // sum(LEGS)), pools.particles.values
    rounds, drawn, precision, moving = [first], None, None, _Moving(pools)
    stopped = GOOD if first.is_good() else ""
    for number, (length, for_round) in enumerate(zip(LEGS, keys_of(key), strict=False)):
        if stopped:
            break
        for_rows, for_training, for_draws, *_ = keys_of(for_round)
        if drawn is not None:
            moving.pools = replace(for_rows, moving.pools, drawn, REPLACED_EACH)
        else:
            precision = target_precision(pools.batch())
        budget = Budget(length * unit, min(256, len(places)), min(EPOCH_STEPS, unit), learning_rate=LEARNING_RATE)
        module, history = train(
            for_training, module, jax.tree_util.Partial(denoising_loss, precision=precision), moving, None, budget,
            progress_bar=progress_bar, title=f"score {number + 1}/{len(LEGS)}",
        )  # fmt: skip
        num_done = rounds[-1].num_steps + history.num_steps
        latest, drawn = judge(for_draws, make(module), pools.target, places, num_done)
        stopped = stops(rounds, latest, history, number == len(LEGS) - 1)
        rounds.append(latest)
    return Taught(tuple(rounds), stopped, int(moving.pools.particles.adapted.num_gradients))


class _Moving:
    """Pools of training data whose particles move on before every epoch."""

    def __init__(self, pools: Pools):
        self.pools = pools

    def __call__(self, key: Key) -> ScoreBatch:
        self.pools = self.pools.moved(key)
        return self.pools.batch()


def judge(
    key: Key, proposal: AbstractProposal, target: Target, places: Float[Array, "num dim"], num_steps: int
) -> tuple[Round, Weighted]:
    """Draw from a sampler, compare it with the explorer's particles, and return what is known and the draws."""
    for_draws, for_places, *_ = keys_of(key)
    drawn = weighted_draws(for_draws, proposal, target, BATCH, None, 0, min(NUM_DRAWN, len(places)))
    log_weight = np.asarray(drawn.log_weight, np.float64)
    share = effective_sample_size(log_weight) / drawn.num
    if share == 0.0:
        return Round(proposal, num_steps, 0.0, np.inf, 1.0, -np.inf, np.inf), drawn
    found, error = log_evidence(log_weight)
    excess = np.asarray(weigh_places(for_places, proposal, target, spaced(places, NUM_PLACES)).log_weight) - found
    missed = missed_share(excess, unseen_excess(log_weight))
    return Round(proposal, num_steps, share, pareto_smooth(log_weight)[1], missed, found, error), drawn


def stops(rounds: list[Round], latest: Round, history: History, is_last: bool) -> str:
    """Say why training stops after the latest round; the empty text if it goes on."""
    if history.stopped == INTERRUPTED:
        return INTERRUPTED
    enough = GOOD_SHARE if len(rounds) < LONG else LONG_SHARE
    if latest.is_good(enough) and choose([*rounds, latest]) is latest:
        return GOOD
    if FLAT_SHARE <= latest.share < (1 + LEAST_GAIN) * rounds[-1].share and latest.k_hat <= GOOD_K_HAT:
        return FLAT
    return FINISHED if is_last else ""


def choose(rounds: Sequence[Round]) -> Round:
    """Choose the round with the largest effective share among those whose evidence is not too low and k-hat is good.

    The evidence is too low if it is more than two standard errors below the largest. Such a sampler misses posterior
    mass, and missing mass makes the weights look better. If k-hat is good nowhere, it does not count.
    """
    most = max(one.share for one in rounds)
    able = [one for one in rounds if one.share >= ABLE * most]
    top = max(able, key=lambda one: one.log_evidence)
    covering = [one for one in able if not one.is_below(top)]
    sound = [one for one in covering if one.k_hat <= GOOD_K_HAT]
    return max(sound or covering or able, key=lambda one: one.share)


def choose_octaves(batch: ScoreBatch) -> tuple[int, ...]:
    """Choose the number of octaves of sine features for each input of the score.

    Details that are s times as wide as the whole density give a mean squared score of about 1 / s^2. The octaves reach
    down to this width. (`learn` uses no octaves if the whitening transforms heavy tails.)
    """
    information = np.mean(np.asarray(batch.gradient, np.float64) ** 2, 0)
    wanted = np.where(information > DETAIL, 1 + np.ceil(0.5 * np.log2(np.maximum(information, 1.0))), 0).astype(int)
    most = next(most for most in range(MAX_OCTAVES, -1, -1) if np.minimum(wanted, most).sum() <= MAX_WAVES)
    return tuple(np.minimum(wanted, most).tolist())


def _whitening(particles: Tempered) -> Chain:
    whitening = whitening_of(particles.values, particles.seen, np.array(1.0), np.array(RIDGE))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf, whitening)


def replace(key: Key, pools: Pools, drawn: Weighted, each: int = 1) -> Pools:
    """Replace one of ``each`` chains of particles by draws that are resampled by weight.

    If the effective sample size is below `REPLACED_SHARE` of the draws, the weights are tempered until it is not.

    Exactness: biased by the tempering and by a finite number of draws; the moves that follow reduce the bias.
    """
    log_weight = np.asarray(drawn.log_weight, np.float64)
    log_weight = np.where(np.isfinite(log_weight), log_weight, -np.inf)
    if not np.isfinite(log_weight.max()):
        return pools
    values = pools.particles.values
    power = float(next_power(log_weight - log_weight.max(), REPLACED_SHARE))
    rows = resample_indices(key, power * log_weight, len(values))
    replaced = np.arange(len(values)) // pools.moves.chain_length % each == 0
    particles = elsewhere(pools.moves, pools.particles, jnp.where(replaced[:, None], drawn.z[rows], values))
    return dataclasses.replace(pools, particles=particles)
