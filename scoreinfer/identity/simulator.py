"""Fingerprints: plain data that describe the computation of a simulator, without running it.

A fingerprint changes if the simulator is edited. It consists of named parts of the callable: bytecode and constants
(including nested functions), defaults, closure and global values, arguments of partials, and attributes of objects. The
user's own functions and classes that the callable refers to have the same parts. A library (all code in
``site-packages`` or the standard library) enters by name only. A library's objects enter by their arrays and fields,
such as the weights of a network. A text enters by its digest, because it may be secret.

No part depends on addresses, file names, line numbers, docstrings or names of local variables. So the parts are the
same in every process of one Python version.
"""

import dataclasses
import dis
import enum
import hashlib
import inspect
import os
import sys
import sysconfig
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple, cast

import numpy as np

from scoreinfer._tree import is_array

Version = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
"""A version text that the user gives, or files whose bytes enter the fingerprint."""
CODE, CONSTANTS, FILE = "code of", "constants of", "file"
"""Beginnings of the labels of parts. Stored fingerprints contain them."""
LONGEST, DEEPEST = 60, 20
"""Longest description that is not replaced by a digest (characters), and deepest nesting. Chosen by judgement."""
PLAIN = (types.NoneType, bool, int, float, complex, range, types.EllipsisType)
"""Types whose values are described by their ``repr``."""
EXACT = ("decimal", "fractions", "datetime", "uuid")
"""Modules of the standard library whose values are described by their ``repr``."""
SIGNATURE = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
"""Flags of a code object that belong to its signature."""
COMPILED = {"None", "True", "False"}
"""Constants that some versions of the compiler add."""
NOT_COMPUTED = ("__doc__", "__firstlineno__")
"""Names in the body of a class whose values do not change a computation."""


def fingerprint(simulator: Callable[..., Any], version: Version = None) -> dict[str, Any]:
    """Describe a simulator as plain data.

    Args:
        simulator: any callable.
        version: a text replaces the parts. Paths of files add one part for each file. None means neither.

    Raises:
        OSError: if a file cannot be read.

    >>> found = fingerprint(lambda x, scale=2.0: 3 * x * scale)
    >>> found["parts"]["default `scale` of `<lambda>`"], found["parts"]["constants of `<lambda>`"]
    ('2.0', ['3'])
    """
    if isinstance(version, str):
        return {"version": version}
    parts = _Parts()
    parts.told(simulator)
    for path in [version] if isinstance(version, os.PathLike) else version or ():
        with Path(path).open("rb") as file:
            parts.add(f"{FILE} `{Path(path).name}`", hashlib.file_digest(file, "sha256").hexdigest()[:16])
    return {"python": f"{sys.version_info.major}.{sys.version_info.minor}", "parts": parts.parts}


def is_fingerprint(told: Any) -> bool:
    """Say whether a value that was read from a file has the form of a fingerprint."""
    if not isinstance(told, dict):
        return False
    return isinstance(told.get("version"), str) or (
        isinstance(told.get("python"), str) and isinstance(told.get("parts"), dict)
    )


def differences(told: dict[str, Any], stored: Mapping[str, Any] | None) -> list[str]:
    """List the differences between a simulator and the one that a store was started with.

    Args:
        told: the fingerprint of the simulator.
        stored: the fingerprint in the store. None means that the store has no fingerprint.

    Returns:
        One text for each difference. The list is empty if the fingerprints cannot be compared.
    """
    if stored is None or ("version" in told and "version" not in stored):
        return []
    if "version" in stored:
        if told.get("version") == stored["version"]:
            return []
        return [f"`simulator_version` is {told.get('version')!r}, was {stored['version']!r}"]
    alike, new, old = told["python"] == stored["python"], told["parts"], stored["parts"]
    labels = [label for label in sorted(new.keys() | old.keys()) if alike or not label.startswith(CODE)]
    return [text for label in labels if (text := _difference(label, new, old, alike))]


