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
from scoreinfer.correct import colour
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
        moved = self.scale * noise if self.factor is None else self.factor @ (self.scale * noise)
        return self.mean + moved, self._log_density(noise)

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


class Frame(eqx.Module):
    """What linear regression says of every step, for a network to start from and to see its numbers scaled by.

    Args:
        centre: mean of the state at the end of the step.
        spread: its standard deviation.
        shift: mean of x_k minus the reverse physics.
        slope: its regression on the standardised state; a vector per step where components are regressed on
            themselves alone.
        factor: square root of the covariance of what is left (a vector: of its variances).
    """

    centre: Float[Array, "steps dim"]
    spread: Float[Array, "steps dim"]
    shift: Float[Array, "steps dim"]
    slope: Float[Array, "steps dim dim"] | Float[Array, "steps dim"]
    factor: Float[Array, "steps dim dim"] | Float[Array, "steps dim"]

    def standardise(self, k: Int[Array, ""] | int, x: State) -> State:
        """Compute the standardised state at the end of step k."""
        return (x - self.centre[k]) / self.spread[k]

    def bounds(self, k: Int[Array, ""]) -> tuple[State, State]:
        """Compute how far out a kernel's mean may lie."""
        reach = FARTHEST * self.spread[k]
        return self.centre[k] - reach, self.centre[k] + reach

    def mean(self, process: PhysicsProcess, k: Int[Array, ""], x: State) -> State:
        """Compute reverse physics plus regression."""
        return process.reverse(k, x) + self.shift[k] + colour(self.slope[k], self.standardise(k, x))


class LearnedBackward(AbstractBackward):
    """Kernels whose mean and variances a network has learned by likelihood, on top of physics and regression.

    With v the standardised state and L the regression's residual factor,

        B_k = N(reverse physics + regression + L f(v, t), L diag(exp(2 h(v, t))) L^T).

    The likelihood of transitions is what the effective sample size depends on, and needs no inverse of the step.

    Args:
        process: the physics.
        frame: the regression.
        network: ``(v, log of elapsed time, elapsed time in [-1, 1]) -> 2 dim`` numbers, f and h.

    Exactness: exact weights whatever was learned; without weights biased, as good as the training.

    References: Holzschuh et al. 2023, arXiv 2301.10250, equation 4 (the one-step loss, its mean); Bao et al. 2022,
    arXiv 2201.06503 (learned reverse variances).
    """

    process: PhysicsProcess
    frame: Frame
    network: Callable[[Array, Array, Array], Array]

    def __call__(self, k, x):
        """Make the kernel of step k."""
        v = self.frame.standardise(k, x).astype(jnp.float32)
        move, log_scale = heads(self.network, v, *elapsed(self.process, k))
        mean, factor = self.frame.mean(self.process, k, x), self.frame.factor[k]
        # A reverse solver that blows up far out is stopped there, so that every density stays finite.
        mean = jnp.clip(mean + colour(factor, move), *self.frame.bounds(k))
        if factor.ndim == 1:
            return Kernel(mean, factor * jnp.exp(log_scale))
        return Kernel(mean, jnp.exp(log_scale).astype(mean.dtype), factor)

    def score(self, t: Float[Array, ""], x: State) -> State:
        """Compute (Phi(E[x_k | x_{k+1}]) - x_{k+1}) / Q, the score that the learned means stand for.

        Tweedie's E[Phi(x_k) | x_{k+1}] = x_{k+1} + Q S with the mean moved inside Phi, so that the error of whatever
        reverse physics was learned on is no part of it.

        Exactness: biased, as good as the training, and by O(t_{k+1} - t_k) where the physics is not linear.
        """
        k = jnp.argmin(jnp.abs(self.process.ts[1:] - t))
        return (self.process.forward(k, self(k, x).mean) - x) / self.process.scale[k] ** 2


