"""Learning one posterior from its density: tempered particles explore it and train the score of its sampler."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.affine import Affine
from scoreinfer.bijections.base import Chain, Change, pull, spread
from scoreinfer.bijections.normalise import fit_shape, has_tails
from scoreinfer.montecarlo.first_draws import draw_first, first_power, resample_first
from scoreinfer.montecarlo.langevin import LogDensity
from scoreinfer.montecarlo.moves import LangevinMoves
from scoreinfer.montecarlo.population import num_ancestors
from scoreinfer.montecarlo.reference import AbstractReference, Prior, reference_draws, reference_of
from scoreinfer.montecarlo.resampling import next_power, resample_indices
from scoreinfer.montecarlo.tempering import KEPT_SHARE, Tempered, advance
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence
from scoreinfer.nets import Concatenate
from scoreinfer.problem import Problem
from scoreinfer.samplers.amortised import _log_q, _propose, default_sampler
from scoreinfer.samplers.base import Proposer, Weighted
from scoreinfer.samplers.batches import weighted_draws
from scoreinfer.samplers.diffusion import AbstractSampler
from scoreinfer.score import NeuralScore
from scoreinfer.score.network import ConditionalScore, score_module
from scoreinfer.training.loop import Budget, train
from scoreinfer.training.losses import ScoreBatch, denoising_loss, target_precision
from scoreinfer.training.simulations import blame


class SingleProposal(eqx.Module):
    """The learned sampler of one posterior: a whitening map, an unconditional score, a sampler.

    Exactness: as for `Proposal`.
    """

    whitening: Chain
    score: NeuralScore
    sampler: AbstractSampler
    problem: Problem = eqx.field(static=True)

    def context(self, y: Sites) -> None:
        """Return nothing: only its own observation is worth asking about."""

    def propose(self, key: Key, context: None) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""
        return _propose(key, self, self.whitening, jnp.zeros(0, jnp.float32))

    def log_q(self, key: Key, context: None, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z."""
        return _log_q(key, self, self.whitening, jnp.zeros(0, jnp.float32), z)


P = TypeVar("P", bound=Proposer)
MAX_TEMPERATURES = 1000
EPOCH_STEPS = 250
MAX_OCTAVES, MAX_WAVES = 6, 40
"""Octaves of sine features of each input of the score, and of all inputs together (more make learning slower)."""
DETAIL = 10.0
"""Fisher information of a whitened coordinate (1 for a normal one) from which it gets sine features at all."""
ROUNDS = 4
"""Rounds of training; between them the sampler's own draws, by weight, take the place of half of the particles."""
REPLACED_SHARE = 0.3
"""Share of the effective sample size that the weights between rounds keep, tempered where they must be."""
ABLE = 0.5
"""Share of the largest effective sample size that a round must reach for its evidence to count."""
REPLACED_EACH = 2
"""Between rounds one particle in so many is replaced. The others know small modes that the sampler may not draw yet."""


class Round(NamedTuple):
    """What a round of training gave: a sampler, and its draws' effective sample size, log evidence and its error."""

    proposal: Any
    ess: float
    log_evidence: float
    error: float


class Effort(NamedTuple):
    """How much work learning one posterior may take.

    Args:
        num_particles: particles of the explorer.
        num_moves: Langevin steps of each at every temperature, and before every epoch of training.
        num_steps: optimiser steps, all rounds together.
        kept_share: share of the effective sample size that each change of temperature keeps.
    """

    num_particles: int = 4096
    num_moves: int = 20
    num_steps: int = 10_000
    kept_share: float = KEPT_SHARE


class Evidence(NamedTuple):
    """What the explorer knows that the sampler's own draws do not.

    Args:
        y: the observation that was explored.
        places: where its particles ended, before any was replaced.
        log_evidence: its estimate of the log evidence.
        num_gradients: evaluations of the density's gradient, those for training included.
        num_informative: effective number of first draws that its particles descend from.
    """

    y: Sites
    places: Float[Array, "num dim"]
    log_evidence: float
    num_gradients: int
    num_informative: float


