"""Foreign simulators: every row once, whatever happens to it, and posteriors that account for those that failed."""

import concurrent.futures
import datetime as dt
import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from decimal import Decimal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import expit
from scipy.stats import norm

import foreign_programs as programs
import scoreinfer as si
from scoreinfer.files import write_record
from scoreinfer.simulators import run as foreign
from scoreinfer.simulators.dataset import stored_simulations, with_outputs
from scoreinfer.simulators.store import MANIFEST, Row, Rows, write_shard

QUIET = {"progress_bar": False}
SAMPLER = si.samplers.ReverseSDE(num_steps=16)
SMALL = {"num_steps": 600, "width": 16, "depth": 1, "batch_size": 128, "sampler": SAMPLER, **QUIET}


def prior():
    numpyro.sample("a", dist.Normal(0.0, 1.0))


@pytest.fixture(scope="module")
def problem():
    return si.from_numpyro(prior)


@pytest.fixture(scope="module")
def reference(problem, tmp_path_factory):
    """Rows of the reliable simulator, run one after the other."""
    store = si.simulators.simulate(
        jax.random.key(0), problem, programs.noisy, 40, store=tmp_path_factory.mktemp("store"), **QUIET
    )
    return store.read()


def same(rows, others):
    """Say whether rows are equal in everything but their wall times."""
    columns = [name for name in Rows._fields if name not in ("seconds", "outputs")]
    equal = all(np.array_equal(getattr(rows, name), getattr(others, name)) for name in columns)
    return equal and all(np.array_equal(rows.outputs[n], others.outputs[n], equal_nan=True) for n in others.outputs)


def test_rows_are_prior_draws_and_their_simulations(reference, problem):
    assert np.array_equal(reference.number, np.arange(40)) and reference.valid.all()
    assert len(np.unique(reference.seed)) == len(np.unique(reference.z)) == 40
    assert abs(reference.z.mean()) < 5 / np.sqrt(40) and abs(reference.z.std() - 1) < 5 / np.sqrt(80)
    for i in range(5):
        expected = programs.noisy({"a": np.float32(reference.z[i, 0])}, int(reference.seed[i]))
        assert np.array_equal(reference.outputs["y"][i], expected)
    assert (reference.seconds > 0).all()


def test_threads_give_the_same_rows_and_are_faster(problem, reference, tmp_path):
    seconds = {}
    for workers in (1, 8):
        with concurrent.futures.ThreadPoolExecutor(workers) as executor:
            start = time.perf_counter()
            store = si.simulators.simulate(
                jax.random.key(0),
                problem,
                programs.slow,
                40,
                store=tmp_path / str(workers),
                executor=executor,
                **QUIET,
            )
            seconds[workers] = time.perf_counter() - start
        assert same(store.read(), reference)
    assert seconds[1] > 40 * 0.02
    assert seconds[8] < seconds[1] / 3  # 6 on a free machine: benchmarks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spawn", "dask"])
def test_processes_give_the_same_rows(kind, problem, reference, tmp_path):
    if kind == "spawn":
        with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
            args = jax.random.key(0), problem, programs.noisy, 40
            assert same(si.simulators.simulate(*args, store=tmp_path, executor=executor, **QUIET).read(), reference)
        return
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        executor = distributed.Client(cluster).get_executor()
        args = jax.random.key(0), problem, programs.noisy, 40
        assert same(si.simulators.simulate(*args, store=tmp_path, executor=executor, **QUIET).read(), reference)


