"""The site's pages: what is made is complete, how-tos are short and their code runs, links are checked."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))
from check_links import broken_links
from docstrings import kind_of, rooms, statements

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
STATEMENTS = list(statements(ROOT / "scoreinfer"))
HOWTOS = sorted(path for path in (DOCS / "howto").glob("*.md") if path.stem != "index")


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def cells(path):
    return re.findall(
        r"^```{code-cell} python\n(?::[^\n]*\n)*(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize("path", HOWTOS, ids=lambda path: path.stem)
def test_howtos_are_short_and_listed(path):
    assert len(path.read_text().splitlines()) < 80
    assert f"\n{path.stem}\n" in (DOCS / "howto" / "index.md").read_text()
    for block in blocks(path):
        compile(block, str(path), "exec")


@pytest.fixture(scope="module")
def room():
    """The names of Getting started, by its own cells."""
    names = {"jax": jax, "jnp": jnp, "np": np, "numpyro": numpyro, "dist": dist, "si": si}
    source = [cell for cell in cells(DOCS / "getting_started.md") if ".plot(" not in cell]
    exec("\n".join(source), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("path", HOWTOS, ids=lambda path: path.stem)
def test_howtos_run(path, room, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    if "import distributed" in path.read_text():
        pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    y = 1.2 * jnp.exp(-0.7 * room["t"])
    draws = room["posterior"].condition(room["t"], y=y).sample(jax.random.key(7), 2000)
    exec("\n".join(blocks(path)), room | {"y": y, "draws": draws})


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_gallery_lists_every_example(example):
    assert f"`examples/{example.name}`" in (DOCS / "gallery" / "index.md").read_text()


def test_thumbnails_exist_and_are_small():
    pictures = re.findall(r"^:img-top: \.\./(\S+)", (DOCS / "gallery" / "index.md").read_text(), flags=re.MULTILINE)
    assert len(pictures) >= 3
    assert all((DOCS / picture).stat().st_size < 200_000 for picture in pictures)


# --- what is made


def test_every_room_has_statements_of_exactness():
    found = {statement.room: statement for statement in STATEMENTS}
    assert {"samplers", "mcmc", "paths", "posterior", "evidence", "montecarlo"} <= found.keys()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ProbabilityFlow", "exact"),
        ("ULA", "biased"),
        ("MALA", "exact"),
        ("LETKF", "exact or biased"),
        ("NPSE", "biased"),
    ],
)
def test_statements_are_sorted_by_their_first_sentence(name, kind):
    (found,) = [statement for statement in STATEMENTS if statement.name == name]
    assert found.kind == kind


def test_negations_are_not_sorted_as_what_they_deny():
    assert kind_of("the rows are no random sample. They are exact otherwise.") == ""


def test_samplers_of_the_table_exist():
    made = pytest.importorskip("made_pages", reason="needs the extra `docs`", exc_type=ImportError)
    table = made.samplers_table()
    assert all(f"`{name} <" in table for name in made.MAIN)
    assert "exact at any number of steps" in table
    assert "Otherwise biased" in table


def test_benchmarks_inherit_the_bounds_of_their_patterns():
    made = pytest.importorskip("made_pages", reason="needs the extra `docs`", exc_type=ImportError)
    table = made.benchmark_tables()
    assert "| two_moons/1 | after | 0.493 | max 0.515 |  |" in table
    assert "| two_moons/1 | before | 0.564 |  | 0.504 |" in table


def test_rooms_are_those_of_the_house():
    found = rooms(ROOT / "scoreinfer")
    assert {"samplers", "draws", "command"} <= found.keys()
    assert not [room for room in found if room.startswith("_")]


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">x</a><a href="https://example.org">y</a><p id="top"></p>')
    (tmp_path / "b.html").write_text('<a href="a.html#top">x</a><a href="c.html">y</a><a href="#nowhere">z</a>')
    assert broken_links(tmp_path) == ["a.html: b.html#here", "b.html: #nowhere", "b.html: c.html"]