def continued(told: dict[str, Any], stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """Leave out of a fingerprint the parts that the stored fingerprint leaves out."""
    moving = {label for label, value in (stored or {}).get("parts", {}).items() if value is None}
    return without(told, moving)


def without(told: dict[str, Any], labels: Iterable[str]) -> dict[str, Any]:
    """Leave parts out of the comparison."""
    return told | {"parts": told["parts"] | dict.fromkeys(labels)} if "parts" in told else told


def moved(told: dict[str, Any], simulator: Callable[..., Any]) -> set[str]:
    """Return the labels of values that have changed since the fingerprint was made, such as counters."""
    if "parts" not in told:
        return set()
    new, old = fingerprint(simulator)["parts"], told["parts"]
    changed = {label for label in new.keys() | old.keys() if new.get(label) != old.get(label)}
    return {label for label in changed if not label.startswith((CODE, CONSTANTS, FILE))}


def _difference(label: str, new: Mapping[str, Any], old: Mapping[str, Any], alike: bool) -> str:
    """Say how one part differs. Return the empty string if it does not.

    Args:
        label: the label of the part.
        new: the parts of the simulator.
        old: the parts in the store.
        alike: whether the same Python version compiled both.
    """
    if label not in old:
        return "" if label.startswith(FILE) else f"{label} is new"
    if label not in new:
        return "" if old[label] is None else f"{label} is gone"
    value, was = new[label], old[label]
    if was is None or value == was:
        return ""
    if isinstance(value, list) and isinstance(was, list):
        if not alike:  # compilers differ in how often they list a constant
            value, was = set(value) - COMPILED, set(was) - COMPILED
        more, less = Counter(value) - Counter(was), Counter(was) - Counter(value)
        if more or less:
            return f"{label}: {_some(more)} in place of {_some(less)}"
        return f"{label} are in another order" if alike else ""
    readable = not any(str(text).startswith(("text", "digest")) for text in (value, was))
    return f"{label} is {value}, was {was}" if readable and not label.startswith((CODE, FILE)) else f"{label} differs"


def _some(constants: Iterable[str]) -> str:
    return ", ".join(list(constants)[:3]) or "none"


class _Code(NamedTuple):
    """Instructions, constants, global names and attribute names of a code object and of the code objects in it."""

    steps: list[str]
    constants: list[Any]
    names: list[str]
    attributes: set[str]


def _read_code(code: types.CodeType) -> _Code:
    """List the instructions, and the constants separately, as they were compiled (before specialisation)."""
    signature = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & SIGNATURE)
    read = _Code([f"{signature} {code.co_exceptiontable.hex()}"], [], [], set())
    instructions = list(dis.get_instructions(code))
    for i, step in enumerate(instructions):
        by_name = step.opcode in dis.hasname or step.opcode in dis.hasfree
        if isinstance(step.argval, types.CodeType):
            inner = _read_code(step.argval)
            read.steps.extend(inner.steps)
            read.constants.extend(inner.constants)
            read.names.extend(inner.names)
            read.attributes.update(inner.attributes)
        elif step.opcode in dis.hasconst:
            after = instructions[i + 1] if i + 1 < len(instructions) else step
            if not (after.opname == "STORE_NAME" and after.argval in NOT_COMPUTED):
                names = step.opname == "KW_NAMES"  # Python 3.11 gives no value for this instruction
                read.constants.append(code.co_consts[cast(int, step.arg)] if names else step.argval)
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.names.append(step.argval)
        elif by_name:
            read.attributes.add(step.argval)
        read.steps.append(
            f"{step.opname} {step.argval if by_name else '' if step.opcode in dis.hasconst else step.arg}"
        )
    return read


