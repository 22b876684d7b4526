"""Learned kernels and scores: regression at every step, and one network for all steps on top of it.

The network sees standardised states and answers in units of what the regression leaves, so that its outputs are of
order one at all times; its last layer starts at zero, so that what is untrained is the regression.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.montecarlo.langevin import colour
from scoreinfer.nets import ResidualMLP
from scoreinfer.paths.frame import Context, Frame
from scoreinfer.paths.gaussian import AbstractBackward, Kernel, State
from scoreinfer.process import PhysicsProcess
from scoreinfer.process.physics import hartley


class LearnedBackward(AbstractBackward):
    """Kernels whose mean and variances a network has learned by likelihood, on top of physics and regression.

    With v the standardised state and L the regression's residual factor,

        B_k = N(reverse physics + regression + L f(v, t, c), L diag(exp(2 h(v, t, c))) L^T),

    c being whatever else decides where the state came from: unknown parameters, observations of earlier states.
    The likelihood of transitions is what the effective sample size depends on, and needs no inverse of the step.

    Args:
        process: the physics.
        frame: the regression.
        network: ``(v, log of elapsed time, (elapsed time in [-1, 1], *c)) -> 2 dim`` numbers, f and h.
        context: c, of one observation and one value of the parameters (see `given`); none, or zeros: their mean.
        physics: show the network, behind v, the plain state and the physics' increment in units of the noise, too.
        separate: show the network the state after the physics backwards instead of before.

    Exactness: exact weights whatever was learned; without weights biased, as good as the training.

    References: Holzschuh et al. 2023, arXiv 2301.10250, equation 4 (the one-step loss, its mean); Bao et al. 2022,
    arXiv 2201.06503 (learned reverse variances).
    """

    process: PhysicsProcess
    frame: Frame
    network: Callable[[Array, Array, Array], Array]
    context: Context = eqx.field(default_factory=lambda: jnp.zeros(0, jnp.float32))
    physics: bool = eqx.field(static=True, default=False)
    separate: bool = eqx.field(static=True, default=False)

    def given(self, context: Context) -> "LearnedBackward":
        """Condition the kernels."""
        return dataclasses.replace(self, context=context)

    def __call__(self, k, x):
        """Make the kernel of step k."""
        log_time, time = elapsed(self.process, k)
        move, log_scale = heads(self.network, self.features(k, x), log_time, jnp.concatenate([time, self.context]))
        mean, factor = self.frame.mean(self.process, k, x, self.context), self.frame.factor[k]
        # A reverse solver that blows up far out is stopped there, so that every density stays finite.
        mean = jnp.where(jnp.isfinite(mean), mean, self.frame.centre[k])
        mean = jnp.clip(mean + colour(factor, move), *self.frame.bounds(k))
        if factor.ndim == 1:
            return Kernel(mean, factor * jnp.exp(log_scale))
        return Kernel(mean, jnp.exp(log_scale).astype(mean.dtype), factor)

    def features(self, k: Int[Array, ""], x: State) -> Float[Array, " features"]:
        """Compute what the network sees of the state at the end of step k."""
        x = self.process.reverse(k, x) if self.separate else x
        seen = [self.frame.standardise(k, x)]
        if self.physics:
            centre, spread = self.frame.centre[k], self.frame.spread[k]
            seen.append((x - centre) / jnp.sqrt((spread**2).mean()))
            seen.append((self.process.forward(k, x) - x) / self.process.scale[k])
        # Physics may blow up where a runaway path takes it: what the network sees stays finite.
        return jnp.clip(jnp.nan_to_num(jnp.concatenate(seen)), -MOST_SEEN, MOST_SEEN).astype(jnp.float32)

    def score(self, t: Float[Array, ""], x: State) -> State:
        """Compute (Phi(E[x_k | x_{k+1}]) - x_{k+1}) / Q, the score that the learned means stand for.

        Tweedie's E[Phi(x_k) | x_{k+1}] = x_{k+1} + Q S with the mean moved inside Phi, so that the error of whatever
        reverse physics was learned on is no part of it.

        Exactness: biased, as good as the training, and by O(t_{k+1} - t_k) where the physics is not linear.
        """
        k = jnp.argmin(jnp.abs(self.process.ts[1:] - t))
        return (self.process.forward(k, self(k, x).mean) - x) / self.process.scale[k] ** 2


def corrected_path(
    key: Key, backward: LearnedBackward, end: State, num_steps: int, num_corrections: int
) -> Float[Array, "times dim"]:
    """Draw a path backwards, every state but the first moved by Langevin steps with the learned score.

    The corrector of a state known to lead to x_{k+1} aims at p(x_k | x_{k+1}), whose gradient is the score at time k
    and that of the transition,

        score(t_k, x_k) + J^T (x_{k+1} - Phi(x_k)) / Q,    J = dPhi at x_k

    (the score alone would forget the end). Steps are preconditioned by the kernel B_k, such that they leave it alone
    where it is right. Nothing is learned of the score of x_0, which is drawn from its kernel.

    Exactness: biased: steps of finite length, without a Metropolis test, and a learned score.

    Good values: 2 to 10 corrections; none where the kernels are well trained.

    References: Song et al. 2021, arXiv 2011.13456, algorithm 1; Cotter et al. 2013, arXiv 1202.0709, equation 4.6.
    """
    process = backward.process

    def back(x: State, inputs: tuple[Array, Key]) -> tuple[State, State]:
        k, key = inputs
        for_draw, for_noise = jax.random.split(key)
        kernel = backward(k, x)

        def correct(new: State, key: Key) -> tuple[State, None]:
            mean, pull = jax.vjp(lambda old: process.forward(k, old), new)
            gradient = backward.score(process.ts[k], new) + pull((x - mean) / process.scale[k] ** 2)[0]
            noise = jax.random.normal(key, new.shape, new.dtype)
            step = (1 - (1 - CORRECTION**2) ** 0.5) * kernel.gather(gradient) + CORRECTION * noise
            return new + kernel.spread(step), None

        drawn = kernel.draw(for_draw)[0]
        moved = jax.lax.scan(correct, drawn, jax.random.split(for_noise, num_corrections))[0]
        new = jnp.where(k == 0, drawn, moved)
        return new, new

    steps = jnp.arange(num_steps)
    path = jax.lax.scan(back, end, (steps, jax.random.split(key, num_steps)), reverse=True)[1]
    return jnp.concatenate([path, end[None]])


CORRECTION = 0.5
"""Noise of a Langevin correction, in units of the backward kernel's own."""
MAX_LOG_SCALE = 4.0
MOST_SEEN = 1e4
"""Largest number that a network is shown."""


