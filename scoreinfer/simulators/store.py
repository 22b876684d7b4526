"""Store: simulations of a foreign program on disk, with one record for each row, including failed rows.

The folder holds ``manifest.json``, which describes the simulations, and shards ``<digest>.npz`` with finished rows. The
name of a shard is the start of the SHA-256 of its content, so damage is detected. A shard is written completely or not
at all. If the process dies, only unwritten rows are lost; they run again.
"""

import contextlib
import hashlib
import io
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from scoreinfer.errors import UnreadableFile
from scoreinfer.files import read_record, remove_leftovers, write_file, write_record
from scoreinfer.identity import continued, differences, is_fingerprint, without

FORMAT, SCHEMA = "scoreinfer simulations", 1
"""Name and version of the file format, stored in the manifest."""
MANIFEST, LOCK = "manifest.json", "lock"
"""File names of the manifest and of the lock."""
FINGERPRINT = "fingerprint"
"""Entry of the manifest that identifies the simulator."""
OK, INVALID, FAILED, TIMEOUT = "ok", "invalid", "failed", "timeout"
"""Status of a row: finite outputs, outputs that are not finite, an error, no result within the time limit."""
STATUSES = (OK, INVALID, FAILED, TIMEOUT)
"""All status values."""
MAX_ERROR = 200
"""Longest stored error text, in characters. Chosen by judgement."""
MEMORY, MIN_CAPACITY = 2**30, 64
"""Bytes of outputs that are in memory for learning, and the least number of rows. Chosen by judgement."""


class Row(NamedTuple):
    """The record of one simulation.

    Args:
        number: number of the row in the sequence that the key determines.
        z: unconstrained parameters.
        status: ``ok``, ``invalid`` (numbers that are not finite), ``failed`` (an error) or ``timeout``.
        error: the error in words, or which outputs have masked entries; otherwise empty.
        seed: the seed that the simulator received.
        seconds: wall time. NaN means it was not measured.
        outputs: outputs by name. None means there are none.
    """

    number: int
    z: np.ndarray
    status: str
    error: str
    seed: int
    seconds: float
    outputs: dict[str, np.ndarray] | None


class Rows(NamedTuple):
    """Several rows of a store. The fields are those of `Row`, with the row as first axis.

    Rows without outputs have NaN in ``outputs``.
    """

    number: Integer[np.ndarray, " num"]
    z: Float[np.ndarray, "num dim"]
    status: np.ndarray
    error: np.ndarray
    seed: Integer[np.ndarray, " num"]
    seconds: Float[np.ndarray, " num"]
    outputs: dict[str, np.ndarray]

    @property
    def valid(self) -> Bool[np.ndarray, " num"]:
        """True for the rows with status ``ok``. Learning uses only these."""
        return self.status == OK


