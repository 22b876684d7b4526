"""What kernels are conditioned on: unknown parameters of the physics, and observations of earlier states."""

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

import scoreinfer as si
from modes import UnknownRate, moments_off, ornstein_uhlenbeck
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence
from scoreinfer.paths.particles import ResampledPaths
from scoreinfer.samplers.batches import draw_rows, weigh_rows

MODES = ornstein_uhlenbeck()
TIMES = [0, 3, 6, 8]
RATE = UnknownRate(ornstein_uhlenbeck(6)._replace(rates=np.ones(1), start_sd=np.ones(1)), (0, 2, 4, 6))
SMALL = {"width": 16, "depth": 1, "progress_bar": False}
NUM = 500
SEEN = np.array([[1.2], [0.3], [0.6], [-0.2]], np.float32)


def check(draws, truth, min_share):
    """Hold parameters, evidence and paths against the grid over the rate."""
    centre, sd, log_evidence, mean, covariance = truth
    found = draws.certificate
    assert found.certified and found.ess > min_share * found.num, found
    assert abs(found.log_evidence - log_evidence) < 5 * found.log_evidence_se + 1e-3
    weight = np.exp(np.asarray(draws.log_weight, np.float64))
    weight /= weight.sum()
    z = (np.log(np.asarray(draws.sites["rate"], np.float64)) - centre) / sd
    assert abs(weight @ z) < 5 / found.ess**0.5
    assert abs(weight @ z**2 - 1) < 5 * (weight @ z**4 - 1) ** 0.5 / found.ess**0.5
    assert moments_off(draws.sites["x"], draws.log_weight, mean, covariance) < 5.5


@pytest.fixture(scope="module")
def unknown_rate():
    return si.SMDP(RATE.model, "x", num_steps=100, **SMALL).fit(jax.random.key(0))


def test_unknown_rate_seen_at_several_times(unknown_rate):
    """Rate and path jointly, against a grid over the rate with the smoother for each."""
    draws = unknown_rate.sample(jax.random.key(1), 4000, y=SEEN)
    assert draws.sites["rate"].shape == (4000,) and draws.sites["x"].shape == (4000, 7, 1)
    check(draws, RATE.truth(SEEN), 0.3)


def test_drawn_paths_have_the_density_they_were_drawn_by(unknown_rate):
    """Of the start and of every kernel, for given paths as for drawn ones, and as the only particle of a run."""
    proposal = unknown_rate.proposal
    target = unknown_rate.condition(y=SEEN).target
    context = proposal.context(target)
    z, drawn = jax.jit(jax.vmap(lambda key: proposal.propose(key, context)))(jax.random.split(jax.random.key(3), 16))
    for by in (proposal, ResampledPaths(proposal, 1)):
        weighed = weigh_rows(jax.random.key(4), by, target, jnp.arange(16), z)
        np.testing.assert_allclose(weighed.log_q, drawn, atol=0.02)


def broadened(posterior, factor):
    """Kernels too broad, so that weights of single paths are poor."""
    where = lambda tree: tree.paths.backward.frame.factor  # noqa: E731
    return eqx.tree_at(where, posterior, factor * where(posterior))


