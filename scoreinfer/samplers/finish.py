"""Finishes: Markov chains on the model's own path density, which turn biased draws of paths into exact ones.

All chains run side by side, one from every start, and what they see on their way is recorded for the certificate
(`scoreinfer.evidence.paths`).
"""

import abc
import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scoreinfer._memory import map_rows
from scoreinfer._typing import Key
from scoreinfer.montecarlo.feynman_kac import draw_backwards, run
from scoreinfer.montecarlo.hamiltonian import Place, hamiltonian_step
from scoreinfer.montecarlo.tridiagonal import BlockFactor, Path
from scoreinfer.samplers.path_target import Bootstrap, PathTarget

BATCH = 128
"""Chains that run side by side. It limits the memory."""
MAX_SEEN = 4
"""Most components of a state that are recorded. Chosen by judgement."""
Scalar = Float[Array, ""]


class Finished(NamedTuple):
    """What the chains leave.

    Args:
        x: their last paths.
        trace: what they saw in the second half of their steps: log p(x), log p(y | x), and numbers of the path.
        accept_prob: mean acceptance probability of every chain in that half; 1 where there is none.
    """

    x: Float[Array, "chains times dim"]
    trace: Float[Array, "chains steps seen"]
    accept_prob: Float[Array, " chains"]


class AbstractFinish(eqx.Module):
    """Markov chains that leave the posterior of a path invariant."""

    @abc.abstractmethod
    def check(self, target: PathTarget) -> None:
        """Refuse a model that the chains cannot run on.

        Raises:
            ValueError: if the model lacks a density that is needed.
        """

    @property
    @abc.abstractmethod
    def num_steps(self) -> int:
        """Number of steps of every chain."""

    @abc.abstractmethod
    def chain(self, key: Key, target: PathTarget, start: Path, cold: Array) -> tuple[Path, Array, Scalar]:
        """Run one chain; return its last path, its trace and its acceptance (see `Finished`).

        Args:
            key: random key.
            target: the posterior.
            start: the first path.
            cold: whether the start has seen no data.
        """

    def run(
        self, key: Key, target: PathTarget, starts: Float[Array, "chains times dim"], cold: Bool[Array, " chains"]
    ) -> Finished:
        """Run one chain from every start."""
        keys = jax.random.split(key, len(starts))
        return Finished(
            *map_rows(lambda key, start, cold: self.chain(key, target, start, cold), BATCH)(keys, starts, cold)
        )


