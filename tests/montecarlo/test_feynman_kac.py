"""The particle loop against a linear Gaussian state-space model, whose evidence and smoother are known."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm
from scipy.special import expit

from scoreinfer.montecarlo.feynman_kac import AbstractFeynmanKac, run, trace_back
from scoreinfer.montecarlo.population import ALWAYS
from scoreinfer.montecarlo.resampling import multinomial, systematic

FIRST_SD, DECAY, NOISE, OBSERVED_SD = 1.2, 0.8, 0.7, 0.6
Y = jnp.array([0.9, -0.8, 1.9, 0.4, -1.3])
STEPS, SIGMAS = len(Y) - 1, 5


def exact():
    """Mean and covariance of the states given the observations, and the log evidence, by the joint Gaussian."""
    prior = np.zeros((STEPS + 1, STEPS + 1))
    variance = FIRST_SD**2
    for k in range(STEPS + 1):
        prior[k, k:] = prior[k:, k] = variance * DECAY ** np.arange(STEPS + 1 - k)
        variance = DECAY**2 * variance + NOISE**2
    total, y = prior + OBSERVED_SD**2 * np.eye(STEPS + 1), np.asarray(Y, np.float64)
    gain = np.linalg.solve(total, prior).T
    log_evidence = -0.5 * (y @ np.linalg.solve(total, y) + np.linalg.slogdet(2 * np.pi * total)[1])
    return gain @ y, prior - gain @ prior, log_evidence


class Bootstrap(AbstractFeynmanKac):
    """Draws from the dynamics, weighed by the likelihood."""

    num_steps: int = STEPS

    def initial(self, key):
        return FIRST_SD * jax.random.normal(key)

    def log_initial(self, first):
        return norm.logpdf(Y[0], first, OBSERVED_SD)

    def propagate(self, key, k, old):
        return DECAY * old + NOISE * jax.random.normal(key)

    def log_potential(self, k, old, new):
        return norm.logpdf(Y[k], new, OBSERVED_SD)


class Drawn(NamedTuple):
    """A state, and the log density that it was drawn with."""

    x: Any
    log_q: Any


class Guided(AbstractFeynmanKac):
    """Draws from a poor guess, whose own density is in the weights."""

    num_steps: int = STEPS

    def initial(self, key):
        return self.at(FIRST_SD * jax.random.normal(key), 0.0, FIRST_SD)

    def log_initial(self, first):
        return norm.logpdf(first.x, 0.0, FIRST_SD) + norm.logpdf(Y[0], first.x, OBSERVED_SD) - first.log_q

    def propagate(self, key, k, old):
        mean = self.mean(k, old.x)
        return self.at(mean + jax.random.normal(key), mean, 1.0)

    def log_potential(self, k, old, new):
        return norm.logpdf(new.x, DECAY * old.x, NOISE) + norm.logpdf(Y[k], new.x, OBSERVED_SD) - new.log_q

    def mean(self, k, x):
        return 0.4 * x + 0.3 * Y[k] + 0.1

    def at(self, x, mean, sd):
        return Drawn(x, norm.logpdf(x, mean, sd))

    def states_of(self, path):
        """States of a given path."""
        mean, k = self.mean(jnp.arange(1, STEPS + 1), path[:-1]), jnp.arange(STEPS + 1)
        return self.at(path, jnp.append(0.0, mean), jnp.where(k == 0, FIRST_SD, 1.0))


def reference_of(model, path):
    return model.states_of(path) if isinstance(model, Guided) else path


def positions(states):
    return states.x if isinstance(states, Drawn) else states


CASES = [(multinomial, 0.5), (systematic, 0.5), (multinomial, ALWAYS), (systematic, ALWAYS), (multinomial, 0.0)]


@pytest.mark.parametrize("model", [Bootstrap(), Guided()], ids=["bootstrap", "guided"])
@pytest.mark.parametrize(("scheme", "least_share"), CASES)
def test_evidence_is_unbiased(model, scheme, least_share):
    """With few particles, whose bias would show; and weighted averages with it."""
    mean, _, log_evidence = exact()

    @jax.jit
    @jax.vmap
    def many(key):
        found = run(key, model, 8, scheme=scheme, least_share=least_share)
        path = positions(trace_back(found))
        return found.last.log_evidence, jax.nn.softmax(found.last.log_weight) @ path

    logs, paths = many(jax.random.split(jax.random.key(0), 20_000))
    ratio = np.exp(np.asarray(logs, np.float64) - log_evidence)
    for values, truth in ((ratio, 1.0), (ratio[:, None] * paths, mean)):
        error = values.std(0) / np.sqrt(len(values))
        assert np.all(np.abs(values.mean(0) - truth) < SIGMAS * error), (values.mean(0), truth, error)
        assert error.max() < 0.05


@pytest.mark.parametrize("model", [Bootstrap(), Guided()], ids=["bootstrap", "guided"])
@pytest.mark.parametrize("least_share", [0.5, ALWAYS])
def test_runs_around_a_path_are_gibbs_steps(model, least_share):
    """Exact paths stay exact through several sweeps of few particles; the law of Z is Z / evidence times the free one.

    The latter is tested by a bounded function, r / (1 + r) of r = Z / evidence, as 1 / Z has heavy tails.
    """
    mean, covariance, log_evidence = exact()
    num, num_particles, sweeps = 20_000, 4, 8
    noise = np.random.default_rng(0).standard_normal((num, STEPS + 1))
    start = jnp.asarray(mean + noise @ np.linalg.cholesky(covariance).T, jnp.float32)

    @jax.jit
    @jax.vmap
    def chain(key, path):
        def sweep(path, key):
            for_run, for_pick = jax.random.split(key)
            found = run(for_run, model, num_particles, reference_of(model, path), least_share=least_share)
            pick = jax.random.categorical(for_pick, found.last.log_weight)
            return positions(trace_back(found))[pick], found.last.log_evidence

        return jax.lax.scan(sweep, path, jax.random.split(key, sweeps))

    @jax.jit
    @jax.vmap
    def free(key):
        return run(key, model, num_particles, least_share=least_share).last.log_evidence

    end, logs = chain(jax.random.split(jax.random.key(1), num), start)
    assert (np.asarray(end) != start).mean() > 0.5  # they have moved
    off = np.asarray(end, np.float64) - mean
    products = (off[:, :, None] * off[:, None]).reshape(num, -1)
    around = expit(log_evidence - np.asarray(logs, np.float64))
    alone = expit(np.asarray(free(jax.random.split(jax.random.key(2), num)), np.float64) - log_evidence)
    for values, truth in ((off, 0.0), (products, covariance.ravel()), (around, alone.mean())):
        error = np.hypot(values.std(0), alone.std() if values is around else 0.0) / np.sqrt(num)
        assert np.all(np.abs(values.mean(0) - truth) < SIGMAS * error), (values.mean(0) - truth) / error


class Remembering(Bootstrap):
    """Every state holds all states before it."""

    def initial(self, key):
        return jnp.zeros(STEPS + 1).at[0].set(super().initial(key))

    def log_initial(self, first):
        return super().log_initial(first[0])

    def propagate(self, key, k, old):
        return old.at[k].set(super().propagate(key, k, old[k - 1]))

    def log_potential(self, k, old, new):
        return super().log_potential(k, old[k - 1], new[k])


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("least_share", [0.0, 0.5, ALWAYS])
def test_genealogy_is_what_the_states_remember(least_share, held):
    path = jnp.linspace(0.0, 1.0, STEPS + 1)
    reference = jnp.tril(jnp.broadcast_to(path, (STEPS + 1, STEPS + 1)))
    key = jax.random.key(3)
    found = run(key, Remembering(), 16, reference if held else None, least_share=least_share)
    traced = np.asarray(trace_back(found))
    assert traced.shape == (16, STEPS + 1, STEPS + 1)
    np.testing.assert_array_equal(np.diagonal(traced, axis1=1, axis2=2), found.last.values)
    np.testing.assert_array_equal(found.last.values[:, 0], found.states[0, found.last.ancestors, 0])
    np.testing.assert_array_equal(found.last.values, found.states[-1])
    if least_share > 0:
        assert len(np.unique(found.last.ancestors)) < 16
    else:
        np.testing.assert_array_equal(found.ancestors, np.broadcast_to(np.arange(16), (STEPS, 16)))
    if held:
        np.testing.assert_array_equal(found.last.values[0], path)
        assert not found.ancestors[:, 0].any()


class Impossible(Bootstrap):
    """From the third step on nothing is possible, or the potential fails."""

    potential: float = -jnp.inf

    def log_potential(self, k, old, new):
        return jnp.where(k >= 3, self.potential, super().log_potential(k, old, new))


@pytest.mark.parametrize("potential", [-np.inf, np.nan])
def test_no_evidence_is_zero_and_not_a_failure(potential):
    found = run(jax.random.key(0), Impossible(potential=potential), 8, least_share=ALWAYS)
    assert found.last.log_evidence == -np.inf and np.isfinite(found.states).all()


def test_one_time_needs_no_move():
    found = run(jax.random.key(0), eqx.tree_at(lambda model: model.num_steps, Bootstrap(), 0), 8)
    np.testing.assert_array_equal(trace_back(found)[:, 0], found.last.values)
    mean = jax.nn.logsumexp(norm.logpdf(Y[0], found.last.values, OBSERVED_SD)) - jnp.log(8)
    assert float(found.last.log_evidence) == pytest.approx(float(mean), rel=1e-5)


def test_a_reference_is_resampled_around_by_one_scheme_alone():
    with pytest.raises(ValueError, match="multinomial"):
        run(jax.random.key(0), Bootstrap(), 8, jnp.zeros(STEPS + 1), scheme=systematic)
