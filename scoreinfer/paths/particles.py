r"""Particles: many paths drawn backwards at a time, resampled on the way, one of them kept.

Where the weights of whole paths are poor, because small errors of many kernels add up, particles that drift from what
is likely are replaced by copies of better ones before the path is complete. They are steered by the bridging densities

    gamma_k = q(theta, x_N) prod_{j >= k} p^_j(x_j | c_j) f_j(x_{j+1} | x_j; theta) / p^_j(x_{j+1} | c_j),
    gamma_0 = p(path, theta, y),

f_j the transitions of the process at the particle's own unknown parameters theta, and p^_j Gaussians with the moments
of simulated states, given the parameters and what the observation says of x_j beyond x_{j+1} (c_j, see
`scoreinfer.paths.linear_frame`). By Bayes' formula the factors stand for p(x_j | x_{j+1}, theta, y), so that
observations of earlier states need no likelihood on the way; without such, all p^ but the first and last cancel.
Whatever they are, the last target is the model's own density, so that the product Z of the mean weights between
resamplings is an unbiased estimate of the evidence, and the path kept (with its parameters), with weight Z, is exact in
the same sense as a path with its own weight. Given a path, a run in which that path is one of the particles
(conditional SMC) draws the rest of the run anew: a Gibbs step, with the weight Z that goes with it. So chains alternate
exactly between both.

References: Del Moral, Doucet and Jasra 2006 (bridging densities); Andrieu, Doucet and Holenstein 2010, sections 4.2
(particle independent Metropolis-Hastings) and 4.5 (conditional SMC).
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.montecarlo.weights import log_effective_share
from scoreinfer.paths import Kernel, LearnedBackward
from scoreinfer.paths.proposal import AbstractPaths
from scoreinfer.problem import Problem
from scoreinfer.process import PhysicsProcess
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted

LEAST_SHARE = 0.5
"""Effective share of the particles below which they are resampled."""


class ResampledPaths(AbstractProposal):
    """Paths of a particle smoother that runs backwards; an independent run for each draw.

    Args:
        paths: the sampler of single paths.
        num_particles: particles of each run.

    Raises:
        ValueError: where the kernels are not learned ones, or nobody has asked for the moments of the states.

    Exactness: the weight of a path is the evidence Z of the run that it was drawn in, or (for a given path) of a
        conditional run: weights are proper over runs, their mean an unbiased estimate of the evidence, whatever the
        kernels and bridging densities are.

    Good values: as many particles as make the effective share of the draws a half; it costs as many paths a draw.
        Conditions are in the bridging densities where at least `scoreinfer.paths.frame.ENOUGH_PATHS` simulations,
        and no more conditions than `scoreinfer.paths.frame.MAX_CONTEXT`, make a regression of it; elsewhere
        resampling does not help kernels that are conditioned on earlier observations.
    """

    paths: AbstractPaths
    num_particles: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Check that there are bridging densities."""
        backward = self.paths.backward
        if not isinstance(backward, LearnedBackward) or backward.frame.before is None:
            raise ValueError(
                "Resampling along the path needs learned kernels whose frame has the moments of every state (see "
                f"`linear_frame`), got `{type(backward).__name__}`: use the plain weights."
            )

    def context(self, target: Target) -> Any:
        """Embed one observation."""
        return self.paths.context(target)

    def sample(self, key, target, context):
        """Draw a run and one path of it, with the evidence Z of the run as its weight."""
        for_run, for_pick = jax.random.split(key)
        z, log_weight, log_evidence = self._run(for_run, target, context, None)
        pick = jax.random.categorical(for_pick, log_weight)
        return Weighted(z[pick], log_evidence, target(z[pick]))

    def weigh(self, key, target, context, z):
        """Draw a run around a given path; infinite where the path misses a known end, which no run reaches."""
        log_weight = self._run(key, target, context, z)[2]
        meets = self.paths.meets(context, self.paths.parts(context, z)[0])
        return Weighted(z, jnp.where(meets, log_weight, jnp.inf), target(z))

    def _run(
        self, key: Key, target: Target, known: Any, given: Float[Array, " path"] | None
    ) -> tuple[Float[Array, "particles path"], Float[Array, " particles"], Float[Array, ""]]:
        """Draw all particles' paths with the weights since the last resampling, and log Z; the first may be given."""
        paths, num = self.paths, self.num_particles
        for_begin, for_given, for_steps = jax.random.split(key, 3)
        begun, log_start = jax.vmap(lambda key: paths.begin(key, known))(jax.random.split(for_begin, num))
        held = jnp.zeros((paths.num_steps + 1, begun.end.shape[1]), begun.end.dtype)
        if given is not None:
            its, held = paths.parts(known, given)
            begun = jax.tree.map(lambda rows, own: rows.at[0].set(own), begun, its)
            log_start = log_start.at[0].set(paths.log_begin(for_given, known, its))

        def back(now: Particles, inputs: tuple[Array, Key, Array]) -> tuple[Particles, tuple[Array, Array]]:
            k, key, held = inputs
            for_ancestors, for_moves = jax.random.split(key)
            now, ancestors = _resample(for_ancestors, now, given is not None)
            keys = jax.random.split(for_moves, num)
            move = partial(self._move, target.problem, known, k)
            moved = jax.vmap(move)(keys, now.x, now.parameters)
            if given is not None:
                first = move(keys[0], now.x[0], now.parameters[0], held)
                moved = jax.tree.map(lambda rows, own: rows.at[0].set(own), moved, first)
            return now.moved(*moved), (moved[0], ancestors)

        steps = (jnp.arange(paths.num_steps), jax.random.split(for_steps, paths.num_steps), held[:-1])
        none = jnp.zeros_like(log_start)
        first = Particles(begun.end, begun.parameters, none, log_start, none, jnp.zeros((), log_start.dtype))
        last, (states, ancestors) = jax.lax.scan(back, first, steps, reverse=True)
        z = jax.vmap(paths.join)(last.parameters, _traced_back(states, ancestors, begun.end))
        log_joint = jax.vmap(target)(z)
        log_weight = _clean(last.log_weight + log_joint - last.log_q - last.used)
        return z, log_weight, last.log_evidence + _log_mean(log_weight)

    def _move(
        self,
        problem: Problem,
        context: Any,
        k: Int[Array, ""],
        key: Key,
        x: Float[Array, " dim"],
        parameters: Float[Array, " parameters"],
        to: Float[Array, " dim"] | None = None,
    ) -> tuple[Float[Array, " dim"], Float[Array, ""], Float[Array, ""]]:
        """Move one particle (to a given state); return the state, its log density and the gain in log weight."""
        backward = self.paths.kernels(context, parameters)
        assert isinstance(backward, LearnedBackward)
        kernel = backward(k, x)
        new, log_b = kernel.draw(key) if to is None else (to, kernel.log_density(to))
        bridge = _bridge(backward, self.paths.physics_of(problem, parameters), k, new, x)
        return new, log_b, jnp.where(k == 0, 0.0, bridge - log_b)


