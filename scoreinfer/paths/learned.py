"""Learned kernels and scores: a regression at every step, and one network that learns the residuals of all steps.

The network sees standardised states. Its outputs are in units of the residuals of the regression, so that they are of
order one at all times. Its last layer starts at zero, so that untrained kernels are the regression.
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
    """Kernels whose means and variances are learned by likelihood: reverse physics, plus regression, plus a network.

        B_k = N(reverse physics + regression + L f(v, t, c), L diag(exp(2 h(v, t, c))) L^T)

    v is the standardised state and L the factor of the regression's residuals. c are the other conditions: unknown
    parameters and observations of earlier states. The effective sample size depends on the likelihood of transitions,
    which is the training loss. It needs no inverse of the physics step.

    Args:
        process: the physics.
        frame: the regression.
        network: ``(v, log of elapsed time, (elapsed time in [-1, 1], *c)) -> 2 dim`` numbers, f and h.
        context: c for one observation and one value of the parameters (see `given`). Zeros mean the average
            conditions; an empty vector means no conditions.
        physics: whether the network also sees, after v, the centred state divided by one number for all components,
            and the increment of the physics in units of the noise.
        separate: whether the network sees the state after the backward physics step, instead of the one before.

    Exactness: weights are exact for any training. Unweighted paths are biased; the bias depends on the training.

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
        """Return the kernels with the given conditions."""
        return dataclasses.replace(self, context=context)

    def __call__(self, k, x):
        """Make the kernel of step k."""
        log_time, time = elapsed(self.process, k)
        move, log_scale = heads(self.network, self.features(k, x), log_time, jnp.concatenate([time, self.context]))
        mean, factor = self.frame.mean(self.process, k, x, self.context), self.frame.factor[k]
        # A reverse solver may diverge far from the simulated states. The mean is bounded, so that densities are finite.
        mean = jnp.where(jnp.isfinite(mean), mean, self.frame.centre[k])
        mean = jnp.clip(mean + colour(factor, move), *self.frame.bounds(k))
        if factor.ndim == 1:
            return Kernel(mean, factor * jnp.exp(log_scale))
        return Kernel(mean, jnp.exp(log_scale).astype(mean.dtype), factor)

    def features(self, k: Int[Array, ""], x: State) -> Float[Array, " features"]:
        """Compute the network's input from the state at the end of step k."""
        x = self.process.reverse(k, x) if self.separate else x
        seen = [self.frame.standardise(k, x)]
        if self.physics:
            centre, spread = self.frame.centre[k], self.frame.spread[k]
            seen.append((x - centre) / jnp.sqrt((spread**2).mean()))
            seen.append((self.process.forward(k, x) - x) / self.process.scale[k])
        # The physics may diverge far from the simulated states. The input of the network is bounded.
        return jnp.clip(jnp.nan_to_num(jnp.concatenate(seen)), -MOST_SEEN, MOST_SEEN).astype(jnp.float32)

    def score(self, t: Float[Array, ""], x: State) -> State:
        """Compute the score that follows from the learned means, (Phi(E[x_k | x_{k+1}]) - x_{k+1}) / Q.

        This is Tweedie's E[Phi(x_k) | x_{k+1}] = x_{k+1} + Q S with the mean taken inside Phi. Errors of the reverse
        physics do not enter.

        Exactness: biased; the bias depends on the training, and is O(t_{k+1} - t_k) for nonlinear physics.
        """
        k = jnp.argmin(jnp.abs(self.process.ts[1:] - t))
        return (self.process.forward(k, self(k, x).mean) - x) / self.process.scale[k] ** 2


