"""Resuming: a training run kept on disk, so that one which was killed goes on as if it had not been.

A folder holds ``fit.json``, which says what is being trained, and one file for each of the two stages with everything
the next epoch depends on. Every file is replaced whole.
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

FORMAT, SCHEMA = "scoreinfer training", 1
IDENTITY = "fit.json"


class Progress(NamedTuple):
    """Where a training run stands after an epoch.

    Args:
        state: weights, their average, and the optimiser's memory.
        best: the best averaged weights so far.
        best_value: their validation loss; infinite before any epoch has ended well.
        best_epoch: the epoch they come from.
        loss: mean training loss of each epoch.
        validation: validation loss of each epoch.
        num_simulations: simulations drawn or passed through.
        seconds: wall time spent.
        stopped: why training has ended; empty while it has not.
    """

    state: PyTree
    best: PyTree
    best_value: float = math.inf
    best_epoch: int = 0
    loss: tuple[float, ...] = ()
    validation: tuple[float, ...] = ()
    num_simulations: int = 0
    seconds: float = 0.0
    stopped: str = ""


def keep_progress(path: Path, progress: Progress) -> None:
    """Write where a run stands, whole or not at all."""
    told = progress._asdict()
    arrays = arrays_by_name((told.pop("state"), told.pop("best")))
    note = {name: _plain(value) for name, value in told.items()}
    write_arrays(path, {name: np.asarray(array) for name, array in arrays.items()}, note)


def resume_progress(path: Path, start: Progress) -> Progress:
    """Read where a run stands, or return ``start`` where it has not got anywhere.

    Raises:
        UnreadableFile: where the file is damaged, or belongs to other networks.
    """
    if not path.exists():
        return start
    own = arrays_by_name((start.state, start.best))
    arrays, note = read_arrays(path, sum(leaf.nbytes for leaf in own.values()))
    shapes = [{name: (leaf.shape, str(leaf.dtype)) for name, leaf in tree.items()} for tree in (own, arrays)]
    if shapes[0] != shapes[1]:
        raise UnreadableFile(path, "it belongs to networks of other sizes")
    state, best = put_arrays((start.state, start.best), arrays)
    try:
        told = {name: getattr(start, name).__class__(value) for name, value in note.items()}
        rows = {name: tuple(map(float, note[name])) for name in ("loss", "validation")}
        return Progress(state, best, **told | rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnreadableFile(path, f"it does not say where a training run stands ({error!r})") from error


def _plain(value: Any) -> Any:
    """Make JSON of a number or a row of numbers; what is not finite becomes a word."""
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def open_run(folder: Path, key: Key, settings: dict[str, Any]) -> None:
    """Begin a run in a folder, or check that the one that is there is the same.

    Args:
        folder: where the run is kept; made where there is none.
        key: the random key of the run.
        settings: everything else that it depends on, as plain data.

    Raises:
        ValueError: where another run is kept there; the message says in what they differ.
        UnreadableFile: where what is there is damaged, newer, or no training run.
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
        raise UnreadableFile(path, f"expected {FORMAT!r} of schema {SCHEMA}", "Choose another folder")
    changed = [
        f"`{name}` is {_shortly(record.get(name))}, was {_shortly(stored.get(name))}"
        for name in sorted(record.keys() | stored.keys())
        if record.get(name) != stored.get(name)
    ]
    if changed:
        raise ValueError(
            f"Another training run is kept in `{folder}`: {'; '.join(changed)}. Resume it with the arguments it was "
            "started with, or choose another `checkpoint` folder."
        )


def _shortly(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