def test_another_program_is_a_simulator(problem, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        rows = si.simulators.simulate(
            jax.random.key(0), problem, programs.by_subprocess, 6, store=tmp_path, executor=executor, **QUIET
        ).read()
    assert np.allclose(rows.outputs["y"], rows.z * [1, 2] + [0.5, 0], atol=1e-4)


def test_every_failure_is_recorded(problem, tmp_path):
    store = si.simulators.simulate(jax.random.key(1), problem, programs.unreliable, 60, store=tmp_path, **QUIET)
    rows, a = store.read(), store.read().z[:, 0]
    assert np.array_equal(rows.number, np.arange(60))
    assert np.array_equal(rows.status == "invalid", (a > 0.8) & (a <= 1.2))
    assert np.array_equal(rows.status == "failed", (a > 1.2) | (a < -1.2))
    assert all("OverflowError: blew up at" in text for text in rows.error[a > 1.2])
    assert all("expected outputs of shapes {'y': (2,)}, got {'y': (3,)}" in text for text in rows.error[a < -1.2])
    assert np.isnan(rows.outputs["y"][rows.status == "failed"]).all()
    assert f"{np.sum(rows.status == 'failed')} failed" in str(store)
    with pytest.raises(OverflowError, match="blew up"):
        si.simulators.simulate(
            jax.random.key(1), problem, programs.unreliable, 60, store=tmp_path / "2", on_error="raise", **QUIET
        )
    kept = si.simulators.Store(tmp_path / "2").read()  # what came before is kept
    assert same(Rows(*(column[: len(kept.number)] for column in rows[:-1]), {}), kept._replace(outputs={}))


REFUSED = {
    "complex": ([1 + 1j, 2.0], "got complex128. Return real and imaginary parts as two outputs"),
    "dates": (np.array(["2020-01-01"], "M8[D]"), "got datetime64[D]. Return a number, such as the seconds since"),
    "durations": (np.array([3], "m8[s]"), "got timedelta64[s]. Return a number"),
    "text": (["1.5", "2.5"], "got <U3"),
    "bytes": (b"1.5", "got |S3"),
    "mixed": ([1.0, "2"], "got <U32"),
    "nothing": (None, "got NoneType"),
    "nothing among numbers": ([1.0, None], "got float"),
    "exact numbers": ([Decimal(1)], "got Decimal"),
    "dates of a calendar": ([dt.date(2020, 1, 1)], "got date"),
    "records": (np.zeros(2, [("a", float)]), "got [('a', '<f8')]"),
    "ragged": (
        [[1.0], [1.0, 2.0]],
        "must be an array of real numbers, but NumPy cannot make one: setting an array element",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_outputs_that_are_no_real_numbers_are_refused_by_name(problem, tmp_path, kind):
    value, message = REFUSED[kind]
    with pytest.warns(UserWarning, match=r"None of the 3 simulations .* The first: ValueError: Output 'h' must be"):
        store = si.simulators.simulate(
            jax.random.key(0), problem, lambda parameters, seed: {"h": value}, 3, store=tmp_path, **QUIET
        )
    rows = store.read()
    assert rows.status.tolist() == ["failed"] * 3 and all("Output 'h' must be" in text for text in rows.error)
    assert all(message in text for text in rows.error), rows.error
    with pytest.raises(ValueError, match="Output 'h' must be"):
        foreign.attempt(lambda parameters, seed: {"h": value}, {}, 0, catch=False)


def test_refusals_come_back_from_spawned_workers(problem, tmp_path):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        args = jax.random.key(0), problem, programs.complex_or_masked, 8
        with pytest.warns(UserWarning, match="None of the 8"):
            rows = si.simulators.simulate(*args, store=tmp_path, executor=executor, **QUIET).read()
    expected = {0: ("invalid", "masked: 'h' (1 of 2 entries)"), 1: ("failed", "ValueError: Output 'h' must be real")}
    for seed, status, error in zip(rows.seed, rows.status, rows.error, strict=True):
        assert status == expected[seed % 2][0] and error.startswith(expected[seed % 2][1])
    assert len(set(rows.status)) == 2


@pytest.mark.parametrize(
    "value",
    [True, 2, [1, 0], np.float16(0.5), np.uint8([3]), jnp.ones(2, jnp.bfloat16), np.ma.array([1.0, 2.0]), (1.5, 2)],
)
def test_every_real_number_is_kept(value):
    outcome = foreign.attempt(lambda parameters, seed: value, {}, 0, catch=False)
    assert np.array_equal(outcome.outputs["y"], np.asarray(value, np.float64)) and not outcome.error


def test_masked_entries_are_missing_wherever_they_hide():
    """Also in lists, from which NumPy itself takes the fill values; and of whole numbers, which have no NaN."""
    part = np.ma.array([1, 999], mask=[False, True])
    for value, shape in (
        (part, (2,)),
        ([part, part], (2, 2)),
        ([[part], [part]], (2, 1, 2)),
        ([1.0, np.ma.masked], (2,)),
    ):
        outcome = foreign.attempt(lambda parameters, seed, value=value: value, {}, 0, catch=False)
        y = outcome.outputs["y"]
        assert y.shape == shape and np.array_equal(np.nan_to_num(y[..., 0], nan=1.0), np.ones(shape[:-1]))
        assert np.isnan(y[..., 1]).all() and outcome.error == f"masked: 'y' ({y.size // 2} of {y.size} entries)"


def test_data_that_are_no_real_numbers_are_refused(problem):
    asked = with_outputs(problem, {"y": (2,)})
    assert np.array_equal(asked.read((), {"y": [1, 2]})["y"], [1.0, 2.0])
    for value, message in (
        ([1.0, np.nan], "Data 'y' must be finite, but 1 of its 2 numbers are not"),
        (np.ma.array([1.0, 2.0], mask=[True, False]), "Data 'y' must be finite, but 1 of its 2"),
        ([1j, 2.0], "Data 'y' must be real or whole numbers, got complex128"),
        ([1.0, 2.0, 3.0], r"Data 'y' must have shape \(2,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            asked.read((), {"y": value})


def test_time_outs_and_retries(problem, tmp_path):
    calls = []

    def hangs_at_first(parameters, seed):
        calls.append(seed)
        if calls.count(seed) == 1 and seed % 2:
            time.sleep(1.2)
        if calls.count(seed) == 1 and not seed % 2:
            raise OSError("no licence")
        return float(parameters["a"])

    with concurrent.futures.ThreadPoolExecutor(12) as executor:
        settings = {"executor": executor, "timeout": 0.5, **QUIET}
        args = jax.random.key(2), problem, hangs_at_first, 12
        once = si.simulators.simulate(*args, store=tmp_path / "1", **settings).read()
        calls.clear()
        again = si.simulators.simulate(*args, store=tmp_path / "2", retries=1, **settings).read()
    assert np.array_equal(once.status == "timeout", once.seed % 2 == 1)
    assert np.array_equal(once.status == "failed", once.seed % 2 == 0)
    assert all("0.5 s" in text for text in once.error[once.status == "timeout"])
    assert again.valid.all() and max(map(calls.count, calls)) == 2
    release = multiprocessing.get_context("spawn").Event()
    executor = concurrent.futures.ThreadPoolExecutor(1)
    with pytest.raises(RuntimeError, match="All 1 workers hang"):
        si.simulators.simulate(
            jax.random.key(2), problem, lambda parameters, seed: release.wait(2.0), 3, store=tmp_path / "3",
            executor=executor, timeout=0.05, **QUIET,
        )  # fmt: skip
    release.set()
    executor.shutdown()
    assert si.simulators.Store(tmp_path / "3").read().status.tolist() == ["timeout"]


CHILD = """
import sys, time, jax, scoreinfer as si, foreign_programs as programs, numpyro, numpyro.distributions as dist
from scoreinfer.simulators import run as foreign
foreign.FLUSH_SECONDS = 0.05
def prior():
    numpyro.sample("a", dist.Normal(0.0, 1.0))
def slow(parameters, seed):
    time.sleep(0.005)
    with open(sys.argv[2], "a") as file:
        file.write(f"{seed}\\n")
    return programs.noisy(parameters, seed)
si.simulators.simulate(jax.random.key(0), prior, slow, int(sys.argv[3]), store=sys.argv[1], progress_bar=False)
"""


def run_and_kill(folder, log, num, delays):
    """Kill the simulating process some time after it has first written, once for each delay; then let it finish."""

    def shards():
        return set(folder.glob("*.npz"))

    for delay in (*delays, None):
        before = shards()
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), str(log), str(num)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        )
        if delay is not None:
            while child.poll() is None and shards() == before:
                time.sleep(1e-3)
            time.sleep(delay)
            assert child.poll() is None, "the run ended before it was killed"
            child.send_signal(signal.SIGKILL)
        assert child.wait() == (0 if delay is None else -signal.SIGKILL)


def check_after_kills(problem, folder, log, num):
    expected = si.simulators.simulate(
        jax.random.key(0), problem, programs.noisy, num, store=folder.parent / "whole", **QUIET
    )
    rows = si.simulators.Store(folder).read()
    assert same(rows, expected.read())  # none lost, none doubled, none other
    stored = [row for path in folder.glob("*.npz") for row in np.load(path)["number"]]
    assert len(stored) == len(set(stored)) == num
    return len(log.read_text().split())


def test_killed_simulation_loses_and_doubles_no_row(problem, tmp_path):
    folder, log = tmp_path / "store", tmp_path / "log"
    run_and_kill(folder, log, 150, (0.07,))
    calls = check_after_kills(problem, folder, log, 150)
    assert 150 <= calls < 150 + 2 * 60  # only what had not been written was run again


@pytest.mark.slow
def test_simulation_killed_twenty_times_loses_and_doubles_no_row(problem, tmp_path):
    folder, log = tmp_path / "store", tmp_path / "log"
    run_and_kill(folder, log, 1500, np.random.default_rng(0).uniform(0.0, 0.2, 20))
    check_after_kills(problem, folder, log, 1500)


def test_more_rows_continue_the_stream_and_others_are_refused(problem, reference, tmp_path):
    args = jax.random.key(0), problem, programs.noisy
    si.simulators.simulate(*args, 15, store=tmp_path, **QUIET)
    assert same(si.simulators.simulate(*args, 40, store=tmp_path, **QUIET).read(), reference)
    with pytest.raises(ValueError, match="`key` is"):
        si.simulators.simulate(jax.random.key(1), problem, programs.noisy, 40, store=tmp_path, **QUIET)
    other = si.from_numpyro(lambda: numpyro.sample("b", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match="`latents` is"):
        si.simulators.simulate(jax.random.key(0), other, programs.noisy, 40, store=tmp_path, **QUIET)
    narrow, wide = (
        si.from_numpyro(lambda high=high: numpyro.sample("a", dist.Uniform(0.0, high))) for high in (1.0, 10.0)
    )  # the same in the unconstrained space, prior and all
    store = si.simulators.simulate(jax.random.key(0), narrow, programs.noisy, 4, store=tmp_path / "narrow", **QUIET)
    with pytest.raises(ValueError, match="`simulator` is slow, was noisy"):
        si.simulators.simulate(jax.random.key(0), problem, programs.slow, 40, store=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="`parameters` is"):
        si.simulators.simulate(jax.random.key(0), wide, programs.noisy, 8, store=tmp_path / "narrow", **QUIET)
    with pytest.raises(ValueError, match="bounds are others"):
        stored_simulations(jax.random.key(0), wide, store)
    with foreign.only_writer(tmp_path), pytest.raises(RuntimeError, match="Another process"):
        si.simulators.simulate(*args, 41, store=tmp_path, **QUIET)


def test_wrong_arguments_are_named(problem, tmp_path):
    args = jax.random.key(0), problem, programs.noisy, 4
    with pytest.raises(ValueError, match="'record' or 'raise'"):
        si.simulators.simulate(*args, store=tmp_path, on_error="ignore", **QUIET)
    with pytest.raises(ValueError, match="needs an `executor`"):
        si.simulators.simulate(*args, store=tmp_path, timeout=1.0, **QUIET)
    forking = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
    with pytest.raises(ValueError, match="spawn"):
        si.simulators.simulate(*args, store=tmp_path, executor=forking, **QUIET)
    assert not list(tmp_path.iterdir())


# --- learning from a store


@pytest.fixture(scope="module")
def failing(problem, tmp_path_factory):
    """A store of which about half the rows have failed."""
    path = tmp_path_factory.mktemp("failing")
    return si.simulators.simulate(jax.random.key(5), problem, programs.fails_by_chance, 6000, store=path, **QUIET)


def exact_moments(y, with_failures):
    """Posterior mean and sd of a given two looks at it, by quadrature; with or without the failures' pull."""
    a = np.linspace(-6, 6, 4001)
    log_p = norm.logpdf(a) + sum(norm.logpdf(value, a, 0.5) for value in y)
    p = np.exp(log_p - log_p.max()) * (expit(3 * a) if with_failures else 1.0)
    p /= p.sum()
    mean = p @ a
    return mean, np.sqrt(p @ (a - mean) ** 2)


@pytest.mark.slow
def test_posterior_accounts_for_failures(problem, failing, tmp_path):
    """Learned validity undoes the bias; leaving failures out has it, to the same letter."""
    y = np.array([-0.5, -0.9])
    (exact, sd), (biased, _) = exact_moments(y, False), exact_moments(y, True)
    assert biased - exact > 0.3 * sd
    posterior = si.NPSE(problem, simulations=failing, **SMALL).fit(jax.random.key(0))
    draws = posterior.sample(jax.random.key(1), 4000, y=y)
    weight = np.exp(np.asarray(draws.log_weight) - np.max(draws.log_weight))
    corrected = np.average(np.asarray(draws.sites["a"]), weights=weight)
    raw = float(draws.sites["a"].mean())
    assert abs(corrected - exact) < 0.15 * sd, (corrected, exact, sd)
    assert abs(raw - biased) < 0.15 * sd, (raw, biased, sd)
    assert "no density" in draws.certificate.reason and not draws.certificate.certified
    resampled = float(draws.resample(jax.random.key(2), 4000)["a"].mean())
    assert abs(resampled - exact) < 0.2 * sd
    posterior.save(tmp_path / "p")
    loaded = si.load(tmp_path / "p", problem).sample(jax.random.key(1), 4000, y=y)
    assert np.array_equal(loaded.unconstrained, draws.unconstrained)
    assert np.array_equal(loaded.log_weight, draws.log_weight)
    with pytest.warns(si.errors.MisspecificationWarning):
        posterior.sample(jax.random.key(1), 512, y=np.array([50.0, -50.0]))
    with pytest.raises(ValueError, match="Expected data for y by name"):
        posterior.sample(jax.random.key(1), 512, x=y)


@pytest.mark.slow
def test_calibration_is_the_evidence_where_there_is_no_density(problem, tmp_path):
    """Trained on one store, tested on another; a posterior of another simulator fails the test."""
    stores = {}
    for name, number, simulator in (("train", 6, programs.noisy), ("test", 7, programs.noisy)):
        stores[name] = si.simulators.simulate(
            jax.random.key(number), problem, simulator, 1500, store=tmp_path / name, **QUIET
        )
    posterior = si.NPSE(problem, simulations=stores["train"], **SMALL).fit(jax.random.key(0))
    assert posterior.validity is None
    report = si.calibrate(jax.random.key(1), posterior, 400, store=stores["test"], **QUIET)
    assert report.trusted, report

    def louder(parameters, seed):
        return parameters["a"] + 1.5 * np.random.default_rng(seed).normal(size=2)

    other = si.simulators.simulate(jax.random.key(8), problem, louder, 450, store=tmp_path / "other", **QUIET)
    wrong = si.calibration.sbc(jax.random.key(1), posterior, 400, store=other, **QUIET)
    assert not wrong.calibrated and any("too narrow" in row.finding for row in wrong.rows()), wrong
    with pytest.raises(ValueError, match="50 more than"):
        si.calibration.sbc(jax.random.key(1), posterior, 440, store=other, **QUIET)


def test_invalid_rows_are_never_dropped_silently(problem, failing):
    tiny = SMALL | {"num_steps": 10}
    with pytest.raises(ValueError, match=r"without failures, but \d+ of 6000 failed"):
        si.NPSE(problem, simulations=failing, invalid="raise", **tiny).fit(jax.random.key(0))
    with pytest.warns(
        si.errors.TrainingWarning, match="biases the posterior towards parameters at which the simulator works"
    ):
        posterior = si.NPSE(problem, simulations=failing.path, invalid="drop", **tiny).fit(jax.random.key(0))
    assert posterior.validity is None
    other = si.from_numpyro(lambda: numpyro.sample("b", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match="this prior's are b"):
        si.NPSE(other, simulations=failing, **tiny).fit(jax.random.key(0))


# --- stores larger than memory


def wide(parameters, seed):
    """Four thousand numbers, of which the first tells the parameter; fail sometimes."""
    if seed % 8 == 0:
        raise RuntimeError("did not converge")
    return np.full(4000, float(parameters["a"])) + np.arange(4000)


@pytest.fixture(scope="module")
def large(problem, tmp_path_factory):
    """A store of 13 MB in shards of 50 rows, of which 2 MB are to be learned from at once."""
    path = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign, "FLUSH_BYTES", 50 * 8 * 4000)
        si.simulators.simulate(jax.random.key(0), problem, wide, 400, store=path, **QUIET)
    assert len(list(path.glob("*.npz"))) == 8
    return si.simulators.Store(path, memory=2 * 2**20)


def test_stores_can_be_copied_to_zarr(problem, tmp_path):
    """Two shards, failures among their rows: every column as `read` has it."""
    import zarr

    for num in (30, 60):
        store = si.simulators.simulate(
            jax.random.key(1), problem, programs.unreliable, num, store=tmp_path / "npz", **QUIET
        )
    store.to_zarr(tmp_path / "zarr")
    group, rows = zarr.open_group(str(tmp_path / "zarr"), mode="r"), store.read()
    columns = {name: getattr(rows, name) for name in Rows._fields if name != "outputs"}
    columns |= {f"output.{name}": value for name, value in rows.outputs.items()}
    assert group.attrs["num"] == 60 and set(group.array_keys()) == set(columns) and len(set(rows.status)) > 1
    for name, column in columns.items():
        np.testing.assert_array_equal(group[name][:], column)
    with pytest.raises(FileExistsError, match="a new or an empty folder"):
        store.to_zarr(tmp_path / "zarr")


def test_large_stores_are_read_in_pieces(problem, large):
    """Every epoch takes other rows, none of those held out, each with its own outputs, in bounded memory."""

    def peak(read):
        tracemalloc.start()
        result = read()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result, size

    rows, whole = peak(large.read)
    stored, first = peak(lambda: stored_simulations(jax.random.key(0), problem, large))
    assert np.array_equal(stored.all_z, rows.z.astype(np.float32)) and np.array_equal(stored.valid, rows.valid)
    assert len(stored.z) == 2 * 2**20 // (8 * 4000)
    assert np.array_equal(stored.z, rows.z[rows.valid][: len(stored.z)].astype(np.float32))
    held_out, seen = set(np.asarray(stored.z[: stored.num_held_out, 0]).tolist()), set()
    for i in range(30):
        (z, y), more = peak(lambda i=i: stored.renew(jax.random.key(i)))
        assert len(z) == len(stored.z) - stored.num_held_out == len(set(np.asarray(z[:, 0]).tolist()))
        assert np.allclose(y["y"][:, 0], z[:, 0], atol=1e-5)
        assert max(first, more) < whole / 2
        seen |= set(np.asarray(z[:, 0]).tolist())
    assert np.array_equal(stored.renew(jax.random.key(29))[0], z)
    assert seen == set(rows.z[rows.valid, 0].astype(np.float32).tolist()) - held_out
    small = si.simulators.Store(large.path)
    assert stored_simulations(jax.random.key(0), problem, small).renew is None


def test_large_stores_are_learned_from(problem, large, tmp_path):
    """(Two wide layers compile in seconds: few steps, one fit.)"""
    settings = SMALL | {"num_steps": 8, "batch_size": 16, "invalid": "drop", "checkpoint": tmp_path}
    with pytest.warns(si.errors.TrainingWarning, match="are left out"):
        posterior = si.NPSE(problem, simulations=large, **settings).fit(jax.random.key(0))
    assert np.isfinite(posterior.history.score.loss).all()
    whole = si.simulators.Store(large.path)  # another training: all rows at once
    with pytest.warns(si.errors.TrainingWarning), pytest.raises(ValueError, match="`simulations` is"):
        si.NPSE(problem, simulations=whole, **settings).fit(jax.random.key(0))


# --- strangers and accidents


def test_hostile_shards_are_refused(problem, reference, tmp_path):
    """Truncated, flipped and forged shards: a clear error quickly, in bounded memory, and never other rows."""
    si.simulators.simulate(jax.random.key(0), problem, programs.noisy, 40, store=tmp_path / "store", **QUIET)
    (shard,) = (tmp_path / "store").glob("*.npz")
    content, rng = shard.read_bytes(), np.random.default_rng(0)
    bodies = [content[: int(n)] for n in rng.integers(0, len(content), 60)]
    for bit in rng.integers(0, 8 * len(content), 80):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        bodies.append(bytes(flipped))
    bodies += [content.replace(b"(40, 1)", b"(10**9,)"[:7]), content.replace(b"(40,)", b"(9e9)"), b"", content * 2]
    bodies += [
        content.replace(b"'<f8'", b"'|O' "),
        content.replace(b"'<i8'", b"'<f8'"),
        content.replace(b"'<U2'", b"'<U9'"),
    ]
    refused = 0
    for number, body in enumerate(bodies):
        for forged in (False, True):  # under the old name, and under one that matches the content
            path = tmp_path / f"{number}-{forged}"
            path.mkdir()
            shutil.copy(tmp_path / "store" / MANIFEST, path)
            name = hashlib.sha256(body).hexdigest()[:32] if forged else shard.stem
            (path / f"{name}.npz").write_bytes(body)
            tracemalloc.start()
            start = time.process_time()
            try:
                rows = si.simulators.Store(path).read()
            except si.errors.UnreadableFile:
                refused += 1
            else:
                assert forged or same(rows, reference)  # a forger may lie about numbers, not about their kind
                assert rows.z.shape[1] == 1 and rows.outputs["y"].dtype == np.float64
            assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
            tracemalloc.stop()
            assert time.process_time() - start < 1.0
            shutil.rmtree(path)
    assert refused >= 200


def zipped(columns, headers=()):
    """Write an npz file by hand, with other headers for some columns, and checksums that fit."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, column in columns.items():
            member = io.BytesIO()
            header = {"descr": column.dtype.str, "fortran_order": False, "shape": column.shape}
            header |= dict(headers).get(name, {})
            np.lib.format.write_array_header_1_0(member, header)
            archive.writestr(f"{name}.npy", member.getvalue() + column.tobytes())
    return content.getvalue()


def test_whole_shards_that_lie_are_refused(problem, reference, tmp_path):
    """Other numbers under the old name, and headers that declare far more than there is."""
    si.simulators.simulate(jax.random.key(0), problem, programs.noisy, 40, store=tmp_path, **QUIET)
    (shard,) = tmp_path.glob("*.npz")
    columns = dict(np.load(shard))
    content = shard.read_bytes()
    shard.write_bytes(zipped(columns | {"output.y": columns["output.y"] + 1.0}))
    with pytest.raises(si.errors.UnreadableFile, match="checksum"):
        si.simulators.Store(tmp_path).read()
    shard.unlink()
    for shape in ((10**7, 1), (2**62, 2**62), (40,), (-1, 1)):
        body = zipped(columns, {"z": {"shape": shape}})
        forged = tmp_path / f"{hashlib.sha256(body).hexdigest()[:32]}.npz"
        forged.write_bytes(body)
        tracemalloc.start()
        with pytest.raises(si.errors.UnreadableFile):
            si.simulators.Store(tmp_path).read()
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        tracemalloc.stop()
        forged.unlink()
    shard.write_bytes(content)
    assert same(si.simulators.Store(tmp_path).read(), reference)


def test_columns_of_other_types_and_names_are_refused(problem, reference, tmp_path):
    """Whole shards under a checksum that fits: wrong types and shapes in every column, strange members."""
    store = si.simulators.simulate(jax.random.key(0), problem, programs.noisy, 40, store=tmp_path, **QUIET)
    (shard,) = tmp_path.glob("*.npz")
    columns = dict(np.load(shard))
    shard.unlink()
    forged = [{name: column for name, column in columns.items() if name != missing} for missing in columns]
    forged += [columns | {name: np.zeros(40)} for name in ("../../evil", "/etc/passwd", "z.npy", "")]
    kinds = np.dtype("?"), *map(np.dtype, ("<i4", "<u8", "<f4", "<c16", "<U5", "S5", "<M8[s]", "V8"))
    for name, column in columns.items():
        others = [kind for kind in kinds if kind.kind != column.dtype.kind]
        forged += [columns | {name: np.zeros(column.shape, kind)} for kind in others]
        forged += [columns | {name: value} for value in (column[:-1], column[None], column.ravel()[:1])]
    for changed in forged:
        body = zipped(changed)
        path = tmp_path / f"{hashlib.sha256(body).hexdigest()[:32]}.npz"
        path.write_bytes(body)
        for read in (si.simulators.Store(tmp_path).read, si.simulators.Store(tmp_path).index):
            with pytest.raises(si.errors.UnreadableFile):
                read()
        path.unlink()
    assert len(forged) > 80
    manifest, rng = tmp_path / MANIFEST, np.random.default_rng(0)
    content = manifest.read_bytes()
    spoiled = [content[:length] for length in rng.integers(0, len(content), 40)]
    for bit in rng.integers(0, 8 * len(content), 60):
        flipped = np.frombuffer(content, np.uint8).copy()
        flipped[bit // 8] ^= 1 << bit % 8
        spoiled.append(flipped.tobytes())
    refused = 0
    for body in spoiled:
        manifest.write_bytes(body)
        try:
            assert si.simulators.Store(tmp_path).manifest == store.manifest  # an indentation
        except si.errors.UnreadableFile:
            refused += 1
    assert refused > 80


def test_duplicates_of_two_writers_count_once(problem, reference, tmp_path):
    store = si.simulators.simulate(jax.random.key(0), problem, programs.noisy, 40, store=tmp_path, **QUIET)
    outputs = {"y": reference.outputs["y"][3]}
    write_shard(tmp_path, [Row(3, reference.z[3], "ok", "", int(reference.seed[3]), 0.5, outputs)])
    assert same(store.read(), reference)


@pytest.mark.parametrize("value", [None, -1, 2**70, "../../etc/passwd", 1.5, True, []])
@pytest.mark.parametrize("name", ["format", "schema", "dim", "num", "latents"])
def test_hostile_manifests_are_refused(problem, tmp_path, name, value):
    if name == "latents" and value == []:
        value = "a"
    record = {"format": "scoreinfer simulations", "schema": 1, "dim": 1, "num": 4, "latents": ["a () real"]}
    write_record(tmp_path / MANIFEST, record | {name: value})
    with pytest.raises(si.errors.UnreadableFile):
        si.simulators.Store(tmp_path)


def test_no_store_is_named(tmp_path):
    with pytest.raises(si.errors.UnreadableFile, match="no such file"):
        si.simulators.Store(tmp_path)
