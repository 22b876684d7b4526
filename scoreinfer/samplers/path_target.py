"""The posterior of a path of a Markov model: its log density, and its precision block by block."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.markov import Entries, State, Time
from scoreinfer.model.states import Series
from scoreinfer.montecarlo.feynman_kac import AbstractFeynmanKac
from scoreinfer.montecarlo.tridiagonal import BlockFactor, Path, factorise
from scoreinfer.score.base import positive_root

RIDGE = 1e-4
"""Share by which the diagonal of the precision is raised: for the rounding of float32. Chosen by judgement."""
Scalar = Float[Array, ""]


class PathTarget(eqx.Module):
    """p(x, y) of a path, as the model has it.

    Args:
        series: the model as a Markov process, with its observations.
        log_prior: log p(x) of a flat path.
        log_likelihood: log p(y | x) of a flat path.
    """

    series: Series
    log_prior: Callable[[Float[Array, " flat"]], Scalar]
    log_likelihood: Callable[[Float[Array, " flat"]], Scalar]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of times, and of components of a state."""
        return self.series.ts.size, self.series.model.dim

    def precision(self, path: Path, power: Scalar) -> BlockFactor:
        """Factorise the precision of the Gaussian at a path, with the likelihood raised to ``power``.

        Transitions count by their Jacobians alone, as in the method of Gauss and Newton; the first state and the data
        by the positive part of their negative Hessian.
        """
        model, ts, y = self.series.model, self.series.ts, self.series.y
        assert model.moments is not None
        assert model.log_initial is not None
        dim = model.dim

        def link(t0: Time, t1: Time, x: State) -> tuple[Array, Array, Array]:
            def mean(v: State) -> tuple[State, State]:
                moments = model.moments(t0, t1, v)  # type: ignore[misc]
                return moments.mean, jnp.broadcast_to(moments.factor, (dim,))

            slope, scale = jax.jacfwd(mean, has_aux=True)(x)
            forward = slope / scale[:, None]
            return forward.T @ forward, -forward / scale[:, None], jnp.diag(1 / scale**2)

        def bend(log_density: Callable[[State], Scalar], x: State) -> Float[Array, "dim dim"]:
            root = positive_root(-jax.hessian(log_density)(x))
            return root @ root

        before, below, after = jax.vmap(link)(ts[:-1], ts[1:], path[:-1])
        data = jax.vmap(lambda t, x, y: bend(lambda v: model.observed.log_density(t, v, y), x))(ts, path, y)
        diagonal = power * data
        diagonal = diagonal.at[:-1].add(before).at[1:].add(after).at[0].add(bend(model.log_initial, path[0]))
        raised = (1 + RIDGE) * jnp.diagonal(diagonal, axis1=1, axis2=2)
        return factorise(diagonal.at[:, jnp.arange(dim), jnp.arange(dim)].set(raised), below)


class Bootstrap(AbstractFeynmanKac[State]):
    """Particles that move by the model's transition, and are weighed by the likelihood: the paths' Feynman-Kac model.

    Args:
        num_steps: number of moves.
        series: the model and its observations. The first time is that of the first state.
    """

    num_steps: int = eqx.field(static=True)
    series: Series

    def initial(self, key: Key) -> State:
        """Draw the first state."""
        return self.series.model.initial(key)

    def log_initial(self, first: State) -> Scalar:
        """Compute the likelihood at the first time."""
        return self._likelihood(jnp.array(0), first)

    def propagate(self, key, k, old):
        """Draw the next state."""
        return self.series.model.transition(key, self.series.ts[k - 1], self.series.ts[k], old)

    def log_potential(self, k, old, new):
        """Compute the likelihood."""
        return self._likelihood(k, new)

    def log_move(self, k: Array, old: State, new: State) -> Scalar:
        """Compute log f(new | old)."""
        return self.series.model.log_transition(self.series.ts[k - 1], self.series.ts[k], old, new)  # type: ignore[misc]

    def _likelihood(self, k: Array, x: State) -> Scalar:
        y: Entries = self.series.y[k]
        return self.series.model.observed.log_density(self.series.ts[k], x, y)
