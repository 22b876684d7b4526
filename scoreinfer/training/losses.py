"""Losses: functions ``(module, batch, key) -> scalar`` for the one training loop.

Everything is in the whitened space, where a draw has roughly unit variance at every observation.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from scoreinfer._typing import Key, Sites
from scoreinfer.score.network import ConditionalScore, preconditioners
from scoreinfer.training.simulations import Simulations
from scoreinfer.training.whitening import Whitening

USELESS = 1e4
"""Mean squared gradient in the whitened space beyond which target-score matching costs more than it gives."""


class ScoreBatch(NamedTuple):
    """What the denoising loss needs of each simulation.

    Args:
        u: whitened latent vectors.
        x: standardised observed sites.
        gradient: grad log p(u, x) with respect to u (zeros where target-score matching is off).
    """

    u: Float[Array, "num dim"]
    x: Sites
    gradient: Float[Array, "num dim"]


class NoiseLevels(NamedTuple):
    """The distribution of training noise: log level ~ Normal(mean, sd), stratified within the batch."""

    mean: float = -1.2
    sd: float = 1.6

    def sample(self, key: Key, num: int) -> Float[Array, " num"]:
        """Draw ``num`` levels, one in each of ``num`` equal-probability strata."""
        where, order = jax.random.split(key)
        uniform = (jnp.arange(num) + jax.random.uniform(where, (num,))) / num
        uniform = jax.random.permutation(order, jnp.clip(uniform, 1e-6, 1 - 1e-6))
        return jnp.exp(self.mean + self.sd * jax.scipy.special.ndtri(uniform)).astype(jnp.float32)


def whitening_loss(module: Whitening, batch: Simulations, key: Key) -> Float[Array, ""]:
    """Compute the mean Gaussian negative log-likelihood of z under N(m(x), L(x) L(x)^T), without its constant."""
    maps = jax.vmap(module)(batch.x)
    u = jax.vmap(lambda affine, z: affine.inverse(z))(maps, batch.z)
    # Heavy tails: beyond six standard deviations the penalty grows linearly.
    squares = jnp.where(jnp.abs(u) < 6.0, 0.5 * u**2, 6.0 * jnp.abs(u) - 18.0)
    return (squares.sum(1) + jax.vmap(lambda affine, u: affine.log_det(u))(maps, u)).mean()


def target_mix(level: Float[Array, "..."], precision: Float[Array, " dim"]) -> Float[Array, "... dim"]:
    """Compute the share of the target-score estimate in the regression target, 1 / (1 + s^2 precision).

    For a Gaussian draw with that precision, (1 - share) u + share (u_s + s^2 grad log p) has no variance at all
    given u_s: the two estimates' errors cancel.
    """
    return 1.0 / (1.0 + level[..., None] ** 2 * precision)


def denoising_loss(
    module: ConditionalScore,
    batch: ScoreBatch,
    key: Key,
    *,
    precision: Float[Array, " dim"] | None,
    levels: NoiseLevels = NoiseLevels(),
) -> Float[Array, ""]:
    """Compute the preconditioned denoising loss, plus the variance head's negative log-likelihood.

    The regression target is u_0 (denoising score matching), or its mixture with the target-score estimate
    u_s + s^2 grad log p(u_0, x) where ``precision`` is given; both have the denoiser as conditional mean.

    References: Karras et al. 2022, arXiv 2206.00364, equation 8; De Bortoli et al. 2024, arXiv 2402.08667 (target
    score matching).
    """
    for_level, for_noise = jax.random.split(key)
    num = batch.u.shape[0]
    level = levels.sample(for_level, num)
    u = batch.u.astype(jnp.float32)
    noisy = u + level[:, None] * jax.random.normal(for_noise, u.shape, jnp.float32)
    target = u
    if precision is not None:
        share = target_mix(level, precision)
        target = u + share * (noisy + level[:, None] ** 2 * batch.gradient - u)
    skip, out, _ = preconditioners(level[:, None])
    context = jax.vmap(module.embedding)(batch.x)
    first, second = jax.vmap(module.score.heads)(level, noisy, context)
    residual = (target - skip * noisy) / out - first
    # The variance head sees the plain denoising residual, whose conditional variance is that of u_0 given u_s.
    plain = jax.lax.stop_gradient((u - skip * noisy) / out - first)
    second = jnp.clip(second, -12.0, 6.0)
    spread = 0.5 * (jnp.minimum(plain**2, 1e3) * jnp.exp(-second) + second)
    return (residual**2).mean() + 0.1 * spread.mean()


def mean_loss(loss, module: PyTree, batch: PyTree, key: Key, num_repeats: int = 4) -> Float[Array, ""]:
    """Average a loss over several noise draws: the validation figure."""
    keys = jax.random.split(key, num_repeats)
    return jax.lax.map(lambda k: loss(module, batch, k), keys).mean()


def target_precision(batch: ScoreBatch, wanted: bool | None = None) -> Float[Array, " dim"] | None:
    """Compute the mean squared gradients, or None where target-score matching would be biased or gain nothing.

    Jumps of the density and wrong gradients break Stein's identity E[u grad log p(u)] = -1: the target would be
    biased. Gradients far larger than one in the whitened space leave the target no share but at tiny noise.
    ``wanted``: True takes them all the same.
    """
    error, precision = _stein(batch)
    if wanted is None and not bool(((error < 5.0) & (precision < USELESS)).all()):
        return None
    return precision if bool(jnp.isfinite(precision).all()) else None


@eqx.filter_jit
def _stein(batch: ScoreBatch) -> tuple[Float[Array, " dim"], Float[Array, " dim"]]:
    """Compute the error of Stein's identity in standard errors, and the mean squared gradients."""
    products = batch.u * batch.gradient
    error = jnp.abs(products.mean(0) + 1.0) / (products.std(0) / jnp.sqrt(products.shape[0]) + 1e-6)
    return error, jnp.mean(batch.gradient**2, axis=0)
