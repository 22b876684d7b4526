"""Fingerprints of simulators: whatever changes what is computed is named, and nothing else is noticed."""

import copy
import functools
import json
import logging
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import gaussian_kde

import scoreinfer as si
from scoreinfer.files import read_record, write_record
from scoreinfer.identity.simulator import differences, fingerprint
from scoreinfer.simulators.store import MANIFEST

BASE = """
import numpy as np
SCALE = 2.0
NAMES = {"a", "b", "c", "d"}
def helper(x):
    return x + 1
class Solver:
    order = 2
    def __init__(self, dt=0.1):
        self.dt = dt
        self.calls = 0
    def step(self, x):
        return x * self.dt
    def __call__(self, parameters, seed):
        self.calls += 1
        return self.step(parameters["a"])
class Child(Solver):
    pass
def make(offset, grid=np.zeros(3), config={"dt": 0.1}):
    def simulator(parameters, seed, order=2, *, noise=0.5):
        noisy = [x + 3 for x in grid if x not in {"u", "v", "w"}]
        try:
            return helper(parameters["a"]) * SCALE + offset + config["dt"] + len(noisy) + len(NAMES)
        except KeyError:
            return 0
    return simulator
simulator = make(1)
solver, child, bound = Solver(), Child(), Solver().step
part = __import__("functools").partial(simulator, order=3)
"""


def load(source, filename="<cell 1>"):
    """Run a notebook's cell."""
    module = types.ModuleType("__main__")
    exec(compile(source, filename, "exec"), vars(module))
    return module


def changes(name, *edits, base=BASE):
    """Say how a simulator of a cell differs after the cell was edited."""
    edited = base
    for old, new in edits:
        assert old in edited
        edited = edited.replace(old, new)
    told, was = (fingerprint(getattr(load(source), name)) for source in (edited, base))
    return differences(json.loads(json.dumps(told)), was)


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("simulator", "* SCALE", "/ SCALE", "code of `make.<locals>.simulator` differs"),
        ("simulator", "x + 3", "x + 30", "constants of `make.<locals>.simulator`: 30 in place of 3"),
        ("simulator", "return 0", "return None", "constants of `make.<locals>.simulator`: None in place of 0"),
        ("simulator", '"w"}', '"x"}', "constants of `make.<locals>.simulator`: digest"),
        ("simulator", "make(1)", "make(1.5)", "closure value `offset` of `make.<locals>.simulator` is 1.5, was 1"),
        ("simulator", "zeros(3)", "ones(3)", "closure value `grid` of `make.<locals>.simulator` differs"),
        ("simulator", '"dt": 0.1', '"dt": 0.2', "closure value `config` of `make.<locals>.simulator`"),
        ("simulator", "order=2, *", "order=4, *", "default `order` of `make.<locals>.simulator` is 4, was 2"),
        ("simulator", "noise=0.5", "noise=0.6", "default `noise` of `make.<locals>.simulator` is 0.6, was 0.5"),
        ("simulator", "SCALE = 2.0", "SCALE = 3.0", "global `SCALE` of `make.<locals>.simulator` is 3.0, was 2.0"),
        ("simulator", '"d"}', '"e"}', "global `NAMES` of `make.<locals>.simulator` differs"),
        ("simulator", "return x + 1", "return x - 1", "code of `helper` differs"),
        ("simulator", "except KeyError", "except ValueError", "code of `make.<locals>.simulator` differs"),
        ("part", "order=3", "order=5", "argument `order` of `make.<locals>.simulator` is 5, was 3"),
        ("part", "x + 3", "x + 30", "constants of `make.<locals>.simulator`: 30 in place of 3"),
        ("solver", "Solver(), Child", "Solver(0.3), Child", "attribute `dt` of a `Solver` is 0.3, was 0.1"),
        ("solver", "order = 2", "order = 3", "attribute `order` of `Solver` is 3, was 2"),
        ("solver", "x * self.dt", "x / self.dt", "code of `Solver.step` differs"),
        ("child", "x * self.dt", "x / self.dt", "code of `Solver.step` differs"),
        ("child", "    pass", "    def step(self, x): return x", "code of `Child.step` is new"),
        ("bound", "Solver().step", "Solver(0.7).step", "attribute `dt` of a `Solver` is 0.7, was 0.1"),
    ],
)
def test_every_edit_is_named(name, old, new, expected):
    found = changes(name, (old, new))
    assert any(text.startswith(expected) for text in found), found


