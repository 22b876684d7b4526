"""Learned kernels and scores: regression at every step, and one network for all steps on top of it.

The network sees standardised states and answers in units of what the regression leaves, so that its outputs are of
order one at all times; its last layer starts at zero, so that what is untrained is the regression.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer.backward.kernels import AbstractBackward, Kernel, State
from scoreinfer.correct import colour
from scoreinfer.nets import ResidualMLP
from scoreinfer.process import PhysicsProcess
from scoreinfer.process.physics import hartley


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
        physics: show the network, behind v, the plain state and the physics' increment in units of the noise, too.

    Exactness: exact weights whatever was learned; without weights biased, as good as the training.

    References: Holzschuh et al. 2023, arXiv 2301.10250, equation 4 (the one-step loss, its mean); Bao et al. 2022,
    arXiv 2201.06503 (learned reverse variances).
    """

    process: PhysicsProcess
    frame: Frame
    network: Callable[[Array, Array, Array], Array]
    physics: bool = eqx.field(static=True, default=False)

    def __call__(self, k, x):
        """Make the kernel of step k."""
        move, log_scale = heads(self.network, self.features(k, x), *elapsed(self.process, k))
        mean, factor = self.frame.mean(self.process, k, x), self.frame.factor[k]
        # A reverse solver that blows up far out is stopped there, so that every density stays finite.
        mean = jnp.clip(mean + colour(factor, move), *self.frame.bounds(k))
        if factor.ndim == 1:
            return Kernel(mean, factor * jnp.exp(log_scale))
        return Kernel(mean, jnp.exp(log_scale).astype(mean.dtype), factor)

    def features(self, k: Int[Array, ""], x: State) -> Float[Array, " features"]:
        """Compute what the network sees of the state at the end of step k."""
        seen = [self.frame.standardise(k, x)]
        if self.physics:
            centre, spread = self.frame.centre[k], self.frame.spread[k]
            seen.append((x - centre) / jnp.sqrt((spread**2).mean()))
            seen.append((self.process.forward(k, x) - x) / self.process.scale[k])
        return jnp.concatenate(seen).astype(jnp.float32)

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


def heads(network: Callable, seen: Array, log_time: Array, time: Array) -> tuple[State, State]:
    """Compute the learned move of the mean and the log scale, in the frame."""
    move, log_scale = jnp.split(network(seen, log_time, time), 2)
    return move, MAX_LOG_SCALE * jnp.tanh(log_scale / MAX_LOG_SCALE)


class OnWaves(eqx.Module):
    """Let a network of fields move their Hartley coefficients, as `Physics` with ``waves`` has them.

    The network sees and moves fields; log scales are each wavenumber's own, functions of time alone.

    Args:
        network: a network of fields: the first half of what it returns is the move.
        scales: network of log scales, of the logarithm of elapsed time and elapsed time.
        shape: shape of one state.
    """

    network: Callable[[Array, Array, Array], Array]
    scales: ResidualMLP
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(
        self, seen: Float[Array, " features"], log_time: Float[Array, ""], time: Float[Array, " 1"]
    ) -> Float[Array, " outputs"]:
        """Compute move and log scale of the coefficients."""
        fields = hartley(seen.reshape(-1, *self.shape), len(self.shape))
        move = jnp.split(self.network(fields.ravel(), log_time, time), 2)[0]
        move = hartley(move.reshape(self.shape), len(self.shape)).ravel()
        return jnp.concatenate([move, self.scales(jnp.append(time, log_time))])


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
        # Without its uncertain entries a covariance may no longer be one.
        whole = jnp.linalg.cholesky(covariance + jnp.diag(floor))
        return centre, spread, shift, slope, jnp.where(jnp.isfinite(factor).all(), factor, whole)

    return Frame(*jax.lax.map(one, jnp.arange(process.num_steps)))


def _regress(v: Float[Array, "num dim"], rest: Float[Array, "num dim"]) -> Float[Array, "dim dim"]:
    num, dim = v.shape
    inverse = jnp.linalg.inv(v.T @ v / num + 1e-5 * jnp.eye(dim))
    slope = rest.T @ v / num @ inverse
    variance = (rest - v @ slope.T).var(0)
    error = jnp.sqrt(variance[:, None] * inverse.diagonal() / num)
    return jnp.where(jnp.abs(slope) > SURE * error, slope, 0.0)


class LearnedScore(eqx.Module):
    """A score on its own: that of the Gaussian with the state's mean and variances, plus a network.

    S = -(v - f(v, t)) / spread, v the standardised state. For `ReverseEuler` and `ThroughPhysics`, and for comparison:
    `LearnedBackward` has the better weights.

    Args:
        process: the physics.
        frame: the regression, for its scales.
        network: ``(v, log of elapsed time, elapsed time in [-1, 1]) -> dim`` numbers or more.

    Exactness: biased, as good as the training.
    """

    process: PhysicsProcess
    frame: Frame
    network: Callable[[Array, Array, Array], Array]

    def __call__(self, t: Float[Array, ""], x: State) -> State:
        """Compute grad log p at a time of the grid."""
        return self.at(jnp.argmin(jnp.abs(self.process.ts[1:] - t)), x)

    def at(self, k: Int[Array, ""], x: State) -> State:
        """Compute grad log p of the state at the end of step k."""
        v = self.frame.standardise(k, x)
        move = self.network(v.astype(jnp.float32), *elapsed(self.process, k))[: v.size]
        return (move - v) / self.frame.spread[k]
