"""Files that outlive crashes and distrust strangers: written whole or not at all, read without executing anything.

Arrays go to safetensors, records to JSON. What is read back is checked against a digest of the content, and its size
against a limit before a byte of it is taken into memory.
"""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from scoreinfer.errors import UnreadableFile

MAX_RECORD = 16 * 2**20
"""Largest record that is read, in bytes."""
MAX_HEADER = 2**20
"""Bytes allowed for the names and shapes of arrays, on top of the arrays themselves."""
LEFT_BEHIND = 3600.0
"""Seconds after which a temporary file is taken for that of a dead writer."""
Arrays = dict[str, np.ndarray]


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whenever the process or the machine dies."""
    temporary = path.parent / f".{path.name}-{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have the operating system remember a new name (where folders can be opened, as they cannot on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what writers of files of these names (patterns) have left that were killed an hour ago or earlier."""
    for name in names:
        for path in folder.glob(f".{name}-*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # of a writer that is not dead after all
                if time.time() - path.stat().st_mtime > LEFT_BEHIND:
                    path.unlink()


def canonical(record: Any) -> bytes:
    """Write a record as JSON in the one form that is digested."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(arrays: Mapping[str, np.ndarray], record: Any = None) -> str:
    """Compute the SHA-256 of named arrays (names, types, shapes, bytes) and of a record.

    >>> digest({"a": np.zeros(2)}) == digest({"b": np.zeros(2)})
    False
    """
    total = hashlib.sha256(canonical(record))
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        total.update(canonical([name, str(array.dtype), list(array.shape)]))
        total.update(array.tobytes())
    return total.hexdigest()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], note: Any = None) -> None:
    """Write named arrays, and a record with them, to one safetensors file."""
    plain = {name: np.array(array, order="C") for name, array in arrays.items()}
    metadata = {"note": canonical(note).decode(), "sha256": digest(plain, note)}
    write_file(path, safetensors.numpy.save(plain, metadata))


def read_arrays(path: Path, max_bytes: int) -> tuple[Arrays, Any]:
    """Read what `write_arrays` wrote: the arrays and the record.

    Args:
        path: the file.
        max_bytes: largest size, in bytes, that the arrays may have together.

    Raises:
        UnreadableFile: where the file is missing, too large, truncated, changed or of another kind.
    """
    content = _read(path, max_bytes + MAX_HEADER + MAX_RECORD)
    try:
        arrays = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        note, expected = parse(path, metadata["note"].encode()), metadata["sha256"]
    except UnreadableFile:
        raise
    except Exception as error:  # whatever a hostile file makes a parser raise
        raise UnreadableFile(path, f"it is no whole safetensors file of ours ({type(error).__name__})") from error
    if digest(arrays, note) != expected:
        raise UnreadableFile(path, "its content does not match its checksum: it was damaged or changed")
    return arrays, note


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, with the checksum of its content."""
    sealed = record | {"sha256": hashlib.sha256(canonical(record)).hexdigest()}
    write_file(path, json.dumps(sealed, indent=1, allow_nan=False).encode())


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Raises:
        UnreadableFile: where the file is missing, too large, truncated, changed or of another kind.
    """
    record = parse(path, _read(path, MAX_RECORD))
    if not isinstance(record, dict) or "sha256" not in record:
        raise UnreadableFile(path, "it is no record of ours: it has no checksum")
    expected = record.pop("sha256")
    try:
        content = canonical(record)
    except (ValueError, RecursionError) as error:  # numbers beyond floating point, lists nested too deep
        raise UnreadableFile(path, f"it is no record of ours ({error})") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise UnreadableFile(path, "its content does not match its checksum: it was damaged or changed")
    return record


def seal(path: Path) -> dict[str, Any]:
    """Compute size and SHA-256 of a file, by pieces."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_seal(path: Path, expected: dict[str, Any]) -> None:
    """Check that a file is the one that was sealed.

    Raises:
        UnreadableFile: where it is missing, truncated, changed, or belongs to another record.
    """
    if not path.is_file():
        raise UnreadableFile(path, "there is no such file")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise UnreadableFile(path, f"it has {size} bytes, expected {expected['bytes']}: it is truncated or another")
    if seal(path) != expected:
        raise UnreadableFile(path, "it does not match its checksum: it was damaged or changed")


def parse(path: Path, content: bytes) -> Any:
    """Parse JSON, refusing what is not standard."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(content.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(path, f"it is not JSON ({error})") from error


def _read(path: Path, max_bytes: int) -> bytes:
    if not path.is_file():
        raise UnreadableFile(path, "there is no such file")
    size = path.stat().st_size
    if size > max_bytes:
        raise UnreadableFile(path, f"it has {size} bytes, where at most {max_bytes} are expected")
    return path.read_bytes()
