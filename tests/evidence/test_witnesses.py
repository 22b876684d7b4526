"""Witnesses: draws near a posterior that owe nothing to a proposal, and what is fitted to those that it misses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import scoreinfer as si
from doubles import GaussianProposal
from modes import ornstein_uhlenbeck
from oracles import disagreement, linear_gaussian, skewed
from scoreinfer.evidence.certificate import ForwardCheck, certify_weights
from scoreinfer.evidence.witnesses import gather, judge, repair, shift_of_means
from scoreinfer.montecarlo.kernel_estimate import kernel_estimate
from scoreinfer.montecarlo.moves import DifferenceMoves
from scoreinfer.montecarlo.reference import Prior
from scoreinfer.paths import Frame, Moments
from scoreinfer.paths.build import read_reversal, samplers, untrained_kernels
from scoreinfer.paths.proposal import END_STATE, KnownEnd, pinned
from scoreinfer.process import Physics
from scoreinfer.samplers.base import Target, Weighted
from scoreinfer.samplers.batches import weighted_draws
from scoreinfer.training.simulations import Standardiser

SIGMAS = 5.0


def witnesses_of(model, data, key=jax.random.key(0)):
    problem = si.from_numpyro(model, **data)
    target = jax.tree_util.Partial(problem.log_joint, y=problem.read((), data))
    return problem, gather(key, Prior(problem), target)


@pytest.mark.parametrize("oracle", [skewed(), linear_gaussian(10)], ids=["direct", "tempered"])
def test_witnesses_are_draws_of_the_posterior(oracle):
    problem, found = witnesses_of(oracle.model, oracle.data)
    truth = oracle.truth(oracle.data)
    theta = oracle.flat(jax.vmap(problem.latent_sites)(found.values))
    assert found.num_informative > 60 and found.num_first == 65_536
    assert disagreement(truth, theta, ess=min(found.num_informative, len(theta))) < SIGMAS
    assert abs(found.log_evidence - truth.log_evidence) < SIGMAS / np.sqrt(found.num_informative)


def cornered(y=None):
    """A normal parameter; beyond 3.09, a thousandth of the prior, data come as from -2.8."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(jnp.where(a > stats.norm.isf(1e-3), -2.8, a), 0.05), obs=y)


def test_mode_in_a_corner_of_the_prior_is_seen():
    _, found = witnesses_of(cornered, {"y": -2.8})
    inside = 1e-3 * stats.norm.pdf(0.0, scale=0.05)
    share = inside / (inside + stats.norm.pdf(2.8, scale=np.hypot(1.0, 0.05)))
    assert 0.4 < share < 0.6
    seen = float(np.mean(found.values > 3.0))
    assert abs(seen - share) < SIGMAS * np.sqrt(share * (1 - share) / found.num_informative)


def test_nothing_informative_is_said_to_be():
    """Data that no draw of the prior explains at all, as a bounded likelihood has them."""

    def model(y=None):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Uniform(a - 1e-3, a + 1e-3), obs=y)

    problem = si.from_numpyro(model)
    target = jax.tree_util.Partial(problem.log_joint, y={"y": jnp.asarray(40.0)})
    found = gather(jax.random.key(0), Prior(problem), target)
    assert found.num_informative == 0.0 and found.log_evidence == -np.inf and len(found.values) == 0


def test_moves_leave_the_density_invariant():
    """From exact draws of a skewed density, at a power between the two: moments stay."""
    power, num = 0.4, 4000

    def model(y=None):
        a = numpyro.sample("a", dist.Exponential(1.0))
        numpyro.sample("y", dist.Poisson(a), obs=y)

    problem = si.from_numpyro(model, y=3)
    target = jax.tree_util.Partial(problem.log_joint, y={"y": jnp.asarray(3)})
    exact = stats.gamma(1 + 3 * power, scale=1 / (1 + power))
    start = np.log(exact.rvs(size=(num, 1), random_state=0))
    moves = DifferenceMoves(Prior(problem), target, jnp.asarray(20))
    start = jnp.asarray(start, jnp.float32)
    moved, seen, _ = moves.move(jax.random.key(1), jnp.asarray(power), start, moves.see(start), jnp.arange(num), None)
    log_ratio = seen.log_ratio
    assert np.mean(np.asarray(moved) != start) > 0.9
    assert stats.kstest(np.exp(np.asarray(moved)[:, 0], dtype=float), exact.cdf).pvalue > 1e-4
    log_likelihood = jax.vmap(lambda z: problem.log_likelihood(z, {"y": jnp.asarray(3)}))(moved)
    assert np.allclose(log_ratio, log_likelihood, atol=1e-4)


