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
from scoreinfer.samplers.local_prior import Context, LocalPrior
from scoreinfer.score.local import windows
from scoreinfer.score.residual import ResidualScore
from scoreinfer.training.loop import Budget, train
from scoreinfer.training.residual import residual_loss

NUM_PATHS, NUM_WINDOWS, NUM_HELD_OUT = 256, 16_384, 4096
"""Paths simulated at once, windows of an epoch, and windows that training does not see. Chosen by judgement."""
Batch = tuple[Float[Array, "num dim"], Float[Array, "num seen"]]
LEAST_VARIANCE = 1e-6
"""Least variance of a direction of a window, in units of a component's: for the rounding of float32."""


def fit_local(
    key: Key,
    model: Callable[..., Any],
    site: str,
    *args: Any,
    k: int = 2,
    context: str | None = None,
    num_steps: int = 5000,
    width: int = 128,
    depth: int = 3,
    learning_rate: float = 2e-3,
    progress_bar: bool = True,
    **kwargs: Any,
) -> LocalPrior:
    """Learn the score of short windows of a model's paths, from its own simulations; no data are used.

    Every epoch simulates anew. All windows share one score, whatever their time: the process should be stationary, or
    nearly, given the context. Parameters that the model draws beside the path are averaged over, unless they are told
    by the context.

    Args:
        key: random key.
        model: the NumPyro model.
        site: its path: a site of shape ``(times, *state)``.
        *args: the model's arguments.
        k: half-width of the windows, 2 k + 1 times.
        context: what the score is told beside the window: a site of shape ``(times, *rest)``, such as time, a forcing,
            or parameters, repeated for every time. The model draws it here, and is given it where `SDA` is conditioned.
        num_steps: optimiser steps. The weights of the smallest held-out loss are kept.
        width: width of the network.
        depth: number of its residual blocks.
        learning_rate: largest learning rate.
        progress_bar: whether to show a progress bar on a terminal.
        **kwargs: the model's keyword arguments.

    Raises:
        UnsupportedModel: if there is no such site, or its support is not the real line.
        ValueError: if the path is shorter than a window, the context has no row for every time, or simulations are not
            finite.

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
    run = functools.partial(model, *args, **kwargs)
    drawn, shape = site_of(site, run)
    length = 2 * k + 1
    if not shape or shape[0] < length or k < 1:
        raise ValueError(
            f"Expected a path of at least 2 k + 1 = {length} times, `k` at least 1, got a site of shape {shape}. Use a "
            "smaller `k`, or `fit_score` for the whole path."
        )
    told, told_shape = (None, shape[:1]) if context is None else site_of(context, run)
    if told_shape[:1] != shape[:1]:
        raise ValueError(
            f"The context must have a row for each of the {shape[0]} times, got shape {told_shape}. Repeat it for "
            f"every time: `numpyro.deterministic({context!r}, jnp.broadcast_to(value, (times, *value.shape)))`."
        )
    cut = jax.jit(functools.partial(_windows, drawn, told, k))
    first = cut(for_first)
    if not all(bool(jnp.isfinite(part).all()) for part in first):
        raise ValueError(f"Paths of {site!r} simulated from the model are not all finite. Use smaller solver steps.")
    (mean, scale), (centre, unit) = (_units(part) for part in first)

    @jax.jit
    def pool(key: Key) -> Batch:
        path, beside = cut(key)
        return _flat((path - mean) / scale), _flat((beside - centre) / unit)

    dim, num_context = length * mean.size, length * centre.size
    score = _begun(pool(for_first)[0], ConditionalMLP(for_net, dim, num_context, dim, width=width, depth=depth))
    budget, held_out = Budget(num_steps, learning_rate=learning_rate), pool(for_held_out)
    trained, history = train(
        for_training, score.network, _Loss(score), pool, jax.tree.map(lambda part: part[:NUM_HELD_OUT], held_out),
        budget, progress_bar=progress_bar, title="local score",
    )  # fmt: skip
    window = eqx.tree_at(lambda tree: tree.network, score, trained)
    beside = None if context is None else Context(context, centre, unit)
    return LocalPrior(window, k, mean, scale, shape[1:], str(history), beside)


class _Loss(eqx.Module):
    """The loss of the network alone: the Gaussian is not trained."""

    score: ResidualScore

    def __call__(self, network: Any, batch: Batch, key: Key) -> Float[Array, ""]:
        return residual_loss(eqx.tree_at(lambda tree: tree.network, self.score, network), *batch, key)


def _windows(
    drawn: Callable[[Key], Array], told: Callable[[Key], Array] | None, k: int, key: Key
) -> tuple[Float[Array, "windows length dim"], Float[Array, "windows length seen"]]:
    """Draw windows of the path and of the context: all of one path where they are few, else some, at random times."""
    for_paths, for_times = jax.random.split(key)
    keys = jax.random.split(for_paths, NUM_PATHS)

    def rows(draw: Callable[[Key], Array]) -> Float[Array, "windows length numbers"]:
        paths = jax.vmap(draw)(keys).astype(jnp.float32)
        paths = paths.reshape(*paths.shape[:2], -1)
        return jax.vmap(lambda path: windows(path, k))(paths).reshape(-1, 2 * k + 1, paths.shape[-1])

    path = rows(drawn)
    beside = jnp.zeros((*path.shape[:2], 0), jnp.float32) if told is None else rows(told)  # of the same simulations
    if len(path) <= NUM_WINDOWS:
        return path, beside
    kept = jax.random.choice(for_times, len(path), (NUM_WINDOWS,), replace=False)
    return path[kept], beside[kept]


def _units(rows: Float[Array, "windows length numbers"]) -> tuple[Float[Array, " numbers"], Float[Array, " numbers"]]:
    """Compute mean and standard deviation of every number of a time."""
    return rows.mean((0, 1)), rows.std((0, 1)) + 1e-12


def _flat(rows: Float[Array, "windows length numbers"]) -> Float[Array, "windows flat"]:
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def _begun(u: Float[Array, "num length"], network: ConditionalMLP) -> ResidualScore:
    mean = u.mean(0)
    values, basis = jnp.linalg.eigh(jnp.cov(u, rowvar=False))
    return ResidualScore(mean, basis, jnp.maximum(values, LEAST_VARIANCE), network)