def randomised(posterior, key):
    """Kernels off at random, and so the moments of states that bridging densities are made of."""

    def where(tree):
        kernels = tree.paths.backward
        before, after = kernels.frame.before, kernels.frame.after
        return kernels.network, before.centre, before.lean, after.centre, after.lean

    arrays, rest = eqx.partition(where(posterior), eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(arrays)
    moved = eqx.combine(unravel(flat + 0.1 * jax.random.normal(key, flat.shape)), rest)
    return eqx.tree_at(where, posterior, moved)


@pytest.mark.slow
def test_resampled_paths_with_an_unknown_rate(unknown_rate):
    """Every particle with a rate of its own; resampling repairs what broad kernels spoil."""
    spoilt = broadened(unknown_rate, 2.0)
    plain = draw_rows(jax.random.key(1), spoilt.paths, spoilt.condition(y=SEEN).target, jnp.arange(NUM))
    draws = spoilt.resampled(8).sample(jax.random.key(1), NUM, y=SEEN)
    assert effective_sample_size(plain.log_weight) < 0.1 * NUM
    check(draws, RATE.truth(SEEN), 0.5)
    assert unknown_rate.resampled(8).sample(jax.random.key(1), NUM, y=SEEN).certificate.ess > 0.95 * NUM


@pytest.mark.slow
def test_resampled_weights_are_unbiased_whatever_was_learned(unknown_rate):
    draws = randomised(unknown_rate, jax.random.key(5)).resampled(8).sample(jax.random.key(1), NUM, y=SEEN)
    check(draws, RATE.truth(SEEN), 0.1)


def test_conditional_runs_with_an_unknown_rate(unknown_rate):
    """Around rates and paths of the posterior 1 / Z averages to one over the evidence, as it must for a Gibbs step."""
    proposal = ResampledPaths(broadened(unknown_rate, 2.0).paths, 8)
    values = jnp.asarray(RATE.draws(np.random.default_rng(0), SEEN, NUM), jnp.float32)
    target = unknown_rate.condition(y=SEEN).target
    weighed = weigh_rows(jax.random.key(2), proposal, target, jnp.arange(NUM), values)
    inverse, error = log_evidence(-np.asarray(weighed.log_weight))
    assert error < 0.1
    assert abs(inverse + RATE.truth(SEEN)[2]) < 5 * error


@pytest.mark.slow
def test_every_particle_has_the_physics_of_its_own_level():
    """A level far less certain than the path around it, which one level's physics would lead astray."""
    ts, times, decay = np.linspace(0.0, 2.0, 21), np.array([0, 5, 10, 15, 20]), np.exp(-0.1)

    def model(y=None):
        level = numpyro.sample("level", dist.Normal(0.0, 3.0))
        start = dist.Normal(jnp.zeros(1), 1.0).to_event(1)
        step = lambda t0, t1, x: level + decay * (x - level)  # noqa: E731
        x = numpyro.sample("x", si.PhysicsPath(step, 0.2, ts, start))
        numpyro.sample("y", dist.Normal(x[times], 0.15).to_event(2), obs=y)

    share = 1 - decay ** np.arange(21)
    covariance = MODES._joint(np.full(20, decay), np.full(20, 0.2), 1.0) + 9 * np.outer(share, share)
    within = covariance[np.ix_(times, times)] + 0.15**2 * np.eye(5)
    y = np.linspace(0.5, 2.0, 5)
    log_evidence = -0.5 * (y @ np.linalg.solve(within, y) + np.linalg.slogdet(2 * np.pi * within)[1])
    gain = np.linalg.solve(within, 9 * share[times])
    mean, variance = y @ gain, 9 - 9 * share[times] @ gain

    posterior = si.SMDP(model, "x", num_steps=100, **SMALL).fit(jax.random.key(0))
    draws = posterior.resampled(8).sample(jax.random.key(1), 1000, y=y[:, None].astype(np.float32))
    found, weight = draws.certificate, np.exp(np.asarray(draws.log_weight) - np.max(draws.log_weight))
    assert found.ess > 0.85 * 1000
    assert abs(found.log_evidence - log_evidence) < 5 * found.log_evidence_se
    z = (np.asarray(draws.sites["level"]) - mean) / variance**0.5
    assert abs(np.average(z, weights=weight)) < 5 / found.ess**0.5


@pytest.mark.slow
def test_poor_weights_of_rates_and_paths_are_resampled(unknown_rate):
    draws = broadened(unknown_rate, 2.6).sample(jax.random.key(1), 1000, y=SEEN)
    assert draws.info.num_particles == 32
    check(draws, RATE.truth(SEEN), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("num_particles", [1, 8])
def test_kernel_moves_rate_and_path(unknown_rate, num_particles):
    """With particles by particle independent Metropolis, and conditional runs around what local moves have changed."""
    kernel = si.ScoreSDE(posterior=unknown_rate.resampled(num_particles), num_local_steps=1)
    mcmc = MCMC(kernel, num_warmup=50, num_samples=1000, num_chains=4, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(2), y=SEEN, extra_fields=("accept_prob",))
    assert mcmc.get_extra_fields()["accept_prob"].mean() > 0.5
    centre, sd, _, mean, covariance = RATE.truth(SEEN)
    z = (np.log(np.asarray(mcmc.get_samples()["rate"])) - centre) / sd
    wasted = 0.3**-0.5  # chains that move one time in three have a third of their draws' worth
    assert abs(z.mean()) < 5 * wasted / 4000**0.5
    assert moments_off(mcmc.get_samples()["x"], np.zeros(4000), mean, covariance) < 5.5 * wasted


@pytest.mark.slow
def test_unknown_rate_seen_at_a_noisy_end():
    """The kernels start from the observation itself, and the start draws the rate alone."""
    rate = RATE._replace(times=(6,))
    posterior = si.SMDP(rate.model, "x", num_steps=200, **SMALL).fit(jax.random.key(0))
    y = np.array([0.8], np.float32)
    assert posterior.paths.start.adjustment.mean.shape == (1,)
    check(posterior.sample(jax.random.key(1), 4000, y=y), rate.truth(y), 0.3)
    check(posterior.resampled(4).sample(jax.random.key(2), NUM, y=y), rate.truth(y), 0.3)
    with pytest.raises(ValueError, match="fit the model without its observed sites"):
        posterior.condition_on_end(y).sample(jax.random.key(1), 10)
    with pytest.raises(ValueError, match="need a model without unknown parameters"):
        si.SMDP(rate.model, "x", trajectories=np.zeros((9, 7, 1))).fit(jax.random.key(0))


@pytest.mark.slow
def test_unknown_rate_and_a_known_end():
    """An end without noise, of a model that observes nothing."""
    rate = RATE._replace(times=(6,), modes=RATE.modes._replace(noise=1e-4))
    posterior = si.SMDP(rate.path_model, "x", num_steps=200, **SMALL).fit(jax.random.key(0))
    end = np.array([0.8], np.float32)
    centre, sd, log_evidence, mean, covariance = rate.truth(end)
    truth = centre, sd, log_evidence, mean[:-1], covariance[:, :-1, :-1]
    for num_particles, num in ((1, 4000), (4, NUM)):
        draws = posterior.resampled(num_particles).condition_on_end(end).sample(jax.random.key(1), num)
        check(draws._replace(sites=draws.sites | {"x": draws.sites["x"][:, :-1]}), truth, 0.3)
    with pytest.raises(ValueError, match="need the parameters' values"):
        posterior.reverse_sde(jax.random.key(0), end)


def several_times(y=None):
    x = numpyro.sample("x", MODES.path())
    numpyro.sample("y", dist.Normal(x[jnp.array(TIMES)], MODES.noise).to_event(2), obs=y)


@pytest.mark.slow
def test_states_seen_at_several_times_give_the_smoother():
    """Kernels conditioned on the observation; linear physics, so regression alone is the answer."""
    posterior = si.SMDP(several_times, "x", num_steps=0, **SMALL).fit(jax.random.key(0))
    y = np.array([[1.4, -0.3], [0.2, 0.5], [0.1, -0.6], [-0.9, 0.4]], np.float32)
    draws = posterior.sample(jax.random.key(1), 4000, y=y)
    mean, covariance, log_evidence = MODES.smoother_of(TIMES, y)
    found = draws.certificate
    assert found.certified and found.ess > 0.8 * 4000, found
    assert abs(found.log_evidence - log_evidence) < 5 * found.log_evidence_se
    assert moments_off(draws.sites["x"], draws.log_weight, mean, covariance) < 5.5
    broad = broadened(posterior, 1.6)
    assert effective_sample_size(broad.resampled(1).sample(jax.random.key(1), NUM, y=y).log_weight) < 0.1 * NUM
    resampled = broad.resampled(16).sample(jax.random.key(1), NUM, y=y)
    assert resampled.certificate.ess > 0.5 * NUM
    assert abs(resampled.certificate.log_evidence - log_evidence) < 5 * resampled.certificate.log_evidence_se
    assert moments_off(resampled.sites["x"], resampled.log_weight, mean, covariance) < 5.5
    with pytest.raises(ValueError, match="parameters or earlier states"):
        posterior.condition_on_end(y[-1]).sample(jax.random.key(1), 10)