def heads(network: Callable, seen: Array, log_time: Array, context: Context) -> tuple[State, State]:
    """Compute the learned move of the mean and the log scale, in the frame."""
    move, log_scale = jnp.split(network(seen, log_time, context), 2)
    return move, MAX_LOG_SCALE * jnp.tanh(log_scale / MAX_LOG_SCALE)


class OnWaves(eqx.Module):
    """Let a network of fields move their Hartley coefficients, as `Physics` with ``waves`` has them.

    The network sees and moves fields; log scales are each wavenumber's own, functions of time and context alone.

    Args:
        network: a network of fields: the first half of what it returns is the move.
        scales: network of log scales, of elapsed time, its logarithm and the context.
        shape: shape of one state.
    """

    network: Callable[[Array, Array, Array], Array]
    scales: ResidualMLP
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(
        self, seen: Float[Array, " features"], log_time: Float[Array, ""], context: Float[Array, " context"]
    ) -> Float[Array, " outputs"]:
        """Compute move and log scale of the coefficients."""
        fields = hartley(seen.reshape(-1, *self.shape), len(self.shape))
        move = jnp.split(self.network(fields.ravel(), log_time, context), 2)[0]
        move = hartley(move.reshape(self.shape), len(self.shape)).ravel()
        return jnp.concatenate([move, self.scales(jnp.append(context, log_time))])


def elapsed(process: PhysicsProcess, k: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, " 1"]]:
    """Compute the time at the end of step k as a network sees it: its logarithm, and on the scale from -1 to 1."""
    share = (process.ts[k + 1] - process.ts[0]) / (process.ts[-1] - process.ts[0])
    return jnp.log(share).astype(jnp.float32), (2 * share[None] - 1).astype(jnp.float32)


def through_time(process: PhysicsProcess) -> tuple[Float[Array, " steps"], Float[Array, "steps 1"]]:
    """Compute `elapsed` for every step."""
    return jax.vmap(lambda k: elapsed(process, k))(jnp.arange(process.num_steps))


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
