"""Hybrid score matching: the loss of a velocity score, with the first velocity integrated out.

Given a position x_0 the state at time t is Gaussian, with a covariance factor L that includes the random first
velocity. Its score by the velocity is minus the velocity's noise over L_22. So the loss of the predicted noise, with
weight one,

    E |e_v - predicted(t, mean(x_0) + L e)|^2,        t uniform on [0, 1],

has the velocity score as its minimiser. Conditioning on the first velocity as well (denoising score matching) has the
same minimiser, and a larger variance at small times.

References: Dockhorn, Vahdat and Kreis 2021, arXiv 2112.07068 (hybrid score matching).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.nets import ConditionalMLP
from scoreinfer.process.langevin import CriticallyDamped
from scoreinfer.score.velocity import NeuralVelocity

LEAST_TIME = 1e-4
"""Earliest time that is trained: noise below a ten thousandth of the velocity's scale says nothing of x_0."""


def velocity_score(key: Key, dim: int, process: CriticallyDamped, *, width: int = 96, depth: int = 3) -> NeuralVelocity:
    """Make an untrained velocity score: that of N(0, I)."""
    return NeuralVelocity(process, ConditionalMLP(key, 2 * dim, 0, dim, width=width, depth=depth))


def hybrid_loss(score: NeuralVelocity, x: Float[Array, "num dim"], key: Key) -> Float[Array, ""]:
    """Compute the hybrid score matching loss of a batch of positions, stratified in time."""
    for_time, for_noise = jax.random.split(key)
    num = len(x)
    times = jnp.maximum((jnp.arange(num) + jax.random.uniform(for_time, (num,))) / num, LEAST_TIME)
    noise = jax.random.normal(for_noise, (num, 2, x.shape[1]), jnp.float32)

    def error(x: Float[Array, " dim"], t: Float[Array, ""], noise: Float[Array, "2 dim"]) -> Float[Array, ""]:
        move, factor = score.process.marginal(t)
        u = move @ score.process.start(x.astype(jnp.float32)) + factor @ noise
        return ((score.noise(t, u) - noise[1]) ** 2).mean()

    return jax.vmap(error)(x, times, noise).mean()
