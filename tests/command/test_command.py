"""The command line: results, exit codes, progress in log files."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import scoreinfer as si
from doubles import Y1
from scoreinfer.command import Exit, main
from scoreinfer.command.doctor import DATA, NOISE, faults_of
from scoreinfer.command.inputs import named_arguments, named_object
from scoreinfer.command.progress import LineStream
from scoreinfer.errors import UnreadableFile
from scoreinfer.evidence.certificate import certify_weights

ARTEFACT = str(Path(__file__).parents[1] / "artefacts" / "location_scale")
HERE = "command_cases"


@pytest.fixture(scope="module", autouse=True)
def cases(tmp_path_factory):
    """A module of models as a user has one in the working directory."""
    folder, before = tmp_path_factory.mktemp("cases"), Path.cwd()
    folder.joinpath(f"{HERE}.py").write_text(CASES)
    os.chdir(folder)
    yield folder
    os.chdir(before)


CASES = """
import concurrent.futures, time
import numpyro, numpyro.distributions as dist
import scoreinfer as si

def model(y=None):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

def prior():
    numpyro.sample("a", dist.Normal(0.0, 1.0))

def simulator(parameters, seed):
    return {"flow": parameters["a"] + 1.0}

def broken(parameters, seed):
    raise RuntimeError("no")

def slow(parameters, seed):
    time.sleep(0.2)
    return {"flow": parameters["a"]}

def interrupted(parameters, seed):
    raise KeyboardInterrupt

def crashes(y=None):
    raise RuntimeError("a bug in the model")