def corrected_path(
    key: Key, backward: LearnedBackward, end: State, num_steps: int, num_corrections: int
) -> Float[Array, "times dim"]:
    """Draw a path backwards; move every state except the first by Langevin steps with the learned score.

        grad log p(x_k | x_{k+1}) = score(t_k, x_k) + J^T (x_{k+1} - Phi(x_k)) / Q,    J = dPhi at x_k

    The Langevin steps target p(x_k | x_{k+1}), so that the path still leads to its end. They are preconditioned by the
    kernel B_k and leave B_k invariant if it is correct. The score of x_0 is not learned, so x_0 is not moved.

    Args:
        key: random key.
        backward: the learned kernels.
        end: the last state.
        num_steps: number of steps backwards.
        num_corrections: number of Langevin steps for each state.

    Exactness: biased: the Langevin steps have finite length and no Metropolis test, and the score is learned.

    Good values: 2 to 10 corrections; none if the kernels are well trained.

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
"""Noise of a Langevin correction, in units of the backward kernel's noise. Chosen by judgement."""
MAX_LOG_SCALE = 4.0
"""Bound of the learned log scales, in absolute value. Chosen by judgement."""
MOST_SEEN = 1e4
"""Bound of the network's inputs, in absolute value. Chosen by judgement."""


def heads(network: Callable, seen: Array, log_time: Array, context: Context) -> tuple[State, State]:
    """Compute the learned move of the mean and the log scale, in the units of the frame."""
    move, log_scale = jnp.split(network(seen, log_time, context), 2)
    return move, MAX_LOG_SCALE * jnp.tanh(log_scale / MAX_LOG_SCALE)


class OnWaves(eqx.Module):
    """Apply a network for fields to Hartley coefficients (`Physics` with ``waves``).

    The network sees and moves fields. Every wavenumber has a log scale, which depends on time and context only.

    Args:
        network: a network for fields; the first half of its output is the move.
        scales: network of the log scales; its inputs are elapsed time, context and the logarithm of elapsed time.
        shape: shape of one state.
    """

    network: Callable[[Array, Array, Array], Array]
    scales: ResidualMLP
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(
        self, seen: Float[Array, " features"], log_time: Float[Array, ""], context: Float[Array, " context"]
    ) -> Float[Array, " outputs"]:
        """Compute moves and log scales of the coefficients."""
        fields = hartley(seen.reshape(-1, *self.shape), len(self.shape))
        move = jnp.split(self.network(fields.ravel(), log_time, context), 2)[0]
        move = hartley(move.reshape(self.shape), len(self.shape)).ravel()
        return jnp.concatenate([move, self.scales(jnp.append(context, log_time))])


def elapsed(process: PhysicsProcess, k: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, " 1"]]:
    """Compute the network's time inputs at the end of step k: log of the elapsed share, and time scaled to [-1, 1]."""
    share = (process.ts[k + 1] - process.ts[0]) / (process.ts[-1] - process.ts[0])
    return jnp.log(share).astype(jnp.float32), (2 * share[None] - 1).astype(jnp.float32)


@eqx.filter_jit
def through_time(process: PhysicsProcess) -> tuple[Float[Array, " steps"], Float[Array, "steps 1"]]:
    """Compute `elapsed` for every step."""
    return jax.vmap(lambda k: elapsed(process, k))(jnp.arange(process.num_steps))


class LearnedScore(eqx.Module):
    """A learned score: the score of a Gaussian with the state's mean and variances, plus a network.

        S = -(v - f(v, t)) / spread,    v the standardised state

    For `ReverseEuler` and `ThroughPhysics`, and for comparison. `LearnedBackward` has a larger effective sample size.

    Args:
        process: the physics.
        frame: the regression; only its centre and spread are used.
        network: ``(v, log of elapsed time, elapsed time in [-1, 1]) -> dim`` numbers; further outputs are ignored.

    Exactness: biased; the bias depends on the training.
    """

    process: PhysicsProcess
    frame: Frame
    network: Callable[[Array, Array, Array], Array]

    def __call__(self, t: Float[Array, ""], x: State) -> State:
        """Compute grad log p at the nearest time of the grid."""
        return self.at(jnp.argmin(jnp.abs(self.process.ts[1:] - t)), x)

    def at(self, k: Int[Array, ""], x: State) -> State:
        """Compute grad log p of the state at the end of step k."""
        v = self.frame.standardise(k, x)
        move = self.network(v.astype(jnp.float32), *elapsed(self.process, k))[: v.size]
        return (move - v) / self.frame.spread[k]
