r"""Particles: many paths drawn backwards at a time, resampled on the way, one of them kept.

Where the weights of whole paths are poor, because small errors of many kernels add up, particles that drift from what
is likely are replaced by copies of better ones before the path is complete. They are steered by the bridging densities

    gamma_k(x_k, ..., x_N) = q(x_N) p^_k(x_k) prod_{j >= k} f_j(x_{j+1} | x_j) / p^_N(x_N),    gamma_0 = p(path, y),

f_j the transitions of the process and p^_k the Gaussian with the moments of its state at time k. Whatever these are,
the last target is the model's own density, so that the product Z of the mean weights between resamplings is an unbiased
estimate of the evidence, and the path kept, with weight Z, is exact in the same sense as a path with its own weight.
Given a path, a run in which that path is one of the particles (conditional SMC) draws the rest of the run anew: a Gibbs
step, with the weight Z that goes with it. So chains alternate exactly between both.

References: Del Moral, Doucet and Jasra 2006 (bridging densities); Andrieu, Doucet and Holenstein 2010, sections 4.2
(particle independent Metropolis-Hastings) and 4.5 (conditional SMC).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key, Sites
from scoreinfer.backward import Kernel, LearnedBackward
from scoreinfer.correct import log_effective_share
from scoreinfer.problem import Problem
from scoreinfer.smoothing import END_STATE, PathProposal, StartedPaths

LEAST_SHARE = 0.5
"""Effective share of the particles below which they are resampled."""


class ResampledPaths(eqx.Module):
    """Paths of a particle smoother that runs backwards; an independent run for each draw.

    Args:
        paths: the sampler of single paths; its kernels must not be conditioned on parameters or earlier observations,
            for which there are no bridging densities.
        num_particles: particles of each run.

    Raises:
        ValueError: where the kernels are conditioned, or not learned ones.

    Exactness: ``log_q`` is log p(path, y) - log Z of the run that the path was drawn in, or (for a given path) of a
        conditional run: weights are exact over runs, their mean an unbiased estimate of the evidence, whatever the
        kernels and bridging densities are.

    Good values: as many particles as make the effective share of the draws a half; it costs as many paths a draw.
    """

    paths: PathProposal | StartedPaths
    num_particles: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Check that there are bridging densities."""
        backward = self.paths.backward
        if not isinstance(backward, LearnedBackward) or backward.context.size:
            raise ValueError(
                "Resampling along the path needs learned kernels that are conditioned on nothing but the next state: "
                "with unknown parameters or observations of earlier states, use the plain weights."
            )

    @property
    def problem(self) -> Problem:
        """The problem that the proposal is for."""
        return self.paths.problem

    def context(self, y: Sites) -> tuple[Any, Sites]:
        """Embed one observation, and keep it."""
        return self.paths.context(y), y

    def propose(self, key: Key, context: tuple[Any, Sites]) -> tuple[Float[Array, " path"], Float[Array, ""]]:
        """Draw a run and one path of it; compute ``log_q``."""
        for_run, for_pick = jax.random.split(key)
        z, log_weight, log_evidence = self._run(for_run, context, None)
        pick = jax.random.categorical(for_pick, log_weight)
        return z[pick], self.problem.log_joint(z[pick], context[1]) - log_evidence

    def log_q(self, key: Key, context: tuple[Any, Sites], z: Float[Array, " path"]) -> Float[Array, ""]:
        """Draw a run around a given path; compute ``log_q``; minus infinity where the path misses a known end."""
        log_q = self.problem.log_joint(z, context[1]) - self._run(key, context, z)[2]
        if self.paths.site != END_STATE:
            return log_q
        return jnp.where(jnp.isfinite(self.paths.log_q(key, context[0], z)), log_q, -jnp.inf)

    def _run(
        self, key: Key, context: tuple[Any, Sites], given: Float[Array, " path"] | None
    ) -> tuple[Float[Array, "particles path"], Float[Array, " particles"], Float[Array, ""]]:
        """Draw all particles' paths with the weights since the last resampling, and log Z; the first may be given."""
        paths, y = self.paths, context[1]
        backward, num = paths.backward, self.num_particles
        assert isinstance(backward, LearnedBackward)
        for_begin, for_given, for_steps = jax.random.split(key, 3)
        ends, log_start = jax.vmap(lambda key: _begin(paths, key, context[0]))(jax.random.split(for_begin, num))
        num_steps = backward.process.num_steps if isinstance(paths, StartedPaths) else paths.num_steps
        held = jnp.zeros((num_steps + 1, backward.process.dim), ends.dtype)
        if given is not None:
            held = _states(paths, context[0], given)
            ends = ends.at[0].set(held[-1])
            log_start = log_start.at[0].set(_log_begin(paths, for_given, context[0], held[-1]))

        def back(now: Particles, inputs: tuple[Array, Key, Array]) -> tuple[Particles, tuple[Array, Array]]:
            k, key, held = inputs
            for_ancestors, for_moves = jax.random.split(key)
            now, ancestors = _resample(for_ancestors, now, given is not None)
            new, log_b = jax.vmap(lambda key, x: backward(k, x).draw(key))(jax.random.split(for_moves, num), now.x)
            if given is not None:
                new = new.at[0].set(held)
                log_b = log_b.at[0].set(backward(k, now.x[0]).log_density(held))
            gain = jnp.where(k == 0, 0.0, jax.vmap(lambda x, later: _bridge(backward, k, x, later))(new, now.x) - log_b)
            moved = Particles(new, now.log_weight + gain, now.log_q + log_b, now.used + gain, now.log_evidence)
            return moved, (new, ancestors)

        steps = (jnp.arange(num_steps), jax.random.split(for_steps, num_steps), held[:-1])
        none = jnp.zeros_like(log_start)
        first = Particles(ends, none, log_start, none, jnp.zeros((), log_start.dtype))
        last, (states, ancestors) = jax.lax.scan(back, first, steps, reverse=True)
        z = jax.vmap(lambda path: _latent(paths, path))(_traced_back(states, ancestors, ends))
        log_joint = jax.vmap(lambda z: self.problem.log_joint(z, y))(z)
        log_weight = _clean(last.log_weight + log_joint - last.log_q - last.used)
        return z, log_weight, last.log_evidence + _log_mean(log_weight)


