"""Physics learned in reverse beside NUTS and MALA on the same model: seconds per effective draw, when training pays."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import toy_process_holzschuh2023 as toy
from measure import Clock
from numpyro.infer import NUTS
from scipy import stats

import scoreinfer as si
from modes import heat

NUM_DRAWS = 4000
ENOUGH = 1000
"""Effective draws wanted of each end state."""
TOY_NOISE = 0.01


class Case(NamedTuple):
    """A model of a path, one observation, and a function of the first state with a known posterior mean and sd."""

    name: str
    model: Callable
    reverse: Callable
    num_steps: int
    y: np.ndarray
    function: Callable
    mean: float
    sd: float


def heat_case() -> Case:
    """Make the heat equation in 32 modes and 16 steps; its second mode at the start."""
    modes = heat()
    y = np.sqrt(modes.covariances()[:, -1, -1]) * np.linspace(-1.5, 1.2, len(modes.rates))
    mean, covariance, _ = modes.smoother(y)
    first = float(mean[0, 1]), float(np.sqrt(covariance[1, 0, 0]))
    return Case("heat", modes.model, lambda t0, t1, x: x, 2000, y, lambda x: x[:, 0, 1], *first)


def observed_toy(y=None):
    """Observe the end of the toy process, with noise."""
    x = numpyro.sample("x", toy.path())
    numpyro.sample("y", dist.Normal(x[-1], TOY_NOISE), obs=y)


def toy_case() -> Case:
    """Make the toy process of 500 steps; which of two starts it came from."""
    y, truth = 0.05, toy.exact()
    likelihood = stats.norm(truth.grid, TOY_NOISE).pdf(y)
    plus, minus = likelihood @ truth.density[-1], likelihood[::-1] @ truth.density[-1]
    share = plus / (plus + minus)
    sd = np.sqrt(share * (1 - share))
    return Case("toy", observed_toy, toy.grow, 6000, np.float32(y), lambda x: x[:, 0] > 0, share, sd)


def rows(key: Any, chosen: Callable[[str], bool], num_steps: int | None, progress_bar: bool) -> Iterator:
    """Yield one row a case."""
    for make in (heat_case, toy_case):
        name = f"against_nuts/{make.__name__.removesuffix('_case')}"
        if chosen(name):
            jax.clear_caches()
            yield name, measure(key, make(), num_steps, progress_bar)


def measure(key: Any, case: Case, num_steps: int | None, progress_bar: bool) -> dict[str, float]:
    """Learn and draw; run the others once, with their warm-up; all without compilation, but the training."""
    data = {"y": jnp.asarray(case.y, jnp.float32)}
    with Clock() as training:
        posterior = si.SMDP(
            case.model, "x", reverse=case.reverse, num_steps=num_steps or case.num_steps, progress_bar=progress_bar
        ).fit(key)
    posterior.sample(key, NUM_DRAWS, **data)
    with Clock() as drawing:
        draws = posterior.sample(jax.random.fold_in(key, 1), NUM_DRAWS, **data)
    weight = np.exp(np.asarray(draws.log_weight, np.float64) - np.max(draws.log_weight))
    value = np.asarray(case.function(np.asarray(draws.sites["x"])), np.float64)
    ours = drawing.times.wall / draws.certificate.ess
    figures = {
        "train_s": training.times.wall,
        "score_s_per_draw": ours,
        "score_ess_share": draws.certificate.ess / draws.num,
        "score_error": abs(np.average(value, weights=weight) - case.mean) / case.sd,
    }
    kernels = {"nuts": NUTS(case.model, max_tree_depth=8), "mala": si.mcmc.MALA(case.model)}
    compared = si.Comparison(case.model, kernels, num_warmup=300, num_samples=300).run(key, **data)
    for name, result in compared.results.items():
        value = case.function(np.asarray(compared.mcmc[name].get_samples()["x"]))
        figures |= {
            f"{name}_s_per_draw": 1 / result.ess_per_second,
            f"{name}_error": abs(float(np.mean(value)) - case.mean) / case.sd,
            f"{name}_r_hat": result.r_hat,
        }
    saved = ENOUGH * (figures["nuts_s_per_draw"] - ours)
    return figures | {"pays_after": training.times.wall / saved if saved > 0 else np.inf}
