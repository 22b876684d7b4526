"""Learn one posterior from its density.

Tempered particles, the explorer, move from a reference density to the posterior. They then train a sampler's score.
"""

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
from scoreinfer.errors import UnsupportedModel
from scoreinfer.montecarlo.first_draws import draw_first, first_power, resample_first
from scoreinfer.montecarlo.langevin import LogDensity
from scoreinfer.montecarlo.moves import LangevinMoves
from scoreinfer.montecarlo.population import num_ancestors
from scoreinfer.montecarlo.reference import AbstractReference, Prior, reference_draws, reference_of
from scoreinfer.montecarlo.resampling import next_power, resample_indices
from scoreinfer.montecarlo.tempering import KEPT_SHARE, Tempered, advance
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence
from scoreinfer.nets import Concatenate
from scoreinfer.samplers.amortised import default_sampler, log_q_whitened, propose_whitened
from scoreinfer.samplers.base import AbstractDensityProposal, AbstractProposal, Target, Weighted
from scoreinfer.samplers.batches import weighted_draws
from scoreinfer.samplers.diffusion import AbstractSampler
from scoreinfer.score import NeuralScore
from scoreinfer.score.network import ConditionalScore, score_module
from scoreinfer.training.loop import INTERRUPTED, Budget, train
from scoreinfer.training.losses import ScoreBatch, denoising_loss, target_precision
from scoreinfer.training.simulations import blame


class SingleProposal(AbstractDensityProposal):
    """The learned sampler of one posterior: a whitening map, an unconditional score, a sampler.

    Exactness: as for `AmortisedProposal`.
    """

    whitening: Chain
    score: NeuralScore
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
MAX_TEMPERATURES = 1000
"""Number of temperatures after which the explorer fails. Chosen by judgement."""
EPOCH_STEPS = 250
"""Optimiser steps between two moves of the particles. Chosen by judgement."""
MAX_OCTAVES, MAX_WAVES = 6, 40
"""Most octaves of sine features of one score input, and of all together (more slow down learning). Judgement."""
DETAIL = 10.0
"""Fisher information above which a whitened coordinate gets sine features (1 for a normal one). Chosen by judgement."""
ROUNDS = 4
"""Rounds of training; after each, the sampler's draws, resampled by weight, replace particles. Chosen by judgement."""
REPLACED_SHARE = 0.3
"""Least effective share of the weights between rounds; below it they are tempered. Chosen by judgement."""
ABLE = 0.5
"""A round's evidence counts from this fraction of the largest effective sample size on. Chosen by judgement."""
REPLACED_EACH = 2
"""One of this many particles is replaced; the rest keep small modes. Benchmark suite k2_24, row with two planets."""


class Round(NamedTuple):
    """Result of one round of training.

    Args:
        proposal: the sampler.
        ess: effective sample size of its draws.
        log_evidence: log evidence estimated from its draws.
        error: standard error of ``log_evidence``.
    """

    proposal: Any
    ess: float
    log_evidence: float
    error: float


class Effort(NamedTuple):
    """The amount of work for learning one posterior.

    Args:
        num_particles: number of particles of the explorer.
        num_moves: Langevin steps of each particle at every temperature, and before every epoch of training.
        num_steps: optimiser steps of all rounds together.
        kept_share: share of the effective sample size that each change of temperature keeps.
    """

    num_particles: int = 4096
    num_moves: int = 20
    num_steps: int = 10_000
    kept_share: float = KEPT_SHARE


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