class Store:
    """Simulations on disk.

    Args:
        path: the folder.
        memory: bytes of outputs that `fit` holds in memory at once. The peak is higher, because `fit` makes copies.
            If the store is larger, each epoch reads other rows.

    Raises:
        UnreadableFile: if the folder holds no simulations, or its manifest is damaged or has another version.
    """

    def __init__(self, path: str | os.PathLike[str], memory: int = MEMORY) -> None:
        self.path, self.memory = Path(path), memory
        self.manifest = read_record(self.path / MANIFEST)
        if self.manifest.get("format") != FORMAT:
            raise UnreadableFile(self.path, f"it holds {self.manifest.get('format')!r}, expected {FORMAT!r}")
        schema = self.manifest.get("schema")
        if schema != SCHEMA or isinstance(schema, bool):
            raise UnreadableFile(self.path, f"it has schema {schema!r}, this version reads {SCHEMA}")
        numbers, latents = [self.manifest.get(name) for name in ("dim", "num")], self.manifest.get("latents")
        if not all(type(number) is int and 0 < number < 2**40 for number in numbers) or not isinstance(latents, list):
            raise UnreadableFile(self.path / MANIFEST, f"it does not describe simulations (dim and num are {numbers})")

    def read(self) -> Rows:
        """Read all rows, in the order of their numbers.

        Raises:
            UnreadableFile: if a shard is damaged, was changed, or does not fit the other shards.
        """
        found: dict[int, Row] = {}
        for path in self._shards():
            for row in _read_shard(path, self.manifest["dim"]):
                found.setdefault(row.number, row)  # key and number determine a row: rows of the same number are equal
        return _gather([found[number] for number in sorted(found)], self.manifest["dim"], self.path)

    def index(self) -> Rows:
        """Read all rows without their outputs, in the order of their numbers.

        ``outputs`` holds empty arrays of shape ``(0, *shape)``, which give the shapes.

        Raises:
            UnreadableFile: as for `read`.
        """
        parts = [_gather([], self.manifest["dim"], self.path)]
        outputs: dict[str, np.ndarray] = {}
        for part in self.parts():
            own = {name: np.empty((0, *value.shape[1:])) for name, value in part.outputs.items()}
            _check_alike(outputs or own, own or outputs, self.path)
            outputs = outputs or own
            parts.append(part._replace(outputs={}))
        return _join(parts, self.path)._replace(outputs=outputs)

    def capacity(self, index: Rows) -> int:
        """Compute the number of rows whose outputs fit into ``memory``, given the `index`; at least 64."""
        size = 8 * sum(math.prod(value.shape[1:]) for value in index.outputs.values())
        return max(self.memory // max(size, 1), MIN_CAPACITY)

    def take(self, numbers: Integer[np.ndarray, " num"]) -> Rows:
        """Read the rows with these numbers, in the order of their numbers.

        Raises:
            UnreadableFile: as for `read`.
        """
        return _join(list(self._chosen(self._shards(), numbers)), self.path)

    def pool(self, seed: Integer[np.ndarray, " words"], numbers: Integer[np.ndarray, " num"], size: int) -> Rows:
        """Read at most ``size`` rows, from shards in random order.

        Args:
            seed: seed of the order.
            numbers: numbers of the rows from which to choose.
            size: number of rows.

        Raises:
            UnreadableFile: as for `read`.

        Exactness: the rows are not a simple random sample, because rows of one shard are chosen together.
        """
        shards, count = self._shards(), 0
        parts: list[Rows] = []
        order = np.random.default_rng(seed).permutation(len(shards))
        for part in self._chosen([shards[i] for i in order], numbers):
            parts.append(select(part, slice(None, size - count)))
            count += len(parts[-1].number)
            if count == size:
                break
        return _join(parts, self.path)

    def to_zarr(self, path: str | os.PathLike[str]) -> None:
        """Copy the rows to a new zarr group, in the order of their numbers, for xarray, dask and other readers.

        The group has one array for each field of `Rows`, one array ``output.<name>`` for each output, and the manifest
        as attributes. Shards are copied one by one, which limits the memory.

        Args:
            path: folder of the group.

        Raises:
            ImportError: if zarr is not installed.
            FileExistsError: if the folder is not empty.
            UnreadableFile: as for `read`.
        """
        try:
            import zarr
        except ImportError as error:
            raise ImportError("`to_zarr` needs zarr: pip install 'scoreinfer[store]'.") from error
        if Path(path).exists() and any(Path(path).iterdir()):
            raise FileExistsError(f"`{path}` is not empty. Expected a new or an empty folder: choose another `path`.")
        rows = self.index()
        group = zarr.create_group(str(path), zarr_format=2, attributes=self.manifest)
        for name in ("number", "z", "status", "error", "seed", "seconds"):
            group.create_array(name, data=getattr(rows, name))
        num = len(rows.number)
        chunk = max(min(self.capacity(rows), num), 1)
        arrays = {}
        for name, value in rows.outputs.items():
            shape = value.shape[1:]
            arrays[name] = group.create_array(f"output.{name}", shape=(num, *shape), chunks=(chunk, *shape), dtype="f8")
        for part in self.parts():
            places = np.searchsorted(rows.number, part.number)
            for name, value in part.outputs.items():
                arrays[name].oindex[places] = value

    def _shards(self) -> list[Path]:
        return sorted(self.path.glob("*.npz"))

    def parts(self, shards: list[Path] | None = None) -> Iterator[Rows]:
        """Yield the rows shard by shard. A row that is in two shards is yielded once.

        Args:
            shards: paths of the shards, in order. None means all shards.

        Raises:
            UnreadableFile: as for `read`.
        """
        seen: set[int] = set()
        for path in self._shards() if shards is None else shards:
            rows = [row for row in _read_shard(path, self.manifest["dim"]) if row.number not in seen]
            seen.update(row.number for row in rows)
            yield _gather(rows, self.manifest["dim"], self.path)

    def _chosen(self, shards: list[Path], numbers: Integer[np.ndarray, " num"]) -> Iterator[Rows]:
        for part in self.parts(shards):
            among = np.isin(part.number, numbers)
            if among.any():
                yield select(part, among)

    def __str__(self) -> str:
        rows = self.index()
        counts = ", ".join(f"{int(np.sum(rows.status == status))} {status}" for status in STATUSES)
        timed = rows.seconds[np.isfinite(rows.seconds)]
        seconds = f", {timed.mean():.3g} s each" if len(timed) else ""
        return f"{len(rows.number)} of {self.manifest['num']} simulations ({counts}){seconds}"


def open_store(path: Path, record: dict[str, Any]) -> Store:
    """Create a store, or open an existing store for more rows of the same sequence.

    Args:
        path: the folder.
        record: the manifest, without format and schema.

    Raises:
        ValueError: if the existing store has another key, prior or simulator.
        UnreadableFile: if the existing manifest is damaged.
    """
    record = {"format": FORMAT, "schema": SCHEMA} | record
    path.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path, MANIFEST, "*.npz")
    if (path / MANIFEST).exists():
        unnamed = {"simulator": record.get("simulator")}  # older manifests do not name the simulator
        stored: dict[str, Any] = unnamed | Store(path).manifest
        changed = [
            f"`{name}` is {record.get(name)}, was {stored.get(name)}"
            for name in sorted(record.keys() | stored.keys())
            if name not in ("num", FINGERPRINT) and record.get(name) != stored.get(name)
        ]
        if changed:
            raise ValueError(
                f"`{path}` holds other simulations: {'; '.join(changed)}. Use the arguments with which they were "
                "started, or choose another `store`."
            )
        record = _same_simulator(path, record, stored)
        record["num"] = max(record["num"], stored["num"])
    write_record(path / MANIFEST, record)
    return Store(path)


