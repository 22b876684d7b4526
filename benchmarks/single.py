"""What one posterior costs with `ScoreSDE`, stage by stage, beside NUTS.

    python benchmarks/single.py                                  # all targets, medians of three
    python benchmarks/single.py decay mixture_9 --repeats 1

Every run is a process of its own on one pinned core: cold, then once more with its programs in JAX's cache. The stages
are learning, the first run, the certificate and a second run on the same data; of NUTS, a first and a second run. Each
has its CPU seconds, the number of programs that were compiled, and the seconds that XLA took for them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = (
    "decay", "eight_schools", "logistic_25", "mixture_9", "many_well_5", "two_moons", "slcp", "funnel_10",
    "mixture_40_in_10",
)  # fmt: skip
SETTINGS = {"num_warmup": 500, "num_samples": 1000, "num_chains": 4}
ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
STAGES = {"scoreinfer": ("learn", "first", "certify", "again"), "nuts": ("first", "again")}


# --- the process of one run


def work(method: str, name: str, seed: int) -> None:
    """Go through the stages, and print a line of JSON."""
    sys.path[:0] = [str(HERE.parent / "tests")]
    import jax
    from measure import Clock
    from numpyro.infer import MCMC, NUTS

    import scoreinfer as si

    target, row = _target(name), {}
    options, first = {"model": target.model}, None
    if target.potential_fn is not None:
        options = {"potential_fn": target.potential_fn}
        first = 2.0 * jax.random.normal(jax.random.key(seed), (SETTINGS["num_chains"], target.dim))
    example = None if first is None else first[0]

    def stage(label, function):
        with Clock() as clock:
            found = function()
        times = clock.times
        row[label] = {"cpu": times.cpu, "programs": times.num_compilations, "xla": times.backend}
        return found

    def run(kernel, number):
        mcmc = MCMC(kernel, chain_method="vectorized", progress_bar=False, **SETTINGS)
        mcmc.run(jax.random.key(seed + number), **target.data, init_params=first)
        jax.block_until_ready(mcmc.get_samples())
        return mcmc

    if method == "nuts":
        stage("first", lambda: run(NUTS(**options), 1))
        stage("again", lambda: run(NUTS(**options), 2))
    else:
        options |= {} if first is None else {"start_scale": target.start_scale}
        kernel = si.ScoreSDE(**options, progress_bar=False)
        key = jax.random.key(seed)
        stage("learn", lambda: kernel.learn(key, SETTINGS["num_warmup"], init_params=example, **target.data))
        mcmc = stage("first", lambda: run(kernel, 1))
        found = stage("certify", lambda: si.certify(mcmc))
        stage("again", lambda: run(kernel, 2))
        row |= _figures(kernel, found, target, mcmc, first is None)
    print(json.dumps(row))


def _target(name: str):
    import rival_targets

    return _decay() if name == "decay" else rival_targets.target(name)


def _decay():
    """Two parameters and fifty noisy values of an exponential decay."""
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as dist
    from rival_targets import Target

    def model(t, y=None):
        start = numpyro.sample("start", dist.LogNormal(0.0, 1.0))
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(start * jnp.exp(-rate * t), 0.1), obs=y)

    t = np.linspace(0.0, 5.0, 50, dtype=np.float32)
    y = 2.0 * np.exp(-0.7 * t) + 0.1 * np.random.default_rng(0).normal(size=50)
    return Target("decay", model, {"t": t, "y": y.astype(np.float32)}, None, 0.0, {"start": (), "rate": ()}, None)


def _figures(kernel, found, target, mcmc, is_model: bool) -> dict:
    from rival_methods import Outcome
    from rivals import figures

    fit = kernel.fit_of(mcmc.last_state)
    row = {
        "certified": found.certified, "share": fit.taught.best.share, "stopped": fit.taught.stopped,
        "shares": [(one.num_steps, round(one.share, 3)) for one in fit.taught.rounds],
        "gradients": fit.evidence.num_gradients,
        "proposals": kernel.moves_of(fit)[0], "local": kernel.moves_of(fit)[1], "k_hat": found.weights.k_hat,
    }  # fmt: skip
    if target.truth is not None:
        rows = target.join(mcmc.get_samples() if is_model else {"x": mcmc.get_samples()})
        row |= figures(Outcome(rows, log_evidence=found.weights.log_evidence), target.truth())
    return row


# --- all processes


def measure(method: str, name: str, seed: int, core: int, cache: str | None = None) -> dict:
    """Start a process, and read its line.

    Raises:
        subprocess.CalledProcessError: if it fails; its standard error has been printed.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")} | ONE_THREAD
    if cache is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, __file__, "--work", method, name, str(seed)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, args) -> list[dict]:
    """Measure one target ``args.repeats`` times: cold, and with the programs of the first process in the cache."""
    rows = []
    for number in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for run in ("cold", "cached") if args.cached else ("cold",):
                for method in args.methods:
                    row = measure(method, name, args.seed + number, args.core, cache if args.cached else None)
                    rows.append({"target": name, "method": method, "run": run, **row})
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def total(row: dict) -> float:
    """Add the CPU seconds of all stages but the second run."""
    return sum(row[stage]["cpu"] for stage in ("learn", "first", "certify") if stage in row)


def summary(rows: list[dict]) -> list[str]:
    """Write medians, one line for each method and run."""
    lines = []
    for method, run in sorted({(row["method"], row["run"]) for row in rows}):
        own = [row for row in rows if (row["method"], row["run"]) == (method, run)]
        stages = [
            f"{label} {_median(own, label, 'cpu'):.1f} s, {_median(own, label, 'programs'):.0f} programs "
            f"({_median(own, label, 'xla'):.1f} s)"
            for label in STAGES[method]
        ]
        total_s = statistics.median(map(total, own))
        lines.append(f"{own[0]['target']:<17} {method:<10} {run:<6} {total_s:6.1f} s: " + "; ".join(stages))
    return lines


def _median(rows: list[dict], stage: str, figure: str) -> float:
    return statistics.median(row[stage][figure] for row in rows)


def main() -> None:
    """Measure what is asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--methods", nargs="+", choices=tuple(STAGES), default=tuple(STAGES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, default=0, help="the core that every process is pinned to")
    parser.add_argument("--cached", action="store_true", help="once more with compiled programs cached")
    args = parser.parse_args()
    print("\n".join(line for name in args.targets for line in summary(compare(name, args))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
