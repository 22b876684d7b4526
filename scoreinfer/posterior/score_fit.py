"""Learning a prior: a score of draws, of whatever they may be draws of; saving and loading it."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._tree import arrays_by_name, put_arrays
from scoreinfer._typing import Key
from scoreinfer.bijections.affine import Affine
from scoreinfer.bijections.base import spread
from scoreinfer.errors import UnreadableFile
from scoreinfer.files import check_seal, read_arrays, read_record, seal, write_arrays, write_record
from scoreinfer.identity import versions
from scoreinfer.model import problem_of
from scoreinfer.nets import Concatenate, ConditionalMLP
from scoreinfer.posterior.checkpoint import CONFIG, WEIGHTS
from scoreinfer.posterior.hyperparameters import MAX_SIZE, describe_sampler, make_sampler, perceptron_size, size_of
from scoreinfer.problem import Problem
from scoreinfer.samplers.diffusion import ProbabilityFlow
from scoreinfer.samplers.learned_prior import LearnedPrior
from scoreinfer.score import NeuralScore, Unconditional
from scoreinfer.score.network import score_module
from scoreinfer.training.loop import Budget, train
from scoreinfer.training.losses import NoiseLevels, ScoreBatch, denoising_loss

FORMAT, SCHEMA = "scoreinfer learned prior", 1
"""Format and schema number in ``config.json``."""
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


def save_score(prior: LearnedPrior, path: str | os.PathLike[str]) -> None:
    """Save a prior learned by `fit_score` to a folder of plain data.

    Raises:
        ValueError: if its score was not learned by `fit_score`.
    """
    if not isinstance(prior.score, Unconditional) or not isinstance(prior.score.score.network, ConditionalMLP):
        raise ValueError(f"Only scores learned by `fit_score` can be saved, got a `{type(prior.score).__name__}`.")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / WEIGHTS, {name: np.asarray(leaf) for name, leaf in arrays_by_name(prior).items()})
    record = {
        "format": FORMAT, "schema": SCHEMA, "versions": versions(), "shape": list(prior.shape),
        "network": prior.score.score.network.hyperparameters, "flow": describe_sampler(prior.flow),
        "training": prior.training, "weights": seal(folder / WEIGHTS),
    }  # fmt: skip
    write_record(folder / CONFIG, record)


def load_score(path: str | os.PathLike[str]) -> LearnedPrior:
    """Load a prior that `save_score` saved. Nothing in the folder is executed.

    Raises:
        UnreadableFile: if the folder is incomplete, changed, of another version, or not written by `save_score`.
    """
    folder = Path(path)
    record = read_record(folder / CONFIG)
    if record.get("format") != FORMAT or record.get("schema") != SCHEMA:
        raise UnreadableFile(folder / CONFIG, f"expected the format {FORMAT!r}, schema {SCHEMA}")
    try:
        check_seal(folder / WEIGHTS, record["weights"])
        outline = eqx.filter_eval_shape(partial(_outline, record))
        expected = arrays_by_name(outline)
        arrays, _ = read_arrays(folder / WEIGHTS, sum(8 * leaf.size for leaf in expected.values()))
        if {name: leaf.shape for name, leaf in arrays.items()} != {name: leaf.shape for name, leaf in expected.items()}:
            raise TypeError("its arrays do not fit its description")
        return put_arrays(outline, arrays)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UnreadableFile(folder / CONFIG, f"it does not describe a learned prior ({error!r})") from error


def _outline(record: dict[str, Any]) -> LearnedPrior:
    """Make an untrained prior from the description."""
    shape = tuple(size_of(number, "shape", MAX_SIZE) for number in record["shape"])
    dim, size = int(np.prod(shape)), perceptron_size(record["network"])
    network = ConditionalMLP(jax.random.key(0), dim, 0, 2 * dim, width=size.width, depth=size.depth)
    change = Affine(jnp.zeros(dim, jnp.float32), jnp.eye(dim, dtype=jnp.float32))
    flow = make_sampler(record["flow"])
    if not isinstance(flow, ProbabilityFlow):
        raise TypeError("expected a flow")
    return LearnedPrior(change, Unconditional(NeuralScore(network)), shape, flow, str(record["training"]))
