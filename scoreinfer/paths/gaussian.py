"""Backward kernels: physics run in reverse, one Gaussian kernel B_k(x_k | x_{k+1}) for each forward step.

A score is always grad log p, p the density of the process at that time. By Anderson and Nelson, to first order in the
step h with Q = g^2 h,

    E[x_k | x_{k+1}] = x_{k+1} - h drift + Q grad log p(x_{k+1}),    Var[x_k | x_{k+1}] = Q,

so the reverse SDE takes the whole score, and the probability flow, which has no noise, takes half of it. No other
constant stands anywhere. Whatever the kernels are, the density of a path they drew is known, so the model's own
density of paths over it is an exact weight.

References: Anderson 1982; Nelson 1967; Song et al. 2021, arXiv 2011.13456, equations 6 and 13; Efron 2011 (Tweedie).
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.process import PhysicsProcess

State = Float[Array, " dim"]
Path = Float[Array, "times dim"]
Score = Callable[[Float[Array, ""], State], State]
"""A score ``(t, x)``: grad log p_t(x), of the discrete process at the times of its grid."""
LOG_2PI = 1.8378770664093453


class Kernel(NamedTuple):
    """A Gaussian N(mean, L diag(scale^2) L^T); L is ``factor``, or the identity where that is None."""

    mean: State
    scale: State
    factor: Float[Array, "dim dim"] | None = None

    def draw(self, key: Key) -> tuple[State, Float[Array, ""]]:
        """Draw from the kernel; return the log density too."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + self.spread(noise), self._log_density(noise)

    def spread(self, noise: State) -> State:
        """Compute L diag(scale) ``noise``."""
        return self.scale * noise if self.factor is None else self.factor @ (self.scale * noise)

    def gather(self, gradient: State) -> State:
        """Compute diag(scale) L^T ``gradient``."""
        return self.scale * (gradient if self.factor is None else self.factor.T @ gradient)

    def log_density(self, x: State) -> Float[Array, ""]:
        """Compute the log density at ``x``."""
        moved = x - self.mean if self.factor is None else jnp.linalg.solve(self.factor, x - self.mean)
        return self._log_density(moved / self.scale)

    def _log_density(self, noise: State) -> Float[Array, ""]:
        log_det = jnp.log(self.scale).sum()
        if self.factor is not None:
            log_det += jnp.linalg.slogdet(self.factor)[1]
        return -0.5 * (noise**2 + LOG_2PI).sum() - log_det


class AbstractBackward(eqx.Module):
    """One kernel for each step of a process, from its end to its beginning."""

    process: eqx.AbstractVar[PhysicsProcess]

    @abc.abstractmethod
    def __call__(self, k: Int[Array, ""], x: State) -> Kernel:
        """Make the kernel B_k(. | x_{k+1} = x)."""


class ReverseEuler(AbstractBackward):
    """The textbook kernel: N(reverse physics + Q score, Q).

    Exactness: consistent as the steps shrink; weights over it are exact, and poor at steps of practical length
        (the learned kernels, and `ThroughPhysics`, know the curvature).
    """

    process: PhysicsProcess
    score: Score

    def __call__(self, k, x):
        """Make the kernel of step k."""
        scale = self.process.scale[k]
        mean = self.process.reverse(k, x) + scale**2 * self.score(self.process.ts[k + 1], x)
        return Kernel(mean, scale)