def learn(
    key: Key,
    target: Target,
    effort: Effort = Effort(),
    *,
    start_scale: float = 5.0,
    progress_bar: bool = True,
) -> tuple[SingleProposal, Evidence]:
    """Learn a sampler of the posterior of one observation from its density.

    Tempered particles move from the prior to the posterior and train an unconditional score. If the prior cannot be
    drawn from, they start from a t distribution of scale ``start_scale``. Later rounds replace half of the particles by
    the sampler's own draws, resampled by weight and moved. The weights of the modes then depend less on the explorer.
    The other half of the particles keeps small modes that the explorer found.

    Args:
        key: random key.
        target: the posterior. If its density has no gradient, particles take random-walk steps.
        effort: the amount of work.
        start_scale: scale of the t distribution, in the unconstrained space.
        progress_bar: whether to show progress bars on a terminal.

    Returns:
        The sampler of the best round (see `choose`), and the explorer's results.

    Raises:
        UnsupportedModel: if the model has no density.
        FloatingPointError: if the density or its gradient is finite at no particle, if the explorer does not reach the
            posterior, or if a round of training ends before any epoch has a finite loss.

    Exactness: the density of the sampler is biased, as that of every learned sampler. Its weighted draws, and chains
        that use it as a proposal, are exact.

    References: Del Moral, Doucet and Jasra 2006 (the explorer); De Bortoli et al. 2024, arXiv 2402.08667 (training
    with the gradient of the density); Gabrie, Rotskoff and Vanden-Eijnden 2022, PNAS 119 (training on own moves).
    """
    for_explorer, for_net, for_rounds = jax.random.split(key, 3)
    problem, y = target.problem, target.y
    if not problem.has_density:
        raise UnsupportedModel("One posterior is learned from its density, but the model has no density: use `fit`.")
    reference = reference_of(problem, start_scale)
    try:
        particles, num_passes = explore(for_explorer, reference, target, effort, progress_bar=progress_bar)
    except FloatingPointError as error:
        where = reference_draws(for_explorer, reference, 1)[0]
        raise FloatingPointError(f"{error}{blame(problem, where, y)}") from error
    places, whitening = particles.values, _whitening(particles)
    nothing = {"nothing": jnp.zeros(0, jnp.float32)}
    example = jax.tree.map(lambda leaf: leaf[None], nothing)
    pools = Pools(LangevinMoves(reference, target, effort.num_moves), target, particles, whitening, nothing)
    octaves = () if has_tails(whitening) else choose_octaves(pools.batch(particles))
    module = score_module(for_net, problem.dim, Concatenate(), example, octaves=octaves)

    def make(module: ConditionalScore) -> SingleProposal:
        return SingleProposal(whitening, module.score, default_sampler(problem.dim, weighed=True), problem.dim)

    best, _, more_passes = teach(for_rounds, module, make, pools, effort.num_steps, progress_bar=progress_bar)
    num_gradients = (num_passes + more_passes) * (effort.num_moves + 1) * effort.num_particles
    informative = num_ancestors(particles.ancestors)
    return best, Evidence(y, places, float(particles.log_evidence), num_gradients, informative)


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

    @eqx.filter_jit
    def __call__(self, key: Key) -> ScoreBatch:
        """Move the particles and map them to the whitened space."""
        return self.batch(advance(key, self.moves, self.particles))

    def batch(self, particles: Tempered) -> ScoreBatch:
        """Map particles and the gradients of their log density to the whitened space."""
        u = jax.vmap(self.whitening.inverse)(particles.values.astype(jnp.float32))
        gradient = jax.vmap(lambda u, g: pull(self.whitening, u, g))(u, particles.kept.gradient.astype(jnp.float32))
        x = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (u.shape[0], *leaf.shape)), self.x)
        return ScoreBatch(u, x, gradient)


