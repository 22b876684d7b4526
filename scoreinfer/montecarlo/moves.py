"""Moves of a whole population that leave a tempered density invariant: Langevin steps, and differences of others.

The tempered density of power b between a reference r and a target p is

    pi_b(z) proportional to r(z)^(1 - b) p(z)^b = r(z) (p(z) / r(z))^b.
"""

import abc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._memory import each
from scoreinfer._program import over_devices, run_once
from scoreinfer._typing import Key
from scoreinfer.bijections.affine import Affine
from scoreinfer.bijections.base import Chain, pull, spread
from scoreinfer.bijections.normalise import fit_shape
from scoreinfer.montecarlo.langevin import (
    TARGET_ACCEPT_PROB,
    LogDensity,
    ValueAndGrad,
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
CHAIN_LENGTH, SHORT = 8, 2
"""States of each Langevin chain that are particles, where evaluations are dear and where they are cheap. Longer chains
move for less work, shorter ones lose fewer first draws and with them fewer modes: of forty modes in ten dimensions
chains of eight lose two, for 350,000 gradients, chains of two none or one, for 820,000 in a quarter more time."""
FORGOTTEN = 0.2
"""Chains go on until the log density's correlation with its start is below this. Chosen by judgement."""
RIDGE = 1e-4
"""Ridge of the whitening behind which particles move: they may descend from few. See `spread`."""
STEP_GAIN = 0.5
"""Change of the log step size for each unit by which acceptance misses its aim. Chosen by judgement."""

Values = Float[Array, "num dim"]


class Seen(NamedTuple):
    """What moves know at a particle.

    Args:
        log_reference: log r(z).
        reference_gradient: its gradient; None where moves need none.
        log_target: log p(z), up to a constant.
        target_gradient: its gradient; None where moves need none.
    """

    log_reference: Float[Array, "*num"]
    reference_gradient: Any
    log_target: Float[Array, "*num"]
    target_gradient: Any

    @property
    def log_ratio(self) -> Float[Array, "*num"]:
        """Compute log p(z) - log r(z), minus infinity where it would be NaN."""
        return _clean(self.log_target - self.log_reference)

    def tempered(self, power: Float[Array | np.ndarray, ""]) -> tuple[Float[Array, "*num"], Float[Array, "*num dim"]]:
        """Compute the log tempered density and its gradient."""
        return jax.tree.map(lambda a, b: (1 - power) * a + power * b, self[:2], self[2:])


def seen_at(reference: AbstractReference, target: LogDensity, z: Float[Array, " dim"]) -> Seen:
    """Compute both log densities at z, without gradients."""
    return Seen(reference.log_density(z), None, target(z), None)


class AbstractMoves(eqx.Module):
    """Moves of a population between a reference and a target, by chains of `chain_length` states.

    What `see` has computed at the particles serves to weigh them, and, once they are resampled, to start moving.
    """

    reference: eqx.AbstractVar[AbstractReference]
    target: eqx.AbstractVar[LogDensity]

    @property
    @abc.abstractmethod
    def chain_length(self) -> int:
        """How many neighbouring particles are the last states of one chain."""

    @abc.abstractmethod
    def begin(self, values: Values) -> Any:
        """Make what the moves adapt from one temperature to the next, such as a step size."""

    @abc.abstractmethod
    def see(self, values: Values) -> Seen:
        """Compute what the moves need to know at the particles."""

    @abc.abstractmethod
    def move(
        self, key: Key, power: Float[Array, ""], values: Values, seen: Seen, starts: Int[Array, " chains"], adapted: Any
    ) -> tuple[Values, Seen, Any]:
        """Move chains at a power from the particles number ``starts``; ``values`` are all particles, resampled.

        Returns:
            As many new particles, chain after chain; what was seen at them; what was adapted.
        """


@run_once
def whitening_of(
    values: Values, seen: Seen, power: Float[Array | np.ndarray, ""], ridge: Float[Array | np.ndarray, ""]
) -> Chain:
    """Fit the map from whitened coordinates to z to a population, moved or about to move.

    It undoes funnels and draws heavy tails in (`scoreinfer.bijections.normalise`). Behind that map it is affine.

    Args:
        values: draws of the tempered density.
        seen: what was seen there, with gradients.
        power: the power.
        ridge: see `scoreinfer.bijections.base.spread`.
    """
    shape = fit_shape(values, seen.tempered(power)[1])
    w = shape.inverse(values)
    return Chain((Affine(w.mean(0), spread(w, ridge)), *shape.changes))


class Adapted(NamedTuple):
    """What Langevin moves adapt.

    Args:
        log_step: logarithm of the step size.
        num_gradients: evaluations of the target's gradient so far.
    """

    log_step: Float[Array, ""]
    num_gradients: Int[Array, ""]


class LangevinMoves(AbstractMoves):
    """Metropolis-adjusted Langevin steps, preconditioned by the population's own shape; no state is wasted.

    One of ``chain_length`` resampled particles starts a chain, and the last ``chain_length`` states of every chain are
    particles. Chains go on in passes of ``chain_length`` steps. They end when the log density at their ends correlates
    less than `FORGOTTEN` with the one at their starts.

    The particles move behind a whitening map (`whitening_of`). The step size adapts.

    Args:
        reference: where the particles come from.
        target: log density of where they go, up to a constant; a pytree (`jax.tree_util.Partial`) compiles once for
            all data.
        max_steps: largest number of steps of a chain at every temperature.
        short: whether chains are short (`SHORT`, else `CHAIN_LENGTH`).

    Exactness: every step leaves the tempered density invariant, given map and step size. These are
        fitted to the population, and the number of passes depends on it, so that averages are consistent as it grows,
        and not unbiased.

    References: Roberts and Tweedie 1996, Bernoulli 2(4) (the steps); Fearnhead and Taylor 2013, Bayesian Analysis 8(2)
        (step sizes that vary); Dau and Chopin 2022, JRSS B 84(1), algorithm 2 (every state is a particle).
    """

    reference: AbstractReference
    target: LogDensity
    max_steps: Int[Array | np.ndarray, ""]
    short: bool = eqx.field(static=True, default=False)

    @property
    def chain_length(self):
        """Return `SHORT` or `CHAIN_LENGTH`."""
        return SHORT if self.short else CHAIN_LENGTH

    def begin(self, values):
        """Begin with steps of size dim^(-1/6), as they scale in high dimension (Roberts and Rosenthal 1998)."""
        return Adapted(-jnp.log(jnp.asarray(values.shape[1], values.dtype)) / 6, jnp.zeros((), jnp.int32))

    def see(self, values):
        """Compute both log densities with their gradients."""
        return each(self._ends(values[0]), self.target)(values)

    def move(self, key, power, values, seen, starts, adapted):
        """Move by Langevin steps."""
        whitening = whitening_of(values, seen, power, np.array(RIDGE))
        return self._walk(key, power, whitening, values, seen, starts, adapted)

    @over_devices
    def _walk(self, key, power, whitening, values, seen, starts, adapted):
        """Walk from the starts, in whitened coordinates."""
        length = self.chain_length
        values, seen = jax.tree.map(lambda leaf: leaf[starts], (values, seen))
        ends_at = self._ends(values[0])

        def at(w):
            z = whitening.forward(w)
            seen = ends_at(z)
            return *_behind(whitening, power, w, seen), (z, seen)

        w = jax.vmap(whitening.inverse)(values)
        first = w, *jax.vmap(partial(_behind, whitening, power))(w, seen), (values, seen)

        def one_pass(carry):
            number, old, log_step, *_ = carry
            keys = jax.random.split(jax.random.fold_in(key, number), length)
            (new, log_step), chains = jax.lax.scan(partial(_step, at, self.target), (old, log_step), keys)
            return number + 1, new, log_step, chains, _correlation(first[1], new[1])

        def lasting(carry):
            return (carry[0] * length < self.max_steps) & ~(carry[-1] < FORGOTTEN)

        chains = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (length, *leaf.shape)), first[-1])
        carry = jnp.zeros((), jnp.int32), first, adapted.log_step, chains, jnp.ones((), values.dtype)
        number, _, log_step, chains, _ = jax.lax.while_loop(lasting, one_pass, carry)
        num_gradients = adapted.num_gradients + number * length * len(starts)
        return *jax.tree.map(_chain_after_chain, chains), Adapted(log_step, num_gradients)

    def _ends(self, z: Float[Array, " dim"]) -> Callable[[Float[Array, " dim"]], Seen]:
        of_reference, of_target = differentiate(self.reference.log_density, z), differentiate(self.target, z)
        return lambda z: Seen(*of_reference(z), *of_target(z))


