"""Checkpoint: a trained posterior as a folder of plain data, and back.

``config.json`` says what the posterior is: schema, versions, the model's sites, hyperparameters, how it was trained.
``weights.safetensors`` holds every array. Reading makes the tree again from the model at hand and the hyperparameters,
by the functions that make it for training, but only as an outline: shapes in the place of arrays. Nothing is allocated
or executed, and only arrays that fit the outline are taken.
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
CONFIG, WEIGHTS = "config.json", "weights.safetensors"


# --- folders


def write_folder(
    path: Path, kind: str, problem: Problem, tree: PyTree, network: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write the arrays of a tree, and the hyperparameters by which its outline can be made.

    Raises:
        ValueError: where the folder holds other things.
    """
    remove_leftovers(path, CONFIG, WEIGHTS)
    entries = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    strangers = {name for name in entries - {CONFIG, WEIGHTS} if not name.endswith(".tmp")}
    if strangers or (path.exists() and not path.is_dir()):
        raise ValueError(
            f"`{path}` must be a new folder or hold a saved posterior and nothing else, got "
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
    """Read what `write_folder` wrote: the tree, and the training.

    Args:
        path: the folder.
        kind: its format.
        problem: the problem of the model at hand.
        outline: from the hyperparameters to the tree, with shapes in the place of its arrays.
        recount: what to make of the record of the training.

    Raises:
        UnreadableFile: where the folder or its content is not whole, of another version, changed, or not ours.
        ValueError: where it was made for another model.
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
    """Read and check the config.json of a saved posterior.

    Raises:
        UnreadableFile: where it is not whole, of another version, changed, or not ours.
        ValueError: where it is a posterior of the other kind.
    """
    if not path.is_dir():
        raise UnreadableFile(path, "there is no such folder", "A saved posterior is the folder that `save` wrote")
    record = read_record(path / CONFIG)
    found = record.get("format")
    if found in (FORMAT, PATHS_FORMAT) and found != kind:
        way = "SMDP(model, site, ...)" if found == PATHS_FORMAT else "NPSE(model, ...)"
        raise ValueError(
            f"`{path}` holds a {found.removeprefix('scoreinfer ')}, not a {kind.removeprefix('scoreinfer ')}: "
            f"`load` it as it was fitted, by `{way}`."
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
    """Name the outputs, with their shapes, that a posterior of a foreign simulator was learned for; else None."""
    try:
        model = read_description(path)["model"]
        if model["foreign"] is False:
            return None
        if model.get("likelihood"):
            raise ValueError(
                f"The posterior in `{path}` was fitted with a likelihood, and files hold no code: load it with "
                "`NPSE(model, likelihood=..., simulations=store)`, a store of the same simulator."
            )
        return {
            str(site["name"]): tuple(size_of(n, "shape", MAX_SIZE) for n in site["shape"]) for site in model["observed"]
        }
    except (KeyError, TypeError) as error:
        raise UnreadableFile(path / CONFIG, f"it does not describe a posterior ({error!r})") from error


def _prefixed(prefix: str, tree: PyTree) -> dict[str, Any]:
    return {f"{prefix}.{name}": leaf for name, leaf in arrays_by_name(tree).items()}


def check_outline(tree: PyTree, outline: PyTree) -> None:
    """Refuse, while writing, what could not be read back."""
    own, theirs = arrays_by_name(tree), arrays_by_name(outline)
    wrong = [name for name in own.keys() | theirs.keys()
             if name not in own or name not in theirs or own[name].shape != theirs[name].shape]  # fmt: skip
    if wrong:
        raise ValueError(
            f"This posterior cannot be described by its hyperparameters: {', '.join(sorted(wrong)[:3])} differ from "
            "those of a network of the kinds that are saved. Was a part of it replaced by hand?"
        )


def _check_arrays(path: Path, arrays: Arrays, expected: dict[str, Any]) -> None:
    names = arrays.keys() ^ expected.keys()
    if names:
        raise UnreadableFile(path, f"expected other arrays: {', '.join(sorted(names)[:3])} missing or too many")
    for name, array in arrays.items():
        own = expected[name]
        kinds = "f" if np.issubdtype(own.dtype, np.floating) else "iub"
        if array.shape != own.shape or array.dtype.kind not in kinds:
            raise UnreadableFile(
                path, f"array {name!r} must have shape {own.shape}, got {array.dtype} of shape {array.shape}"
            )


# --- training


def run_record(history: History) -> dict[str, Any]:
    """Make a record of a training run."""
    rows = {name: [float(v) if np.isfinite(v) else None for v in getattr(history, name)]
            for name in ("loss", "validation")}  # fmt: skip
    return history._asdict() | rows


def read_run(part: dict[str, Any]) -> History:
    """Invert `run_record`."""
    rows = {name: np.array([np.nan if v is None else v for v in part[name]], float)
            for name in ("loss", "validation")}  # fmt: skip
    return History(**part | rows)


def training_record(history: TrainingHistory | None) -> dict[str, Any]:
    """Make a record of the training of an amortised posterior."""
    if history is None:
        return {"history": None, "budget": None}
    runs = {"whitening": run_record(history.whitening), "score": run_record(history.score)}
    return {"history": runs, "budget": None if history.budget is None else history.budget._asdict()}


def read_training(training: dict[str, Any]) -> TrainingHistory | None:
    """Invert `training_record`."""
    stored, budget = training["history"], training["budget"]
    if stored is None:
        return None
    runs = read_run(stored["whitening"]), read_run(stored["score"])
    return TrainingHistory(*runs, None if budget is None else Budget(**budget))
