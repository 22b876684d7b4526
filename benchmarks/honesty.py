"""Sabotaged posteriors: every way of going wrong, on problems with known answers.

Each sabotage trains on something else than the true problem, or looks at something else than the observation, and the
resulting proposal then answers, and is certified, under the *true* density. A certificate is false when the batch is
certified but its weighted draws disagree with the known answer.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import scoreinfer as si
from scoreinfer.problem import Problem

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracles

FACTORIES = {
    "linear_gaussian": lambda **noise: oracles.linear_gaussian(2, **noise),
    "gaussian_mixture": oracles.gaussian_mixture,
    "banana": oracles.banana,
    "hierarchical": oracles.hierarchical,
    "skewed": lambda: oracles.skewed(),
}
HEALTHY_STEPS, SABOTAGED_STEPS, HASTY_STEPS = 4000, 1500, 40
DISAGREEMENT = 5.0


class Case(NamedTuple):
    """One posterior and one observation, ready to be judged."""

    kind: str
    oracle: oracles.Oracle
    data: dict
    posterior: si.Posterior


class Verdict(NamedTuple):
    """What the certificate said, and what the known answer says (distance in standard errors)."""

    kind: str
    problem: str
    certified: bool
    disagreement: float
    ess: float
    k_hat: float
    reason: str

    @property
    def false_certificate(self) -> bool:
        """Certified, but wrong."""
        return self.certified and self.disagreement > DISAGREEMENT


def judge(key, case: Case, num: int = 4000) -> Verdict:
    """Draw, certify, and compare the weighted draws with the known answer."""
    draws = case.posterior.sample(key, num, **case.data)
    theta, log_weight = case.oracle.flat(draws.sites), np.asarray(draws.log_weight, np.float64)
    finite = np.isfinite(theta).all(axis=1) & (log_weight > -np.inf)
    distance = np.inf
    if finite.any():
        distance = oracles.disagreement(case.oracle.truth(case.data), theta[finite], log_weight[finite])
    found = draws.certificate
    return Verdict(
        case.kind, case.oracle.name, found.certified, distance, float(found.ess), float(found.k_hat), found.reason
    )


def read(oracle: oracles.Oracle) -> Problem:
    """Read the oracle's model as a problem."""
    return si.from_numpyro(oracle.model, **oracle.data)


def answer_for(posterior: si.Posterior, problem: Problem) -> si.Posterior:
    """Let a trained proposal answer for another problem: its density, and its prior for the witnesses."""
    return dataclasses.replace(posterior, problem=problem)


def look_elsewhere(posterior: si.Posterior, data: dict) -> si.Posterior:
    """Let the proposal see ``data`` whatever is observed; the density still sees the observation."""
    problem = posterior.problem
    blind = dataclasses.replace(problem, encode=lambda _: problem.encode(data))
    return dataclasses.replace(posterior, problem=blind)


def observations(oracle: oracles.Oracle, key, num: int) -> list[dict]:
    """Take the oracle's own observation and simulate more."""
    return [oracle.data, *oracles.prior_draws(oracle, key, num - 1)[1]][:num]


# --- the sabotages: each yields cases; two observations per training


def healthy(key, num_observations: int = 10, names=tuple(FACTORIES)) -> Iterator[Case]:
    """Train properly."""
    for i, name in enumerate(names):
        oracle, own = FACTORIES[name](), jax.random.fold_in(key, i)
        posterior = si.NPSE(read(oracle), num_steps=HEALTHY_STEPS, progress_bar=False).fit(own)
        for data in observations(oracle, own, num_observations):
            yield Case("healthy", oracle, data, posterior)


def undertrained(key) -> Iterator[Case]:
    """Train for a moment."""
    for i, name in enumerate(FACTORIES):
        oracle, own = FACTORIES[name](), jax.random.fold_in(key, i)
        posterior = si.NPSE(read(oracle), num_steps=HASTY_STEPS, progress_bar=False).fit(own)
        for data in observations(oracle, own, 2):
            yield Case("undertrained", oracle, data, posterior)


def dropped_mode(key) -> Iterator[Case]:
    """Train on a simulator that never returns one side of the posterior, as if its runs had failed."""
    for i in range(5):
        name, drop_right = ("gaussian_mixture", "banana")[i % 2], i % 4 < 2
        oracle, own = FACTORIES[name](), jax.random.fold_in(key, i)
        problem = read(oracle)

        def dropped(z, problem=problem, oracle=oracle, drop_right=drop_right):
            first = jnp.ravel(problem.latent_sites(z)[oracle.latents[0]])[0]
            return (first > 0.0) == drop_right

        posterior = si.NPSE(filtered(problem, dropped), num_steps=SABOTAGED_STEPS, progress_bar=False).fit(own)
        posterior = answer_for(posterior, problem)
        for data in observations(oracle, own, 2):
            yield Case("dropped mode", oracle, data, posterior)


def wrong_observation(key) -> Iterator[Case]:
    """Show the network another observation than the density sees; and observations no simulation comes near."""
    for i, name in enumerate(FACTORIES):
        oracle, own = FACTORIES[name](), jax.random.fold_in(key, i)
        posterior = si.NPSE(read(oracle), num_steps=SABOTAGED_STEPS, progress_bar=False).fit(own)
        yield Case("wrong observation", oracle, oracle.data, look_elsewhere(posterior, oracle.simulate(own)[1]))
        scale = max(float(np.abs(oracle.data["y"]).max()), 3.0)
        far = {"y": np.asarray(oracle.data["y"] + 8.0 * scale, np.float32)}
        yield Case("wrong observation", oracle, far, posterior)


def wrong_noise(key) -> Iterator[Case]:
    """Train on the model with another noise scale."""
    names = [name for name in FACTORIES if name != "skewed"]
    for i, (name, noise) in enumerate([(n, 0.15) for n in names] + [("gaussian_mixture", 2.0)]):
        oracle, own = FACTORIES[name](), jax.random.fold_in(key, i)
        posterior = si.NPSE(read(FACTORIES[name](noise=noise)), num_steps=SABOTAGED_STEPS, progress_bar=False).fit(own)
        posterior = answer_for(posterior, read(oracle))
        for data in observations(oracle, own, 2):
            yield Case("wrong noise", oracle, data, posterior)


def shuffled(key) -> Iterator[Case]:
    """Train on parameters and observations that do not belong together."""
    for i, name in enumerate(FACTORIES):
        oracle, own = FACTORIES[name](), jax.random.fold_in(key, i)
        problem = read(oracle)

        def mismatched(key, problem=problem):
            first, second = jax.random.split(key)
            return problem.simulate(first)[0], problem.simulate(second)[1]

        broken = dataclasses.replace(problem, simulate=mismatched)
        posterior = si.NPSE(broken, num_steps=SABOTAGED_STEPS, target_score=False, progress_bar=False).fit(own)
        posterior = answer_for(posterior, problem)
        for data in observations(oracle, own, 2):
            yield Case("shuffled", oracle, data, posterior)


SABOTAGES: tuple[Callable, ...] = (undertrained, dropped_mode, wrong_observation, wrong_noise, shuffled)


def filtered(problem: Problem, dropped: Callable) -> Problem:
    """Make the simulator draw again for as long as ``dropped(z)``."""

    def simulate(key):
        def again(carry):
            key, _ = carry
            key, fresh = jax.random.split(key)
            return key, problem.simulate(fresh)

        _, pair = jax.lax.while_loop(lambda carry: dropped(carry[1][0]), again, again((key, None)))
        return pair

    return dataclasses.replace(problem, simulate=simulate)
