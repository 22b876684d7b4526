"""The doctor: what is installed, what JAX runs on, and whether a small posterior comes out right."""

import argparse
import importlib.util
import math
import os
import platform
import time
from typing import Any

import jax
import numpy as np

from scoreinfer.command.exits import Exit
from scoreinfer.draws import Draws
from scoreinfer.identity import versions
from scoreinfer.montecarlo.weights import effective_sample_size, relative_weights

EXTRAS = {"plot": "matplotlib", "calibration": "sklearn", "store": "zarr"}
"""The module by which an extra is recognised."""
DATA = np.array([0.3, 0.9, 0.6])
"""Data of the self-test. Chosen by judgement."""
NOISE = 0.5
"""Standard deviation of the data's noise in the self-test. Chosen by judgement."""


def doctor(arguments: argparse.Namespace) -> Exit:
    """Print what a bug report needs, and run the self-test."""
    print("versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()))
    print(f"platform: {platform.platform()}, {os.cpu_count()} processors")
    for extra, module in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        print(f"extra {extra}: {'installed' if found else f'not installed (pip install scoreinfer[{extra}])'}")
    devices = jax.devices()
    print(f"devices: {len(devices)} {devices[0].platform} ({devices[0].device_kind})")
    print(f"dtype: {jax.numpy.zeros(()).dtype} (JAX_ENABLE_X64=1 gives float64)")
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    print(f"cache of compiled programs: {cache or 'none (JAX_COMPILATION_CACHE_DIR=FOLDER keeps them)'}")
    start = time.perf_counter()
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the test, and the process ends
    faults = faults_of(_draw(jax.random.key(0), 2000))
    verdict = "; ".join(faults) or "passed"
    print(f"self-test: {verdict}, {time.perf_counter() - start:.1f} s")
    return Exit.REFUSED if faults else Exit.DONE


def _draw(key: jax.Array, num: int) -> Draws:
    """Learn the posterior of a mean with Gaussian prior and noise, and draw for `DATA`."""
    import numpyro
    import numpyro.distributions as dist

    from scoreinfer.posterior import NPSE

    def model(y: Any = None) -> None:
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mean, NOISE).expand([DATA.size]).to_event(1), obs=y)

    for_fit, for_draws = jax.random.split(key)
    posterior = NPSE(model, num_steps=500, width=16).fit(for_fit)
    return posterior.sample(for_draws, num, y=DATA)


def faults_of(draws: Draws) -> list[str]:
    """List what is wrong with draws of the self-test: each figure has to be within five standard errors.

    Exact: precision 1 + n / noise^2, mean of the data times n / noise^2 over it; y is Gaussian with covariance
    noise^2 I + 1 1^T.
    """
    assert draws.log_weight is not None
    certificate = draws.certificate
    precision = 1.0 + DATA.size / NOISE**2
    mean = np.average(np.asarray(draws.sites["mean"]), weights=relative_weights(draws.log_weight))
    error = 1.0 / math.sqrt(precision * effective_sample_size(draws.log_weight))
    exact = DATA.sum() / NOISE**2 / precision
    quadratic = (DATA @ DATA) / NOISE**2 - precision * exact**2
    log_evidence = -0.5 * (quadratic + math.log(precision) + DATA.size * math.log(2 * math.pi * NOISE**2))
    faults = [] if certificate.certified else [f"not certified: {certificate.reason}"]
    if not abs(mean - exact) < 5 * error:
        faults.append(f"mean {mean:.4f}, expected {exact:.4f} +- {error:.4f}")
    if not abs(certificate.log_evidence - log_evidence) < 5 * certificate.log_evidence_se + 1e-4:
        faults.append(f"log evidence {certificate.log_evidence:.4f}, expected {log_evidence:.4f}")
    return faults
