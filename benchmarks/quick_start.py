"""Seconds of the README's quick starts in a cold process, and milliseconds of 4000 weighted draws when warm.

    taskset -c 0 python benchmarks/quick_start.py                # a minute: prints one line of JSON
    taskset -c 0 python benchmarks/quick_start.py physics        # the double well, in reverse

Seconds are CPU seconds of the process, the import included, so that a busy machine changes them little.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from measure import Clock

import scoreinfer as si
from scoreinfer.samplers.batches import weighted_draws

NUM, REPEATS = 4000, 9


def decay(t, y=None):
    """The README's first model."""
    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.LogNormal(0, 0.5))
    numpyro.sample("y", dist.Normal(a * jnp.exp(-b * t), 0.1), obs=y)


def decays(t, y=None):
    """Four decays, seen one by one: eight parameters."""
    a = numpyro.sample("a", dist.Normal(0, 1).expand([4]).to_event(1))
    b = numpyro.sample("b", dist.LogNormal(0, 0.5).expand([4]).to_event(1))
    numpyro.sample("y", dist.Normal(a * jnp.exp(-b * t[:, None]), 0.1).to_event(2), obs=y)


def milliseconds(conditioned):
    """Compute the median CPU time of 4000 weighted draws."""
    proposal, target, spent = conditioned.proposal, conditioned.target, []
    for number in range(REPEATS + 1):  # the first one compiles
        began = time.process_time()
        jax.block_until_ready(weighted_draws(jax.random.key(number), proposal, target, 1024, None, 0, NUM))
        spent.append(1e3 * (time.process_time() - began))
    return float(np.median(spent[1:]))


def figures():
    """Fit, draw, certify; then time draws of this posterior, and of the largest default sampler in 8 dimensions."""
    t = jnp.linspace(0, 3, 20)
    y = 1.2 * jnp.exp(-0.7 * t)
    with Clock() as fit:
        posterior = si.NPSE(decay, progress_bar=False).fit(jax.random.key(0), t)
    told = {"fit_s": time.process_time(), "fit_programs": fit.times.num_compilations}
    conditioned = posterior.condition(t, y=y)
    with Clock() as first:
        draws = conditioned.sample(jax.random.key(1), NUM)
    told |= {
        "share": max(posterior.history.whitening.share, posterior.history.score.share),
        "ess_share": draws.certificate.ess / NUM,
        "certified": float(draws.certificate.certified),
        "first_batch_s": first.times.cpu,
        "first_batch_programs": first.times.num_compilations,
        "draws_2_ms": milliseconds(conditioned),
    }
    # What is drawn does not change the time: a network of the largest size that was hardly trained, and eight steps.
    flow = si.samplers.ProbabilityFlow(num_steps=8)
    options = {"num_steps": 1, "target_share": 1.1, "sampler": flow, "progress_bar": False}
    eight = si.NPSE(decays, **options).fit(jax.random.key(2), t)
    y = jnp.exp(-t)[:, None] * jnp.ones(4)
    return told | {"draws_8_ms": milliseconds(eight.condition(t, y=y))}


def well(y=None):
    """The README's double well, seen at its end."""
    ts = jnp.linspace(0.0, 1.0, 41)
    x = numpyro.sample("x", dist.EulerMaruyama(ts, lambda x, t: (4 * (x - x**3), 0.7), dist.Normal(0, 0.5)))
    numpyro.sample("y", dist.Normal(x[-1], 0.2), obs=y)


def physics():
    """Learn the reverse of the double well, and draw paths that end at 0.8."""
    paths = si.SMDP(well, "x", progress_bar=False).fit(jax.random.key(6))
    told = {"fit_s": time.process_time()}
    draws = paths.sample(jax.random.key(7), NUM, y=0.8)
    whole = time.process_time()
    return told | {
        "whole_s": whole,
        "ess_share": draws.certificate.ess / NUM,
        "certified": float(draws.certificate.certified),
    }


if __name__ == "__main__":
    print(json.dumps(physics() if sys.argv[1:] == ["physics"] else figures()))
