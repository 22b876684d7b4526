"""What docstrings say of exactness, read from the source without importing it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KINDS = {
    "biased": r"\bbiased\b|\bheuristic\b",
    "consistent": r"\bconsistent\b|\basymptotic\b|\bvanish",
    "exact": r"\bexact\b|\bunbiased\b|\bproper\b|\bleaves? the\b|\binvariant\b",
}
"""Words by which the first sentence of a statement is sorted; an earlier word of the sentence wins."""


class Statement(NamedTuple):
    """What a docstring says of exactness.

    Args:
        room: room of the package.
        name: class, function or ``Class.method``.
        target: full name.
        kind: exact, consistent, biased, or empty where the statement is none of these.
        text: the statement.
    """

    room: str
    name: str
    target: str
    kind: str
    text: str

    @property
    def first(self) -> str:
        """The first sentence, and the second one where that says when it is otherwise."""
        sentences = re.split(r"(?<=[^.][.])\s", self.text)
        return " ".join(sentences[: 2 if len(sentences) > 1 and sentences[1].startswith(("Otherwise", "Its")) else 1])


def rooms(package: Path) -> dict[str, list[str]]:
    """Find the public modules with a public class or function, by room."""
    found: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        module, parts = _module(package, path), path.relative_to(package).parts
        if any(part.startswith("_") and part != "__init__.py" for part in parts) or module == package.name:
            continue
        tree = ast.parse(path.read_text())
        if next(_documented(tree), None) is not None or path.name == "__init__.py":
            found.setdefault(parts[0].removesuffix(".py"), []).append(module)
    return found


def statements(package: Path) -> Iterator[Statement]:
    """Yield every public statement of exactness."""
    for room, modules in rooms(package).items():
        for module in modules:
            for name, doc in _documented(ast.parse(_path(package, module).read_text())):
                if text := _statement(doc):
                    yield Statement(room, name, f"{module}.{name}", kind_of(text), text)


def kind_of(text: str) -> str:
    """Sort a statement by the first of the words in its first sentence.

    >>> kind_of("biased: the steps have finite length")
    'biased'
    >>> kind_of("exact for linear models; else biased")
    'exact or biased'
    >>> kind_of("``log_q`` is exact for any score")
    'exact'
    >>> kind_of("not a random sample")
    ''
    """
    if re.search(r"\b(else|otherwise) biased", text, flags=re.IGNORECASE):
        return "exact or biased"
    sentence = re.split(r"\.\s", text)[0]
    places = {kind: found.start() for kind, word in KINDS.items() if (found := re.search(word, sentence))}
    return min(places, key=places.__getitem__, default="")


def _module(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _path(package: Path, module: str) -> Path:
    path = package.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _documented(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and docstring of public classes, their methods, and functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if doc := ast.get_docstring(node):
                yield prefix + node.name, doc
            if isinstance(node, ast.ClassDef):
                yield from _documented(node, f"{prefix}{node.name}.")


def _statement(doc: str) -> str:
    found = re.search(r"^Exactness:((?:.+\n?)+)", doc, flags=re.MULTILINE)
    return " ".join(found[1].split()) if found else ""
