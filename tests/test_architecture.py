"""The walk through the package is one-way: imports point down the table, outside libraries stay behind their doors."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "scoreinfer"
ROOT = Path(__file__).parents[1] / PACKAGE

# Who may import whom, low to high. Names on one line are independent of each other.
RANKS = """
_typing errors _pickling _devices _threads
_memory
_keys _quadrature _tree files figures
_program problem nets process bijections
identity score agreement markov
montecarlo
model training arviz
draws samplers
simulators evidence paths
posterior filters reweighing
mcmc
calibration comparison
__init__
command
__main__
"""
RANK = {room: rank for rank, line in enumerate(RANKS.strip().splitlines()) for room in line.split()}
NUMPYRO_DOORS = {"model", "mcmc", "comparison", "command"}
LAZY = {"arviz", "matplotlib", "sklearn"}  # imported inside functions only


class Import(NamedTuple):
    """One imported module, with the line it stands on and whether it waits inside a function."""

    module: str
    line: int
    lazy: bool


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Yield every import of a syntax tree; from-imports of the package itself are resolved to its modules."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it out in full"
            if node.module == PACKAGE:  # `from scoreinfer import problem` names the room in the alias
                yield from (Import(f"{PACKAGE}.{alias.name}", node.lineno, lazy) for alias in node.names)
            else:
                yield Import(node.module, node.lineno, lazy)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, inside)


def room_of(parts: tuple[str, ...]) -> str:
    """Name the room a module belongs to: the module itself, or its sub-package."""
    return parts[0].removesuffix(".py")


def violations(room: str, tree: ast.AST) -> Iterator[str]:
    """Yield what a module of ``room`` imports and must not."""
    for found in imports(tree):
        library, *inner = found.module.split(".")
        if library == PACKAGE:
            target = inner[0] if inner else "__init__"
            if target not in RANK:  # a headline name taken from the hall: `from scoreinfer import fit`
                target = "__init__"
            if target != room and RANK[target] >= RANK[room]:
                yield f"line {found.line}: {room} imports {target}, which is not below it"
        if library == "numpyro" and room not in NUMPYRO_DOORS:
            yield f"line {found.line}: numpyro is imported in {room}; only {sorted(NUMPYRO_DOORS)} may"
        if library in LAZY and not found.lazy:
            yield f"line {found.line}: {library} is imported at module level; import it inside a function"


MODULES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_point_down(path: Path):
    """Each module imports only rooms below its own, and outside libraries only where they are allowed."""
    room = room_of(path.relative_to(ROOT).parts)
    assert room in RANK, f"{room} has no row in the table of tests/test_architecture.py; give it one"
    assert not list(violations(room, ast.parse(path.read_text())))


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("problem", "import numpyro"),
        ("problem", "def f():\n    from numpyro import handlers"),
        ("montecarlo", "from scoreinfer.draws import Draws"),
        ("montecarlo", "def f():\n    from scoreinfer.draws import Draws"),
        ("montecarlo", "from scoreinfer import draws"),
        ("draws", "from scoreinfer import fit"),
        ("draws", "import scoreinfer"),
        ("score", "from scoreinfer.training.simulations import Simulations"),
        ("arviz", "import arviz as az"),
        ("arviz", "class A:\n    import matplotlib.pyplot"),
    ],
)
def test_violations_are_seen(room, source):
    assert len(list(violations(room, ast.parse(source)))) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("mcmc", "import numpyro.distributions as dist"),
        ("score", "from scoreinfer.score.base import AbstractScore"),
        ("arviz", "def f():\n    import arviz as az"),
        ("__init__", "from scoreinfer.comparison import compare"),
        ("posterior", "from scoreinfer import samplers, training"),
    ],
)
def test_allowed_imports_pass(room, source):
    assert not list(violations(room, ast.parse(source)))


def test_import_leaves_jax_asleep():
    """The number of host devices can still be set after the import, as NumPyro's users do."""
    code = f"import {PACKAGE}, numpyro, jax; numpyro.set_host_device_count(3); print(jax.local_device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]


def test_import_is_light():
    """Importing the package imports neither arviz (seconds) nor matplotlib nor scikit-learn."""
    code = f"import sys, {PACKAGE}; print(*sorted({LAZY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