def _step(at: ValueAndGrad, target: LogDensity, carry: Any, key: Key) -> tuple[Any, tuple[Values, Seen]]:
    """Take one step of every chain, adapt the common step size, and return the new states."""
    states, log_step = carry
    for_size, for_step = jax.random.split(key)
    num, dim = states[0].shape
    jitter = jnp.log(LANGEVIN_JITTER) * jax.random.uniform(for_size, (num,), log_step.dtype)
    ones = jnp.ones(dim, log_step.dtype)
    step = each(lambda key, state, size: metropolis_langevin_step(key, at, state, ones, size), target)
    states, accept = step(jax.random.split(for_step, num), states, jnp.exp(log_step - jitter))
    return (states, log_step + STEP_GAIN * (accept.mean() - TARGET_ACCEPT_PROB)), states[-1]


def _behind(
    change: Chain, power: Float[Array, ""], w: Float[Array, " dim"], seen: Seen
) -> tuple[Float[Array, ""], Float[Array, " dim"]]:
    """Compute the log tempered density of w, where z = change(w), and its gradient."""
    value, gradient = seen.tempered(power)
    return value + change.log_det(w), pull(change, w, gradient)


def _correlation(a: Float[Array, " num"], b: Float[Array, " num"]) -> Float[Array, ""]:
    """Compute the correlation of those pairs that are finite."""
    finite = jnp.isfinite(a) & jnp.isfinite(b)
    a, b = (jnp.where(finite, x - jnp.mean(x, where=finite), 0.0) for x in (a, b))
    return (a @ b) * jax.lax.rsqrt((a @ a) * (b @ b))


