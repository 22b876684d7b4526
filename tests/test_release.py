"""What a release needs: files in step with each other, floors for dependencies, an entry in the changelog."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = dict(re.findall(r"^([a-z-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FLOORS = load(ROOT / ".ci" / "floors.py")


def test_citation_is_in_step():
    assert (CITATION["version"], CITATION["license"]) == (PROJECT["version"], PROJECT["license"])
    assert CITATION["title"].strip('"').startswith(PROJECT["name"])
    listed = re.findall(r'^  - (?:name: )?"?([^"\n]+)"?$', (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    names = {author["name"] for author in PROJECT["authors"]}
    assert names <= set(listed)
    assert set(listed) - names <= set(PROJECT["keywords"])


def test_changelog_knows_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{PROJECT['version']}]" in changelog


@pytest.mark.parametrize("name", ["SECURITY.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "LICENSE", "README.md"])
def test_files_that_hosts_look_for(name):
    assert len((ROOT / name).read_text()) > 500


def test_every_dependency_has_one_floor():
    constraints = FLOORS.floors((ROOT / "pyproject.toml").read_text())
    assert len(constraints) == len(PROJECT["dependencies"])
    assert "jax==0.10" in {constraint[:9] for constraint in constraints}


def test_a_dependency_without_a_floor_is_refused():
    with pytest.raises(ValueError, match="Expected `name>=version`, got `jax`"):
        FLOORS.floors('[project]\ndependencies = ["numpy>=2.0", "jax"]')


def test_hosted_ci_runs_our_own():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for script in re.findall(r"bash (\.ci/\w+)", workflow):
        assert (ROOT / script).is_file(), script
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"run: make ([a-z-]+)", workflow)) <= set(targets)
    assert "bash .ci/run" in workflow
