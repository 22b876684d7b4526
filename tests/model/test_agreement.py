"""Whether a density describes the simulator: found where it does not, and nowhere else."""

import io

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from doubles import location_scale
from oracles import oracles
from scoreinfer.agreement import misdrawn_data, misdrawn_latents
from scoreinfer.montecarlo.reference import Overdispersed, Prior, reference_of

CENSORED = np.array([0, 0, 1, 0, 1])


def censored(y=None):
    """A conjugate survival model, whose distribution draws uncensored times."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 2.0))
    with numpyro.plate("n", 5):
        numpyro.sample("y", dist.RightCensoredDistribution(dist.Exponential(rate), censored=CENSORED), obs=y)


def powered(y=None):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", 4), numpyro.handlers.scale(scale=0.2):
        numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def masked(y=None):
    """A flat prior, drawn as if it were none."""
    a = numpyro.sample("a", dist.Normal(0.0, 0.5).mask(False))
    numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def moving(y=None):
    """Right, although the support of the data moves with the parameter and the prior has no mean."""
    scale = numpyro.sample("scale", dist.HalfCauchy(1.0))
    numpyro.sample("y", dist.Uniform(0.0, scale), obs=y)


def chained(y=None, count=None):
    """Right: the count's rate depends on the other datum."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    y = numpyro.sample("y", dist.Normal(a, 0.3), obs=y)
    numpyro.sample("count", dist.Poisson(np.e ** (a + y)), obs=count)


@pytest.mark.parametrize(
    ("model", "latents", "observed"),
    [(censored, (), ("y",)), (powered, (), ("y",)), (masked, ("a",), ()), (moving, (), ()), (chained, (), ())],
)
def test_disagreements_are_named(model, latents, observed):
    problem = si.from_numpyro(model)
    assert misdrawn_latents(problem) == latents
    assert misdrawn_data(problem) == observed
    report = si.check(model, file=io.StringIO())
    assert report.ok and any("does not describe" in line for line in report.messages) == bool(latents + observed)


@pytest.mark.parametrize("oracle", oracles()[:7], ids=lambda oracle: oracle.name)
def test_right_models_agree(oracle):
    problem = si.from_numpyro(oracle.model)
    assert misdrawn_latents(problem) + misdrawn_data(problem) == ()


def test_first_draws_come_from_a_density_that_describes_them():
    assert isinstance(reference_of(si.from_numpyro(location_scale)), Prior)
    flat = reference_of(si.from_numpyro(masked))
    assert isinstance(flat, Overdispersed) and abs(float(flat.scale[0]) - 1.0) < 0.1


@pytest.mark.slow
def test_posteriors_follow_the_density_and_calibration_refuses():
    """The flat prior's posterior is N(y, 1), certified; the simulator's parameters are no draws of it."""
    posterior = si.NPSE(masked, num_steps=100, width=16, depth=1, progress_bar=False).fit(jax.random.key(0))
    draws = posterior.sample(jax.random.key(1), 4000, 1.3)
    weight = np.exp(np.asarray(draws.log_weight, float) - np.max(draws.log_weight))
    mean = np.average(draws.sites["a"], weights=weight)
    assert draws.certificate.certified, draws.certificate
    assert abs(mean - 1.3) < 5 / np.sqrt(draws.certificate.ess)
    assert np.isnan(draws.certificate.seen_prior_mass)
    with pytest.raises(si.errors.UnsupportedModel, match="density of a does not describe"):
        si.calibration.sbc(jax.random.key(2), posterior, 50, progress_bar=False)
    with pytest.raises(ValueError, match="density of a does not describe"):
        posterior.condition(1.3).sample(jax.random.key(1), 100, prior_fraction=0.1)
    si.calibration.sbc(jax.random.key(2), posterior, 50, corrected=False, progress_bar=False)
