"""Learning a local prior of paths from windows of a model's own simulations."""

import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.model.seen import site_of
from scoreinfer.nets import ConditionalMLP
from scoreinfer.samplers.local_prior import LocalPrior
from scoreinfer.score.local import windows
from scoreinfer.score.residual import ResidualScore
from scoreinfer.training.loop import Budget, train
from scoreinfer.training.residual import residual_loss

NUM_PATHS, NUM_WINDOWS, NUM_HELD_OUT = 256, 16_384, 4096
"""Paths simulated at once, windows of an epoch, and windows that training does not see. Chosen by judgement."""
LEAST_VARIANCE = 1e-6
"""Least variance of a direction of a window, in units of a component's: for the rounding of float32."""


def fit_local(
    key: Key,
    model: Callable[..., Any],
    site: str,
    *args: Any,
    k: int = 2,
    num_steps: int = 5000,
    width: int = 128,
    depth: int = 3,
    learning_rate: float = 2e-3,
    progress_bar: bool = True,
    **kwargs: Any,
) -> LocalPrior:
    """Learn the score of short windows of a model's paths, from its own simulations; no data are used.

    Every epoch simulates anew. All windows share one score, whatever their time: the process should be stationary, or
    nearly. Parameters that the model draws beside the path are averaged over.

    Args:
        key: random key.
        model: the NumPyro model.
        site: its path: a site of shape ``(times, *state)``.
        *args: the model's arguments.
        k: half-width of the windows, 2 k + 1 times.
        num_steps: optimiser steps. The weights of the smallest held-out loss are kept.
        width: width of the network.
        depth: number of its residual blocks.
        learning_rate: largest learning rate.
        progress_bar: whether to show a progress bar on a terminal.
        **kwargs: the model's keyword arguments.

    Raises:
        UnsupportedModel: if there is no such site, or its support is not the real line.
        ValueError: if the path is shorter than a window, or simulations are not finite.

    Exactness: biased: as good as training, and a window is not the path. `SDA` finishes what is drawn with it on the
        model's own density.

    Good values: ``k`` = 2 to 4. Wider windows know more and take longer to learn.

    References: Rozet and Louppe 2023, arXiv 2306.10574, section 3.1.

    >>> import numpyro, numpyro.distributions as dist
    >>> import scoreinfer as si
    >>> def model(y=None):
    ...     ts = jnp.arange(10.0)
    ...     x = numpyro.sample("x", si.PhysicsPath(lambda s, t, x: 0.8 * x, 0.6, ts, dist.Normal(0.0, 1.0)))
    ...     numpyro.sample("y", dist.Normal(x[::3], 0.5), obs=y)
    >>> prior = fit_local(jax.random.key(0), model, "x", k=1, num_steps=250, width=8, depth=1, progress_bar=False)
    >>> prior.over((10,)).dim
    10
    """
    for_first, for_net, for_training, for_held_out = jax.random.split(key, 4)
    drawn, shape = site_of(site, functools.partial(model, *args, **kwargs))
    length = 2 * k + 1
    if not shape or shape[0] < length or k < 1:
        raise ValueError(
            f"Expected a path of at least 2 k + 1 = {length} times, `k` at least 1, got a site of shape {shape}. Use a "
            "smaller `k`, or `fit_score` for the whole path."
        )
    cut = jax.jit(functools.partial(_windows, drawn, k))
    first = cut(for_first)
    if not bool(jnp.isfinite(first).all()):
        raise ValueError(f"Paths of {site!r} simulated from the model are not all finite. Use smaller solver steps.")
    dim = math.prod(shape[1:])
    components = first.reshape(-1, dim)
    mean, scale = components.mean(0), components.std(0) + 1e-12
    units = jax.jit(lambda key: (cut(key).reshape(-1, length, dim) - mean) / scale)
    pool = lambda key: units(key).reshape(-1, length * dim)  # noqa: E731
    network = ConditionalMLP(for_net, length * dim, 0, length * dim, width=width, depth=depth)
    score = _begun(pool(for_first), network)
    budget = Budget(num_steps, learning_rate=learning_rate)
    trained, history = train(
        for_training, score.network, _Loss(score), pool, pool(for_held_out)[:NUM_HELD_OUT], budget,
        progress_bar=progress_bar, title="local score",
    )  # fmt: skip
    window = eqx.tree_at(lambda tree: tree.network, score, trained)
    return LocalPrior(window, k, mean, scale, shape[1:], training=str(history))


class _Loss(eqx.Module):
    """The loss of the network alone: the Gaussian is not trained."""

    score: ResidualScore

    def __call__(self, network: Any, batch: Float[Array, "num dim"], key: Key) -> Float[Array, ""]:
        return residual_loss(eqx.tree_at(lambda tree: tree.network, self.score, network), batch, key)


def _windows(drawn: Callable[[Key], Array], k: int, key: Key) -> Float[Array, "windows length"]:
    """Draw windows: all those of one path where they are few, else as many of each, at random times."""
    for_paths, for_times = jax.random.split(key)
    paths = jax.vmap(drawn)(jax.random.split(for_paths, NUM_PATHS)).astype(jnp.float32)
    paths = paths.reshape(NUM_PATHS, paths.shape[1], -1)
    cut = jax.vmap(lambda path: windows(path, k).reshape(path.shape[0] - 2 * k, -1))(paths)
    rows = cut.reshape(-1, cut.shape[-1])
    if len(rows) <= NUM_WINDOWS:
        return rows
    return rows[jax.random.choice(for_times, len(rows), (NUM_WINDOWS,), replace=False)]


def _begun(u: Float[Array, "num length"], network: ConditionalMLP) -> ResidualScore:
    mean = u.mean(0)
    values, basis = jnp.linalg.eigh(jnp.cov(u, rowvar=False))
    return ResidualScore(mean, basis, jnp.maximum(values, LEAST_VARIANCE), network)
