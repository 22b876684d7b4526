"""Trust: threads, the bias of failed simulations, 1000 simulations of calibration, a C program learned and weighed.

`python benchmarks/accuracy.py --suite trust` runs and judges them.
"""

import argparse
import concurrent.futures
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import rainfall_runoff
from measure import Clock
from scipy.special import expit
from scipy.stats import norm

import foreign_programs
import scoreinfer as si
from doubles import location_scale


def prior():
    numpyro.sample("a", dist.Normal(0.0, 1.0))


def threads() -> dict[str, float]:
    """Run slow simulators (20 ms) in eight threads and in one."""
    seconds = {}
    for workers in (1, 8):
        with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(workers) as executor:
            args = jax.random.key(0), prior, foreign_programs.slow
            si.simulators.simulate(*args, 1, store=folder, executor=executor, progress_bar=False)
            start = time.perf_counter()
            si.simulators.simulate(*args, 400, store=folder, executor=executor, progress_bar=False)
            seconds[workers] = time.perf_counter() - start
    return {"speedup": seconds[1] / seconds[8]}


def failures(num_rows: int = 10_000) -> dict[str, float]:
    """Find the worst posterior mean, in posterior sd from the exact one, where half of the simulations fail."""
    with tempfile.TemporaryDirectory() as folder:
        store = si.simulators.simulate(
            jax.random.key(5), prior, foreign_programs.fails_by_chance, num_rows, store=folder, progress_bar=False
        )
        posterior = si.NPSE(prior, simulations=store, num_steps=3000, progress_bar=False).fit(jax.random.key(0))
    a, errors = np.linspace(-6, 6, 4001), []
    for y in ([0.5, 0.9], [0.0, 0.2], [-0.5, -0.9], [-0.9, -1.2]):
        log_p = norm.logpdf(a) + sum(norm.logpdf(value, a, 0.5) for value in y)
        exact, pulled = (p / p.sum() for p in (np.exp(log_p), np.exp(log_p) * expit(3 * a)))
        mean = exact @ a
        sd = np.sqrt(exact @ (a - mean) ** 2)
        draws = posterior.sample(jax.random.key(1), 20_000, y=np.array(y))
        values, log_weight = np.asarray(draws.sites["a"], float), np.asarray(draws.log_weight, float)
        learned = np.average(values, weights=np.exp(log_weight - log_weight.max()))
        errors.append([abs(value - mean) / sd for value in (values.mean(), learned, pulled @ a)])
    return dict(zip(("dropped_error", "learned_error", "expected_of_dropping"), np.max(errors, axis=0), strict=True))


def calibration() -> dict[str, float]:
    """Rank 1000 known truths under a trained posterior, after training."""
    posterior = si.NPSE(location_scale, num_steps=5000, progress_bar=False).fit(jax.random.key(0))
    with Clock() as clock:
        result = si.calibration.sbc(jax.random.key(1), posterior, 1000, progress_bar=False)
    return {"p_value": result.p_value, "seconds": clock.times.wall, "cpu_s": clock.times.cpu}


def rainfall(seed: int) -> dict[str, float]:
    """Run the rainfall-runoff example (real data where spotpy is installed)."""
    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(smoke=False, seed=seed, output_dir=Path(folder))
        draws, report = rainfall_runoff.run(settings)
    found = draws.certificate
    figures = {"ess_share": found.ess / found.num, "k_hat": found.k_hat, "missed": found.missed}
    return figures | {"p_value": report.sbc.p_value, "certified": float(found.certified)}