executor = lambda: concurrent.futures.ThreadPoolExecutor(2)
small = si.NPSE(model, num_steps=5, width=8, depth=1, progress_bar=False)
"""


def run(capsys, *words):
    """Run a command; return exit code, standard output, standard error."""
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    return code, told.out, told.err


# --- verdicts and their exit codes


def test_fit_saves_what_load_reads(capsys, tmp_path):
    code, out, err = run(capsys, "fit", f"{HERE}:small", "--seed", 0, "--output", tmp_path / "p", "--num-steps", 3)
    assert code == Exit.DONE, err
    assert "whitening:" in out
    posterior = si.load(tmp_path / "p", named_object(f"{HERE}:model"))
    assert posterior.history.budget.num_steps == 3


def test_report_draws_certifies_and_writes(capsys, tmp_path):
    np.savez(tmp_path / "data.npz", y=Y1)
    words = ["report", "doubles:location_scale", ARTEFACT, "--arguments", tmp_path / "data.npz", "--seed", 0]
    words += ["--num", 60, "--num-draws", 2000, "--output", tmp_path / "r.html", "--draws", tmp_path / "d.nc"]
    code, out, err = run(capsys, *words)
    page = (tmp_path / "r.html").read_text()
    assert code == Exit.DONE, out + err
    assert "your data are certified" in out
    assert "<h2>Trusted" in page
    assert (tmp_path / "d.nc").stat().st_size > 1000


def test_refused_report_says_so_in_its_exit_code(capsys, tmp_path):
    """Forty draws can never be certified."""
    np.savez(tmp_path / "data.npz", y=Y1)
    words = ["report", "doubles:location_scale", ARTEFACT, "--arguments", tmp_path / "data.npz", "--seed", 0]
    code, out, _ = run(capsys, *words, "--num", 60, "--num-draws", 39, "--output", tmp_path / "r.html")
    assert code == Exit.REFUSED
    assert "not certified" in out
    assert "Not trusted" in (tmp_path / "r.html").read_text()


def test_simulate_stores_and_counts(capsys, tmp_path):
    words = ["simulate", f"{HERE}:prior", f"{HERE}:simulator", "--num", 6, "--store", tmp_path / "s", "--seed", 0]
    code, out, _ = run(capsys, *words, "--executor", f"{HERE}:executor")
    rows = si.simulators.Store(tmp_path / "s").read()
    assert (code, out.split(": ")[1]) == (Exit.DONE, "6 ok\n")
    assert np.allclose(rows.outputs["flow"], rows.z[:, 0] + 1.0)


def test_simulations_that_all_fail_are_refused(capsys, tmp_path):
    with pytest.warns(UserWarning, match="None of the 3"):
        code, out, _ = run(
            capsys, "simulate", f"{HERE}:prior", f"{HERE}:broken", "--num", 3, "--store", tmp_path, "--seed", 0
        )
    assert (code, out.split(": ")[1]) == (Exit.REFUSED, "3 failed\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "nowhere:model", "--seed", "0", "--output", "x"], "no module `nowhere`"),
        (["fit", f"{HERE}:nothing", "--seed", "0", "--output", "x"], "has no `nothing`"),
        (["fit", HERE, "--seed", "0", "--output", "x"], "Expected `module:name`"),
        (["fit", f"{HERE}:model", "--seed", "0", "--output", "x", "--arguments", "no.npz"], "no.npz"),
        (["calibrate", "doubles:location_scale", "no", "--num", "20", "--seed", "0"], "cannot be read"),
    ],
)
def test_what_cannot_be_used_is_named(capsys, words, told):
    code, _, err = run(capsys, *words)
    assert (code, told in err, "Traceback" in err) == (Exit.UNUSABLE, True, False)


def test_wrong_command_lines_end_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"{HERE}:model"])
    assert stopped.value.code == Exit.UNUSABLE
    assert "--seed" in capsys.readouterr().err


def test_unforeseen_errors_show_where_they_were_raised(capsys):
    code, _, err = run(capsys, "fit", f"{HERE}:crashes", "--seed", 0, "--output", "x")
    assert (code, "a bug in the model" in err, "Traceback" in err) == (Exit.FAILED, True, True)


def test_interrupts_ask_for_the_same_command_again(capsys, tmp_path):
    code, _, _ = run(
        capsys, "simulate", f"{HERE}:prior", f"{HERE}:interrupted", "--num", 3, "--store", tmp_path, "--seed", 0
    )
    assert code == Exit.INTERRUPTED


def test_sigterm_keeps_what_is_done_and_the_same_command_ends_it(tmp_path, cases):
    """In a process of its own, as a scheduler ends one; the second run has only the rest to do."""
    command = [sys.executable, "-m", "scoreinfer", "simulate", f"{HERE}:prior", f"{HERE}:slow"]
    command += ["--num", "30", "--store", str(tmp_path / "s"), "--seed", "0", "--progress-seconds", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    job = subprocess.Popen(command, cwd=cases, env=environment, stderr=subprocess.PIPE, text=True)
    assert job.stderr is not None
    for line in job.stderr:
        if "3/30" in line:
            break
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == Exit.INTERRUPTED
    job.stderr.close()
    done = len(si.simulators.Store(tmp_path / "s").read().number)
    assert 3 <= done < 30
    start = time.monotonic()
    assert main(command[3:]) == Exit.DONE
    assert time.monotonic() - start >= 0.2 * (30 - done)
    assert len(si.simulators.Store(tmp_path / "s").read().number) == 30


# --- inputs, progress, doctor


def test_arguments_come_from_files(tmp_path):
    np.savez(tmp_path / "a.npz", t=np.arange(3.0), n=np.array(2))
    tmp_path.joinpath("b.json").write_text(json.dumps({"y": [1.0, 2.0], "n": 5}))
    found = named_arguments([str(tmp_path / "a.npz"), str(tmp_path / "b.json")])
    assert found.pop("n") == 5
    assert {name: value.tolist() for name, value in found.items()} == {"t": [0.0, 1.0, 2.0], "y": [1.0, 2.0]}
    assert type(named_arguments([str(tmp_path / "a.npz")])["n"]) is int


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", y=np.array([print], dtype=object))
    with pytest.raises(UnreadableFile, match="Object arrays cannot be loaded"):
        named_arguments([str(tmp_path / "a.npz")])


def test_log_files_get_few_lines():
    log = io.StringIO()
    stream = LineStream(log, 3600.0)
    print("a message", file=stream)
    for number in range(100):
        stream.write(f"\rrow {number} of 100")
    stream.write("\r" + 20 * " " + "\r")
    assert log.getvalue() == "a message\nrow 0 of 100\n"


def test_doctor_reports_and_passes(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == Exit.DONE, out
    assert all(word in out for word in ("versions:", "devices: ", "dtype: float32", "self-test: passed"))


def test_doctor_sees_a_wrong_answer():
    precision = 1.0 + DATA.size / NOISE**2
    noise = np.random.default_rng(0).normal(0.0, precision**-0.5, 2000)
    right = jnp.asarray(DATA.sum() / NOISE**2 / precision + noise)
    covariance = NOISE**2 * np.eye(DATA.size) + 1.0
    evidence = stats.multivariate_normal(np.zeros(DATA.size), covariance).logpdf(DATA)
    assert faults_of(drawn(right, evidence)) == []
    assert [fault.split()[0] for fault in faults_of(drawn(right + 0.1, evidence + 0.01))] == ["mean", "log"]


def drawn(mean, log_evidence):
    """Equally weighted draws with an evidence."""
    certificate = certify_weights(np.full(2000, log_evidence))
    return si.Draws({"mean": mean}, mean[:, None], jnp.zeros(2000), mean, mean, {}, certificate)
