"""Moves of a whole population that leave a tempered density invariant: Langevin steps, and differences of others.

The tempered density of power b between a reference r and a target p is

    pi_b(z) proportional to r(z)^(1 - b) p(z)^b = r(z) (p(z) / r(z))^b.
"""

import abc
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from scoreinfer._typing import Key
from scoreinfer.bijections.base import pull, push, spread
from scoreinfer.bijections.normalise import fit_shape
from scoreinfer.montecarlo.langevin import (
    TARGET_ACCEPT_PROB,
    LogDensity,
    differentiate,
    metropolis,
    metropolis_langevin_step,
)
from scoreinfer.montecarlo.reference import AbstractReference

LANGEVIN_JITTER = 10.0
"""Langevin steps vary in size between particles by up to this factor, for densities that are narrower in some places
than in others. Chosen by judgement: a funnel is narrower by factors like this one."""
DIFFERENCE_JITTER = 4.0
"""Moves by differences vary in length by up to this factor, for modes narrower than the whole. Chosen by judgement."""
DIFFERENCE_SCALE = 2.38
"""Moves by differences are this long, divided by sqrt(2 dim): best for Gaussians (ter Braak and Vrugt 2008).
"""
STEP_GAIN = 0.5
"""Change of the log step size for each unit by which acceptance misses its aim. Chosen by judgement."""

Values = Float[Array, "num dim"]