class Particles(NamedTuple):
    """Particles on their way.

    Args:
        x: their states.
        parameters: the unknown parameters that each, and its ancestors, were drawn with.
        log_weight: their weights since they were last resampled.
        log_q: log density by which each, and its ancestors, were drawn.
        used: sum of the log weights, of each and its ancestors, that bridging densities have given so far.
        log_evidence: sum of the log mean weights at all resamplings.
    """

    x: Float[Array, "particles dim"]
    parameters: Float[Array, "particles parameters"]
    log_weight: Float[Array, " particles"]
    log_q: Float[Array, " particles"]
    used: Float[Array, " particles"]
    log_evidence: Float[Array, ""]

    def moved(
        self, x: Float[Array, "particles dim"], log_b: Float[Array, " particles"], gain: Float[Array, " particles"]
    ) -> "Particles":
        """Move the particles to new states, drawn with these log densities, of this gain in log weight."""
        log_weight, log_q, used = self.log_weight + gain, self.log_q + log_b, self.used + gain
        return self._replace(x=x, log_weight=log_weight, log_q=log_q, used=used)


def _resample(key: Key, now: Particles, conditional: bool) -> tuple[Particles, Int[Array, " particles"]]:
    """Resample where weights have become uneven (multinomial; the first particle stays in a conditional run)."""
    log_weight = _clean(now.log_weight)
    num = log_weight.size
    uneven = _log_share(log_weight) < jnp.log(LEAST_SHARE)
    drawn = jax.random.categorical(key, log_weight, shape=(num,))
    ancestors = jnp.where(uneven, drawn, jnp.arange(num))
    if conditional:
        ancestors = ancestors.at[0].set(0)
    evidence = now.log_evidence + jnp.where(uneven, _log_mean(log_weight), 0.0)
    weights = jnp.where(uneven, 0.0, log_weight)
    x, parameters, log_q, used = (each[ancestors] for each in (now.x, now.parameters, now.log_q, now.used))
    return Particles(x, parameters, weights, log_q, used, evidence), ancestors


def _log_share(log_weight: Float[Array, " particles"]) -> Float[Array, ""]:
    """Compute the logarithm of the effective share; none is lost where every weight is zero."""
    return jnp.nan_to_num(log_effective_share(log_weight), nan=0.0)


def _log_mean(log_weight: Float[Array, " particles"]) -> Float[Array, ""]:
    return jax.nn.logsumexp(log_weight) - jnp.log(log_weight.size)


def _clean(log_weight: Float[Array, " particles"]) -> Float[Array, " particles"]:
    return jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)


def _bridge(
    backward: LearnedBackward,
    physics: PhysicsProcess,
    k: Int[Array, ""],
    x: Float[Array, " dim"],
    later: Float[Array, " dim"],
) -> Float[Array, ""]:
    """Compute log p^_k(x_k | c) + log f_k(x_{k+1} | x_k) - log p^_k(x_{k+1} | c)."""
    transition = Kernel(physics.forward(k, x), physics.scale[k]).log_density(later)
    before, after, context = backward.frame.before, backward.frame.after, backward.context
    assert before is not None
    assert after is not None
    return before.log_density(k, x, context) + transition - after.log_density(k, later, context)


def _traced_back(
    states: Float[Array, "steps particles dim"],
    ancestors: Int[Array, "steps particles"],
    ends: Float[Array, "particles dim"],
) -> Float[Array, "particles times dim"]:
    """Follow every particle of the beginning to its end."""

    def later(who: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        states, ancestors = inputs
        return ancestors[who], states[who]

    who, paths = jax.lax.scan(later, jnp.arange(len(ends)), (states, ancestors))
    return jnp.concatenate([paths, ends[who][None]]).swapaxes(0, 1)