def learn(
    key: Key,
    problem: Problem,
    y: Sites,
    effort: Effort = Effort(),
    *,
    start_scale: float = 5.0,
    progress_bar: bool = True,
) -> tuple[SingleProposal, Evidence]:
    """Learn a sampler of the posterior of one observation from its density.

    Particles walk by tempering from the prior (or, where there is none to draw from, from a t distribution of scale
    ``start_scale``) to the posterior and train an unconditional score. Then draws of that sampler,
    resampled by weight and moved, train it further beside half of the particles: the modes' weights rest less on the
    explorer's, and small modes that it found are not forgotten.

    Args:
        key: random key.
        problem: the problem; where its density has no gradient, particles take random-walk steps.
        y: the observation.
        effort: how much work to spend.
        start_scale: see above.
        progress_bar: show progress bars on a terminal.

    Returns:
        The sampler of the round with the largest effective sample size, and the explorer's evidence.

    Raises:
        FloatingPointError: where the density or its gradient is not finite, or too far from the reference.

    Exactness: biased as a density, like every learned sampler; weighted draws and chains from it are exact.

    References: Del Moral, Doucet and Jasra 2006 (the explorer); De Bortoli et al. 2024, arXiv 2402.08667 (training
    with the gradient of the density); Gabrie, Rotskoff and Vanden-Eijnden 2022, PNAS 119 (training on own moves).
    """
    for_explorer, for_net, for_rounds = jax.random.split(key, 3)
    reference = reference_of(problem, start_scale)
    target = jax.tree_util.Partial(problem.log_joint, y=y)
    try:
        particles, num_passes = explore(for_explorer, reference, target, effort, progress_bar=progress_bar)
    except FloatingPointError as error:
        where = reference_draws(for_explorer, reference, 1)[0]
        raise FloatingPointError(f"{error}{blame(problem, where, y)}") from error
    places, whitening = particles.values, _whitening(particles)
    nothing = {"nothing": jnp.zeros(0, jnp.float32)}
    example = jax.tree.map(lambda leaf: leaf[None], nothing)
    pools = Pools(LangevinMoves(reference, target, effort.num_moves), particles, whitening, nothing)
    octaves = () if has_tails(whitening) else choose_octaves(pools.batch(particles))
    module = score_module(for_net, problem.dim, Concatenate(), example, octaves=octaves)

    def make(module: ConditionalScore) -> SingleProposal:
        return SingleProposal(whitening, module.score, default_sampler(problem.dim, weighed=True), problem)

    best, _, more_passes = teach(for_rounds, module, make, pools, y, effort.num_steps, progress_bar=progress_bar)
    num_gradients = (num_passes + more_passes) * (effort.num_moves + 1) * effort.num_particles
    informative = num_ancestors(particles.ancestors)
    return best, Evidence(y, places, float(particles.log_evidence), num_gradients, informative)


class Pools(eqx.Module):
    """Training pools: particles moved afresh for every epoch, so that none is learned by heart.

    Args:
        moves: moves of the particles before every epoch, with the posterior as their target.
        particles: draws from about the posterior, at power 1.
        whitening: the whitening map.
        x: the standardised observation, as the score is told of it.
    """

    moves: LangevinMoves
    particles: Tempered
    whitening: Change
    x: Sites

    @eqx.filter_jit
    def __call__(self, key: Key) -> ScoreBatch:
        """Move the particles, and bring them to the whitened space."""
        return self.batch(advance(key, self.moves, self.particles))

    def batch(self, particles: Tempered) -> ScoreBatch:
        """Bring particles to the whitened space."""
        u = jax.vmap(self.whitening.inverse)(particles.values.astype(jnp.float32))
        gradient = jax.vmap(lambda u, g: pull(self.whitening, u, g))(u, particles.kept.gradient.astype(jnp.float32))
        x = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (u.shape[0], *leaf.shape)), self.x)
        return ScoreBatch(u, x, gradient)