class _Parts:
    """Collects the parts of a callable. Every function, class and object is visited once."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        self._seen: dict[int, Any] = {}
        self._depth = 0

    def add(self, label: str, value: Any) -> None:
        """Add a part. If the label is taken, a number is added to it."""
        number = next(i for i in range(1, len(self.parts) + 2) if _numbered(label, i) not in self.parts)
        self.parts[_numbered(label, number)] = value

    def told(self, value: Any) -> str:
        """Describe a value in one line, and add the parts that it consists of."""
        self._depth += 1
        text = self._tell(value) if self._depth < DEEPEST else "..."
        self._depth -= 1
        return text if len(text) <= LONGEST else f"digest {_digest(text)}"

    def _tell(self, value: Any) -> str:
        if isinstance(value, np.generic):
            return f"{value.dtype} {value.item()!r}"
        if type(value) in PLAIN or type(value).__module__ in EXACT:
            return repr(value)
        if isinstance(value, str | bytes):
            return f"text {_digest(str(value))}"
        if isinstance(value, PurePath):
            return f"text {_digest(value.name)}"  # the name only, because folders may move
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name} {self.told(value.value)}"
        if is_array(value):
            return self._tell_array(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self.told, list(value)))}]"
        if isinstance(value, set | frozenset):
            return f"{{{', '.join(sorted(map(self.told, list(value))))}}}"
        if isinstance(value, Mapping):
            return f"{{{', '.join(sorted(f'{self.told(key)}: {self.told(of)}' for key, of in list(value.items())))}}}"
        return self._name(value)

    def _tell_array(self, value: Any) -> str:
        try:
            array = np.asarray(value)
        except (TypeError, RuntimeError):  # typed random keys, and arrays that were donated to JAX
            return f"a {type(value).__qualname__}"
        if array.dtype == object:
            return self.told(array.tolist())
        return f"digest {_digest(f'{array.dtype} {array.shape}', array.tobytes())}"

    def _name(self, value: Any) -> str:
        """Return the name of a value that has no plain form. Add its parts if it is the user's own."""
        first = id(value) not in self._seen
        self._seen[id(value)] = value  # keep the object, so that no other object gets its address
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, types.MethodType):
            return f"{self.told(value.__self__)}.{self.told(value.__func__)}"
        if isinstance(value, partial):
            return self._partial(value) if first else "a partial"
        if isinstance(value, types.FunctionType):
            if first and _is_own_file(value.__code__.co_filename):
                self._function(value)
            elif first and hasattr(value, "__wrapped__"):
                self.told(value.__wrapped__)
            return value.__qualname__
        if isinstance(value, type):
            if first and _is_own_class(value):
                self._class(value)
            return value.__qualname__
        if first and _is_own_class(type(value)):
            self._class_once(type(value))
            self._attributes(value)
        elif first and hasattr(value, "__wrapped__"):
            self.told(value.__wrapped__)
        elif first:
            self._attributes(value, arrays_alone=not dataclasses.is_dataclass(value))
        return f"a {type(value).__qualname__}"

    def _partial(self, value: partial) -> str:
        name = self.told(value.func)
        for label, argument in (*enumerate(value.args), *value.keywords.items()):
            self.add(f"argument `{label}` of `{name}`", self.told(argument))
        return f"a partial of {name}"

    def _function(self, function: types.FunctionType) -> None:
        code, name = _read_code(function.__code__), function.__qualname__
        depth, self._depth = self._depth, 0
        self.add(f"{CODE} `{name}`", _digest("\n".join(code.steps)))
        self.add(f"{CONSTANTS} `{name}`", list(map(self.told, code.constants)))
        found = {
            "default": _defaults(function),
            "closure value": _closure(function),
            "global": _globals(function, code),
        }
        for kind, values in found.items():
            for variable, value in values:
                self.add(f"{kind} `{variable}` of `{name}`", self.told(value))
        self._depth = depth

    def _class_once(self, kind: type) -> None:
        if id(kind) not in self._seen:
            self.told(kind)

    def _class(self, kind: type) -> None:
        """Add the methods and the plain attributes of a class and of its base classes."""
        for base in kind.__bases__:
            if _is_own_class(base):
                self._class_once(base)
        for name, member in sorted(vars(kind).items()):
            function = next((f for a in ("fget", "__func__", "func") if (f := getattr(member, a, None))), member)
            generated = dataclasses.is_dataclass(kind) and name.startswith("__")
            if isinstance(function, types.FunctionType):
                if not generated or function.__code__.co_filename != "<string>":
                    self.told(function)
            elif not name.startswith("__"):
                self.add(f"attribute `{name}` of `{kind.__qualname__}`", self.told(member))

    def _attributes(self, value: Any, arrays_alone: bool = False) -> None:
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        found = getattr(value, "__dict__", {}) | {name: getattr(value, name) for name in slots if hasattr(value, name)}
        for name, attribute in list(found.items()):
            if arrays_alone and not is_array(attribute):
                continue
            self.add(f"attribute `{name}` of a `{type(value).__qualname__}`", self.told(attribute))


def _defaults(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    values = function.__defaults__ or ()
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    yield from zip(names[len(names) - len(values) :], values, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def _closure(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if cell != types.CellType():
            yield name, cell.cell_contents


def _globals(function: types.FunctionType, code: _Code) -> Iterator[tuple[str, Any]]:
    """Yield the values that a function uses from its own module, and from other modules of the user."""
    for name in dict.fromkeys(code.names):
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        if not isinstance(value, types.ModuleType):
            yield name, value
        elif _is_own_file(getattr(value, "__file__", None) or "<frozen>"):
            yield from ((f"{name}.{of}", getattr(value, of)) for of in sorted(code.attributes) if hasattr(value, of))


def _is_own_file(path: str) -> bool:
    """Say whether a file belongs to the user, not to a library."""
    library = {"site-packages", "dist-packages"} & set(PurePath(path).parts)
    return not (library or path.startswith(("<frozen", sysconfig.get_path("stdlib"))))


def _is_own_class(kind: type) -> bool:
    if kind.__module__ == "__main__":
        return True
    path = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return path is not None and _is_own_file(path)


def _numbered(label: str, number: int) -> str:
    return label if number == 1 else f"{label} ({number})"


def _digest(text: str, content: bytes = b"") -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass") + content).hexdigest()[:16]
