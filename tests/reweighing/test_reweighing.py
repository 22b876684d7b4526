"""Reweighing, bridging and power scaling, on Gaussian posteriors whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from scoreinfer.montecarlo.weights import effective_sample_size, relative_weights
from scoreinfer.reweighing.power_scaling import cumulative_distance

SIGMAS = 5.0
NUM = 20_000


def normal(mean, scale, dim=5):
    """A prior without data: the posterior itself."""
    numpyro.sample("a", dist.Normal(mean, scale).expand([dim]).to_event(1))


def location(prior_scale, y=None):
    """Rows with unit noise around one location."""
    a = numpyro.sample("a", dist.Normal(0.0, prior_scale))
    numpyro.sample("y", dist.Normal(a, 1.0).expand([len(y)]).to_event(1), obs=y)


def exact_draws(model, centre, width, num=NUM, key=jax.random.key(0), **data):
    """Exact draws of a Gaussian posterior in the sites' own shape, with equal weights of the exact evidence."""
    problem = si.from_numpyro(model, **data)
    y = problem.read((), data)
    z = centre + width * jax.random.normal(key, (num, problem.dim))
    log_joint = jax.jit(jax.vmap(lambda z: problem.log_joint(z, y)))(z)
    log_q = jax.scipy.stats.norm.logpdf(z, centre, width).sum(1)
    sites = jax.vmap(problem.latent_sites)(z)
    return si.Draws(sites, z, log_joint - log_q, log_q, log_joint, y, problem=problem)


def weighted_moments(draws):
    weight = relative_weights(draws.log_weight)
    weight = weight / weight.sum()
    z = np.asarray(draws.unconstrained, np.float64)
    mean = weight @ z
    return mean, np.sqrt(weight @ (z - mean) ** 2), np.sqrt((weight**2) @ (z - mean) ** 2)


@pytest.mark.parametrize(("delta", "ratio"), [(0.5, 1.0), (0.3, 0.7), (0.2, 1.3)])
def test_effective_share_is_that_of_the_closed_form(delta, ratio):
    """From N(0, 1) to N(delta, r): ESS/N = sqrt(r (2 - r)) exp(-delta^2 / (2 - r)) in every dimension."""
    draws = exact_draws(normal, 0.0, 1.0, mean=0.0, scale=1.0)
    new = si.reweigh(jax.random.key(1), draws, normal, delta, np.sqrt(ratio))
    share = (np.sqrt(ratio * (2 - ratio)) * np.exp(-(delta**2) / (2 - ratio))) ** 5
    assert abs(effective_sample_size(new.log_weight) / NUM / share - 1.0) < 0.1
    mean, _, error = weighted_moments(new)
    assert np.all(np.abs(mean - delta) < SIGMAS * error)
    assert new.certificate.certified, new.certificate
    assert abs(new.certificate.log_evidence) < SIGMAS * new.certificate.log_evidence_se  # both are normalised


def test_far_change_is_refused_and_bridged():
    """Two standard deviations in each of five dimensions: an effective share of e^-20."""
    draws = exact_draws(normal, 0.0, 1.0, num=4000, mean=0.0, scale=1.0)
    refused = si.reweigh(jax.random.key(1), draws, normal, 2.0, 0.5)
    assert not refused.certificate.certified
    bridged = si.bridge(jax.random.key(2), draws, normal, 2.0, 0.5)
    assert bridged.certificate.certified, bridged.certificate
    assert bridged.info.witnessed == 0.0, "the particles should arrive, without help from witnesses"
    mean, deviation, error = weighted_moments(bridged)
    assert np.all(np.abs(mean - 2.0) < SIGMAS * error)
    assert np.all(np.abs(deviation / 0.5 - 1.0) < 0.05)
    assert abs(bridged.certificate.log_evidence) < SIGMAS * bridged.certificate.log_evidence_se


def test_infinite_variance_is_refused():
    """From N(0, 1) to a normal of three times the variance: weights have no variance, and k-hat says so."""
    draws = exact_draws(normal, 0.0, 1.0, mean=0.0, scale=1.0)
    new = si.reweigh(jax.random.key(1), draws, normal, 0.0, np.sqrt(3.0))
    assert not new.certificate.certified and "k-hat" in new.certificate.reason