def densities(
    reference: AbstractReference, target: LogDensity, z: Float[Array, " dim"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute log r(z) and log p(z) - log r(z); the latter is minus infinity where it would be NaN."""
    log_reference = reference.log_density(z)
    return log_reference, _clean(target(z) - log_reference)


class AbstractMoves(eqx.Module):
    """Moves of a population between a reference and a target.

    They are cut in two. What `look` has computed at the particles serves to weigh them, and, once they are resampled,
    to start moving.
    """

    reference: eqx.AbstractVar[AbstractReference]
    target: eqx.AbstractVar[LogDensity]

    @abc.abstractmethod
    def begin(self, values: Values) -> Any:
        """Make what the moves keep from one temperature to the next, such as a step size."""

    @abc.abstractmethod
    def look(self, values: Values) -> tuple[Float[Array, " num"], PyTree]:
        """Compute log p - log r at the particles (never NaN), and what else `move` needs there, particles first."""

    @abc.abstractmethod
    def move(self, key: Key, power: Float[Array, ""], values: Values, seen: Any, kept: Any) -> tuple[Values, Any]:
        """Move the particles at a power, where ``seen`` was seen at them."""


class Walk(NamedTuple):
    """What Langevin moves keep.

    Args:
        gradient: gradient of the log tempered density at the particles; zero before they have moved.
        log_step: logarithm of the step size.
    """

    gradient: Values
    log_step: Float[Array, ""]


class LangevinMoves(AbstractMoves):
    """Metropolis-adjusted Langevin steps, preconditioned by the population's own shape.

    The particles are seen through a map that undoes funnels and draws heavy tails in
    (`scoreinfer.bijections.normalise`). Their covariance behind that map is the preconditioner. The step size adapts.

    Args:
        reference: where the particles come from.
        target: log density of where they go, up to a constant; a pytree (`jax.tree_util.Partial`) compiles once for
            all data.
        num_moves: steps of each particle at every temperature.

    Exactness: every step leaves the tempered density invariant, given map, preconditioner and step size. These are
        fitted to the population, so that averages are consistent as it grows, and not unbiased.

    References: Roberts and Tweedie 1996, Bernoulli 2(4) (the steps); Fearnhead and Taylor 2013, Bayesian Analysis 8(2)
        (step sizes that vary).
    """

    reference: AbstractReference
    target: LogDensity
    num_moves: int = eqx.field(static=True)

    def begin(self, values):
        """Begin with steps of size dim^(-1/6), as they scale in high dimension (Roberts and Rosenthal 1998)."""
        return Walk(jnp.zeros_like(values), -jnp.log(jnp.asarray(values.shape[1], values.dtype)) / 6)

    def look(self, values):
        """Compute log ratios, and both log densities with their gradients."""
        ends = jax.vmap(self._both(values[0]))(values)
        return _clean(ends[1][0] - ends[0][0]), ends

    def move(self, key, power, values, seen, kept):
        """Move by Langevin steps."""
        num, both = values.shape[0], self._both(values[0])
        value, gradient = _mix(power, seen)
        shape = fit_shape(values, gradient)
        w = shape.inverse(values)
        factor = spread(w)
        step = jax.vmap(metropolis_langevin_step, in_axes=(0, None, 0, None, 0))

        def value_and_grad(w):
            value, gradient = _mix(power, both(shape.forward(w)))
            return value + shape.log_det(w), pull(shape, w, gradient)

        def move_once(carry, key):
            states, log_step = carry
            for_size, for_step = jax.random.split(key)
            jitter = jnp.log(LANGEVIN_JITTER) * jax.random.uniform(for_size, (num,), log_step.dtype)
            keys = jax.random.split(for_step, num)
            states, accept = step(keys, value_and_grad, states, factor, jnp.exp(log_step - jitter))
            return (states, log_step + STEP_GAIN * (accept.mean() - TARGET_ACCEPT_PROB)), None

        states = (w, value + shape.log_det(w), pull(shape, w, gradient))
        keys = jax.random.split(key, self.num_moves)
        ((w, _, gradient), log_step), _ = jax.lax.scan(move_once, (states, kept.log_step), keys)
        return shape.forward(w), Walk(push(shape, w, gradient), log_step)

    def _both(self, z: Float[Array, " dim"]) -> Any:
        of_reference, of_target = differentiate(self.reference.log_density, z), differentiate(self.target, z)
        return lambda z: (of_reference(z), of_target(z))


class DifferenceMoves(AbstractMoves):
    """Metropolis steps along differences of two other particles; no gradient is asked for.

    Args:
        reference: where the particles come from.
        target: log density of where they go, as for `LangevinMoves`.
        num_moves: steps of each particle at every temperature.

    Exactness: every step leaves the tempered density invariant, given the places where the others stood when the moves
        began. These stay fixed, and a difference is as likely as its negative.

    References: ter Braak and Vrugt 2008, Statistics and Computing 18(4).
    """

    reference: AbstractReference
    target: LogDensity
    num_moves: Int[Array, ""]

    def begin(self, values):
        """Keep nothing."""

    def look(self, values):
        """Compute log ratios, and both log densities."""
        seen = jax.vmap(partial(densities, self.reference, self.target))(values)
        return seen[1], seen

    def move(self, key, power, values, seen, kept):
        """Move along differences."""
        num, dim = values.shape
        longest = DIFFERENCE_SCALE / (2 * dim) ** 0.5

        def step(key, state):
            for_pair, for_length, for_accept = jax.random.split(key, 3)
            a, b = jax.random.randint(for_pair, (2,), 0, num)
            length = longest * jnp.exp(-jnp.log(DIFFERENCE_JITTER) * jax.random.uniform(for_length, (), values.dtype))
            z, log_reference, log_ratio = state
            new = z + length * (values[a] - values[b])
            at_new = densities(self.reference, self.target, new)
            log_accept = _clean(at_new[0] - log_reference + power * (at_new[1] - log_ratio))
            return metropolis(for_accept, (new, *at_new), state, log_accept)[0]

        def move_once(i, states):
            return jax.vmap(step)(jax.random.split(jax.random.fold_in(key, i), num), states)

        return jax.lax.fori_loop(0, self.num_moves, move_once, (values, *seen))[0], None


def _mix(power: Float[Array, ""], ends: Any) -> Any:
    """Mix log densities and their gradients, (1 - power) of the reference's and power of the target's."""
    return jax.tree.map(lambda a, b: (1 - power) * a + power * b, *ends)


def _clean(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
