"""Predictor and corrector: the corrector forgets what a coarse predictor does wrong, with the score alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laws import standard_errors
from scoreinfer.process import VE, Noising
from scoreinfer.samplers.corrector import FunctionScore, PredictorCorrector, line_integral
from scoreinfer.score import DensityScore, MixtureScore

WEIGHTS, MEANS, SCALES = jnp.array([0.3, 0.7]), jnp.array([[-1.0], [1.2]]), jnp.array([0.4, 0.6])
MIXTURE = MixtureScore(WEIGHTS, MEANS, SCALES)
COARSE = Noising(VE(level_min=0.02, level_max=5.0, power=3.0))


def log_density(level, x):
    """Compute the mixture's log density at a level, up to a constant that differs from level to level."""
    variance = SCALES**2 + level**2
    return jax.nn.logsumexp(-0.5 * (x - MEANS[:, 0]) ** 2 / variance, b=WEIGHTS / jnp.sqrt(variance)) - 7.0 * level


def test_line_integrals_are_differences_of_the_log_density():
    level, start, end = jnp.array(0.5), jnp.array([-0.2]), jnp.array([0.5])
    found = line_integral(lambda x: MIXTURE(level, x), start, end)
    np.testing.assert_allclose(found, log_density(level, end) - log_density(level, start), atol=5e-4)


GIVEN = {
    "score": FunctionScore(lambda level, x: MIXTURE(level, x)),
    "density": DensityScore(log_density),
}
"""The same score, as a user may have it."""


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("level", [0.05, 3.0])
def test_a_users_own_score_is_that_of_the_mixture(given, level):
    x = jnp.array([0.3])
    np.testing.assert_allclose(given(jnp.array(level), x), MIXTURE(jnp.array(level), x), rtol=1e-3)


@pytest.mark.parametrize(("given", "num_corrections", "right"), [("score", 0, False), ("density", 12, True)])
def test_corrections_mend_a_coarse_predictor(given, num_corrections, right):
    """Six reverse steps alone get the mixture's skewness wrong; with moves in between it is right."""
    score = GIVEN[given]
    sampler, num = PredictorCorrector(COARSE, 6, num_corrections), 20_000
    x = jax.jit(jax.vmap(lambda key: sampler.sample(key, score, 1)))(jax.random.split(jax.random.key(0), num))[:, 0]
    x = np.asarray(x, np.float64)
    rng = np.random.default_rng(0)
    which = rng.choice(2, size=400_000, p=np.asarray(WEIGHTS))
    exact = np.asarray(MEANS)[which, 0] + np.asarray(SCALES)[which] * rng.normal(size=which.size)

    def functions(x):
        return np.stack([x, x**2, x**3, np.cos(3 * x)], 1)

    own, theirs = functions(x), functions(exact)
    far = np.abs(own.mean(0) - theirs.mean(0)) / np.sqrt(own.var(0) / num + theirs.var(0) / len(exact))
    assert (far.max() < 5) == right


def test_long_moves_leave_a_level_invariant():
    """Moves of 1.5 squared levels nearly double the variance of a component where every one is accepted."""
    level, num = jnp.array(0.5), 20_000
    rng = np.random.default_rng(1)
    which = rng.choice(2, size=num, p=np.asarray(WEIGHTS))
    noise = np.sqrt(np.asarray(SCALES)[which] ** 2 + 0.25) * rng.normal(size=num)
    start = jnp.asarray(np.asarray(MEANS)[which] + noise[:, None], jnp.float32)
    sampler, keys = PredictorCorrector(COARSE, 6, 6, step=1.5), jax.random.split(jax.random.key(2), num)
    end = jax.jit(jax.vmap(lambda key, x: sampler.correct(key, MIXTURE, level, x)))(keys, start)
    assert (jnp.abs(end - start) > 0).mean() > 0.9

    def functions(x):
        return np.concatenate([x, x**2, x**3, np.cos(3 * x)], 1, dtype=np.float64)

    assert standard_errors(functions(end) - functions(start)) < 5
