"""Single posteriors learned under sabotage: a far mode out of the explorer's reach, no training, a wrong gradient.

A certificate is false when the chains' verdict is "certified" but the log evidence or the modes' shares are wrong.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from numpyro.infer import MCMC

import scoreinfer as si

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracles

NUM_CASES = 10
WRONG_SHARE = 0.1


class Case(NamedTuple):
    """A density with its answers, and how it is learned."""

    kind: str
    target: oracles.Density
    num_warmup: int = 100


class Verdict(NamedTuple):
    """What the certificate said, and what the known answers say."""

    case: Case
    found: si.mcmc.ChainCertificate
    evidence_error: float
    mode_error: float

    @property
    def wrong(self) -> bool:
        """Whether evidence (beyond five standard errors and 0.02) or modes' shares (total variation) are off."""
        bound = 5 * self.found.weights.log_evidence_se + 0.02
        return not self.evidence_error <= bound or self.mode_error > WRONG_SHARE


def far_mode() -> Iterator[Case]:
    """Two modes, one of them 20 to 120 standard deviations of the start away."""
    for i, distance in enumerate(np.geomspace(20.0, 120.0, NUM_CASES)):
        means = np.zeros((2, 2 + i % 3))
        means[1, 0] = distance
        yield Case("far_mode", oracles.gaussian_mixture_density(f"two modes {distance:.0f} apart", means, 1.0, 1.0))


def untrained() -> Iterator[Case]:
    """A sampler that saw a handful of optimiser steps."""
    for i in range(NUM_CASES):
        rng = np.random.default_rng(i)
        means = rng.uniform(-6, 6, size=(3 + i % 4, 2 + i % 3))
        target = oracles.gaussian_mixture_density(f"{len(means)} modes in {means.shape[1]}", means, 0.5, 5.0)
        yield Case("untrained", target, num_warmup=1)


def wrong_gradient() -> Iterator[Case]:
    """The density is right, its gradient turned round, shrunk, blown up, gone, or rotated."""
    distortions: list[Callable] = [
        lambda g: -g, lambda g: 0.3 * g, lambda g: 3.0 * g, lambda g: 0.0 * g, lambda g: g[::-1],
    ]  # fmt: skip
    for i in range(NUM_CASES):
        means = np.random.default_rng(100 + i).uniform(-5, 5, size=(2 + i % 2, 2))
        target = oracles.gaussian_mixture_density(f"{len(means)} modes, distortion {i % 5}", means, 0.5, 5.0)
        yield Case("wrong_gradient", target._replace(potential=distorted(target.potential, distortions[i % 5])))


def distorted(potential: Callable, distort: Callable) -> Callable:
    """Give a function another gradient."""

    @jax.custom_jvp
    def function(x):
        return potential(x)

    @function.defjvp
    def _(primals, tangents):
        value, gradient = jax.value_and_grad(potential)(*primals)
        return value, distort(gradient) @ tangents[0]

    return function


KINDS = (far_mode, untrained, wrong_gradient)


def judge(key, case: Case) -> Verdict:
    """Learn, run, certify, and compare with the known answers."""
    target = case.target
    kernel = si.ScoreSDE(potential_fn=target.potential, start_scale=target.start_scale, progress_bar=False)
    mcmc = MCMC(
        kernel, num_warmup=case.num_warmup, num_samples=500, num_chains=4, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    for_start, for_run = jax.random.split(key)
    first = jax.random.normal(for_start, (4, target.dim))
    mcmc.run(for_run, init_params=first, extra_fields=("accept_prob",))
    found = si.certify(mcmc)
    draws = np.asarray(mcmc.get_samples(), np.float64)
    shares = np.bincount(target.mode_of(draws), minlength=len(target.modes)) / len(draws)
    mode_error = 0.5 * float(np.abs(shares - target.modes).sum())
    return Verdict(case, found, abs(found.weights.log_evidence - target.log_evidence), mode_error)