def test_kernel_estimate_is_normalised_and_draws_what_it_says():
    """Two clusters in a plane: the mean of f / density over its draws is one, for any density f; and so for one row."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=(200, 2)), rng.normal(size=(100, 2)) * [0.1, 2.0] + [8.0, 0.0]])
    density = kernel_estimate(values)
    drawn = jax.vmap(density.sample)(jax.random.split(jax.random.key(0), 20_000))
    log_density = np.asarray(jax.vmap(density.log_density)(drawn), np.float64)
    for centre, scale in (([0.0, 0.0], [1.0, 1.0]), ([8.0, 0.0], [0.1, 2.0])):
        ratio = np.exp(stats.norm.logpdf(drawn, centre, scale).sum(1) - log_density)
        assert abs(ratio.mean() - 1.0) < SIGMAS * ratio.std() / np.sqrt(len(ratio)) < 0.2
    assert np.all(np.isfinite(kernel_estimate(values[:1]).log_density(jnp.zeros(2))))


def test_repair_is_fitted_to_what_is_missed():
    values = jnp.concatenate([jnp.zeros((300, 2)), 9.0 + jax.random.normal(jax.random.key(0), (100, 2))])
    excess = jnp.where(jnp.arange(400) < 300, 0.0, 8.0)
    mending = repair(np.asarray(values), excess)
    assert mending.share == 0.25 and np.allclose(np.mean(mending.density.centres, 0), 9.0, atol=0.5)
    assert repair(np.asarray(values), jnp.zeros(400)) is None


def two_modes():
    """One normal mode, and one of 1.2 % at a distance of 20 standard deviations; no data."""
    shares = dist.Categorical(jnp.array([1 - RARE, RARE]))
    numpyro.sample("a", dist.MixtureSameFamily(shares, dist.Normal(jnp.array([0.0, 20.0]), 1.0)))


RARE = 0.012


def test_rare_mode_is_mended_or_refused():
    """The weights of a proposal that never draws the second mode are perfect; its mean is 7 standard errors off."""
    problem = si.from_numpyro(two_modes)
    target, proposal = Target(problem, {}), GaussianProposal(jnp.zeros(1), jnp.ones(1), problem)
    drawn = weighted_draws(jax.random.key(1), proposal, target, 1024, None, 0, 4000)
    assert certify_weights(drawn.log_weight).certified
    witnesses = gather(jax.random.key(2), Prior(problem), target)

    def again(defence):
        return weighted_draws(jax.random.key(3), proposal, target, 1024, defence, 0, 4000)

    refused = judge(jax.random.key(4), proposal, target, drawn, witnesses, None, None)
    assert not refused.certificate.certified
    assert "a mean would shift by" in refused.certificate.reason
    mended = judge(jax.random.key(4), proposal, target, drawn, witnesses, None, again)
    assert mended.certificate.certified and mended.witnessed == 0.1
    weight = np.exp(np.asarray(mended.drawn.log_weight, np.float64))
    weight, far = weight / weight.sum(), np.asarray(mended.drawn.z)[:, 0] > 10.0
    assert abs(weight[far].sum() - RARE) < SIGMAS * np.sqrt(np.sum(weight**2 * (far - RARE) ** 2)) < 0.005


def test_shift_of_means_is_what_missed_points_would_do():
    """One point in a hundred, eight standard deviations away, among 4000 draws with equal weights."""
    rng = np.random.default_rng(0)
    values = np.where(np.arange(1000) < 10, 8.0, rng.normal(size=1000))[:, None].astype(np.float32)
    drawn = Weighted(jnp.asarray(rng.normal(size=(4000, 1)), jnp.float32), jnp.zeros(4000), jnp.zeros(4000))
    log_excess = np.where(np.arange(1000) < 10, 30.0, 0.0)
    shift = shift_of_means(drawn, values, log_excess)
    assert abs(shift - 0.01 * 8.0 / values.std() * np.sqrt(4000)) < 0.1
    assert shift_of_means(drawn, values, np.zeros(1000)) == 0.0
    assert "shift" in certify_weights(np.zeros(4000), ForwardCheck(log_excess, shift=shift)).reason


def test_known_end_is_normalised():
    """Simulated paths, put to the end: the mean weight is the density of the process there."""
    modes = ornstein_uhlenbeck()
    end = jnp.array([0.4, -0.3])
    reversal = read_reversal(Physics("x"), modes.path_model)
    rows = jnp.zeros(reversal.physics.scale.shape)
    frame = Frame(rows, rows + 1, rows, rows, rows + 1, None, Moments(rows, rows + 1, None, None), None)
    backward = untrained_kernels(jax.random.key(0), reversal.physics, frame, jnp.zeros(0), None, 4, 1)
    paths = samplers(reversal, backward, Standardiser({}, {}), None).paths
    target = Target(pinned(reversal.problem), {END_STATE: end})
    reference = KnownEnd(paths, target)
    z = jax.jit(jax.vmap(reference.sample))(jax.random.split(jax.random.key(1), 20_000))
    log_weight = jax.jit(jax.vmap(lambda z: target(z) - reference.log_density(z)))(z)
    weight = np.exp(np.asarray(log_weight, np.float64) - modes.smoother(np.asarray(end), noise_stage=False)[2])
    assert np.allclose(np.asarray(z).reshape(len(z), -1, 2)[:, -1], end)
    assert abs(weight.mean() - 1.0) < SIGMAS * weight.std() / np.sqrt(len(weight)) < 0.1
