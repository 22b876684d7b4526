"""Checkpoints of training runs: a run that was killed resumes from disk and ends with the same weights.

A folder holds ``fit.json``, which describes the run, and one file for each of the two training stages. Each of these
holds everything that the next epoch depends on. Files are replaced atomically.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from scoreinfer._tree import arrays_by_name, put_arrays
from scoreinfer._typing import Key
from scoreinfer.errors import UnreadableFile
from scoreinfer.files import read_arrays, read_record, remove_leftovers, write_arrays, write_record
from scoreinfer.identity import key_bits

FORMAT, SCHEMA = "scoreinfer training", 2
"""Name of the file format, and its version."""
IDENTITY = "fit.json"
"""Name of the file that describes the run."""


class Progress(NamedTuple):
    """State of a training run after an epoch.

    Args:
        state: weights, averaged weights, state of the optimiser, and number of steps.
        best: the best averaged weights of this leg.
        chosen: the best averaged weights of all legs before.
        best_value: validation loss of the best weights; infinite before any epoch of the leg has a finite loss.
        best_epoch: epoch of the best weights.
        least_value: smallest validation loss of all legs before.
        loss: mean training loss of each epoch.
        validation: validation loss of each epoch.
        num_simulations: number of simulations in all pools so far.
        seconds: wall time so far, in seconds.
        stopped: why training ended; empty while it goes on.
        shares: what the judge said.
        share_steps: optimiser steps before each of the shares.
        share_seconds: seconds before each of the shares.
    """

    state: PyTree
    best: PyTree
    chosen: PyTree
    best_value: float = math.inf
    best_epoch: int = 0
    least_value: float = math.inf
    loss: tuple[float, ...] = ()
    validation: tuple[float, ...] = ()
    num_simulations: int = 0
    seconds: float = 0.0
    stopped: str = ""
    shares: tuple[float, ...] = ()
    share_steps: tuple[int, ...] = ()
    share_seconds: tuple[float, ...] = ()


def keep_progress(path: Path, progress: Progress) -> None:
    """Write the state of a run atomically."""
    told = progress._asdict()
    arrays = arrays_by_name(tuple(told.pop(name) for name in ("state", "best", "chosen")))
    note = {name: _plain(value) for name, value in told.items()}
    write_arrays(path, {name: np.asarray(array) for name, array in arrays.items()}, note)


def resume_progress(path: Path, start: Progress) -> Progress:
    """Read the state of a run; if the file does not exist, return ``start``.

    Raises:
        UnreadableFile: if the file is damaged or belongs to other networks.
    """
    if not path.exists():
        return start
    own = arrays_by_name((start.state, start.best, start.chosen))
    arrays, note = read_arrays(path, sum(leaf.nbytes for leaf in own.values()))
    shapes = [{name: (leaf.shape, str(leaf.dtype)) for name, leaf in tree.items()} for tree in (own, arrays)]
    if shapes[0] != shapes[1]:
        raise UnreadableFile(path, "names, shapes or types of its arrays are not those of this run's networks")
    trees = put_arrays((start.state, start.best, start.chosen), arrays)
    try:
        told = {name: getattr(start, name).__class__(value) for name, value in note.items()}
        rows = {name: tuple(map(float, note[name])) for name in ("loss", "validation", "shares", "share_seconds")}
        return Progress(*trees, **told | rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnreadableFile(path, f"it does not hold the state of a training run ({error!r})") from error


def _plain(value: Any) -> Any:
    """Convert a number or a tuple of numbers to JSON values; numbers that are not finite become text."""
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def open_run(folder: Path, key: Key, settings: dict[str, Any]) -> None:
    """Begin a run in a folder, or check that the run in it is the same.

    Args:
        folder: folder of the run; it is created if it does not exist.
        key: random key of the run.
        settings: everything else that the run depends on, as plain data.

    Raises:
        ValueError: if the folder holds another run. The message lists the differences.
        UnreadableFile: if the folder's record is damaged, of another version, or no training run.
    """
    record = {"format": FORMAT, "schema": SCHEMA, "key": key_bits(key)} | settings
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, IDENTITY, "*.safetensors")
    path = folder / IDENTITY
    if not path.exists():
        write_record(path, record)
        return
    stored = read_record(path)
    if stored.get("format") != FORMAT or stored.get("schema") != SCHEMA:
        raise UnreadableFile(
            path,
            f"expected {FORMAT!r} of schema {SCHEMA}, got {stored.get('format')!r} of schema {stored.get('schema')!r}",
            "Choose another folder",
        )
    changed = [
        f"`{name}` is {_shortly(record.get(name))}, was {_shortly(stored.get(name))}"
        for name in sorted(record.keys() | stored.keys())
        if record.get(name) != stored.get(name)
    ]
    if changed:
        raise ValueError(
            f"`{folder}` must hold this training run, but it holds another one: {'; '.join(changed)}. Use the "
            "arguments of that run to resume it, or choose another `checkpoint` folder."
        )


def _shortly(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
