"""Training runs that are interrupted or killed end with the very weights of one that was not."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

import scoreinfer as si
from doubles import location_scale
from scoreinfer.training import loop as training
from scoreinfer.training.resume import IDENTITY

SMALL = {"num_steps": 40, "width": 8, "depth": 1, "batch_size": 64, "num_simulations": 256, "progress_bar": False}
SAMPLER = si.samplers.ReverseSDE(num_steps=4)  # compiles fast; nothing is drawn here


def bits(tree):
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


@pytest.fixture(scope="module")
def problem():
    return si.from_numpyro(location_scale)


@pytest.mark.slow
def test_interrupted_fit_goes_on_to_the_same_weights(problem, tmp_path, monkeypatch):
    """Interrupted in every epoch of all stages: each call gets one epoch further."""
    options = SMALL | {"sampler": SAMPLER, "width": 33, "target_share": 1.1}  # a ladder of two networks
    uninterrupted = si.NPSE(problem, **options).fit(jax.random.key(0))
    real, calls = training._run_epoch, []

    def interrupted(*args):
        if len(calls) % 2:
            calls.append("interrupt")
            raise KeyboardInterrupt
        calls.append("epoch")
        return real(*args)

    monkeypatch.setattr(training, "_run_epoch", interrupted)
    posterior = None
    for _ in range(40):
        try:
            posterior = si.NPSE(problem, checkpoint=tmp_path, **options).fit(jax.random.key(0))
            break
        except KeyboardInterrupt:
            continue
    assert calls.count("interrupt") >= 4
    assert bits((posterior.proposal, posterior.outliers)) == bits((uninterrupted.proposal, uninterrupted.outliers))
    for stage in ("whitening", "smaller", "score"):
        ours, theirs = (getattr(p.history, stage) for p in (posterior, uninterrupted))
        assert np.array_equal(ours.loss, theirs.loss) and np.array_equal(ours.validation, theirs.validation)
        assert (ours.num_steps, ours.num_simulations) == (theirs.num_steps, theirs.num_simulations)
        assert ours.shares == theirs.shares and len(ours.shares) > 1
    monkeypatch.setattr(training, "_run_epoch", None)  # a finished run is not trained again
    again = si.NPSE(problem, checkpoint=tmp_path, **options).fit(jax.random.key(0))
    assert bits(again.proposal) == bits(uninterrupted.proposal)


def test_another_run_is_refused(problem, tmp_path):
    def fit(key=0, model=problem, **changed):
        return si.NPSE(model, sampler=SAMPLER, checkpoint=tmp_path, **SMALL | changed).fit(jax.random.key(key))

    fit(num_steps=4)
    with pytest.raises(ValueError, match=r"`key` is \[0, 1\], was \[0, 0\]"):
        fit(key=1, num_steps=4)
    with pytest.raises(ValueError, match="`num_steps` is 8, was 4"):
        fit(num_steps=8)
    with pytest.raises(ValueError, match="`simulations` is"):
        fit(model=_doubled(problem), num_steps=4)
    stage = tmp_path / "score.safetensors"
    stage.write_bytes(stage.read_bytes()[:-5])
    with pytest.raises(si.errors.UnreadableFile, match="safetensors"):
        fit(num_steps=4)
    (tmp_path / IDENTITY).write_text('{"format": "something else"}')
    with pytest.raises(si.errors.UnreadableFile, match="no checksum"):
        fit(num_steps=4)


def _doubled(problem):
    """Make a problem with the same sites and other simulations."""

    def simulate(key):
        z, y = problem.simulate(key)
        return z, jax.tree.map(lambda leaf: 2 * leaf, y)

    return dataclasses.replace(problem, simulate=simulate)


CHILD = """
import sys, jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from scoreinfer.training import loop as training
training.KEEP_SECONDS = 0.0
def pools(key):
    return jax.random.normal(key, (64, 8))
def loss(weights, batch, key):
    noise = jax.random.normal(key, batch.shape)
    return jnp.mean((jnp.tanh(batch @ weights) - batch + noise) ** 2)
weights, history = training.train(
    jax.random.key(0), 0.1 * jnp.ones((8, 8)), loss, pools, jnp.ones((8, 8)), training.Budget(600, 8, 2),
    progress_bar=False, checkpoint=Path(sys.argv[1]) if sys.argv[1] else None,
)
print("finished", np.asarray(weights).tobytes().hex(), len(history.loss), flush=True)
"""
FIT = """
import sys, jax, numpy as np
from scoreinfer.training import loop as training
import scoreinfer as si, equinox as eqx
from doubles import location_scale
training.KEEP_SECONDS = 0.0
posterior = si.NPSE(
    location_scale, num_steps=8000, width=16, depth=1, batch_size=64,
    progress_bar=False, sampler=si.samplers.ReverseSDE(num_steps=4), checkpoint=sys.argv[1] or None,
).fit(jax.random.key(0))
leaves = jax.tree.leaves(eqx.filter(posterior.proposal, eqx.is_array))
print("finished", b"".join(np.asarray(leaf).tobytes() for leaf in leaves).hex(), flush=True)
"""


def written(folder):
    """Say when each file of a run was last written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*") if path.is_file()}


def run(code, argument, folder=None, kill_after=None, num_writes=1):
    """Run a child to its end, or kill it some time after so many writes; return what it said at the end."""
    before = None if kill_after is None else written(folder)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(argument)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
    )  # fmt: skip
    if kill_after is not None:
        for _ in range(num_writes):
            while child.poll() is None and written(folder) == before:
                time.sleep(1e-3)
            before = written(folder)
        time.sleep(kill_after)
        child.send_signal(signal.SIGKILL)
    out = child.communicate()[0]
    assert child.returncode in (0, -signal.SIGKILL)
    return out


def test_killed_training_ends_with_the_same_weights(tmp_path):
    """A real process, killed while it trains and writes after every epoch."""
    path = tmp_path / "run.safetensors"
    expected = run(CHILD, "")
    assert not run(CHILD, path, tmp_path, 0.11), "the run ended before it was killed"
    assert run(CHILD, path) == expected and expected.startswith("finished")


@pytest.mark.slow
def test_fit_killed_twenty_times_ends_with_the_same_weights(tmp_path):
    """The whole fit, both stages of 32 epochs, killed at random moments one to three epochs further on."""
    expected, folder, where = run(FIT, ""), tmp_path / "run", []
    folder.mkdir()
    rng = np.random.default_rng(0)
    for num_writes, delay in zip(rng.integers(1, 4, 20), rng.uniform(0.0, 0.02, 20), strict=True):
        assert not run(FIT, folder, folder, delay, num_writes), "the run ended before it was killed"
        where.append(sorted(written(folder)))
    assert ["fit.json", "whitening.safetensors"] in where and len(where[-1]) == 3
    assert run(FIT, folder) == expected and expected.startswith("finished")
