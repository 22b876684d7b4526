"""A foreign simulator whose data have a known likelihood: exact weights, as those of the same model in one piece."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import norm

import scoreinfer as si
from oracles import linear_gaussian
from scoreinfer.simulators.dataset import explained, stored_simulations

QUIET = {"progress_bar": False}
SAMPLER = si.samplers.ReverseSDE(num_steps=16)
SMALL = {"num_steps": 400, "width": 16, "depth": 1, "batch_size": 128, "sampler": SAMPLER, **QUIET}
ORACLE = linear_gaussian(2)
MATRIX = np.array([[1.0, 0.5], [-0.3, 1.0]])
EDGE = 0.7
TRUTH = ORACLE.truth(ORACLE.data)
Y = np.exp(ORACLE.data["y"])
"""Seen on another scale, so that learning and drawing have to agree on how data are encoded."""
LOG_EVIDENCE = TRUTH.log_evidence - ORACLE.data["y"].sum()


def prior():
    numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def physics(parameters, seed):
    return {"field": MATRIX @ parameters["theta"]}


def fragile(parameters, seed):
    if parameters["theta"][0] > EDGE:
        raise OverflowError("blew up")
    return physics(parameters, seed)


def likelihood(parameters, outputs, y=None):
    numpyro.sample("y", dist.LogNormal(outputs["field"], 0.5).to_event(1), obs=y)


def run(simulator, draws, path):
    return si.simulators.simulate(jax.random.key(9), draws, simulator, draws.num, store=path, **QUIET)


@pytest.fixture(scope="module")
def problem():
    return si.from_numpyro(prior)


@pytest.fixture(scope="module")
def store(problem, tmp_path_factory):
    return si.simulators.simulate(
        jax.random.key(0), problem, physics, 1500, store=tmp_path_factory.mktemp("runs"), **QUIET
    )


@pytest.fixture(scope="module")
def posterior(problem, store):
    return si.NPSE(problem, simulations=store, likelihood=likelihood, **SMALL).fit(jax.random.key(1))


@pytest.fixture(scope="module")
def conditioned(posterior):
    return posterior.condition(y=Y)


@pytest.fixture(scope="module")
def draws(conditioned):
    return conditioned.sample(jax.random.key(2), 2000)


def test_weights_are_exact(conditioned, draws, store, tmp_path):
    """Those of the same model in one piece, with the moments and the evidence of the closed form."""
    assert draws.log_weight is None and "not weighed yet" in draws.certificate.reason
    weighed = conditioned.weigh(jax.random.key(3), draws, run(physics, draws, tmp_path), store)

    def model(y=None):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        likelihood(None, {"field": jnp.asarray(MATRIX, jnp.float32) @ theta}, y)

    whole = si.from_numpyro(model, y=Y)
    expected = jax.vmap(lambda z: whole.log_joint(z, draws.observed))(draws.unconstrained)
    assert np.allclose(weighed.log_joint, expected, atol=1e-3)
    certificate = weighed.certificate
    assert certificate.certified and "explain the data covered" in certificate.reason, certificate
    assert abs(certificate.log_evidence - LOG_EVIDENCE) < 5 * certificate.log_evidence_se
    weight = np.exp(np.asarray(weighed.log_weight, float) - np.max(weighed.log_weight))
    mean = np.average(draws.unconstrained, axis=0, weights=weight)
    assert np.all(np.abs(mean - TRUTH.mean) < 5 * np.sqrt(np.diag(TRUTH.covariance) / certificate.ess))
    assert weighed.info.num_failed == 0


def test_where_the_simulator_fails_the_weight_is_zero(conditioned, draws, tmp_path):
    """The evidence is that of the part where it works."""
    weighed = conditioned.weigh(jax.random.key(3), draws, run(fragile, draws, tmp_path))
    failed = np.asarray(draws.sites["theta"])[:, 0] > EDGE
    assert np.array_equal(np.isneginf(weighed.log_weight), failed)
    assert f"failed at {failed.sum()} draws" in weighed.certificate.reason
    inside = norm.cdf(EDGE, TRUTH.mean[0], np.sqrt(TRUTH.covariance[0, 0]))
    expected = LOG_EVIDENCE + np.log(inside)
    assert 0.05 < inside < 0.95
    assert abs(weighed.certificate.log_evidence - expected) < 5 * weighed.certificate.log_evidence_se


def test_stored_simulations_show_what_the_proposal_misses(posterior, store, tmp_path):
    affine = posterior.proposal.adjustment
    narrow = dataclasses.replace(affine, factor=0.05 * affine.factor)
    proposal = dataclasses.replace(posterior.proposal, adjustment=narrow)
    blind = dataclasses.replace(posterior, proposal=proposal).condition(y=Y)
    draws = blind.sample(jax.random.key(2), 512)
    certificate = blind.weigh(jax.random.key(3), draws, run(physics, draws, tmp_path), store).certificate
    assert certificate.missed > 0.5 and "the stored simulations that explain the data are where" in certificate.reason


def test_runs_on_draws_may_be_made_elsewhere(conditioned, draws, tmp_path):
    fields = np.asarray(draws.sites["theta"]) @ MATRIX.T
    theirs = si.simulators.record(draws, draws.sites, {"field": fields}, store=tmp_path / "theirs")
    ours = run(physics, draws, tmp_path / "ours")
    told = [conditioned.weigh(jax.random.key(3), draws, runs).log_weight for runs in (ours, theirs)]
    assert np.allclose(*told, atol=1e-4)
    turned = {"theta": -draws.sites["theta"]}
    with pytest.raises(ValueError, match="must be those of the draws"):
        si.simulators.record(draws, turned, {"field": fields}, store=tmp_path / "turned")


def test_draws_of_other_data_are_not_weighed(posterior, draws, tmp_path):
    with pytest.raises(ValueError, match=r"draws of other data: y of `draws\.observed` differ"):
        posterior.condition(y=2 * Y).weigh(jax.random.key(3), draws, tmp_path)


def test_loading_does_not_mind_runs_that_failed(problem, posterior, tmp_path):
    posterior.save(tmp_path / "p")
    store = si.simulators.simulate(jax.random.key(0), problem, fragile, 50, store=tmp_path / "runs", **QUIET)
    assert not store.read().valid.all()
    for invalid in ("raise", "drop"):
        options = si.NPSE(problem, simulations=store, likelihood=likelihood, invalid=invalid)
        assert options.load(tmp_path / "p").problem.observed


def test_saved_posteriors_are_weighed_again(posterior, problem, draws, store, tmp_path):
    posterior.save(tmp_path / "p")
    with pytest.raises(ValueError, match=r"Load it with `NPSE\(model, likelihood="):
        si.load(tmp_path / "p", problem)

    def narrower(parameters, outputs, y=None):
        numpyro.sample("y", dist.LogNormal(outputs["field"], 0.4).to_event(1), obs=y)

    with pytest.raises(ValueError, match="other densities or bounds: expected log_likelihood"):
        si.NPSE(problem, simulations=store, likelihood=narrower).load(tmp_path / "p")
    loaded = si.NPSE(problem, simulations=store, likelihood=likelihood).load(tmp_path / "p")
    again = loaded.sample(jax.random.key(2), 2000, y=Y)
    assert np.array_equal(again.unconstrained, draws.unconstrained)
    runs = run(physics, draws, tmp_path / "runs")
    ours, theirs = (p.condition(y=Y).weigh(jax.random.key(3), draws, runs) for p in (posterior, loaded))
    assert np.array_equal(ours.log_weight, theirs.log_weight)


def test_data_of_the_likelihood_are_not_the_outputs(problem, tmp_path):
    """Counts of a share of a rate: of another kind and shape, and with a parameter that physics never sees."""

    def both():
        numpyro.sample("rate", dist.LogNormal(0.0, 0.3))
        numpyro.sample("share", dist.Beta(2.0, 2.0))

    def counts(parameters, outputs, hits=None):
        numpyro.sample("hits", dist.Poisson(parameters["share"] * outputs["y"]).expand([3]).to_event(1), obs=hits)

    store = si.simulators.simulate(jax.random.key(0), both, lambda p, seed: 9 * p["rate"], 80, store=tmp_path, **QUIET)
    learned = stored_simulations(jax.random.key(1), si.from_numpyro(both), store, counts)
    assert learned.y["hits"].shape == (80, 3) and len({tuple(row) for row in np.asarray(learned.y["hits"])}) > 40
    hits = np.array([3, 4, 2])
    z, log_likelihood = explained(learned.problem, store, learned.problem.read((), {"hits": hits}))
    sites = jax.jit(jax.vmap(learned.problem.latent_sites))(z)
    expected = dist.Poisson(9 * sites["share"] * sites["rate"]).log_prob(hits[:, None]).sum(0)
    assert np.allclose(log_likelihood, expected, rtol=1e-4)
    for_first, for_second = jax.random.split(jax.random.key(2))
    assert not np.array_equal(learned.renew(for_first)[1]["hits"], learned.renew(for_second)[1]["hits"])


@pytest.mark.slow
def test_learned_draws_are_calibrated_on_other_runs(problem, store, tmp_path):
    settings = {"num_steps": 3000, "width": 32, "depth": 2, "sampler": si.samplers.ReverseSDE(num_steps=64), **QUIET}
    posterior = si.NPSE(problem, simulations=store, likelihood=likelihood, **settings).fit(jax.random.key(1))
    others = si.simulators.simulate(jax.random.key(7), problem, physics, 460, store=tmp_path, **QUIET)
    ranks = si.calibration.sbc(jax.random.key(1), posterior, 400, store=others, **QUIET)
    assert ranks.calibrated, ranks


def test_wrong_use_is_named(posterior, conditioned, problem, draws, store, tmp_path):
    with pytest.raises(ValueError, match=r"must be 0 .* got 0\.5\. This model: its simulator is foreign"):
        conditioned.sample(jax.random.key(2), 10, prior_fraction=0.5)
    unknown = dataclasses.replace(posterior.problem, observation=None)
    plain = si.Posterior(unknown, posterior.proposal, None).condition(y=Y)
    with pytest.raises(ValueError, match=r"fitted with a likelihood, got one without.*NPSE\(\.\.\., likelihood="):
        plain.weigh(jax.random.key(3), draws, store)
    with pytest.raises(ValueError, match="one run of the simulator for each of the 2000 draws, got 1500 of 1500"):
        conditioned.weigh(jax.random.key(3), draws, store)
    with pytest.raises(ValueError, match="needs `simulations`"):
        si.NPSE(problem, likelihood=likelihood, **SMALL).fit(jax.random.key(1))
    with pytest.raises(si.errors.UnsupportedModel, match="no sample site"):
        si.NPSE(problem, simulations=store, likelihood=lambda parameters, outputs: None, **SMALL).fit(jax.random.key(1))

    def factor(parameters, outputs, y=None):
        likelihood(parameters, outputs, y)
        numpyro.factor("more", outputs["field"].sum())

    with pytest.raises(si.errors.UnsupportedModel, match=r"numpyro\.factor"):
        si.NPSE(problem, simulations=store, likelihood=factor, **SMALL).fit(jax.random.key(1))
    with pytest.raises(ValueError, match="got none for y"):
        posterior.sample(jax.random.key(2), 10)
    few = draws._replace(unconstrained=jnp.asarray(draws.unconstrained[:5]), sites={"theta": draws.sites["theta"][:5]})
    with pytest.raises(ValueError, match="at most the number of draws, 5"):
        si.simulators.simulate(jax.random.key(0), few, physics, 6, store=tmp_path, **QUIET)
    run(physics, few, tmp_path)
    with pytest.raises(ValueError, match="`draws` is"):
        run(physics, few._replace(unconstrained=2 * few.unconstrained), tmp_path)
    with pytest.raises(ValueError, match="`simulator` is fragile, was physics"):
        run(fragile, few, tmp_path)
