"""Saving and loading learned priors: of draws (`fit_score`), and of windows of paths (`fit_local`)."""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from scoreinfer._tree import arrays_by_name, put_arrays
from scoreinfer.bijections.affine import identity
from scoreinfer.errors import UnreadableFile
from scoreinfer.files import check_seal, read_arrays, read_record, seal, write_arrays, write_record
from scoreinfer.identity import versions
from scoreinfer.nets import ConditionalMLP
from scoreinfer.posterior.checkpoint import CONFIG, WEIGHTS
from scoreinfer.posterior.hyperparameters import MAX_SIZE, describe_sampler, make_sampler, perceptron_size, size_of
from scoreinfer.samplers.diffusion import ProbabilityFlow
from scoreinfer.samplers.learned_prior import LearnedPrior
from scoreinfer.samplers.local_prior import Context, LocalPrior
from scoreinfer.score import NeuralScore, Unconditional
from scoreinfer.score.residual import ResidualScore

FORMAT, LOCAL_FORMAT, SCHEMA = "scoreinfer learned prior", "scoreinfer local prior", 1
"""Formats and schema number in ``config.json``."""


def save_score(prior: LearnedPrior | LocalPrior, path: str | os.PathLike[str]) -> None:
    """Save a prior learned by `fit_score` or `fit_local` to a folder of plain data.

    Raises:
        ValueError: if its score was not learned by one of these.
    """
    described = _described_local(prior) if isinstance(prior, LocalPrior) else _described(prior)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / WEIGHTS, {name: np.asarray(leaf) for name, leaf in arrays_by_name(prior).items()})
    record = {
        "schema": SCHEMA, "versions": versions(), "shape": list(prior.shape), "training": prior.training,
        "weights": seal(folder / WEIGHTS), **described,
    }  # fmt: skip
    write_record(folder / CONFIG, record)


def load_score(path: str | os.PathLike[str]) -> LearnedPrior | LocalPrior:
    """Load a prior that `save_score` saved. Nothing in the folder is executed.

    Raises:
        UnreadableFile: if the folder is incomplete, changed, of another version, or not written by `save_score`.
    """
    folder = Path(path)
    record = read_record(folder / CONFIG)
    made = {FORMAT: _outline, LOCAL_FORMAT: _local_outline}.get(str(record.get("format")))
    if made is None or record.get("schema") != SCHEMA:
        raise UnreadableFile(folder / CONFIG, f"expected the format {FORMAT!r} or {LOCAL_FORMAT!r}, schema {SCHEMA}")
    try:
        check_seal(folder / WEIGHTS, record["weights"])
        outline = eqx.filter_eval_shape(partial(made, record))
        expected = arrays_by_name(outline)
        arrays, _ = read_arrays(folder / WEIGHTS, sum(8 * leaf.size for leaf in expected.values()))
        if {name: leaf.shape for name, leaf in arrays.items()} != {name: leaf.shape for name, leaf in expected.items()}:
            raise TypeError("its arrays do not fit its description")
        return put_arrays(outline, arrays)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UnreadableFile(folder / CONFIG, f"it does not describe a learned prior ({error!r})") from error


def _described(prior: LearnedPrior) -> dict[str, Any]:
    network = prior.score.score.network if isinstance(prior.score, Unconditional) else None
    return {"format": FORMAT, "network": _size(network, prior.score), "flow": describe_sampler(prior.flow)}


def _described_local(prior: LocalPrior) -> dict[str, Any]:
    network = prior.window.network if isinstance(prior.window, ResidualScore) else None
    told = None if prior.context is None else {"site": prior.context.site, "size": prior.context.mean.size}
    return {"format": LOCAL_FORMAT, "network": _size(network, prior.window), "k": prior.k, "context": told}


def _size(network: Any, score: Any) -> dict[str, Any]:
    """Describe a network that can be made again."""
    if not isinstance(network, ConditionalMLP):
        raise ValueError(
            f"Only scores learned by `fit_score` or `fit_local` can be saved, got a `{type(score).__name__}`."
        )
    return network.hyperparameters


def _outline(record: dict[str, Any]) -> LearnedPrior:
    """Make an untrained prior from the description."""
    shape, size = _shape(record), perceptron_size(record["network"])
    dim = math.prod(shape)
    network = ConditionalMLP(jax.random.key(0), dim, 0, 2 * dim, width=size.width, depth=size.depth)
    flow = make_sampler(record["flow"])
    if not isinstance(flow, ProbabilityFlow):
        raise TypeError("expected a flow")
    return LearnedPrior(identity(dim), Unconditional(NeuralScore(network)), shape, flow, str(record["training"]))


def _local_outline(record: dict[str, Any]) -> LocalPrior:
    """Make an untrained prior of windows from the description."""
    shape, size, k = _shape(record), perceptron_size(record["network"]), size_of(record["k"], "k", MAX_SIZE)
    state, told = jnp.zeros(math.prod(shape), jnp.float32), record["context"]
    dim, context = (2 * k + 1) * state.size, None
    if told is not None:
        numbers = jnp.zeros(size_of(told["size"], "size", MAX_SIZE, 0), jnp.float32)
        context = Context(str(told["site"]), numbers, numbers)
    num_context = 0 if context is None else (2 * k + 1) * context.mean.size
    network = ConditionalMLP(jax.random.key(0), dim, num_context, dim, width=size.width, depth=size.depth)
    window = ResidualScore(
        jnp.zeros(dim, jnp.float32), jnp.eye(dim, dtype=jnp.float32), jnp.ones(dim, jnp.float32), network
    )
    return LocalPrior(window, k, state, state, shape, str(record["training"]), context)


def _shape(record: dict[str, Any]) -> tuple[int, ...]:
    return tuple(size_of(number, "shape", MAX_SIZE) for number in record["shape"])