def _same_simulator(path: Path, record: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Check that the simulator is the one of the store, if both manifests have a fingerprint.

    Returns:
        The record, with the fingerprint to store.

    Raises:
        ValueError: if the simulator differs.
        UnreadableFile: if the stored fingerprint is damaged.
    """
    if FINGERPRINT not in record:
        return record
    told, was = record[FINGERPRINT], stored.get(FINGERPRINT)
    if was is not None and not is_fingerprint(was):
        raise UnreadableFile(path / MANIFEST, "it does not say which simulator was run")
    changed = differences(told, was)
    if changed:
        raise ValueError(
            f"`{path}` holds rows of another `{record['simulator']}`: {'; '.join(changed)}. Choose another `store`, or "
            "use the old simulator. If both compute the same, set `simulator_version=` to a text of your own."
        )
    return record | {FINGERPRINT: continued(told, was)}


def leave_out(path: Path, labels: Iterable[str]) -> None:
    """Remove parts from the stored fingerprint, because a run of the simulator changes them.

    Args:
        path: the folder.
        labels: the parts.
    """
    record = read_record(path / MANIFEST)
    write_record(path / MANIFEST, record | {FINGERPRINT: without(record[FINGERPRINT], labels)})


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the lock of the folder. The operating system releases it when the process dies. Windows has no lock.

    Raises:
        RuntimeError: if another process writes to the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows: if two writers made the same row, it is read once
        yield
        return
    with (path / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"Another process writes to `{path}`. Wait until it ends, or end it.") from error
        yield


def status_of(outputs: Mapping[str, np.ndarray]) -> str:
    """Return ``ok`` if every number is finite, else ``invalid``."""
    return OK if all(np.isfinite(value).all() for value in outputs.values()) else INVALID


def write_shard(path: Path, rows: list[Row]) -> None:
    """Write finished rows as one shard, completely or not at all."""
    names = next((list(row.outputs) for row in rows if row.outputs is not None), [])
    like = next((row.outputs for row in rows if row.outputs is not None), {})
    columns: dict[str, np.ndarray] = {
        "number": np.array([row.number for row in rows], np.int64),
        "z": np.array([row.z for row in rows], np.float64),
        "status": np.array([row.status for row in rows]),
        "error": np.array([row.error[:MAX_ERROR] for row in rows]),
        "seed": np.array([row.seed for row in rows], np.uint32),
        "seconds": np.array([row.seconds for row in rows], np.float64),
    }
    for name in names:
        nothing = np.full(like[name].shape, np.nan)
        columns[f"output.{name}"] = np.array(
            [nothing if row.outputs is None else row.outputs[name] for row in rows], np.float64
        )
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **columns)
    data = content.getvalue()
    write_file(path / f"{hashlib.sha256(data).hexdigest()[:32]}.npz", data)


def _read_shard(path: Path, dim: int) -> Iterator[Row]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:32] != path.stem:
        raise UnreadableFile(path, "it does not match its checksum, so it was damaged or changed")
    try:
        columns = _columns(path, data)
        num = len(columns["number"])
        expected = {
            "number": ((num,), "i"), "z": ((num, dim), "f"), "status": ((num,), "U"), "error": ((num,), "U"),
            "seed": ((num,), "u"), "seconds": ((num,), "f"),
        }  # fmt: skip
        for name, (shape, kind) in expected.items():
            if columns[name].shape != shape or columns[name].dtype.kind != kind:
                raise UnreadableFile(path, f"column {name!r} must have shape {shape} and kind {kind!r}")
        outputs = {name: column for name, column in columns.items() if name.startswith("output.")}
        if any(column.shape[:1] != (num,) or column.dtype != np.float64 for column in outputs.values()):
            raise UnreadableFile(path, f"an output does not have {num} rows of double-precision numbers")
        if not outputs and set(columns["status"].tolist()) & {OK, INVALID}:
            raise UnreadableFile(path, "it has rows that succeeded, but no outputs")
        if set(columns) - set(expected) - set(outputs) or not set(columns["status"].tolist()) <= set(STATUSES):
            raise UnreadableFile(path, "it has an unknown column or status")
    except UnreadableFile:
        raise
    except Exception as error:  # a hostile file may make the parser raise anything
        raise UnreadableFile(path, f"it is no shard of a store ({type(error).__name__}: {error})") from error
    for i in range(num):
        has = columns["status"][i] in (OK, INVALID)
        yield Row(
            int(columns["number"][i]), columns["z"][i], str(columns["status"][i]), str(columns["error"][i]),
            int(columns["seed"][i]), float(columns["seconds"][i]),
            {name.removeprefix("output."): column[i] for name, column in outputs.items()} if has else None,
        )  # fmt: skip


def _columns(path: Path, data: bytes) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file. Refuse an array whose size differs from its header, or exceeds the file's."""
    columns = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(data):
                raise UnreadableFile(path, f"{member.filename!r} is compressed or larger than the file")
            file = io.BytesIO(archive.read(member))
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version](file)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
                raise UnreadableFile(path, f"the size of {member.filename!r} does not fit its shape {shape}")
            file.seek(0)
            columns[member.filename.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    return columns


def _gather(rows: list[Row], dim: int, path: Path) -> Rows:
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        own: Mapping[str, np.ndarray] = row.outputs or {}
        if shapes and own and {name: value.shape for name, value in own.items()} != shapes:
            raise UnreadableFile(path, f"the outputs of row {row.number} have other shapes than those of earlier rows")
        shapes = shapes or {name: value.shape for name, value in own.items()}
    outputs = {
        name: np.array([np.full(shape, np.nan) if row.outputs is None else row.outputs[name] for row in rows])
        for name, shape in shapes.items()
    }
    return Rows(
        np.array([row.number for row in rows], np.int64), np.array([row.z for row in rows], float).reshape(-1, dim),
        np.array([row.status for row in rows], str), np.array([row.error for row in rows], str),
        np.array([row.seed for row in rows], np.uint32), np.array([row.seconds for row in rows], float), outputs,
    )  # fmt: skip


def select(rows: Rows, which: Any) -> Rows:
    """Select rows by a slice, by their indices, or by one flag for each."""
    columns = {name: getattr(rows, name)[which] for name in Rows._fields if name != "outputs"}
    return Rows(**columns, outputs={name: value[which] for name, value in rows.outputs.items()})


def _check_alike(outputs: dict[str, np.ndarray], others: dict[str, np.ndarray], path: Path) -> None:
    shapes, expected = ({name: value.shape[1:] for name, value in which.items()} for which in (outputs, others))
    if shapes != expected:
        raise UnreadableFile(path, f"its shards have outputs of different shapes, {shapes} and {expected}")


def _join(parts: list[Rows], path: Path) -> Rows:
    """Join rows, in the order of their numbers."""
    for part in parts:
        _check_alike(part.outputs, parts[0].outputs, path)
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Rows._fields[:-1]}
    outputs = {name: np.concatenate([part.outputs[name] for part in parts]) for name in parts[0].outputs}
    return select(Rows(**columns, outputs=outputs), np.argsort(columns["number"]))
