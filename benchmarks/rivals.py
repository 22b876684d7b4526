"""scoreinfer beside the samplers that a user would pick instead, on eight targets with known answers.

    python benchmarks/rivals.py --setup .venv-rivals          # makes the environment (Python 3.12 or 3.13)
    .venv-rivals/bin/python benchmarks/rivals.py --methods nuts blackjax --targets mixture_9 --output rivals.jsonl
    .venv-rivals/bin/python benchmarks/rivals.py --table rivals.jsonl

Each sampler meets each target in a process of its own, on one pinned core, without a cache of compiled programs: a cold
run, and a warm one with another seed. With ``--cached``, a third run follows in a fresh process that finds the programs
of an earlier process in JAX's cache. Each run is a line of JSON. CPU seconds leave imports out (they stand apart) and
count everything else: reading the target, compilation, sampling. A run that exceeds ``--limit`` CPU seconds is a row,
too.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
METHODS = ("scoreinfer", "nuts", "blackjax", "dynesty", "jaxns", "pocomc", "flowmc")
TARGETS = (
    "mixture_9", "mixture_40_in_10", "many_well_5", "funnel_10", "two_moons", "slcp", "eight_schools", "logistic_25",
)  # fmt: skip
ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def set_up(folder: str) -> None:
    """Make the environment of all samplers, scoreinfer with its benchmarks included."""
    venv.create(folder, with_pip=True)
    python = str(Path(folder).absolute() / "bin" / "python")
    packages = ["-r", str(HERE / "rivals-requirements.txt"), "-e", f"{HERE.parent}[benchmarks]"]
    subprocess.run([python, "-m", "pip", "install", *packages], check=True)


# --- the process of one sampler and one target


def work(method: str, name: str, seed: int, num_runs: int, limit: int) -> None:
    """Run, and print a line of JSON after each run."""
    import importlib
    import time

    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
    import rival_targets
    from measure import Clock

    module = importlib.import_module(f"rival_methods.{method}")
    settings = module.SETTINGS | getattr(module, "TUNED", {}).get(name, {})
    imports, run = time.process_time(), None
    for number in range(num_runs):
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + limit, resource.RLIM_INFINITY))
        with Clock() as clock:
            target = target if run else rival_targets.target(name, settings.get("scales"))
            run = run or module.prepare(target)
            outcome = run(seed + number)
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        row = {"run": ("cold", "warm")[number], "imports_cpu": imports, **clock.times._asdict()}
        if outcome.certifying:
            row |= {f"certify_{key}": value for key, value in outcome.certifying._asdict().items()}
            row |= {key: row[key] - row[f"certify_{key}"] for key in ("wall", "cpu")}
        row |= figures(outcome, target.truth()) | (outcome.extra or {})
        row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"settings": settings, **row}), flush=True)


def figures(outcome, truth) -> dict:
    """Hold the draws against what is known."""
    import numpy as np
    from numpyro.diagnostics import split_gelman_rubin

    draws = np.asarray(outcome.draws, float)
    weights = np.ones(len(draws)) if outcome.weights is None else np.asarray(outcome.weights, float)
    weights = weights / weights.sum()
    found = {"mean_error": float(np.max(np.abs(weights @ draws - truth.mean) / truth.sd))}
    if len(truth.modes):
        shares = np.bincount(truth.mode_of(draws), weights, minlength=len(truth.modes))
        found["mode_error"] = 0.5 * float(np.abs(shares - truth.modes).sum())
    if outcome.log_evidence is not None:
        found["log_evidence_error"] = abs(outcome.log_evidence - truth.log_evidence)
    if outcome.chains is not None:
        found["r_hat"] = float(np.max(split_gelman_rubin(outcome.chains)))
    found |= {"num_draws": len(draws), "kish_ess": float(1 / (weights**2).sum())}
    return found | {"num_evaluations": outcome.num_evaluations}


# --- all processes


def measure(method: str, name: str, args, cache: str | None = None, num_runs: int = 2) -> list[dict]:
    """Start the process, and read its rows; a row for a run that failed or took too long."""
    command = [sys.executable, __file__, "--work", method, name, str(args.seed), str(num_runs), str(args.limit)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")} | ONE_THREAD
    environment["PYTHONPATH"] = str(HERE.parent)
    if cache is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {args.core}),
        )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"settings"')]
    if done.returncode and len(rows) < num_runs:
        late = done.returncode in (-24, -9)  # SIGXCPU
        why = f"not in {args.limit} s" if late else (done.stderr.strip().splitlines() or ["?"])[-1]
        rows.append({"run": ("cold", "warm")[len(rows)], "failed": why})
    return rows


def cached(method: str, name: str, args) -> list[dict]:
    """Run in a fresh process that finds every program in JAX's cache."""
    with tempfile.TemporaryDirectory() as cache:
        if "failed" in measure(method, name, args, cache, 1)[-1]:
            return []
        return [row | {"run": "cached"} for row in measure(method, name, args, cache, 1)]