def test_rows_may_be_added_and_the_evidence_follows():
    """The posterior of five rows from that of four, with another prior; both evidences are known."""
    y = jnp.array([0.4, -0.2, 1.1, 0.3, 0.6])

    def exact(scale, y):
        precision = 1 / scale**2 + len(y)
        covariance = np.eye(len(y)) + scale**2
        log_evidence = jax.scipy.stats.multivariate_normal.logpdf(y, jnp.zeros(len(y)), jnp.asarray(covariance))
        return float(y.sum() / precision), precision**-0.5, float(log_evidence)

    mean, scale, _ = exact(1.0, y[:4])
    draws = exact_draws(location, mean, scale, prior_scale=1.0, y=y[:4])
    new = si.reweigh(jax.random.key(1), draws, location, 2.0, y=y)
    mean, _, log_evidence = exact(2.0, y)
    found, _, error = weighted_moments(new)
    assert abs(found[0] - mean) < SIGMAS * error[0]
    assert abs(new.certificate.log_evidence - log_evidence) < SIGMAS * new.certificate.log_evidence_se + 1e-5
    assert np.array_equal(new.observed["y"], y) and new.certificate.certified


def test_mode_that_the_old_posterior_lacks_is_seen():
    """The new prior has half of its mass where no old draw is: the weights are even, the witnesses are not."""

    def two(y=None):
        numpyro.sample("a", dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.5, 0.5])), dist.Normal(jnp.array([0.0, 30.0]), 1.0)
        ).expand([1]).to_event(1))  # fmt: skip

    draws = exact_draws(normal, 0.0, 1.0, num=4000, mean=0.0, scale=1.0, dim=1)
    new = si.reweigh(jax.random.key(1), draws, two)
    assert effective_sample_size(new.log_weight) > 3999
    assert not new.certificate.certified and new.certificate.missed > 0.4


def test_what_cannot_be_reweighed_is_refused():
    draws = exact_draws(normal, 0.0, 1.0, num=100, mean=0.0, scale=1.0)

    def positive():
        numpyro.sample("a", dist.HalfNormal(1.0).expand([5]).to_event(1))

    with pytest.raises(ValueError, match="these differ: a"):
        si.reweigh(jax.random.key(0), draws, positive)
    with pytest.raises(ValueError, match="these differ: a"):
        si.bridge(jax.random.key(0), draws, normal, 0.0, 1.0, dim=4)
    with pytest.raises(ValueError, match="hold no problem"):
        si.reweigh(jax.random.key(0), draws._replace(problem=None), normal, 0.0, 1.0)
    with pytest.raises(ValueError, match="without weights"):
        si.reweigh(jax.random.key(0), draws._replace(log_weight=None), normal, 0.0, 1.0)
    with pytest.raises(ValueError, match="`power`"):
        si.sensitivity(draws, power=1.0)


def test_sensitivity_is_that_of_scaled_gaussians():
    """Prior N(0, 1) and n rows of unit noise: raised to a power a, the posterior is Gaussian again."""
    y = jnp.array([2.5, 3.5])
    draws = exact_draws(location, 2.0, 3**-0.5, prior_scale=1.0, y=y)
    found = si.sensitivity(draws)
    x = np.linspace(*np.quantile(draws.sites["a"], [0.0, 1.0]), 20_001)  # the distance depends on the range

    def weights(power_of_prior, power_of_data):
        precision = power_of_prior + 2 * power_of_data
        density = np.exp(-0.5 * precision * (x - 6 * power_of_data / precision) ** 2)
        return density / density.sum()

    base, log2 = weights(1, 1), np.log2(1.01)
    for name, pairs in (("prior", [(1.01, 1), (1 / 1.01, 1)]), ("likelihood", [(1, 1.01), (1, 1 / 1.01)])):
        exact = sum(cumulative_distance(x, base, weights(*pair)) for pair in pairs) / (2 * log2)
        assert abs(float(getattr(found, name)["a"]) / exact - 1.0) < 0.05
    assert "prior and data may conflict" in str(found)


def test_arviz_computes_the_same_sensitivity():
    az = pytest.importorskip("arviz_stats", reason="ArviZ 1.x")
    y = jnp.array([2.5, 3.5])
    draws = exact_draws(location, 2.0, 3**-0.5, num=4000, prior_scale=1.0, y=y)
    ours = si.sensitivity(draws)
    data = si.to_arviz(jax.random.key(0), draws, log_prior=True, log_likelihood=True)
    for name in ("prior", "likelihood"):
        theirs = az.psense(data, group=name, alphas=(1 / 1.01, 1.01))
        assert abs(float(theirs["a"]) / float(getattr(ours, name)["a"]) - 1.0) < 0.1
