"""What a command line names: objects as ``module:name``, and the model's arguments as files of arrays."""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scoreinfer.errors import UnreadableFile


def named_object(name: str) -> Any:
    """Import ``module:name``; modules in the working directory are found first.

    Raises:
        ValueError: if the name has another form, or there is no such module or name.

    >>> named_object("math:pi")
    3.141592653589793
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"Expected `module:name`, such as `models:decay`, got `{name}`.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"There is no module `{module}` in {Path.cwd()} or on PYTHONPATH.") from error
    if not hasattr(found, attribute):
        raise ValueError(f"Module `{module}` ({found.__file__}) has no `{attribute}`.")
    return getattr(found, attribute)


def named_arguments(paths: Sequence[str]) -> dict[str, Any]:
    """Read keyword arguments of a model from ``.npz`` and ``.json`` files; later files win.

    Numbers in JSON and arrays without axes become Python numbers, so that they can be sizes. Lists become arrays.

    Raises:
        UnreadableFile: if a file is missing, is neither, or holds anything but arrays and numbers.
    """
    found: dict[str, Any] = {}
    for path in paths:
        found |= _read(Path(path))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            return {name: np.asarray(value) if isinstance(value, list) else value for name, value in values.items()}
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _plain(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, AttributeError) as error:
        way_out = "Expected arrays by argument name: np.savez('data.npz', y=y), or a JSON dictionary"
        raise UnreadableFile(path, str(error), way_out) from error


def _plain(array: np.ndarray) -> Any:
    return array.item() if array.ndim == 0 else array