def table(lines: list[dict]) -> str:
    """Write a markdown table, a row for each target and method: CPU seconds and errors, medians over seeds."""
    out = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for name in TARGETS:
        for method in METHODS:
            own = [line for line in lines if (line["target"], line["method"]) == (name, method)]
            if own:
                out.append("| " + " | ".join([name, method, *cells(own)]) + " |")
    return "\n".join(out)


HEAD = (
    "target", "method", "cold", "warm", "cached", "density evaluations", "modes off", "log evidence off",
    "mean off (sd)", "R-hat", "certified",
)  # fmt: skip


def cells(lines: list[dict]) -> list[str]:
    """Write the figures of one target and method; all but the seconds are those of the cold runs."""
    by_run = {run: [line for line in lines if line["run"] == run] for run in ("cold", "warm", "cached")}
    cold, seconds = by_run["cold"], []
    for rows in by_run.values():
        certificate = median(rows, "certify_cpu", " + {:.1f}")
        failure = next((row["failed"] for row in rows if "failed" in row), "-")
        seconds.append(median(rows, "cpu", "{:.1f}", failure) + certificate.removeprefix("-"))
    verdicts = [row["certified"] for row in cold if "certified" in row]
    millions = [{"n": row["num_evaluations"] / 1e6} for row in cold if row.get("num_evaluations")]
    errors = [median(cold, f"{name}_error", "{:.3f}") for name in ("mode", "log_evidence", "mean")]
    certified = f"{sum(verdicts)} of {len(verdicts)}" if verdicts else "-"
    return [*seconds, median(millions, "n", "{:.2g} M"), *errors, median(cold, "r_hat", "{:.2f}"), certified]


def median(rows: list[dict], key: str, form: str, absent: str = "-") -> str:
    """Write the median of what is known."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return form.format(statistics.median(known)) if known else absent


def main() -> None:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", metavar="FOLDER", help="make a virtual environment with all samplers, and end")
    parser.add_argument("--table", metavar="FILE", help="write the table of these lines, and end")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, default=0, help="the core that every process is pinned to")
    parser.add_argument("--limit", type=int, default=150, help="CPU seconds for a run")
    parser.add_argument("--cached", action="store_true", help="once more with compiled programs cached")
    parser.add_argument("--output", type=Path, help="append the lines of JSON to this file")
    args = parser.parse_args()
    if args.setup:
        set_up(args.setup)
    elif args.table:
        print(table([json.loads(line) for line in Path(args.table).read_text().splitlines()]))
    else:
        compare(args)


def compare(args) -> None:
    """Measure, print and keep the lines, then the table."""
    lines = []
    for name in args.targets:
        for method in args.methods:
            for row in measure(method, name, args) + (cached(method, name, args) if args.cached else []):
                lines.append({"target": name, "method": method, "seed": args.seed, **row})
                print(json.dumps(lines[-1]), flush=True)
                if args.output:
                    with args.output.open("a") as file:
                        file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
    else:
        main()