def teach(
    key: Key,
    module: ConditionalScore,
    make: Callable[[ConditionalScore], P],
    pools: Pools,
    num_steps: int,
    *,
    progress_bar: bool = True,
) -> tuple[P, float, int]:
    """Train a score in rounds on particles near the posterior.

    After each round, draws of the sampler, resampled by weight, replace half of the particles.

    Args:
        key: random key.
        module: the score at the start.
        make: makes a sampler from a score.
        pools: the particles of the first round.
        num_steps: optimiser steps of all rounds together.
        progress_bar: whether to show progress bars on a terminal.

    Returns:
        The sampler of the best round (see `choose`), the effective sample size of its draws divided by their number,
        and the number of passes in which the particles were moved.

    Raises:
        FloatingPointError: if a round ends before any epoch has a finite loss.

    Exactness: as for `learn`.
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
        drawn = weighted_draws(for_draws, proposal, pools.target, 1024, None, 0, num)
        rounds.append(Round(proposal, effective_sample_size(drawn.log_weight), *log_evidence(drawn.log_weight)))
        pools = dataclasses.replace(pools, particles=replace(for_rows, pools.particles, drawn, REPLACED_EACH))
        num_passes += len(history.loss) + 1
        if history.stopped == INTERRUPTED:
            break
    best = choose(rounds)
    return best.proposal, best.ess / num, num_passes


def choose(rounds: list[Round]) -> Round:
    """Choose the round with the largest effective sample size among those whose evidence is not too low.

    The evidence is too low if it is more than two standard errors below the largest. Such a sampler misses posterior
    mass, and missing mass makes the weights look better.
    """
    most = max(one.ess for one in rounds)
    able = [one for one in rounds if one.ess >= ABLE * most]
    top = max(able, key=lambda one: one.log_evidence)
    covering = [one for one in able if top.log_evidence - one.log_evidence <= 2 * np.hypot(one.error, top.error)]
    return max(covering or able, key=lambda one: one.ess)


def explore(
    key: Key, reference: AbstractReference, target: LogDensity, effort: Effort, *, progress_bar: bool = True
) -> tuple[Tempered, int]:
    """Move particles from the reference to the target; return them and the number of temperatures.

    The particles are resampled from 65,536 weighted draws of the reference (fewer in high dimensions). Many first draws
    also reach modes of small reference mass.

    Raises:
        FloatingPointError: if the target or its gradient is finite at no particle, or the target is not reached.

    Exactness: consistent as the number of particles grows (see `scoreinfer.montecarlo.tempering.advance`).
    """
    key, _, for_first, for_rows = jax.random.split(key, 4)
    first = draw_first(for_first, reference, target)
    if not bool(jnp.isfinite(first.log_ratio).any()):
        where = "the prior" if isinstance(reference, Prior) else "a t distribution of scale `start_scale` around zero"
        raise FloatingPointError(
            f"The density must be finite somewhere, but it is finite at none of {first.num} draws of {where}. Check "
            "the data and the model, or change `start_scale`."
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
                raise FloatingPointError(
                    "The gradient of the density must be finite somewhere, but it is finite at none of the explorer's "
                    "particles. Check the model."
                )
            if particles.power == 1.0:
                return particles, passes
    raise FloatingPointError(
        f"The explorer must reach power 1 of the density, but reached only {float(particles.power):.2g} in "
        f"{MAX_TEMPERATURES} temperatures. The density changes too fast for the particles' start. Give more "
        "informative priors or another `start_scale`."
    )


def choose_octaves(batch: ScoreBatch) -> tuple[int, ...]:
    """Choose the number of octaves of sine features for each input of the score.

    Details that are s times as wide as the whole density give a mean squared score of about 1 / s^2. The octaves reach
    down to this width. (`learn` uses no octaves if the whitening transforms heavy tails.)
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
    """Replace one of ``each`` particles by draws that are resampled by weight.

    If the effective sample size is below `REPLACED_SHARE` of the draws, the weights are tempered until it is not.

    Exactness: biased by the tempering and by a finite number of draws; the moves that follow reduce the bias.
    """
    log_weight = np.asarray(drawn.log_weight, np.float64)
    log_weight = np.where(np.isfinite(log_weight), log_weight, -np.inf)
    if not np.isfinite(log_weight.max()):
        return particles
    power = float(next_power(log_weight - log_weight.max(), REPLACED_SHARE))
    resampled = drawn.z[resample_indices(key, power * log_weight, drawn.num)]
    replaced = jnp.arange(drawn.num)[:, None] % each == 0
    return particles.at(jnp.where(replaced, resampled, particles.values))
