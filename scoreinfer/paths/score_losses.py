"""Losses of scores of a process: functions ``(network, paths, key, ...) -> scalar`` for `scoreinfer.training.loop`.

Transition denoising, and implicit and sliced score matching as baselines, which use single states only. All losses
learn grad log p itself, without a factor.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.paths.learned import LearnedScore


def _pairs(paths: Array, key: Key, num_pairs: int) -> tuple[Array, Array, Array]:
    """Pick steps of each path at random. Return their numbers, the states before them and the states after them."""
    k = jax.random.randint(key, (paths.shape[0], num_pairs), 0, paths.shape[1] - 1)
    rows = jnp.arange(paths.shape[0])[:, None]
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    return k.reshape(-1), flat(paths[rows, k]), flat(paths[rows, k + 1])


def transition_denoising_loss(
    network: Callable, paths: Float[Array, "num times dim"], key: Key, *, score: LearnedScore, num_pairs: int
) -> Float[Array, ""]:
    """Compute the denoising score matching loss on the transitions of the process, per component.

        E || sqrt(Q) S(x_{k+1}) + (x_{k+1} - Phi(x_k)) / sqrt(Q) ||^2

    Exactness: the gradient of a transition's log density is an unbiased target of the score at its end, for any length
        of the step.

    References: Vincent 2011; Song et al. 2021, arXiv 2011.13456, equation 7.
    """
    score = eqx.tree_at(lambda tree: tree.network, score, network)

    def one(k: Array, old: Array, new: Array) -> Array:
        scale = score.process.scale[k]
        noise = (new - score.process.forward(k, old)) / scale
        return ((scale * score.at(k, new) + noise) ** 2).mean()

    return jax.vmap(one)(*_pairs(paths, key, num_pairs)).mean()


def implicit_score_loss(
    network: Callable,
    paths: Float[Array, "num times dim"],
    key: Key,
    *,
    score: LearnedScore,
    num_pairs: int,
    sliced: bool = False,
) -> Float[Array, ""]:
    """Compute the implicit score matching loss, per component and in units of each component's spread.

        E[ |S|^2 / 2 + div S ],    with ``sliced``: E[ |S|^2 / 2 + v dS v ]

    ``sliced`` estimates the divergence with one random direction v per state (variance-reduced form). It is for
    dimensions in which the whole Jacobian is too expensive.

    Exactness: both losses have the score as their minimum; the sliced one is an unbiased estimate of the other.

    References: Hyvarinen 2005, JMLR 6, theorem 1; Song et al. 2019, arXiv 1905.07088, equation 8.
    """
    score = eqx.tree_at(lambda tree: tree.network, score, network)
    for_pairs, for_directions = jax.random.split(key)
    k, _, new = _pairs(paths, for_pairs, num_pairs)
    directions = jax.random.rademacher(for_directions, new.shape, new.dtype)

    def one(k: Array, x: Array, direction: Array) -> Array:
        centre, spread = score.frame.centre[k], score.frame.spread[k]

        def scaled(v: Array) -> Array:
            return spread * score.at(k, centre + spread * v)

        v = score.frame.standardise(k, x)
        if sliced:
            value, slope = jax.jvp(scaled, (v,), (direction,))
            divergence = direction @ slope
        else:
            value, divergence = scaled(v), jnp.trace(jax.jacfwd(scaled)(v))
        return (0.5 * value @ value + divergence) / x.size

    return jax.vmap(one)(k, new, directions).mean()