MAX_LOG_SCALE = 4.0
FARTHEST = 1e4
"""Standard deviations of the state at which kernels' means are stopped."""


def heads(network: Callable, v: State, log_time: Array, time: Array) -> tuple[State, State]:
    """Compute the learned move of the mean and the log scale, in the frame."""
    output = network(v, log_time, time)
    return output[: v.size], MAX_LOG_SCALE * jnp.tanh(output[v.size :] / MAX_LOG_SCALE)


def elapsed(process: PhysicsProcess, k: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, " 1"]]:
    """Compute the time at the end of step k as a network sees it: its logarithm, and on the scale from -1 to 1."""
    share = (process.ts[k + 1] - process.ts[0]) / (process.ts[-1] - process.ts[0])
    return jnp.log(share).astype(jnp.float32), (2 * share[None] - 1).astype(jnp.float32)


def through_time(process: PhysicsProcess) -> tuple[Float[Array, " steps"], Float[Array, "steps 1"]]:
    """Compute `elapsed` for every step."""
    return jax.vmap(lambda k: elapsed(process, k))(jnp.arange(process.num_steps))


MAX_DENSE = 64
"""Largest dimension in which every component is regressed on all others."""
ENOUGH_PATHS = 4000
"""Fewest paths for a regression of its own at every step; with fewer the network, which sees all steps, does it all."""
ENOUGH_WAVES = 100
"""The same for Fourier coefficients, each regressed on itself alone."""
SURE = 3.5
"""Standard errors below which an entry of the regression counts as zero."""


@eqx.filter_jit
def linear_frame(process: PhysicsProcess, paths: Float[Array, "num times dim"]) -> Frame:
    """Make the frame of simulated paths.

    Entries of slope and covariance that could be noise are left out, so that components which do not mix stay apart.
    """
    num, dense = paths.shape[0], process.dim <= MAX_DENSE and not process.waves
    enough = ENOUGH_WAVES if process.waves else ENOUGH_PATHS

    def one(k: Array) -> tuple[Array, ...]:
        old, new = paths[:, k], paths[:, k + 1]
        rest = old - jax.vmap(lambda x: process.reverse(k, x))(new)
        centre, spread = new.mean(0), jnp.maximum(new.std(0), process.scale[k])
        if num < enough:
            none = jnp.zeros(process.dim)
            return centre, spread, none, none, process.scale[k]
        v, shift = (new - centre) / spread, rest.mean(0)
        if not dense:
            slope = (v * (rest - shift)).mean(0) / jnp.maximum((v**2).mean(0), 1e-6)
            return centre, spread, shift, slope, jnp.maximum((rest - shift - slope * v).std(0), 1e-3 * process.scale[k])
        slope = _regress(v, rest - shift)
        error = rest - shift - v @ slope.T
        covariance = error.T @ error / num
        sd = jnp.sqrt(covariance.diagonal())
        certain = (jnp.abs(covariance) > SURE / jnp.sqrt(num) * sd[:, None] * sd) | jnp.eye(process.dim, dtype=bool)
        floor = 1e-6 * process.scale[k] ** 2 + 1e-5 * covariance.diagonal()
        factor = jnp.linalg.cholesky(jnp.where(certain, covariance, 0.0) + jnp.diag(floor))
        return centre, spread, shift, slope, factor

    return Frame(*jax.lax.map(one, jnp.arange(process.num_steps)))


def _regress(v: Float[Array, "num dim"], rest: Float[Array, "num dim"]) -> Float[Array, "dim dim"]:
    num, dim = v.shape
    inverse = jnp.linalg.inv(v.T @ v / num + 1e-5 * jnp.eye(dim))
    slope = rest.T @ v / num @ inverse
    variance = (rest - v @ slope.T).var(0)
    error = jnp.sqrt(variance[:, None] * inverse.diagonal() / num)
    return jnp.where(jnp.abs(slope) > SURE * error, slope, 0.0)


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
