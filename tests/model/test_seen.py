"""What the data of a model see of one site: the density is NumPyro's own, in the form that says most."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density

from scoreinfer.errors import UnsupportedModel
from scoreinfer.model.seen import read_seen
from scoreinfer.score import DensityLikelihood, GaussianLikelihood, SiteLikelihood

ROWS = jnp.array([[1.0, -0.5], [0.3, 0.8], [0.2, 0.0]])
Y = jnp.array([1.0, 2.0, 0.0])
X = jnp.array([0.3, -0.7])


def observe(make, prior=None):
    """Make a model: x normal in the plane, and data of the given distribution."""

    def model(y=None, mask=True):
        x = numpyro.sample("x", dist.Normal(0.0, 1.5).expand([2]).to_event(1) if prior is None else prior)
        with numpyro.handlers.mask(mask=mask):
            numpyro.sample("y", make(x), obs=y)

    return model


CASES = {
    "linear": (GaussianLikelihood, ROWS @ X, lambda x: dist.Normal(ROWS @ x, 0.5)),
    "linear, one event": (GaussianLikelihood, ROWS @ X, lambda x: dist.Normal(ROWS @ x, 0.5).to_event(1)),
    "non-linear": (GaussianLikelihood, jnp.sin(ROWS @ X), lambda x: dist.Normal(jnp.sin(ROWS @ x), 0.5)),
    "one component each": (SiteLikelihood, X, lambda x: dist.Normal(jnp.arctan(x[jnp.array([0, 1, 0])]), 0.5)),
    "own noise": (SiteLikelihood, X[:1], lambda x: dist.Normal(0.0, jnp.exp(x[0])).expand([3])),
    "counts": (SiteLikelihood, ROWS @ X, lambda x: dist.Poisson(jnp.exp(ROWS @ x))),
    "heavy tails": (SiteLikelihood, ROWS @ X, lambda x: dist.StudentT(3.0, ROWS @ x, 0.5)),
    "two parameters": (DensityLikelihood, X, lambda x: dist.Normal(ROWS @ x, jnp.exp(x[0]))),
    "correlated": (DensityLikelihood, X, lambda x: dist.MultivariateNormal(ROWS @ x, jnp.eye(3) + 0.5)),
}


@pytest.mark.parametrize("name", CASES)
def test_likelihoods_are_numpyros(name):
    kind, predictors, make = CASES[name]
    seen = read_seen("x", observe(make), y=Y)
    assert type(seen.likelihood) is kind
    np.testing.assert_allclose(seen.likelihood.predict(X), predictors, atol=1e-5)
    expected = log_density(observe(make), (), {"y": Y}, {"x": X})[0]
    np.testing.assert_allclose(seen.likelihood.log_density(X) + seen.log_prior(X), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "one component each", "counts", "two parameters"])
def test_masked_entries_are_not_seen(name):
    kind, _, make = CASES[name]
    mask = np.array([True, False, True])
    garbage = Y.at[1].set(1e3)
    seen, other = (read_seen("x", observe(make), y=y, mask=mask).likelihood for y in (Y, garbage))
    assert type(seen) is kind
    np.testing.assert_array_equal(seen.log_density(X), other.log_density(X))


def test_factors_are_likelihoods():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.factor("r", -((x[0] * x[1] - 1.0) ** 2))

    seen = read_seen("x", model)
    assert isinstance(seen.likelihood, DensityLikelihood)
    np.testing.assert_allclose(seen.likelihood.log_density(X), -((X[0] * X[1] - 1.0) ** 2), rtol=1e-6)


def hierarchical(y=None):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, scale), obs=y)


@pytest.mark.parametrize(
    ("site", "model", "data", "error", "words"),
    [
        ("x", observe(lambda x: dist.Normal(jnp.zeros(3), 1.0)), {"y": Y}, ValueError, "see nothing of 'x'"),
        ("x", observe(CASES["linear"][2]), {}, ValueError, "Expected data"),
        ("w", observe(CASES["linear"][2]), {"y": Y}, UnsupportedModel, "no site of this model"),
        ("x", hierarchical, {"y": Y}, UnsupportedModel, "'scale': is unknown beside 'x'"),
        ("x", observe(lambda x: dist.Normal(x, 1.0), dist.HalfNormal(1.0)), {"y": Y}, UnsupportedModel, "real line"),
    ],
)
def test_what_cannot_be_read_is_named(site, model, data, error, words):
    with pytest.raises(error, match=words):
        read_seen(site, model, **data)