class HMC(AbstractFinish):
    """Hamiltonian Monte Carlo, preconditioned by the block-tridiagonal precision of every chain's own path.

    In the first half of the steps every chain adapts its step size, and its precision at the start of each of
    ``num_stages`` stages; chains that start without data (`SDA`) meet these with a power that grows to one. In the
    second half nothing changes any more.

    Args:
        num_steps: number of moves, a multiple of twice ``num_stages`` (else it is rounded down).
        num_leapfrogs: leapfrogs of each.
        num_stages: see above.
        accept_prob: acceptance probability that steps are tuned to.

    Exactness: exact in the limit of many steps, within the lobes of the posterior that the starts have found: a chain
        hardly ever crosses from one lobe to another.

    Good values: 100 steps from starts of a trained score; 400 where the certificate reports drift.

    References: Neal 2011, arXiv 1206.1901.
    """

    num_steps: int = eqx.field(static=True, default=100)
    num_leapfrogs: int = eqx.field(static=True, default=16)
    num_stages: int = eqx.field(static=True, default=5)
    accept_prob: float = 0.8

    def check(self, target):
        """Refuse transitions that are not Gaussian, and a first state without density."""
        model = target.series.model
        if model.moments is None or model.log_initial is None:
            raise ValueError(
                "`HMC` needs Gaussian transitions and the density of the first state, which this model does not have. "
                "Write the path as one site (`EulerMaruyama`, `PhysicsPath`), or use `ParticleGibbs`."
            )

    def chain(self, key, target, start, cold):
        """Run one chain: as many stages that adapt as stages that do not."""
        per_stage, stages = max(self.num_steps // (2 * self.num_stages), 1), jnp.arange(2 * self.num_stages)

        def see(power: Scalar, x: Path) -> Place:
            def log_density(x: Path) -> tuple[Scalar, tuple[Scalar, Scalar]]:
                parts = target.log_prior(x.ravel()), target.log_likelihood(x.ravel())
                return parts[0] + power * parts[1], parts

            (value, parts), gradient = jax.value_and_grad(log_density, has_aux=True)(x)
            return Place(x, value, gradient, parts)

        def stage(carry: tuple[Path, Scalar, BlockFactor], inputs: tuple[Key, Array]) -> tuple[Any, Any]:
            (x, log_size, factor), (key, number) = carry, inputs
            share = jnp.clip(number / max(self.num_stages - 1, 1), 0.0, 1.0).astype(x.dtype)
            power, gain = jnp.where(cold, LEAST_POWER ** (1 - share), 1.0), 0.5 * (number < self.num_stages)
            fresh = target.precision(x, power)
            factor = jax.tree.map(functools.partial(jnp.where, number <= self.num_stages), fresh, factor)

            def step(carry: tuple[Place, Scalar], key: Key) -> tuple[Any, Any]:
                place, log_size = carry
                size, at_power = jnp.exp(log_size), functools.partial(see, power)
                place, accept = hamiltonian_step(key, at_power, place, factor, size, self.num_leapfrogs)
                log_size = log_size + (gain * (accept - self.accept_prob)).astype(x.dtype)
                return (place, log_size), (recorded(place.x, *place.more), accept)

            (place, log_size), seen = jax.lax.scan(step, (see(power, x), log_size), jax.random.split(key, per_stage))
            return (place.x, log_size, factor), seen

        begun = start, jnp.full((), math.log(FIRST_SIZE), start.dtype), _no_factor(start)
        (x, *_), (trace, accept) = jax.lax.scan(stage, begun, (jax.random.split(key, len(stages)), stages))
        kept = trace[self.num_stages :].reshape(-1, trace.shape[-1])
        return x, kept, accept[self.num_stages :].mean()


LEAST_POWER, FIRST_SIZE = 1e-4, 0.1
"""First power of the likelihood for cold starts, and first step size, in standard deviations. Chosen by judgement."""


def _no_factor(x: Path) -> BlockFactor:
    return BlockFactor(*(jnp.zeros((num, x.shape[1], x.shape[1]), x.dtype) for num in (len(x), len(x) - 1)))


class ParticleGibbs(AbstractFinish):
    """Conditional particle filters around the chain's path, each followed by a draw backwards through the particles.

    It needs no score, no gradient and no trained start: for states of few components it does everything alone.

    Args:
        num_steps: number of sweeps.
        num_particles: particles of a sweep.

    Exactness: exact in the limit of many sweeps, for any number of particles.

    Good values: 20 sweeps of 128 particles, for states of up to about six components; more components need a number of
        particles that grows exponentially.

    References: Andrieu, Doucet and Holenstein 2010, JRSS B 72(3), section 4.5; Whiteley 2010 (drawing backwards).
    """

    num_steps: int = eqx.field(static=True, default=20)
    num_particles: int = eqx.field(static=True, default=128)

    def check(self, target):
        """Refuse transitions without density."""
        if target.series.model.log_transition is None:
            raise ValueError(
                "`ParticleGibbs` needs the density of the transition, and this model only simulates it. Write the path "
                "as one site (`EulerMaruyama`, `PhysicsPath`)."
            )

    def chain(self, key, target, start, cold):
        """Run one chain."""

        def sweep(x: Path, key: Key) -> tuple[Path, Array]:
            x = swept(key, target, self.num_particles, x)
            return x, recorded(x, target.log_prior(x.ravel()), target.log_likelihood(x.ravel()))

        x, trace = jax.lax.scan(sweep, start, jax.random.split(key, self.num_steps))
        return x, trace[self.num_steps // 2 :], jnp.ones((), x.dtype)


def swept(key: Key, target: PathTarget, num: int, reference: Path | None = None) -> Path:
    """Draw a path through particles, free or around a reference (a Gibbs step)."""
    for_run, for_path = jax.random.split(key)
    model = Bootstrap(target.shape[0] - 1, target.series)
    found = run(for_run, model, num, reference)
    return draw_backwards(for_path, found.states, found.log_weight, model.log_move)


def recorded(x: Path, log_prior: Scalar, log_likelihood: Scalar) -> Float[Array, " seen"]:
    """List what a trace holds of a path: both log densities; some components first, in the middle, last, on average."""
    num = x.shape[1]
    shown = x[:, (jnp.arange(min(num, MAX_SEEN)) * num) // min(num, MAX_SEEN)]
    numbers = jnp.stack([shown[0], shown[len(x) // 2], shown[-1], shown.mean(0)])
    return jnp.concatenate([jnp.stack([log_prior, log_likelihood]), numbers.ravel()])
