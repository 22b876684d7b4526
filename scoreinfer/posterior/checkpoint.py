"""Checkpoint: write a trained posterior to a folder of plain data, and read it back.

``config.json`` describes the posterior: schema, versions, sites of the model, hyperparameters, training.
``weights.safetensors`` holds all arrays. Reading makes the tree again from the given model and the hyperparameters, by
the same functions as for training. At first it is an outline only, with shapes instead of arrays, so that nothing is
allocated or executed. Only arrays that fit the outline are accepted.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from scoreinfer._tree import arrays_by_name, put_arrays
from scoreinfer.errors import UnreadableFile
from scoreinfer.files import (
    Arrays,
    check_seal,
    read_arrays,
    read_record,
    remove_leftovers,
    seal,
    write_arrays,
    write_record,
)
from scoreinfer.identity import (
    check_probe,
    check_sites,
    describe_model,
    probe_model,
    versions,
)
from scoreinfer.posterior.hyperparameters import (
    MAX_SIZE,
    size_of,
)
from scoreinfer.problem import Problem
from scoreinfer.training.loop import Budget, History, TrainingHistory

FORMAT, PATHS_FORMAT, SCHEMA = "scoreinfer posterior", "scoreinfer posterior of paths", 3
"""Format of amortised posteriors, format of posteriors of paths, and schema number of both, in ``config.json``."""
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
"""Names of the two files in the folder."""


# --- folders


def write_folder(
    path: Path, kind: str, problem: Problem, tree: PyTree, network: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write the arrays of a tree, and the hyperparameters from which its outline can be made.

    Raises:
        ValueError: if the folder holds other files, or the path is a file.
    """
    remove_leftovers(path, CONFIG, WEIGHTS)
    entries = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    strangers = {name for name in entries - {CONFIG, WEIGHTS} if not name.endswith(".tmp")}
    if strangers or (path.exists() and not path.is_dir()):
        raise ValueError(
            f"`{path}` must be a new folder, or a folder with a saved posterior and nothing else, got "
            f"{', '.join(sorted(strangers)) or 'a file'}. Choose another path."
        )
    arrays = arrays_by_name(tree) | _prefixed("probe", probe_model(problem))
    record = {
        "format": kind,
        "schema": SCHEMA,
        "versions": versions(),
        "model": describe_model(problem),
        "network": network,
        "training": training,
    }
    path.mkdir(parents=True, exist_ok=True)
    write_arrays(path / WEIGHTS, {name: np.asarray(array) for name, array in arrays.items()})
    write_record(path / CONFIG, record | {"weights": seal(path / WEIGHTS)})


def read_folder(
    path: Path,
    kind: str,
    problem: Problem,
    outline: Callable[[dict[str, Any]], PyTree],
    recount: Callable[[dict[str, Any]], Any],
) -> tuple[PyTree, Any]:
    """Read the tree and the history of the training that `write_folder` wrote.

    Args:
        path: the folder.
        kind: its format.
        problem: the problem of the given model.
        outline: makes the tree from the hyperparameters, with shapes instead of arrays.
        recount: makes the history from the record of the training.

    Raises:
        UnreadableFile: if the folder or its content is incomplete, changed, of another version, or was not written by
            `write_folder`.
        ValueError: if the posterior was learned for another model.
    """
    record = read_description(path, kind)
    try:
        check_seal(path / WEIGHTS, record["weights"])
        check_sites(record["model"], problem)
        tree = outline(record["network"])
        expected = arrays_by_name(tree) | _prefixed("probe", jax.eval_shape(lambda: probe_model(problem)))
        arrays, _ = read_arrays(path / WEIGHTS, sum(math.prod(leaf.shape) * 8 for leaf in expected.values()))
        _check_arrays(path / WEIGHTS, arrays, expected)
        training = recount(record["training"])
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise UnreadableFile(path / CONFIG, f"it does not describe a posterior ({error!r})") from error
    probe = {name.removeprefix("probe."): array for name, array in arrays.items() if name.startswith("probe.")}
    check_probe(probe, problem)
    return put_arrays(tree, arrays), training


def read_description(path: Path, kind: str = FORMAT) -> dict[str, Any]:
    """Read and check the ``config.json`` of a saved posterior.

    Raises:
        UnreadableFile: if it is incomplete, changed, of another version, or was not written by `write_folder`.
        ValueError: if it describes a posterior of the other kind.
    """
    if not path.is_dir():
        raise UnreadableFile(path, "there is no such folder", "A saved posterior is the folder that `save` wrote")
    record = read_record(path / CONFIG)
    found = record.get("format")
    if found in (FORMAT, PATHS_FORMAT) and found != kind:
        way = "SMDP(model, site, ...)" if found == PATHS_FORMAT else "NPSE(model, ...)"
        raise ValueError(
            f"`{path}` holds a {found.removeprefix('scoreinfer ')}, not a {kind.removeprefix('scoreinfer ')}: "
            f"`load` it with the class that fitted it, by `{way}`."
        )
    if found != kind:
        raise UnreadableFile(path / CONFIG, f"expected the format {kind!r}, got {found!r}")
    schema = record.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise UnreadableFile(path / CONFIG, f"expected a schema number, got {schema!r}")
    if schema != SCHEMA:
        way = "Install a newer scoreinfer" if schema > SCHEMA else "Fit the posterior again"
        raise UnreadableFile(path / CONFIG, f"it has schema {schema}, this version reads {SCHEMA}", way)
    return record