class Particles(NamedTuple):
    """Particles on their way.

    Args:
        x: their states.
        log_weight: their weights since they were last resampled.
        log_q: log density by which each, and its ancestors, were drawn.
        used: sum of the log weights, of each and its ancestors, that bridging densities have given so far.
        log_evidence: sum of the log mean weights at all resamplings.
    """

    x: Float[Array, "particles dim"]
    log_weight: Float[Array, " particles"]
    log_q: Float[Array, " particles"]
    used: Float[Array, " particles"]
    log_evidence: Float[Array, ""]


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
    return Particles(now.x[ancestors], weights, now.log_q[ancestors], now.used[ancestors], evidence), ancestors


def _log_share(log_weight: Float[Array, " particles"]) -> Float[Array, ""]:
    """Compute the logarithm of the effective share; none is lost where every weight is zero."""
    return jnp.nan_to_num(log_effective_share(log_weight), nan=0.0)


def _log_mean(log_weight: Float[Array, " particles"]) -> Float[Array, ""]:
    return jax.nn.logsumexp(log_weight) - jnp.log(log_weight.size)


def _clean(log_weight: Float[Array, " particles"]) -> Float[Array, " particles"]:
    return jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)


def _bridge(
    backward: LearnedBackward, k: Int[Array, ""], x: Float[Array, " dim"], later: Float[Array, " dim"]
) -> Float[Array, ""]:
    """Compute log p^_k(x_k) + log f_k(x_{k+1} | x_k) - log p^_{k+1}(x_{k+1})."""
    transition = Kernel(backward.process.forward(k, x), backward.process.scale[k]).log_density(later)
    return backward.frame.log_marginal(k - 1, x) + transition - backward.frame.log_marginal(k, later)


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


# --- how both samplers of single paths begin, and lay out a path


def _begin(paths: PathProposal | StartedPaths, key: Key, context: Any) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
    """Draw the state that the kernels start from, with its log density."""
    if isinstance(paths, PathProposal):
        return context, jnp.zeros((), context.dtype)
    return paths.start.propose(key, context.start)


def _log_begin(
    paths: PathProposal | StartedPaths, key: Key, context: Any, end: Float[Array, " dim"]
) -> Float[Array, ""]:
    if isinstance(paths, PathProposal):
        return jnp.zeros((), end.dtype)
    return paths.start.log_q(key, context.start, end)


def _states(paths: PathProposal | StartedPaths, context: Any, z: Float[Array, " path"]) -> Float[Array, "times dim"]:
    process = paths.backward.process
    path = process.flatten(z.reshape(-1, *process.shape))
    if isinstance(paths, PathProposal) and paths.site != END_STATE:
        return jnp.concatenate([path, context[None]])
    return path


def _latent(paths: PathProposal | StartedPaths, path: Float[Array, "times dim"]) -> Float[Array, " path"]:
    return paths.backward.process.unflatten(path).reshape(-1)[: paths.problem.dim]
