"""Files that are written completely or not at all, and read without executing anything.

Arrays are stored as safetensors, records as JSON. Reading first checks the file's size against a limit, before any
content is loaded into memory. Then it checks the content against a digest.
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
"""Largest record that is read, in bytes. Chosen by judgement."""
MAX_HEADER = 2**20
"""Bytes allowed for the names and shapes of arrays, in addition to the arrays. Chosen by judgement."""
LEFT_BEHIND = 3600.0
"""Age, in seconds, after which a temporary file counts as left by a killed writer. Chosen by judgement."""
Arrays = dict[str, np.ndarray]
"""Arrays by name."""


def write_file(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, even if the process or the machine stops."""
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
    """Write a folder's new file names to the disk. Nothing is done where folders cannot be opened (Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove temporary files that killed writers left.

    Args:
        folder: the folder.
        *names: patterns of the names of the files that were being written.

    A temporary file is removed if it is older than `LEFT_BEHIND`.
    """
    for name in names:
        for path in folder.glob(f".{name}-*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # its writer was still running and has finished
                if time.time() - path.stat().st_mtime > LEFT_BEHIND:
                    path.unlink()


def canonical(record: Any) -> bytes:
    """Write a record as JSON in the canonical form that is digested."""
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
    """Write named arrays and a record to one safetensors file."""
    plain = {name: np.array(array, order="C") for name, array in arrays.items()}
    metadata = {"note": canonical(note).decode(), "sha256": digest(plain, note)}
    write_file(path, safetensors.numpy.save(plain, metadata))


def read_arrays(path: Path, max_bytes: int) -> tuple[Arrays, Any]:
    """Read a file of `write_arrays`: the arrays and the record.

    Args:
        path: the file.
        max_bytes: largest allowed size of all arrays together, in bytes.

    Raises:
        UnreadableFile: if the file is missing, too large, truncated, changed or of another kind.
    """
    content = _read(path, max_bytes + MAX_HEADER + MAX_RECORD)
    try:
        arrays = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        note, expected = parse(path, metadata["note"].encode()), metadata["sha256"]
    except UnreadableFile:
        raise
    except Exception as error:  # a hostile file may make a parser raise anything
        raise UnreadableFile(path, f"it is not a complete safetensors file ({type(error).__name__})") from error
    if digest(arrays, note) != expected:
        raise UnreadableFile(path, "its content does not match its checksum: it was damaged or changed")
    return arrays, note


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, with a checksum of its content."""
    sealed = record | {"sha256": hashlib.sha256(canonical(record)).hexdigest()}
    write_file(path, json.dumps(sealed, indent=1, allow_nan=False).encode())


def read_record(path: Path) -> dict[str, Any]:
    """Read a file of `write_record`.

    Raises:
        UnreadableFile: if the file is missing, too large, truncated, changed or of another kind.
    """
    record = parse(path, _read(path, MAX_RECORD))
    if not isinstance(record, dict) or "sha256" not in record:
        raise UnreadableFile(path, "expected a record of scoreinfer, but it has no checksum")
    expected = record.pop("sha256")
    try:
        content = canonical(record)
    except (ValueError, RecursionError) as error:  # numbers too large for floats, or lists nested too deep
        raise UnreadableFile(path, f"expected a record of scoreinfer, but it cannot be parsed ({error})") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise UnreadableFile(path, "its content does not match its checksum: it was damaged or changed")
    return record


def seal(path: Path) -> dict[str, Any]:
    """Compute the size and the SHA-256 of a file. The file is read in pieces."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_seal(path: Path, expected: dict[str, Any]) -> None:
    """Check that a file still has the size and the SHA-256 that `seal` computed.

    Raises:
        UnreadableFile: if the file is missing, truncated, changed, or belongs to another record.
    """
    if not path.is_file():
        raise UnreadableFile(path, "there is no such file")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise UnreadableFile(path, f"expected {expected['bytes']} bytes, got {size}: it is truncated or another file")
    if seal(path) != expected:
        raise UnreadableFile(path, "its content does not match its checksum: it was damaged or changed")


def parse(path: Path, content: bytes) -> Any:
    """Parse standard JSON.

    Raises:
        UnreadableFile: if the content is not standard JSON (NaN and Infinity are not).
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not standard JSON")

    try:
        return json.loads(content.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(path, f"expected JSON, got content that cannot be parsed ({error})") from error


def _read(path: Path, max_bytes: int) -> bytes:
    if not path.is_file():
        raise UnreadableFile(path, "there is no such file")
    size = path.stat().st_size
    if size > max_bytes:
        raise UnreadableFile(path, f"expected at most {max_bytes} bytes, got {size}")
    return path.read_bytes()