@pytest.mark.parametrize("name", ["simulator", "solver", "child", "bound", "part"])
def test_what_computes_the_same_is_the_same(name):
    """Other lines, comments, docstrings, names of local variables; code that is not called."""
    edits = [
        ("import numpy as np\n", "import numpy as np\n\n# a remark\n\n"),
        ("    return x + 1", '    """Add one."""\n    return x + 1'),
        ("noisy", "louder"),
        ("class Child", "def unused(): return 7\nclass Child"),
        ("    order = 2", '    """Solve."""\n    order = 2'),
    ]
    assert changes(name, *edits) == []
    told, moved = (fingerprint(getattr(load(BASE, filename), name)) for filename in ("<cell 1>", "/elsewhere/cell.py"))
    assert told == moved


def test_a_body_of_a_class_may_move_to_other_lines():
    """Python 3.13 keeps the number of its first line among the constants."""
    base = "def simulator(p, s):\n    class Inner:\n        x = 1\n    return Inner.x\n"
    assert changes("simulator", ("def sim", "\n\n\ndef sim"), base=base) == []
    assert changes("simulator", ("x = 1", "x = 2"), base=base) == ["constants of `simulator`: 2 in place of 1"]


def test_order_of_constants_counts():
    base = "def simulator(p, s):\n    return p * 2 + 3\n"
    assert changes("simulator", ("* 2 + 3", "* 3 + 2"), base=base) == ["constants of `simulator` are in another order"]


def test_every_process_tells_the_same():
    """Sets come in another order there, and addresses are others."""
    code = f"import json, sys\nexec(compile({BASE!r}, 'x', 'exec'))\nfrom scoreinfer.identity import fingerprint\n"
    code += "print(json.dumps([fingerprint(f) for f in (simulator, solver, bound, part)], sort_keys=True))"
    told = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] and b" at 0x" not in told[0]


def test_decorated_and_compiled_functions_are_looked_through():
    def simulator(parameters, seed):
        return parameters["a"] * 2

    def edited(parameters, seed):
        return parameters["a"] * 3

    edited.__qualname__ = simulator.__qualname__
    for wrap in (jax.jit, functools.lru_cache, jax.vmap, lambda f: functools.partial(jax.jit(f), seed=0)):
        assert any(
            "3 in place of 2" in text for text in differences(fingerprint(wrap(edited)), fingerprint(wrap(simulator)))
        )


def test_secrets_stay_secret():
    told = fingerprint(lambda parameters, seed, token="hunter2": f"swordfish {token}")
    assert "hunter2" not in json.dumps(told) and "swordfish" not in json.dumps(told)


def test_objects_of_libraries_count_by_name():
    """A logger and a random generator change as they are used."""
    log, rng, key = logging.getLogger("scoreinfer.test"), np.random.default_rng(0), jax.random.key(0)

    def simulator(parameters, seed):
        return log, rng, key

    before = fingerprint(simulator)
    rng.normal()
    log.debug("used")
    assert fingerprint(simulator) == before
    assert before["parts"]["closure value `rng` of `test_objects_of_libraries_count_by_name.<locals>.simulator`"] == (
        "a Generator"
    )


def test_weights_of_networks_and_tables_of_libraries_count():
    """A surrogate trained anew, a density estimated from other values."""
    nets = [eqx.nn.MLP(1, 1, 4, 1, key=jax.random.key(i)) for i in (0, 1)]
    densities = [gaussian_kde(np.arange(4.0) ** i) for i in (2, 3)]
    for one, other in (nets, densities):
        told, was = (fingerprint(functools.partial(load(BASE).simulator, surrogate=s)) for s in (one, other))
        assert any("attribute `" in text and text.endswith("differs") for text in differences(told, was))
        assert told == fingerprint(functools.partial(load(BASE).simulator, surrogate=copy.deepcopy(one)))


def test_folders_may_move():
    def run(program):
        return lambda parameters, seed: program

    programs = [Path("/tmp/one/solver"), Path("/home/two/solver"), Path("/tmp/one/other")]
    told = [fingerprint(run(program)) for program in programs]
    assert told[0] == told[1] != told[2]


def test_a_function_sent_to_another_process_is_the_same():
    cloudpickle = pytest.importorskip("cloudpickle")
    function = offset_by(2.0)
    for _ in range(2):
        function = pickle.loads(cloudpickle.dumps(function))
        assert fingerprint(function) == fingerprint(offset_by(2.0))


