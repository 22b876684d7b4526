"""Learning a prior: a score of draws, of whatever they may be draws of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.bijections.affine import Affine
from scoreinfer.bijections.base import spread
from scoreinfer.model import problem_of
from scoreinfer.nets import Concatenate
from scoreinfer.problem import Problem
from scoreinfer.samplers.learned_prior import LearnedPrior
from scoreinfer.score import Unconditional
from scoreinfer.score.network import score_module
from scoreinfer.training.loop import Budget, train
from scoreinfer.training.losses import NoiseLevels, ScoreBatch, denoising_loss

HELD_OUT, MOST_HELD_OUT = 0.1, 2048
"""Share of the draws, and most of them, that training does not see. Chosen by judgement."""
NUM_DRAWN = 50_000
"""Draws of a model from which its prior is learned. Chosen by judgement."""
LEAST_DRAWS = 100
"""Fewest draws to learn from. Chosen by judgement."""
RIDGE = 1e-6
"""Ridge of the whitening, for the rounding of float32."""


def fit_score(
    key: Key,
    draws: Float[Array | np.ndarray, "num *shape"] | Callable[..., Any] | Problem,
    *args: Any,
    num_steps: int = 5000,
    width: int = 96,
    depth: int = 3,
    learning_rate: float = 4e-3,
    progress_bar: bool = True,
    **kwargs: Any,
) -> LearnedPrior:
    """Learn a prior from draws, or from a NumPyro model: the denoiser of whitened draws.

    Args:
        key: random key.
        draws: draws, draw axis first, each of any shape; or a model, whose latent sites are then drawn, as one flat
            vector in the unconstrained space.
        *args: the model's arguments.
        num_steps: optimiser steps. The weights of the smallest held-out loss are kept.
        width: width of the network.
        depth: number of its residual blocks.
        learning_rate: largest learning rate.
        progress_bar: whether to show a progress bar on a terminal.
        **kwargs: the model's keyword arguments.

    Raises:
        ValueError: if there are fewer than 100 draws, or some are not finite.
        UnsupportedModel: if the model cannot be read or simulated.

    Exactness: biased: as good as training. Posteriors under the learned prior are exact for the prior itself.

    >>> draws = jax.random.normal(jax.random.key(0), (500, 2)) * jnp.array([1.0, 3.0]) + 2.0
    >>> prior = fit_score(jax.random.key(1), draws, num_steps=250, width=8, depth=1, progress_bar=False)
    >>> prior.sample(jax.random.key(2), 1000).std(0).round(0).tolist()
    [1.0, 3.0]
    """
    for_draws, for_net, for_training = jax.random.split(key, 3)
    values = _drawn(for_draws, draws, args, kwargs) if callable(draws) or isinstance(draws, Problem) else draws
    values = jnp.asarray(values, jnp.float32)
    _check(values)
    flat = values.reshape(len(values), -1)
    change = Affine(flat.mean(0), spread(flat, RIDGE))
    rows = ScoreBatch(change.inverse(flat), {"nothing": jnp.zeros((len(flat), 0))}, jnp.zeros_like(flat))
    held_out = min(int(HELD_OUT * len(flat)), MOST_HELD_OUT)
    validation, training = (jax.tree.map(lambda leaf, w=which: leaf[w], rows) for which in _split(held_out))
    module = score_module(for_net, flat.shape[1], Concatenate(), validation.x, width=width, depth=depth)
    loss = jax.tree_util.Partial(denoising_loss, precision=None, levels=NoiseLevels(-0.8, 1.8))
    budget = Budget(num_steps, batch_size=min(512, len(flat) - held_out), learning_rate=learning_rate)
    trained, history = train(
        for_training, module, loss, lambda key: training, validation, budget, progress_bar=progress_bar,
        title="prior",
    )  # fmt: skip
    return LearnedPrior(change, Unconditional(trained.score), values.shape[1:], training=str(history))


def _split(held_out: int) -> tuple[slice, slice]:
    return slice(None, held_out), slice(held_out, None)


def _drawn(key: Key, model: Any, args: tuple, kwargs: dict[str, Any]) -> Float[Array, "num dim"]:
    problem = problem_of(model, args, kwargs)
    if problem.simulate is None:
        raise ValueError(f"The prior of this model cannot be drawn from: {problem.not_simulable}. Pass draws instead.")
    return jax.jit(jax.vmap(lambda key: problem.simulate(key)[0]))(jax.random.split(key, NUM_DRAWN))  # type: ignore[misc]


def _check(values: Float[Array, "num *shape"]) -> None:
    if values.ndim < 2 or len(values) < LEAST_DRAWS:
        raise ValueError(
            f"`draws` must be an array of at least {LEAST_DRAWS} draws, draw axis first, then at least one axis more; "
            f"got shape {values.shape}."
        )
    bad = int((~jnp.isfinite(values)).reshape(len(values), -1).any(axis=1).sum())
    if bad:
        raise ValueError(f"`draws` must be finite, but {bad} of {len(values)} are not. Remove them.")