class ThroughPhysics(AbstractBackward):
    """Tweedie's formulas through the physics step, for a process whose ``reverse`` inverts the step.

    E[Phi(x_k) | x_{k+1}] = x_{k+1} + Q S and Var[Phi(x_k) | x_{k+1}] = Q + Q (dS) Q are exact; linearised,

        mean = Phi^{-1}(x_{k+1} + Q S),    covariance = J^{-1} (Q + Q (dS) Q) J^{-T},    J = dPhi at the mean.

    Args:
        process: the physics; its ``reverse`` should invert its step.
        score: grad log p at the grid's times.
        diagonal: components do not mix, neither in the physics nor in the score (modes of linear physics): the
            Jacobians' diagonals are all there is to them.

    Exactness: the exact kernels where physics is linear and p Gaussian (every weight is equal); weights are exact
        everywhere.

    Good values: a few dozen dimensions, or ``diagonal``.
    """

    process: PhysicsProcess
    score: Score
    diagonal: bool = eqx.field(static=True, default=False)

    def __call__(self, k, x):
        """Make the kernel of step k."""
        scale, t = self.process.scale[k], self.process.ts[k + 1]
        value, curvature = self.score(t, x), jax.jacfwd(lambda v: self.score(t, v))(x)
        mean = self.process.reverse(k, x + scale**2 * value)
        jacobian = jax.jacfwd(lambda v: self.process.forward(k, v))(mean)
        if self.diagonal:
            left = jnp.clip(1.0 + scale**2 * curvature.diagonal(), *LEFT)
            return Kernel(mean, scale * jnp.sqrt(left) / jnp.abs(jacobian.diagonal()))
        inner = jnp.eye(x.size) + 0.5 * scale[:, None] * (curvature + curvature.T) * scale
        left, axes = jnp.linalg.eigh(inner)
        factor = jnp.linalg.solve(jacobian, scale[:, None] * axes)
        return Kernel(mean, jnp.sqrt(jnp.clip(left, *LEFT)), factor)


LEFT = (1e-4, 1e2)
"""What may be left of the noise's variance once x_{k+1} is known; exact scores stay within (0, 1)."""


def draw_path(
    key: Key, backward: AbstractBackward, end: State, num_steps: int | None = None
) -> tuple[Path, Float[Array, ""]]:
    """Draw a path of ``num_steps`` (all) steps backwards from its end; compute sum_k log B_k(x_k | x_{k+1}).

    Exactness: an exact draw from the kernels and its exact log density.
    """
    steps = jnp.arange(backward.process.num_steps if num_steps is None else num_steps)

    def back(x: State, inputs: tuple[Array, Key]) -> tuple[State, tuple[State, Array]]:
        k, key = inputs
        new, log_density = backward(k, x).draw(key)
        return new, (new, log_density)

    keys = jax.random.split(key, steps.size)
    _, (path, log_density) = jax.lax.scan(back, end, (steps, keys), reverse=True)
    return jnp.concatenate([path, end[None]]), log_density.sum()


def log_path(backward: AbstractBackward, path: Path) -> Float[Array, ""]:
    """Compute sum_k log B_k(x_k | x_{k+1}) of a given path."""
    steps = jnp.arange(path.shape[0] - 1)
    return jax.vmap(lambda k, old, new: backward(k, new).log_density(old))(steps, path[:-1], path[1:]).sum()


def probability_flow(backward: AbstractBackward, end: State, num_steps: int | None = None) -> Path:
    """Run ``num_steps`` (all) of the probability flow backwards from the end.

    It has no noise. Its velocity, drift - g^2/2 score, is the mean of the forward drift and of the backward one
    (Nelson), so one step back solves Phi(x_k) + x_k = x_{k+1} + E[x_k | x_{k+1}] for x_k: half the score, and stable
    however stiff the physics. From ends drawn from the process its states have the marginals of the process; from one
    end it gives one path, no posterior.

    Exactness: consistent as the steps shrink.

    Good values: dissipative physics, where the fixed-point iteration shrinks the error at least twofold each time.

    References: Nelson 1967, section 13; Song et al. 2021, arXiv 2011.13456, equation 13.
    """
    process = backward.process

    def back(x: State, k: Array) -> tuple[State, State]:
        total = x + backward(k, x).mean

        def closer(_: Array, guess: State) -> State:
            return guess + 0.5 * (total - guess - process.forward(k, guess))

        new = jax.lax.fori_loop(0, NUM_FIXED_POINT, closer, x)
        return new, new

    steps = jnp.arange(process.num_steps if num_steps is None else num_steps)
    path = jax.lax.scan(back, end, steps, reverse=True)[1]
    return jnp.concatenate([path, end[None]])


NUM_FIXED_POINT = 20
