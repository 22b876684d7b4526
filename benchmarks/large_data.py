"""Logistic regression with many rows: memory and time of `ScoreSDE`, its certificate and `fit`, beside NUTS.

    python benchmarks/large_data.py                                    # 1,000, 20,000 and 100,000 rows, 10 covariates
    python benchmarks/large_data.py --rows 20000 --methods learn nuts  # some of it

Every method is a process of its own on one pinned core, cold. Each stage has its CPU seconds, XLA's share of them, and
the peak resident memory of the process so far, before which about 300 MB are JAX and NumPyro themselves.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
METHODS = ("nuts", "learn", "fit")
SETTINGS = {"num_warmup": 500, "num_samples": 1000, "num_chains": 4}
ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


# --- the process of one run


def work(method: str, rows: int, covariates: int, options: dict) -> None:
    """Go through the stages of one method, and print a line of JSON after each."""
    import jax
    from measure import Clock
    from numpyro.infer import MCMC, NUTS

    import scoreinfer as si

    x, y = data(rows, covariates)
    row = {"method": method, "rows": rows}

    def stage(label, function):
        with Clock() as clock:
            found = function()
        times = clock.times
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        row[label] = {"cpu": round(times.cpu, 1), "xla": round(times.backend, 1), "peak_gb": round(peak, 2)}
        print(json.dumps(row), flush=True)
        return found

    def run(kernel):
        mcmc = MCMC(kernel, chain_method="vectorized", progress_bar=False, **SETTINGS)
        mcmc.run(jax.random.key(1), x, y=y, extra_fields=("num_steps",) if method == "nuts" else ())
        jax.block_until_ready(mcmc.get_samples())
        return mcmc

    if method == "fit":
        posterior = stage("fit", lambda: si.NPSE(model, progress_bar=False, **options).fit(jax.random.key(0), x))
        drawn = stage("draw", lambda: posterior.condition(x, y=y).sample(jax.random.key(1), 1000))
        row["ess"] = float(drawn.certificate.ess)
    elif method == "nuts":
        mcmc = stage("run", lambda: run(NUTS(model)))
        row["gradients"] = int(mcmc.get_extra_fields()["num_steps"].sum() * 1.5)  # warm-up is not collected
    else:
        kernel = si.ScoreSDE(model, progress_bar=False, **options)
        stage("learn", lambda: kernel.learn(jax.random.key(0), SETTINGS["num_warmup"], x, y=y))
        mcmc = stage("run", lambda: run(kernel))
        fit = kernel.fit_of(mcmc.last_state)
        row |= {"gradients": fit.evidence.num_gradients, "learning": str(fit.taught)}
        found = stage("certify", lambda: si.certify(mcmc))
        row |= {"certified": found.certified, "reason": found.reason}
    if method != "fit":
        row["means"] = [round(float(mean), 4) for mean in mcmc.get_samples()["w"].mean(0)]
    print(json.dumps(row))


def data(rows: int, covariates: int):
    """Draw covariates, weights and labels."""
    import numpy as np

    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(rows, covariates)).astype(np.float32), rng.normal(size=covariates) / covariates**0.5
    return x, (rng.uniform(size=rows) < 1 / (1 + np.exp(-x @ w))).astype(np.int32)


def model(x, y=None):
    """Regress binary labels on covariates."""
    import numpyro
    import numpyro.distributions as dist

    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


# --- all processes


def main() -> None:
    """Measure what is asked; print each stage as it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=(1000, 20_000, 100_000))
    parser.add_argument("--covariates", type=int, default=10)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seconds", type=int, default=1800, help="wall seconds after which a process is ended")
    parser.add_argument("--core", type=int, default=0, help="the core that every process is pinned to")
    parser.add_argument("--options", type=json.loads, default={}, help='such as {"max_memory": 100000000}')
    args = parser.parse_args()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")} | ONE_THREAD
    for rows in args.rows:
        for method in args.methods:
            command = [sys.executable, __file__, "--work", method, str(rows), str(args.covariates)]
            try:
                subprocess.run(
                    [*command, json.dumps({} if method == "nuts" else args.options)], env=environment, check=True,
                    timeout=args.seconds, preexec_fn=lambda: os.sched_setaffinity(0, {args.core}),
                )  # fmt: skip
            except subprocess.SubprocessError as error:
                print(json.dumps({"method": method, "rows": rows, "failed": str(error)[-200:]}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        sys.path[:0] = [str(HERE)]
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]))
    else:
        main()