def foreign_outputs(path: Path) -> dict[str, tuple[int, ...]] | None:
    """Read the names and shapes of the outputs of a foreign simulator; None means a model without such a simulator.

    Raises:
        UnreadableFile: as `read_description`.
        ValueError: if the posterior was fitted with a likelihood, which must be given again.
    """
    try:
        model = read_description(path)["model"]
        if model["foreign"] is False:
            return None
        if model.get("likelihood"):
            raise ValueError(
                f"The posterior in `{path}` was fitted with a likelihood, which is code and not saved. Load it with "
                "`NPSE(model, likelihood=..., simulations=store)` and a store of the same simulator."
            )
        return {
            str(site["name"]): tuple(size_of(n, "shape", MAX_SIZE) for n in site["shape"]) for site in model["observed"]
        }
    except (KeyError, TypeError) as error:
        raise UnreadableFile(path / CONFIG, f"it does not describe a posterior ({error!r})") from error


def _prefixed(prefix: str, tree: PyTree) -> dict[str, Any]:
    return {f"{prefix}.{name}": leaf for name, leaf in arrays_by_name(tree).items()}


def check_outline(tree: PyTree, outline: PyTree) -> None:
    """Check, before writing, that the tree can be read back.

    Raises:
        ValueError: if arrays of the tree differ from those of its outline in name or shape.
    """
    own, theirs = arrays_by_name(tree), arrays_by_name(outline)
    wrong = [name for name in own.keys() | theirs.keys()
             if name not in own or name not in theirs or own[name].shape != theirs[name].shape]  # fmt: skip
    if wrong:
        raise ValueError(
            "Expected a posterior that its hyperparameters describe, but these arrays differ in shape or name: "
            f"{', '.join(sorted(wrong)[:3])}. Save it without the parts that were replaced after the training."
        )


def _check_arrays(path: Path, arrays: Arrays, expected: dict[str, Any]) -> None:
    names = arrays.keys() ^ expected.keys()
    if names:
        raise UnreadableFile(path, f"these arrays are missing or unexpected: {', '.join(sorted(names)[:3])}")
    for name, array in arrays.items():
        own = expected[name]
        kinds = "f" if np.issubdtype(own.dtype, np.floating) else "iub"
        if array.shape != own.shape or array.dtype.kind not in kinds:
            raise UnreadableFile(
                path, f"array {name!r} must have shape {own.shape}, got {array.dtype} of shape {array.shape}"
            )


# --- training


def run_record(history: History) -> dict[str, Any]:
    """Make a plain record of a training run; numbers that are not finite become None."""
    rows = {name: [float(v) if np.isfinite(v) else None for v in getattr(history, name)]
            for name in ("loss", "validation")}  # fmt: skip
    return history._asdict() | rows


def read_run(part: dict[str, Any]) -> History:
    """Make the history from the record by `run_record`."""
    rows = {name: np.array([np.nan if v is None else v for v in part[name]], float)
            for name in ("loss", "validation")}  # fmt: skip
    shares = {name: tuple(part.get(name, ())) for name in ("shares", "share_steps", "share_seconds")}
    return History(**part | rows | shares)


def training_record(history: TrainingHistory | None) -> dict[str, Any]:
    """Make a plain record of the training of an amortised posterior."""
    if history is None:
        return {"history": None, "budget": None}
    runs = {name: None if run is None else run_record(run)
            for name, run in history._asdict().items() if name not in ("budget", "tuned_share")}  # fmt: skip
    budget = None if history.budget is None else history.budget._asdict()
    share = None if math.isnan(history.tuned_share) else history.tuned_share
    return {"history": runs, "budget": budget, "tuned_share": share}


def read_training(training: dict[str, Any]) -> TrainingHistory | None:
    """Make the history from the record by `training_record`."""
    stored, budget = training["history"], training["budget"]
    if stored is None:
        return None
    smaller, share = stored.get("smaller"), training.get("tuned_share")  # files of earlier versions have none
    return TrainingHistory(
        read_run(stored["whitening"]), read_run(stored["score"]), None if budget is None else Budget(**budget),
        None if smaller is None else read_run(smaller), math.nan if share is None else float(share),
    )  # fmt: skip
