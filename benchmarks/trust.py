"""Trust: 1000 simulations of calibration, the bias of failed simulations, threads. `python benchmarks/trust.py`."""

import concurrent.futures
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import expit
from scipy.stats import norm

import scoreinfer as si

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import simulators
from doubles import location_scale


def prior():
    numpyro.sample("a", dist.Normal(0.0, 1.0))


def calibration():
    """1000-simulation SBC of a trained posterior, after training."""
    posterior = si.fit(jax.random.key(0), location_scale, num_steps=5000, progress_bar=False)
    start, cpu = time.perf_counter(), time.process_time()
    result = si.sbc(jax.random.key(1), posterior, posterior.problem, 1000, progress_bar=False)
    print(
        f"1000-simulation SBC: {time.perf_counter() - start:.1f} s, {time.process_time() - cpu:.1f} s of CPU\n{result}"
    )


def failures(num_rows: int = 10_000):
    """Posterior means, in posterior sd from the exact one, where half of the prior's simulations fail."""
    with tempfile.TemporaryDirectory() as folder:
        store = si.simulate(
            jax.random.key(5), prior, simulators.fails_by_chance, num_rows, store=folder, progress_bar=False
        )
        print(store)
        posterior = si.fit(jax.random.key(0), prior, simulations=store, num_steps=3000, progress_bar=False)
    a = np.linspace(-6, 6, 4001)
    print(f"{'data':>14} {'drop':>7} {'learn':>7} {'expected of drop':>17}  (errors of the mean in posterior sd)")
    for y in ([0.5, 0.9], [0.0, 0.2], [-0.5, -0.9], [-0.9, -1.2]):
        log_p = norm.logpdf(a) + sum(norm.logpdf(value, a, 0.5) for value in y)
        exact, pulled = (p / p.sum() for p in (np.exp(log_p), np.exp(log_p) * expit(3 * a)))
        mean = exact @ a
        sd = np.sqrt(exact @ (a - mean) ** 2)
        draws = posterior.sample(jax.random.key(1), 20_000, y=np.array(y))
        values, log_weight = np.asarray(draws.sites["a"], float), np.asarray(draws.log_weight, float)
        learned = np.average(values, weights=np.exp(log_weight - log_weight.max()))
        errors = [(value - mean) / sd for value in (values.mean(), learned, pulled @ a)]
        print(f"{y!s:>14} {errors[0]:7.3f} {errors[1]:7.3f} {errors[2]:17.3f}")


def threads():
    """Slow simulators (20 ms) in eight threads and in one."""
    seconds = {}
    for workers in (1, 8):
        with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(workers) as executor:
            args = jax.random.key(0), prior, simulators.slow
            si.simulate(*args, 1, store=folder, executor=executor, progress_bar=False)
            start = time.perf_counter()
            si.simulate(*args, 400, store=folder, executor=executor, progress_bar=False)
            seconds[workers] = time.perf_counter() - start
    print(f"400 simulations of 20 ms: {seconds[1]:.2f} s in one thread, {seconds[8]:.2f} s in eight: "
          f"{seconds[1] / seconds[8]:.1f} times faster")  # fmt: skip


if __name__ == "__main__":
    threads()
    failures()
    calibration()
