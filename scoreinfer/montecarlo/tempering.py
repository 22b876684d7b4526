"""Tempered sequential Monte Carlo: walk a population of particles from a reference density to a target.

Temperatures are chosen so that each step keeps a fixed share of the effective sample size; between them the particles
are moved by Langevin steps whose preconditioner is the population's own covariance, seen through a map that undoes
funnels and draws heavy tails in, and whose size adapts.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.bijections.base import pull, push, spread
from scoreinfer.bijections.normalise import fit_shape
from scoreinfer.montecarlo.langevin import TARGET_ACCEPT_PROB, LogDensity, differentiate, metropolis_langevin_step
from scoreinfer.montecarlo.reference import AbstractReference
from scoreinfer.montecarlo.resampling import next_power, resample

KEPT_SHARE = 0.7
JITTER = 10.0
"""Step sizes vary between particles by up to this factor, for densities narrower in some places than in others."""


class Particles(NamedTuple):
    """A population on its way.

    Args:
        values: the particles.
        gradient: gradient of the current density's logarithm there.
        power: the target's share of the current density, reference^(1 - power) target^power; 1 at the end.
        log_step: logarithm of the step size of the moves.
        log_evidence: log of the ratio of normalising constants so far.
        accept_prob: mean acceptance probability of the last moves.
        ancestors: numbers of the first draws that the particles descend from.
    """

    values: Float[Array, "num dim"]
    gradient: Float[Array, "num dim"]
    power: Float[Array, ""]
    log_step: Float[Array, ""]
    log_evidence: Float[Array, ""]
    accept_prob: Float[Array, ""]
    ancestors: Int[Array, " num"]


@eqx.filter_jit
def begin(key: Key, reference: AbstractReference, num: int) -> Particles:
    """Draw the population from the reference."""
    return particles_at(jax.vmap(reference.sample)(jax.random.split(key, num)))


def particles_at(values: Float[Array, "num dim"]) -> Particles:
    """Make a population that has not moved yet, at draws of the reference."""
    zero = jnp.zeros((), values.dtype)
    first = -jnp.log(jnp.asarray(values.shape[1], values.dtype)) / 6
    return Particles(values, jnp.zeros_like(values), zero, first, zero, zero, jnp.arange(len(values)))


@eqx.filter_jit
def advance(
    key: Key,
    reference: AbstractReference,
    target: LogDensity,
    particles: Particles,
    num_moves: int,
    kept_share: float = KEPT_SHARE,
) -> Particles:
    """Go to the next temperature, resample, and move; at the last temperature move only.

    Args:
        key: random key.
        reference: where the particles come from.
        target: log density of where they go, up to a constant; a pytree (`jax.tree_util.Partial`) compiles once for
            all data.
        particles: the population.
        num_moves: Langevin steps of each particle.
        kept_share: share of the effective sample size that the change of temperature keeps.

    Exactness: averages and evidence are consistent as the population grows (with fixed temperatures and step sizes
        the evidence itself would be unbiased).

    References: Del Moral, Doucet and Jasra 2006, JRSS B 68(3), section 3.3.2; Jasra et al. 2011 (temperatures by
    effective sample size); Fearnhead and Taylor 2013, Bayesian Analysis 8(2) (step sizes that vary).
    """
    for_rows, for_moves = jax.random.split(key)
    num, z = particles.values.shape[0], particles.values[0]
    of_reference, of_target = differentiate(reference.log_density, z), differentiate(target, z)

    def both(z):
        return of_reference(z), of_target(z)

    def mix(power, ends):
        (a, gradient_a), (b, gradient_b) = ends
        return (1 - power) * a + power * b, (1 - power) * gradient_a + power * gradient_b

    ends = jax.vmap(both)(particles.values)
    log_ratio = ends[1][0] - ends[0][0]
    log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
    power = next_power(particles.power, log_ratio, kept_share)
    log_weight = jnp.where(power > particles.power, (power - particles.power) * log_ratio, jnp.zeros(num))
    rows = resample(for_rows, log_weight)
    values = particles.values[rows]
    value, gradient = mix(power, jax.tree.map(lambda leaf: leaf[rows], ends))
    shape = fit_shape(values, gradient)
    w = shape.inverse(values)
    states = (w, value + shape.log_det(w), pull(shape, w, gradient))
    factor = spread(w)
    step = jax.vmap(metropolis_langevin_step, in_axes=(0, None, 0, None, 0))

    def value_and_grad(w):
        value, gradient = mix(power, both(shape.forward(w)))
        return value + shape.log_det(w), pull(shape, w, gradient)

    def move(carry, key):
        states, log_step = carry
        for_size, for_step = jax.random.split(key)
        size = jnp.exp(log_step - jnp.log(JITTER) * jax.random.uniform(for_size, (num,), log_step.dtype))
        keys = jax.random.split(for_step, num)
        states, accept = step(keys, value_and_grad, states, factor, size)
        return (states, log_step + 0.5 * (accept.mean() - TARGET_ACCEPT_PROB)), accept.mean()

    keys = jax.random.split(for_moves, num_moves)
    ((w, _, gradient), log_step), accept = jax.lax.scan(move, (states, particles.log_step), keys)
    gradient = push(shape, w, gradient)
    increment = jax.nn.logsumexp(log_weight) - jnp.log(num)
    log_evidence, ancestors = particles.log_evidence + increment, particles.ancestors[rows]
    return Particles(shape.forward(w), gradient, power, log_step, log_evidence, accept.mean(), ancestors)
