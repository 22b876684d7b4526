"""Corrections: weights, resampling, Langevin moves and the verdict, on known log densities."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from scoreinfer.evidence.certificate import ForwardCheck, certify_weights
from scoreinfer.montecarlo.langevin import metropolis_langevin_step, rejuvenate
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence, pareto_smooth

NUM = 20_000


def shifted_normal(num=NUM, shift=0.8, seed=0):
    """Draws of N(0, 1.3^2) weighted to N(shift, 1), with evidence e^2."""
    x = np.random.default_rng(seed).normal(0.0, 1.3, num)
    return x, 2.0 + stats.norm.logpdf(x, shift) - stats.norm.logpdf(x, 0.0, 1.3)


def test_weights_give_evidence_and_moments():
    x, log_weight = shifted_normal()
    value, error = log_evidence(log_weight)
    assert abs(value - 2.0) < 5 * error
    smooth, k_hat = pareto_smooth(log_weight)
    ess = effective_sample_size(log_weight)
    assert k_hat < 0.5
    assert np.isclose(np.exp(smooth).sum(), 1.0)
    assert abs(np.exp(smooth) @ x - 0.8) < 5 / np.sqrt(ess)


def test_pareto_shape_tells_the_heavy_tail_from_the_light_one():
    """Weights (1 - u)^-k have tail shape exactly k, in either generation of ArviZ."""
    u = np.random.default_rng(0).uniform(size=NUM)
    for shape in (0.3, 0.9):
        assert abs(pareto_smooth(-shape * np.log1p(-u))[1] - shape) < 0.12


def banana(x):
    return -0.5 * x[0] ** 2 / 2.0 - 0.5 * (x[1] - 0.5 * x[0] ** 2) ** 2 / 0.3


def test_langevin_step_leaves_the_density_invariant():
    """Exact draws stay exact after 30 steps of a preconditioned chain with a coarse step."""
    first, second = jax.random.split(jax.random.key(0))
    a = jnp.sqrt(2.0) * jax.random.normal(first, (NUM,))
    start = jnp.stack([a, 0.5 * a**2 + jnp.sqrt(0.3) * jax.random.normal(second, (NUM,))], axis=1)
    factor = jnp.array([[1.2, 0.0], [0.5, 0.8]])
    value_and_grad = jax.value_and_grad(banana)

    @jax.jit
    def run(start):
        def step(states, key):
            keys = jax.random.split(key, NUM)
            states, accept = jax.vmap(
                lambda key, state: metropolis_langevin_step(key, value_and_grad, state, factor, jnp.float32(0.8))
            )(keys, states)
            return states, accept.mean()

        states = (start, *jax.vmap(value_and_grad)(start))
        return jax.lax.scan(step, states, jax.random.split(jax.random.key(3), 30))

    (end, *_), accept = run(start)
    assert 0.2 < float(accept.mean()) < 0.95
    residual = (end[:, 1] - 0.5 * end[:, 0] ** 2) / np.sqrt(0.3)
    for sample in (end[:, 0] / np.sqrt(2.0), residual):
        assert stats.kstest(np.asarray(sample, np.float64), "norm").pvalue > 1e-4


def test_rejuvenation_separates_duplicates_and_stays_on_target():
    x = jax.random.normal(jax.random.key(0), (4000, 2)) * jnp.array([2.0, 1.0]) + jnp.array([0.0, 1.0])
    log_q = jax.vmap(lambda x: -0.5 * (x[0] / 2) ** 2 - 0.5 * (x[1] - 1.0) ** 2)(x)
    log_weight = jax.vmap(banana)(x) - log_q
    values, log_density, moves = rejuvenate(jax.random.key(1), banana, x, log_weight, 4000, 20)
    ess = effective_sample_size(log_weight)
    assert len(np.unique(np.asarray(values), axis=0)) > 3900
    assert abs(float(moves.accept_prob) - 0.574) < 0.1
    assert np.allclose(log_density, jax.vmap(banana)(values), atol=1e-4)
    assert abs(float(values[:, 0].mean())) < 5 * np.sqrt(2.0 / ess)
    assert abs(float(values[:, 1].mean()) - 1.0) < 5 * np.sqrt(0.8 / ess)


def test_certificate_certifies_good_weights_and_says_why_it_refuses_bad_ones():
    _, good = shifted_normal(4000)
    assert certify_weights(good).certified
    _, few = shifted_normal(4000, shift=4.5)
    refused = certify_weights(few)
    assert not refused.certified
    assert "effective sample size" in refused.reason
    heavy = 0.95 * np.random.default_rng(0).exponential(size=NUM)
    assert "k-hat" in certify_weights(heavy).reason
    assert "NaN" in certify_weights(np.where(np.arange(4000) < 10, np.nan, good)).reason
    assert "no density" in certify_weights(None).reason


def test_certificate_believes_forward_evidence_over_perfect_weights():
    """Equal weights, and yet one truth in eight lies where the proposal never goes."""
    log_weight = np.zeros(4000)
    fine = ForwardCheck(jnp.zeros(64), jnp.array(0.5))
    assert certify_weights(log_weight, fine).certified
    missed = certify_weights(log_weight, fine._replace(log_excess=jnp.where(jnp.arange(64) < 8, 60.0, 0.0)))
    assert not missed.certified
    assert missed.missed == 0.125
    assert not certify_weights(
        log_weight, fine._replace(log_excess=jnp.where(jnp.arange(64) < 8, jnp.inf, 0.0))
    ).certified
    silent = certify_weights(log_weight, fine._replace(log_excess=jnp.full(64, jnp.nan)))
    assert not silent.certified and "none of simulated truths" in silent.reason
    few = fine._replace(log_excess=jnp.where(jnp.arange(64) < 60, jnp.nan, jnp.where(jnp.arange(64) < 61, 60.0, 0.0)))
    assert certify_weights(log_weight, few).missed == 0.25
    far = fine._replace(distance_rank=0.0)
    assert "further from the simulations" in certify_weights(log_weight, far).reason
    assert certify_weights(log_weight, far, fine._replace(num_informative=100.0, num_first=60_000)).certified


def test_certificate_states_what_it_can_see():
    """Thirty independent witnesses hit a tenth of the posterior with 95 %, 28 do not."""
    log_weight = np.zeros(4000)
    fine = ForwardCheck(jnp.zeros(64), source="the witnesses", num_first=60_000)
    good = certify_weights(log_weight, fine._replace(num_informative=30.0))
    assert good.certified and abs(good.seen_mass - (1 - 0.05 ** (1 / 30))) < 1e-9
    assert abs(good.seen_prior_mass - 5e-5) < 1e-6
    assert "at least 0.095 of the posterior in regions of at least 5e-05 of the prior" in str(good)
    few = certify_weights(log_weight, fine._replace(num_informative=28.0))
    assert not few.certified and "only 28 independent witnesses" in few.reason
    assert certify_weights(
        log_weight, fine._replace(num_informative=28.0), fine._replace(num_informative=30.0)
    ).certified
    assert "no witnesses were gathered" in str(certify_weights(log_weight))
