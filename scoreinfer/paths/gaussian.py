"""Backward kernels: physics run in reverse, with one Gaussian kernel B_k(x_k | x_{k+1}) for each forward step.

    E[x_k | x_{k+1}] = x_{k+1} - h drift + Q grad log p(x_{k+1}),    Var[x_k | x_{k+1}] = Q

to first order in the step h, with Q = g^2 h (Anderson, Nelson). A score is always grad log p, with p the density of the
process at that time. The reverse SDE uses the full score. The probability flow, which has no noise, uses half of it.
There are no other factors. For any kernels the density of a drawn path is known. The model's density of the path
divided by it is an exact weight.

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
from scoreinfer.process.base import LOG_2PI

State = Float[Array, " dim"]
"""One state of the process, as a vector."""
Path = Float[Array, "times dim"]
"""The states at all times of the grid."""
Score = Callable[[Float[Array, ""], State], State]
"""A score ``(t, x) -> grad log p_t(x)`` of the discrete process, at the times of its grid."""
"""log(2 pi)."""


class Kernel(NamedTuple):
    """A Gaussian N(mean, L diag(scale^2) L^T). L is ``factor``; None means the identity."""

    mean: State
    scale: State
    factor: Float[Array, "dim dim"] | None = None

    def draw(self, key: Key) -> tuple[State, Float[Array, ""]]:
        """Draw from the kernel; also return the log density of the draw.

        Exactness: an exact draw and its exact log density.
        """
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

    Exactness: consistent as the steps become shorter. Weights are exact, but the effective sample size is small at
        practical step lengths. `ThroughPhysics` and the learned kernels include the curvature and are better.
    """

    process: PhysicsProcess
    score: Score

    def __call__(self, k, x):
        """Make the kernel of step k."""
        scale = self.process.scale[k]
        mean = self.process.reverse(k, x) + scale**2 * self.score(self.process.ts[k + 1], x)
        return Kernel(mean, scale)


class ThroughPhysics(AbstractBackward):
    """Kernels from Tweedie's formulas through the physics step, for a process whose ``reverse`` inverts the step.

        E[Phi(x_k) | x_{k+1}] = x_{k+1} + Q S,    Var[Phi(x_k) | x_{k+1}] = Q + Q (dS) Q                    (exact)
        mean = Phi^{-1}(x_{k+1} + Q S),    covariance = J^{-1} (Q + Q (dS) Q) J^{-T},    J = dPhi at the mean

    The second line is the first one, linearised in x_k.

    Args:
        process: the physics; its ``reverse`` should invert its step.
        score: grad log p at the times of the grid.
        diagonal: whether components are independent in the physics and in the score (as modes of linear physics are).
            Only the diagonals of the Jacobians are then used.

    Exactness: the exact kernels if the physics is linear and p is Gaussian (all weights are then equal). In all cases
        the weights are exact.

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
"""Bounds of Var[Phi(x_k) | x_{k+1}] / Q, which must be positive. Chosen by judgement."""


def draw_path(
    key: Key, backward: AbstractBackward, end: State, num_steps: int | None = None
) -> tuple[Path, Float[Array, ""]]:
    """Draw a path of ``num_steps`` steps (None means all) backwards from its end; compute sum_k log B_k(x_k | x_{k+1}).

    Exactness: an exact draw from the kernels, and its exact log density.
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
    """Compute sum_k log B_k(x_k | x_{k+1}) of a given path.

    Exactness: the exact log density of what `draw_path` draws.
    """
    steps = jnp.arange(path.shape[0] - 1)
    return jax.vmap(lambda k, old, new: backward(k, new).log_density(old))(steps, path[:-1], path[1:]).sum()


def probability_flow(backward: AbstractBackward, end: State, num_steps: int | None = None) -> Path:
    """Run ``num_steps`` steps (None means all) of the probability flow backwards from the end.

        Phi(x_k) + x_k = x_{k+1} + E[x_k | x_{k+1}]

    The probability flow has no noise. Its velocity, drift - g^2/2 score, is the mean of the forward drift and the
    backward drift (Nelson). One step back solves the equation for x_k. It uses half the score and is stable for stiff
    physics. If the ends are drawn from the process, the states have the marginals of the process. From one end the flow
    gives one path, not draws from a posterior.

    Exactness: consistent as the steps become shorter.

    Good values: dissipative physics; each fixed-point iteration then at least halves the error.

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
"""Fixed-point iterations per step of the probability flow; 20 halvings of the error. Chosen by judgement."""
