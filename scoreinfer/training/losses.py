"""Losses: functions ``(module, batch, key) -> scalar`` for the training loop.

The denoising loss works in the whitened space, where draws have about unit variance at every observation. Notation: u_0
is a whitened draw, s the noise level, and u_s = u_0 + s e the noisy draw.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from scoreinfer._typing import Key, Sites
from scoreinfer.score.network import ConditionalScore, preconditioners
from scoreinfer.training.grouped import GroupWhitening
from scoreinfer.training.simulations import Simulations
from scoreinfer.training.whitening import Whitening

USELESS = 1e4
"""Mean squared gradient in the whitened space above which target-score matching is not used. Chosen by judgement."""


class ScoreBatch(NamedTuple):
    """A batch of the denoising loss.

    Args:
        u: whitened latent vectors.
        x: standardised observed sites.
        gradient: gradient of log p(u, x) with respect to u; zeros without target-score matching.
    """

    u: Float[Array, "num dim"]
    x: Sites
    gradient: Float[Array, "num dim"]


class NoiseLevels(NamedTuple):
    """The distribution of noise levels in training: log level ~ Normal(mean, sd), stratified within the batch.

    Args:
        mean: mean of the log level.
        sd: standard deviation of the log level.
    """

    mean: float = -1.2
    sd: float = 1.6

    def sample(self, key: Key, num: int) -> Float[Array, " num"]:
        """Draw ``num`` levels, one in each of ``num`` strata of equal probability, which begin at a random one.

        Exactness: every level has the stated distribution, cut at the probabilities 1e-6 and 1 - 1e-6.
        """
        for_first, for_uniform = jax.random.split(key)
        strata = (jnp.arange(num) + jax.random.randint(for_first, (), 0, num)) % num
        uniform = jnp.clip((strata + jax.random.uniform(for_uniform, (num,))) / num, 1e-6, 1 - 1e-6)
        return jnp.exp(self.mean + self.sd * jax.scipy.special.ndtri(uniform)).astype(jnp.float32)


def whitening_loss(module: Whitening | GroupWhitening, batch: Simulations, key: Key) -> Float[Array, ""]:
    """Compute the mean of -log N(z; m(x), L(x) L(x)^T), without its constant; linear beyond six standard deviations."""
    maps = jax.vmap(module)(batch.x)
    u = jax.vmap(lambda affine, z: affine.inverse(z))(maps, batch.z)
    # The linear growth limits the effect of heavy tails.
    squares = jnp.where(jnp.abs(u) < 6.0, 0.5 * u**2, 6.0 * jnp.abs(u) - 18.0)
    return (squares.sum(1) + jax.vmap(lambda affine, u: affine.log_det(u))(maps, u)).mean()


def target_mix(level: Float[Array, "..."], precision: Float[Array, " dim"]) -> Float[Array, "... dim"]:
    """Compute share = 1 / (1 + s^2 precision), the share of the target-score estimate in the regression target.

    For a Gaussian u_0 with this precision, (1 - share) u_0 + share (u_s + s^2 grad log p) has variance zero given u_s,
    because the errors of the two estimates cancel.
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
    """Compute the preconditioned denoising loss, plus 0.1 times the negative log-likelihood of the variance head.

    Without ``precision`` the regression target is u_0 (denoising score matching). With ``precision`` it is the mixture
    of u_0 and the target-score estimate u_s + s^2 grad log p(u_0, x), with the share of `target_mix`. The conditional
    mean of both targets is the denoiser.

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
    # The variance head learns from the residual of u_0: its conditional variance is that of u_0 given u_s.
    plain = jax.lax.stop_gradient((u - skip * noisy) / out - first)
    second = jnp.clip(second, -12.0, 6.0)
    spread = 0.5 * (jnp.minimum(plain**2, 1e3) * jnp.exp(-second) + second)
    return (residual**2).mean() + 0.1 * spread.mean()


def mean_loss(loss, module: PyTree, batch: PyTree, key: Key, num_repeats: int = 4) -> Float[Array, ""]:
    """Compute the validation loss: the mean of a loss over ``num_repeats`` random keys."""
    keys = jax.random.split(key, num_repeats)
    return jax.lax.map(lambda k: loss(module, batch, k), keys).mean()


def target_precision(batch: ScoreBatch, wanted: bool | None = None) -> Float[Array, " dim"] | None:
    """Compute the precision for `denoising_loss`: the mean squared gradient of every dimension.

    None means that target-score matching would be biased or without gain. Jumps of the density and wrong gradients
    violate Stein's identity E[u grad log p(u)] = -1; the target would then be biased. Gradients far above one in the
    whitened space give the target-score estimate almost no share, except at very small noise.

    Args:
        batch: the simulations.
        wanted: None applies both tests. True applies neither, and the result is None only if a mean squared gradient is
            not finite. False always gives None.
    """
    if wanted is False:
        return None
    error, precision = _stein(batch)
    if wanted is None and not bool(((error < 5.0) & (precision < USELESS)).all()):
        return None
    return precision if bool(jnp.isfinite(precision).all()) else None


@eqx.filter_jit
def _stein(batch: ScoreBatch) -> tuple[Float[Array, " dim"], Float[Array, " dim"]]:
    """Compute, in every dimension, the error of Stein's identity in standard errors and the mean squared gradient."""
    products = batch.u * batch.gradient
    error = jnp.abs(products.mean(0) + 1.0) / (products.std(0) / jnp.sqrt(products.shape[0]) + 1e-6)
    return error, jnp.mean(batch.gradient**2, axis=0)