def _chain_after_chain(leaf: Float[Array, "length chains *rest"]) -> Float[Array, "num *rest"]:
    """Put the states of each chain side by side."""
    return jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])


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
    num_moves: Int[Array | np.ndarray, ""]

    @property
    def chain_length(self):
        """Return 1: only the last state of a chain is a particle."""
        return 1

    def begin(self, values):
        """Adapt nothing."""

    def see(self, values):
        """Compute both log densities."""
        return each(partial(seen_at, self.reference, self.target), self.target)(values)

    @over_devices
    def move(self, key, power, values, seen, starts, adapted):
        """Move along differences."""
        num, dim = values.shape
        longest = DIFFERENCE_SCALE / (2 * dim) ** 0.5

        def step(key, state):
            for_pair, for_length, for_accept = jax.random.split(key, 3)
            a, b = jax.random.randint(for_pair, (2,), 0, num)
            length = longest * jnp.exp(-jnp.log(DIFFERENCE_JITTER) * jax.random.uniform(for_length, (), values.dtype))
            z, seen = state
            new = z + length * (values[a] - values[b])
            at_new = seen_at(self.reference, self.target, new)
            log_accept = at_new.log_reference - seen.log_reference + power * (at_new.log_ratio - seen.log_ratio)
            return metropolis(for_accept, (new, at_new), state, _clean(log_accept))[0]

        def move_once(i, states):
            return each(step, self.target)(jax.random.split(jax.random.fold_in(key, i), num), states)

        return *jax.lax.fori_loop(0, self.num_moves, move_once, (values, seen)), None


def _clean(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