def test_another_python_has_other_bytecode():
    """Its constants and values are compared all the same, however often it names a constant."""
    told = fingerprint(load(BASE).simulator)
    label = "constants of `make.<locals>.simulator`"
    older = told | {"python": "2.7"}
    parts = {name: "other" if name.startswith("code of") else value for name, value in told["parts"].items()}
    parts[label] = [*parts[label][::-1], "None", parts[label][0]]
    assert differences(told, older | {"parts": parts}) == []
    assert differences(told, older | {"parts": parts | {label: [*parts[label], "17"]}}) == [
        f"{label}: none in place of 17"
    ]
    assert differences(told, told | {"parts": parts}) != []


# --- stores


QUIET = {"progress_bar": False}


def prior():
    numpyro.sample("a", dist.Normal(0.0, 1.0))


@pytest.fixture(scope="module")
def run():
    problem = si.from_numpyro(prior)
    return lambda simulator, num, store, **options: si.simulators.simulate(
        jax.random.key(0), problem, simulator, num, store=store, **QUIET, **options
    )


def offset_by(offset):
    def simulator(parameters, seed):
        return parameters["a"] + offset

    return simulator


def test_an_edited_simulator_does_not_go_on(run, tmp_path):
    run(offset_by(0.0), 4, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"rows of another `offset_by.*closure value `offset` .* is 100.0, was 0.0\. .*simulator_version=",
    ):
        run(offset_by(100.0), 8, tmp_path)
    rows = run(offset_by(0.0), 8, tmp_path).read()
    assert np.array_equal(rows.outputs["y"], rows.z[:, 0]) and len(rows.number) == 8


def test_own_version_stands_in_place_of_the_fingerprint(run, tmp_path):
    run(offset_by(0.0), 4, tmp_path)
    run(offset_by(1.0), 5, tmp_path, simulator_version="1")  # it computes the same, says its user
    run(offset_by(2.0), 6, tmp_path, simulator_version="1")
    for version in ("2", None):
        with pytest.raises(ValueError, match=f"`simulator_version` is {version!r}, was '1'"):
            run(offset_by(2.0), 8, tmp_path, simulator_version=version)
    assert len(run(offset_by(2.0), 6, tmp_path, simulator_version="1").read().number) == 6


def test_bytes_of_named_files_count(run, tmp_path):
    program, store = tmp_path / "program", tmp_path / "store"
    program.write_bytes(b"\x7fELF 1")
    for version in (program, [program], [str(program)]):
        run(offset_by(0.0), 4, store, simulator_version=version)
    program.write_bytes(b"\x7fELF 2")
    with pytest.raises(ValueError, match="file `program` differs"):
        run(offset_by(0.0), 8, store, simulator_version=program)
    with pytest.raises(ValueError, match="closure value `offset`"):
        run(offset_by(1.0), 8, store, simulator_version=program)
    with pytest.raises(FileNotFoundError):
        run(offset_by(0.0), 8, store, simulator_version=tmp_path / "none")


def test_what_running_changes_is_no_edit(run, tmp_path):
    calls, cache = [], {}

    def simulator(parameters, seed):
        calls.append(seed)
        cache[seed] = parameters["a"]
        return parameters["a"]

    class Counting:
        def __init__(self, factor):
            self.num, self.factor = 0, factor

        def __call__(self, parameters, seed):
            self.num += 1
            return self.factor * parameters["a"]

    run(simulator, 4, tmp_path / "1")
    assert len(run(simulator, 8, tmp_path / "1").read().number) == len(calls) == 8
    calls.clear()
    run(simulator, 9, tmp_path / "1")
    counting = Counting(1.0)
    for num in (4, 8):
        run(counting, num, tmp_path / "2")
    with pytest.raises(ValueError, match=r"attribute `factor` of a `.*Counting` is 2.0, was 1.0"):
        run(Counting(2.0), 12, tmp_path / "2")


def test_stores_of_older_versions_go_on(run, tmp_path):
    run(offset_by(0.0), 4, tmp_path)
    manifest = read_record(tmp_path / MANIFEST)
    write_record(tmp_path / MANIFEST, {name: value for name, value in manifest.items() if name != "fingerprint"})
    assert len(run(offset_by(1.0), 6, tmp_path).read().number) == 6
    for spoiled in (3, {}, {"parts": {}}, {"python": "3.13", "parts": []}, {"version": 1}):
        write_record(tmp_path / MANIFEST, manifest | {"num": 6, "fingerprint": spoiled})
        with pytest.raises(si.errors.UnreadableFile, match="which simulator was run"):
            run(offset_by(1.0), 6, tmp_path)