def teach(
    key: Key,
    module: ConditionalScore,
    make: Callable[[ConditionalScore], P],
    pools: Pools,
    y: Sites,
    num_steps: int,
    *,
    progress_bar: bool = True,
) -> tuple[P, float, int]:
    """Train a score on particles near the posterior, put the sampler's weighted draws in place of half, and again.

    Args:
        key: random key.
        module: the score to start from.
        make: makes the sampler of a score.
        pools: the first particles.
        y: the observation.
        num_steps: optimiser steps, all rounds together.
        progress_bar: show progress bars on a terminal.

    Returns:
        The sampler of the best round (`choose`), the effective share of its draws, and how often the particles were
        moved.
    """
    num, num_passes = pools.particles.values.shape[0], 0
    steps = max(num_steps // ROUNDS, 1)
    budget = Budget(steps, min(256, num), min(EPOCH_STEPS, steps), learning_rate=4e-3)
    precision, rounds = None, []
    for number, for_round in enumerate(jax.random.split(key, ROUNDS)):
        for_pool, for_training, for_draws, for_rows = jax.random.split(for_round, 4)
        validation = pools(for_pool)
        precision = target_precision(validation) if number == 0 else precision
        loss = jax.tree_util.Partial(denoising_loss, precision=precision)
        title = f"score {number + 1}/{ROUNDS}"
        module, history = train(
            for_training, module, loss, pools, validation, budget, progress_bar=progress_bar, title=title
        )
        proposal = make(module)
        drawn = weighted_draws(for_draws, proposal, y, 1024, None, 0, num)
        rounds.append(Round(proposal, effective_sample_size(drawn.log_weight), *log_evidence(drawn.log_weight)))
        pools = dataclasses.replace(pools, particles=replace(for_rows, pools.particles, drawn, REPLACED_EACH))
        num_passes += len(history.loss) + 1
        if history.stopped == "interrupted":
            break
    best = choose(rounds)
    return best.proposal, best.ess / num, num_passes


def choose(rounds: list[Round]) -> Round:
    """Choose the most effective round, but none whose evidence is too low: weights that miss mass look better."""
    most = max(one.ess for one in rounds)
    able = [one for one in rounds if one.ess >= ABLE * most]
    top = max(able, key=lambda one: one.log_evidence)
    covering = [one for one in able if top.log_evidence - one.log_evidence <= 2 * np.hypot(one.error, top.error)]
    return max(covering or able, key=lambda one: one.ess)


def explore(
    key: Key, reference: AbstractReference, target: LogDensity, effort: Effort, *, progress_bar: bool = True
) -> tuple[Tempered, int]:
    """Walk particles from the reference to the target; return them and the number of temperatures.

    They begin as the most promising of 65,536 draws of the reference, so that rare corners of it are not overlooked.

    Raises:
        FloatingPointError: where the target or its gradient is finite at no particle, or the target is not reached.

    Exactness: consistent as the particles grow (`scoreinfer.montecarlo.tempering.advance`).
    """
    key, _, for_first, for_rows = jax.random.split(key, 4)
    first = draw_first(for_first, reference, target)
    if not bool(jnp.isfinite(first.log_ratio).any()):
        where = "the prior" if isinstance(reference, Prior) else "a t distribution of `start_scale` around zero"
        raise FloatingPointError(
            f"The density is finite at none of the explorer's {first.num} first draws, which come from {where}."
        )
    power = first_power(first, effort.num_particles)
    begun = resample_first(for_rows, reference, first, power, effort.num_particles)
    moves = LangevinMoves(reference, target, effort.num_moves)
    particles = Tempered(begun, power, moves.begin(begun.values))
    with tqdm(total=1.0, desc="exploring", disable=None if progress_bar else True, leave=False) as bar:
        for passes in range(1, MAX_TEMPERATURES + 1):
            key, for_pass = jax.random.split(key)
            before = particles.power
            particles = advance(for_pass, moves, particles, effort.kept_share)
            bar.update(float(particles.power - before))
            if not bool(jnp.isfinite(particles.kept.gradient).all(1).any()):
                raise FloatingPointError("The gradient of the density is finite at none of the explorer's particles.")
            if particles.power == 1.0:
                return particles, passes
    raise FloatingPointError(
        f"The explorer got no further than power {float(particles.power):.2g} of the density in {MAX_TEMPERATURES} "
        "temperatures: it changes too fast for where the particles start. Give better priors or `start_scale`."
    )


def choose_octaves(batch: ScoreBatch) -> tuple[int, ...]:
    """Choose how many octaves of sine features each input of the score gets: down to the width of its details.

    Where the density's details are a share s of its whole, the mean square of its score is about 1 / s^2. (Where tails
    have been bent, narrow places are no details any more, and there are none.)
    """
    information = np.asarray((batch.gradient**2).mean(0), np.float64)
    wanted = np.where(information > DETAIL, 1 + np.ceil(0.5 * np.log2(np.maximum(information, 1.0))), 0).astype(int)
    most = next(most for most in range(MAX_OCTAVES, -1, -1) if np.minimum(wanted, most).sum() <= MAX_WAVES)
    return tuple(np.minimum(wanted, most).tolist())


@eqx.filter_jit
def _whitening(particles: Tempered) -> Chain:
    shape = fit_shape(particles.values, particles.kept.gradient)
    w = shape.inverse(particles.values)
    whitening = Chain((Affine(w.mean(0), spread(w, 1e-6)), *shape.changes))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf, whitening)


def replace(key: Key, particles: Tempered, drawn: Weighted, each: int = 1) -> Tempered:
    """Put draws, resampled by weight (tempered where few would be left), in place of one in ``each`` particles."""
    log_weight = np.asarray(drawn.log_weight, np.float64)
    log_weight = np.where(np.isfinite(log_weight), log_weight, -np.inf)
    if not np.isfinite(log_weight.max()):
        return particles
    power = float(next_power(log_weight - log_weight.max(), REPLACED_SHARE))
    resampled = drawn.values[resample_indices(key, power * log_weight, drawn.num)]
    replaced = jnp.arange(drawn.num)[:, None] % each == 0
    return particles.at(jnp.where(replaced, resampled, particles.values))
