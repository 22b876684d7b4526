"""The README's code runs as it stands there."""

import concurrent.futures
import re
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def prior():
    numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("sigma", dist.LogNormal(-1.0, 0.3))


def simulator(parameters, seed):
    return {"flow": parameters["a"] + 0.1 * np.random.default_rng(seed).normal(size=3)}


MODEL, KERNEL, SINGLE, PHYSICS, TRUST, FOREIGN = BLOCKS
OWN, ANY_PROGRAM = TRUST.split("# Any program: ")


@pytest.fixture(scope="module")
def room():
    """The first block's names, and draws."""
    names: dict = {"key": jax.random.key(20)}
    exec(MODEL, names)
    assert names["draws"].certificate.certified
    return names


@pytest.mark.slow
@pytest.mark.parametrize("block", [KERNEL + SINGLE, PHYSICS], ids=["kernels", "physics"])
def test_inference(room, block):
    exec(block, dict(room))


@pytest.mark.slow
def test_trust(room, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(OWN, room | {"reference": room["draws"].resample(jax.random.key(21), 4000)})


@pytest.mark.slow
def test_any_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = si.simulators.simulate(jax.random.key(22), prior, simulator, 1000, store="other-runs", progress_bar=False)
    theirs = {"key": jax.random.key(23), "prior": prior, "simulator": simulator, "si": si, "numpyro": numpyro}
    theirs |= {"dist": dist, "data": others.read().outputs["flow"][0]}
    with concurrent.futures.ThreadPoolExecutor(2) as theirs["executor"]:
        exec(f"# {ANY_PROGRAM}{FOREIGN}", theirs)
    assert theirs["draws"].certificate.certified, theirs["draws"].certificate
