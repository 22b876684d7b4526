"""The amortised posterior end to end, on models with known answers."""

import dataclasses
import os
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

import scoreinfer as si
import scoreinfer.evidence.certificate
import scoreinfer.evidence.witnesses
import scoreinfer.posterior.amortised
from compilations import Compilations
from oracles import disagreement, gaussian_mixture, linear_gaussian
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence
from scoreinfer.nets import Concatenate
from scoreinfer.nets.embedding import flatten
from scoreinfer.posterior.amortised import _streams
from scoreinfer.samplers import refined as refinement
from scoreinfer.samplers.base import Target
from scoreinfer.samplers.batches import weighted_draws
from scoreinfer.samplers.focused import FocusedProposal, focus
from scoreinfer.training.loop import Budget, train
from scoreinfer.training.losses import target_mix, whitening_loss
from scoreinfer.training.simulations import Simulations, check_finite, simulate_joint, standardiser
from scoreinfer.training.whitening import regressed, untrained_whitening

SMALL = {"width": 32, "depth": 2, "num_steps": 1000, "batch_size": 256, "progress_bar": False}


@pytest.fixture(scope="module")
def mixture():
    """After 1000 steps one fit of six is too small between the modes, and refused; after 2000 none is."""
    oracle = gaussian_mixture()
    return oracle, si.NPSE(oracle.model, **SMALL | {"num_steps": 2000}).fit(jax.random.key(0))


@pytest.mark.slow
def test_linear_gaussian_is_solved_by_the_whitening_alone():
    """The regression is the answer: nearly equal weights after hardly any training."""
    oracle = linear_gaussian(5)
    posterior = si.NPSE(oracle.model, **SMALL | {"num_steps": 50}).fit(jax.random.key(0))
    draws = posterior.sample(jax.random.key(1), 4000, **oracle.data)
    truth = oracle.truth(oracle.data)
    assert draws.certificate.certified
    assert draws.certificate.ess > 2000
    assert abs(draws.certificate.log_evidence - truth.log_evidence) < 5 * draws.certificate.log_evidence_se + 1e-3
    assert disagreement(truth, oracle.flat(draws.sites), draws.log_weight) < 5


def test_mixture_is_certified_and_right(mixture):
    oracle, posterior = mixture
    draws = posterior.sample(jax.random.key(1), 4000, **oracle.data)
    truth = oracle.truth(oracle.data)
    assert draws.certificate.certified, draws.certificate
    assert abs(draws.certificate.log_evidence - truth.log_evidence) < 5 * draws.certificate.log_evidence_se
    assert disagreement(truth, oracle.flat(draws.sites), draws.log_weight) < 5


def _disturb(proposal, scale):
    """Add noise to every weight of the score."""
    leaves, tree = jax.tree.flatten(proposal.score)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [leaf + scale * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return dataclasses.replace(proposal, score=jax.tree.unflatten(tree, noisy))


@pytest.mark.parametrize(
    "sampler", [si.samplers.ProbabilityFlow(num_steps=8), si.samplers.ReverseSDE(num_steps=32)], ids=["flow", "sde"]
)
@pytest.mark.parametrize("focused", [False, True], ids=["amortised", "focused"])
def test_any_sampler_on_any_weights_is_exact(mixture, sampler, focused):
    """Another sampler, weights disturbed at random, a focus: the answer does not move, only the efficiency does."""
    oracle, posterior = mixture
    proposal = _disturb(dataclasses.replace(posterior.proposal, sampler=sampler), 0.02)
    posterior = dataclasses.replace(posterior, proposal=proposal)
    conditioned = posterior.condition(**oracle.data)
    if focused:
        conditioned = conditioned.focus(jax.random.key(5))
    draws = conditioned.sample(jax.random.key(4), 4000)
    truth = oracle.truth(oracle.data)
    assert draws.certificate.ess > 100
    assert abs(draws.certificate.log_evidence - truth.log_evidence) < 5 * draws.certificate.log_evidence_se
    assert disagreement(truth, oracle.flat(draws.sites), draws.log_weight) < 5


def test_defensive_mixture_is_exact_and_bounds_the_weights(mixture):
    oracle, posterior = mixture
    draws = posterior.condition(**oracle.data).sample(jax.random.key(1), 4000, prior_fraction=0.25)
    truth = oracle.truth(oracle.data)
    assert disagreement(truth, oracle.flat(draws.sites), draws.log_weight) < 5
    assert abs(draws.certificate.log_evidence - truth.log_evidence) < 5 * draws.certificate.log_evidence_se
    log_prior = jax.vmap(posterior.problem.log_prior)(draws.unconstrained)
    assert np.all(np.asarray(draws.log_weight) <= draws.log_joint - log_prior - np.log(0.25) + 1e-3)


def test_more_proposals_and_moves_give_equal_weights(mixture):
    oracle, posterior = mixture
    draws = posterior.condition(**oracle.data).sample(jax.random.key(1), 2000, max_proposals=20_000)
    truth = oracle.truth(oracle.data)
    assert draws.num == 2000
    assert draws.info.num_proposals > 2000
    assert draws.certificate.ess >= 2000
    assert np.ptp(np.asarray(draws.log_weight)) == 0.0
    assert len(np.unique(draws.resample(jax.random.key(2), 2000)["theta"], axis=0)) == 2000
    assert len(np.unique(np.asarray(draws.unconstrained), axis=0)) == 2000
    assert disagreement(truth, oracle.flat(draws.sites), ess=1000) < 5


def test_draws_do_not_depend_on_the_batch_size(mixture):
    oracle, posterior = mixture
    conditioned = posterior.condition(**oracle.data)
    whole = conditioned.sample(jax.random.key(1), 500)
    parts = conditioned.sample(jax.random.key(1), 500, batch_size=64)
    more = conditioned.sample(jax.random.key(1), 700)
    for other in (parts, more):
        assert np.allclose(other.unconstrained[:500], whole.unconstrained, atol=1e-4)
        assert np.allclose(other.log_weight[:500], whole.log_weight, atol=2e-3)


def test_second_observation_costs_no_compilation(mixture):
    oracle, posterior = mixture
    posterior.sample(jax.random.key(1), 500, **oracle.data)
    with Compilations() as compilations:
        posterior.sample(jax.random.key(2), 500, **{k: v + 0.3 for k, v in oracle.data.items()})
    assert compilations.count == 0


def test_focusing_and_moving_for_a_second_observation_cost_no_compilation(mixture):
    oracle, posterior = mixture
    for shift in (0.0, 0.3):
        data = {k: v + shift for k, v in oracle.data.items()}
        with Compilations() as compilations:
            focused = posterior.condition(**data).focus(jax.random.key(1))
            focused.sample(jax.random.key(2), 500, max_proposals=500)
    assert compilations.count == 0  # of the second round


@pytest.mark.slow
def test_refined_score_is_exact_and_stays_with_its_observation(mixture, monkeypatch):
    """A badly learned score, trained further on one observation: exact there, and the original's elsewhere."""
    oracle, posterior = mixture
    monkeypatch.setattr(refinement, "NUM_PARTICLES", 1024)
    monkeypatch.setattr(refinement, "NUM_MOVES", 5)
    monkeypatch.setattr(scoreinfer.posterior.amortised, "ENOUGH", 1.0)
    bad = dataclasses.replace(posterior, proposal=_disturb(posterior.proposal, 0.15))
    conditioned = bad.condition(**oracle.data)
    target = conditioned.target
    _, share = focus(jax.random.key(1), bad.proposal, target)
    refined = conditioned.focus(jax.random.key(1), num_steps=600)
    draws = refined.sample(jax.random.key(2), 4000)
    assert draws.certificate.ess > 1.5 * share * 4000
    truth = oracle.truth(oracle.data)
    assert abs(draws.certificate.log_evidence - truth.log_evidence) < 5 * draws.certificate.log_evidence_se
    assert disagreement(truth, oracle.flat(draws.sites), draws.log_weight) < 5
    proposal = refined.proposal
    context = proposal.context(target)
    affine, _ = proposal.carry(context)  # simulated truths were whitened by the original's
    assert np.allclose(affine.mean, bad.proposal.context(target).affine.mean, atol=1e-5)
    z = draws.unconstrained[0]
    again = proposal.log_q(jax.random.key(3), context, z)  # by inverting the flow
    assert abs(again - draws.log_q[0]) < 1e-3
    other = {name: value + 0.3 for name, value in oracle.data.items()}
    ours, theirs = (p.sample(jax.random.key(2), 512, **other) for p in (refined.posterior, bad))
    assert np.allclose(ours.unconstrained, theirs.unconstrained, atol=1e-4)


def test_annealed_langevin_on_a_learned_score(mixture):
    """Biased, but near; it can be pickled after the run, and tells that it cannot be run again."""
    oracle, posterior = mixture
    mcmc = MCMC(
        si.mcmc.AnnealedLangevin(posterior), num_warmup=0, num_samples=200, num_chains=8, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(0), **oracle.data)
    truth, flat = oracle.truth(oracle.data), oracle.flat(mcmc.get_samples())
    sd = np.sqrt(np.diag(truth.covariance))
    assert (np.abs(flat.mean(0) - truth.mean) < 0.2 * sd).all()
    assert (np.abs(flat.std(0) / sd - 1) < 0.2).all()
    again = pickle.loads(pickle.dumps(mcmc))
    assert all(np.array_equal(again.get_samples()[name], value) for name, value in mcmc.get_samples().items())
    with pytest.raises(RuntimeError, match="Pickling left"):
        again.run(jax.random.key(0), **oracle.data)
    focused = dataclasses.replace(posterior, proposal=FocusedProposal(posterior.proposal, posterior.proposal))
    with pytest.raises(ValueError, match="focused"):
        si.mcmc.AnnealedLangevin(focused)


def test_resampled_sites_keep_their_rows_together(mixture):
    oracle, posterior = mixture
    draws = posterior.sample(jax.random.key(1), 2000, **oracle.data)
    resampled = draws.resample(jax.random.key(2), 1000)
    assert disagreement(oracle.truth(oracle.data), oracle.flat(resampled), ess=500) < 5


@pytest.fixture(scope="module")
def half_blind(mixture):
    """A proposal trained on half the simulator: perfect weights on its half."""
    _, posterior = mixture
    problem = posterior.problem

    def half(key):
        z, y = problem.simulate(key)
        flip = jnp.where(z[0] > 0, 1.0, -1.0)  # the prior is symmetric: reflect to the positive side
        other = problem.simulate_observation(jax.random.fold_in(key, 1), flip * z)
        return flip * z, jax.tree.map(lambda a, b: jnp.where(flip > 0, a, b), y, other)

    broken = si.NPSE(dataclasses.replace(problem, simulate=half), **SMALL, target_score=False).fit(jax.random.key(0))
    return dataclasses.replace(broken, problem=problem)


def test_missed_mode_is_refused(mixture, half_blind, monkeypatch):
    oracle, _ = mixture
    monkeypatch.setattr(scoreinfer.evidence.witnesses, "repair", lambda *_: None)
    draws = half_blind.sample(jax.random.key(1), 4000, **oracle.data)
    assert not draws.certificate.certified
    assert draws.certificate.missed > 0.05, draws.certificate


def test_missed_mode_is_drawn_from_its_witnesses(mixture, half_blind):
    """What witnesses find joins the proposal: the batch is right, and the other half of the witnesses says so."""
    oracle, posterior = mixture
    draws = half_blind.sample(jax.random.key(1), 4000, **oracle.data)
    assert draws.certificate.certified and draws.info.witnessed > 0.1, draws.certificate
    assert disagreement(oracle.truth(oracle.data), oracle.flat(draws.sites), draws.log_weight) < 5
    assert posterior.sample(jax.random.key(1), 4000, **oracle.data).info.witnessed == 0.0


@pytest.mark.slow
def test_missed_mode_is_refused_after_further_training(mixture, half_blind, monkeypatch):
    oracle, _ = mixture
    monkeypatch.setattr(refinement, "NUM_PARTICLES", 1024)
    monkeypatch.setattr(refinement, "NUM_MOVES", 5)
    monkeypatch.setattr(scoreinfer.posterior.amortised, "ENOUGH", 2.0)  # trained further whatever its share, and kept
    monkeypatch.setattr(scoreinfer.posterior.amortised, "refine", lambda *a, **k: (refinement.refine(*a, **k)[0], 2.0))
    focused = half_blind.condition(**oracle.data).focus(jax.random.key(3), num_steps=400)
    assert isinstance(focused.proposal, refinement.RefinedProposal)
    draws = focused.sample(jax.random.key(1), 4000)
    # Its particles may have found the way to the other mode: then it is right.
    wrong = disagreement(oracle.truth(oracle.data), oracle.flat(draws.sites), draws.log_weight) > 5
    assert not (draws.certificate.certified and wrong)


def test_draws_moves_and_focus_have_streams_of_their_own(mixture):
    """One key for everything: nothing is drawn twice."""
    streams = _streams(jax.random.key(0))
    rows = jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(streams.draws, row)))(jnp.arange(1000))
    other = jnp.stack([jax.random.key_data(key) for key in streams])
    assert len(np.unique(np.concatenate([rows, other]), axis=0)) == 1000 + len(streams)


def test_far_observation_is_warned_of(mixture, monkeypatch):
    """What was learned does not reach it. Witnesses do: where they are informative the batch is right all the same."""
    oracle, posterior = mixture
    far = {name: np.full_like(value, 15.0) for name, value in oracle.data.items()}
    with pytest.warns(si.errors.MisspecificationWarning, match=r"100\.0% of them .* misspecified"):
        draws = posterior.sample(jax.random.key(1), 4000, **far)
    assert draws.certificate.distance_rank == 0.0 and draws.info.witnessed > 0.1
    assert disagreement(oracle.truth(far), oracle.flat(draws.sites), draws.log_weight) < 5
    nowhere = {name: np.full_like(value, 1e6) for name, value in oracle.data.items()}
    monkeypatch.setattr(scoreinfer.evidence.witnesses, "MIN_INFORMATIVE", 0.0)  # no second attempt, which costs most
    with pytest.warns(si.errors.MisspecificationWarning):
        assert not posterior.sample(jax.random.key(1), 4000, **nowhere).certificate.certified


def test_warnings_name_the_line_of_the_caller(mixture, monkeypatch):
    """Not one of Equinox, which wraps the methods, nor the caller's own file where its name begins with ours."""
    oracle, posterior = mixture
    far = {name: np.full_like(value, 1e6) for name, value in oracle.data.items()}
    monkeypatch.setattr(scoreinfer.evidence.witnesses, "MIN_INFORMATIVE", 0.0)
    study = f"{os.path.dirname(si.__file__)}_study.py"
    own = {"__name__": "scoreinfer_study"}
    exec(compile("def draw(posterior, **data): posterior.sample(KEY, 64, **data)", study, "exec"), own)
    own["KEY"] = jax.random.key(1)
    for call in (posterior.sample, lambda key, num, **data: posterior.condition(**data).sample(key, num)):
        with pytest.warns(si.errors.MisspecificationWarning) as caught:
            call(jax.random.key(1), 64, **far)
        assert {warning.filename for warning in caught} == {__file__}
    with pytest.warns(si.errors.MisspecificationWarning) as caught:
        own["draw"](posterior, **far)
    assert {warning.filename for warning in caught} == {study}


def test_failed_refinement_warns_at_the_line_of_the_caller(mixture, monkeypatch):
    oracle, posterior = mixture

    def fails(*args, **kwargs):
        raise FloatingPointError("nothing is finite")

    monkeypatch.setattr(scoreinfer.posterior.amortised, "focus", lambda key, proposal, target: (proposal, 0.1))
    monkeypatch.setattr(scoreinfer.posterior.amortised, "refine", fails)
    with pytest.warns(si.errors.TrainingWarning, match="nothing is finite") as caught:
        posterior.condition(**oracle.data).focus(jax.random.key(1))
    assert [warning.filename for warning in caught] == [__file__]


def test_distance_rank_is_uniform_on_data_from_the_model(mixture):
    """Warnings come at their stated rate; the standard error counts the data sets and the simulations."""
    _, posterior = mixture
    num, rate = 2000, scoreinfer.evidence.certificate.MAX_OUTLYING

    def rank(key):
        target = Target(posterior.problem, posterior.problem.simulate(key)[1])
        return posterior.outliers.rank(flatten(posterior.proposal.features(target)))

    ranks = np.asarray(jax.jit(jax.vmap(rank))(jax.random.split(jax.random.key(1000), num)))
    spread = np.sqrt(1 / num + 1 / 512)
    assert abs(np.mean(ranks <= rate) - rate) < 5 * np.sqrt(rate * (1 - rate)) * spread
    assert np.mean(ranks == 0.0) <= 1 / 512 + 5 * np.sqrt(1 / 512) * spread
    assert abs(np.mean(ranks) - 0.5) < 5 * np.sqrt(1 / 12) * spread


def test_same_key_same_weights(mixture):
    _, posterior = mixture
    first, second = (si.NPSE(posterior.problem, **SMALL | {"num_steps": 20}).fit(jax.random.key(7)) for _ in range(2))
    for a, b in zip(*(jax.tree.leaves(eqx.filter(p.proposal, eqx.is_array)) for p in (first, second)), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
def test_fixed_budget_holds_out_and_stops():
    oracle = linear_gaussian(2)
    posterior = si.NPSE(oracle.model, num_simulations=500, **SMALL | {"num_steps": 1500, "batch_size": 64}).fit(
        jax.random.key(0)
    )
    history = posterior.history.score
    assert history.stopped in ("good enough", "flat", "finished", "early")
    draws = posterior.sample(jax.random.key(1), 4000, **oracle.data)
    assert disagreement(oracle.truth(oracle.data), oracle.flat(draws.sites), draws.log_weight) < 5


@pytest.mark.slow
def test_model_without_data_is_its_prior():
    def model():
        numpyro.sample("a", dist.Normal(1.0, 2.0))
        numpyro.sample("b", dist.Gamma(3.0, 1.0))

    posterior = si.NPSE(model, **SMALL | {"num_steps": 100}).fit(jax.random.key(0))
    draws = posterior.sample(jax.random.key(1), 4000)
    cert = draws.certificate
    assert abs(cert.log_evidence) < 5 * cert.log_evidence_se + 1e-3
    w = np.exp(np.asarray(draws.log_weight, float))
    w /= w.sum()
    assert abs(w @ np.asarray(draws.sites["b"]) - 3.0) < 5 * np.sqrt(3.0 / cert.ess)


@pytest.mark.slow
def test_stochastic_simulator_has_draws_but_no_weights_and_no_certificate():
    """Noise drawn inside the model: the learned posterior marginalises it, and nothing can correct it."""

    def model(y=None):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        hidden = 0.5 * jax.random.normal(numpyro.prng_key())
        numpyro.sample("y", dist.Normal(a + hidden, 0.1), obs=y)

    posterior = si.NPSE(model, **SMALL).fit(jax.random.key(0))
    draws = posterior.condition(y=1.0).sample(jax.random.key(1), 2000, max_proposals=10_000)
    assert draws.log_weight is None
    assert not draws.certificate.certified
    assert "no density" in draws.certificate.reason
    variance = 1.0 / (1.0 + 1.0 / 0.26)
    a = np.asarray(draws.sites["a"])
    assert abs(a.mean() - variance / 0.26) < 0.1
    assert abs(a.std() / np.sqrt(variance) - 1.0) < 0.1
    assert draws.resample(jax.random.key(2), 100)["a"].shape == (100,)


def test_simulations_that_are_not_finite_stop_training_with_the_sites_named():
    def model(y=None):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(jnp.where(a > 1.0, jnp.nan, a), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"not finite in y: 1\d\.\d\d% of"):
        si.NPSE(model, **SMALL).fit(jax.random.key(0))


def test_check_finite_names_latent_values():
    with pytest.raises(ValueError, match="latent values"):
        check_finite(Simulations(jnp.array([[jnp.nan], [1.0]]), {"y": jnp.zeros((2, 1))}))


def test_model_that_cannot_be_simulated_is_refused():
    def model(y=None):
        a = numpyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(a, 1.0), obs=y)

    with pytest.raises(si.errors.UnsupportedModel, match="simulat"):
        si.NPSE(model, **SMALL).fit(jax.random.key(0), y=1.0)


@pytest.mark.parametrize("when", ["loss", "pool", "interrupt"])
def test_training_that_breaks_keeps_the_best_weights(when):
    """Bad numbers or an interrupt after a good epoch: a warning that says which, and finite weights."""
    calls = []

    def pools(key):
        calls.append(key)
        broken = len(calls) > 2
        if broken and when == "interrupt":
            raise KeyboardInterrupt
        return jnp.where(broken and when == "pool", jnp.nan, 1e25 if broken and when == "loss" else 1.0) * jnp.ones(64)

    def loss(weight, batch, key):
        return jnp.mean((weight - batch) ** 2 * batch)

    expected = {"loss": "loss not finite", "pool": "simulations not finite", "interrupt": "interrupted"}[when]
    with pytest.warns(si.errors.TrainingWarning, match=expected):
        weight, history = train(
            jax.random.key(0), jnp.zeros(()), loss, pools, jnp.ones(8), Budget(50, 8, 10), progress_bar=False
        )
    assert history.stopped == expected
    assert np.isfinite(weight) and weight > 0


def test_training_that_never_worked_raises():
    with pytest.raises(FloatingPointError, match="no weights to return"):
        train(
            jax.random.key(0),
            jnp.zeros(()),
            lambda w, b, k: jnp.mean(w * b) / 0.0,
            lambda key: jnp.ones(64),
            jnp.ones(8),
            Budget(50, 8, 10),
            progress_bar=False,
        )


def test_standardiser_is_linear_in_the_bulk_and_logarithmic_beyond():
    x = {"y": jax.random.normal(jax.random.key(0), (5000,)) * 3.0 + 5.0}
    scale = standardiser(x)
    assert abs(float(scale({"y": jnp.array(8.0)})["y"]) - 1.0) < 0.05
    assert float(scale({"y": jnp.array(5.0 + 3e6)})["y"]) < 20.0
    constant = standardiser({"y": jnp.ones((10, 2))})
    assert np.all(np.isfinite(constant({"y": jnp.ones(2)})["y"]))


def test_linear_whitening_is_the_gaussian_posterior():
    oracle = linear_gaussian(3)
    problem = si.from_numpyro(oracle.model)
    simulations = simulate_joint(jax.random.key(0), problem, 20_000)
    scale = standardiser(simulations.x)
    x = jax.vmap(scale)(simulations.x)
    row = jax.tree.map(lambda leaf: leaf[0], x)
    start = untrained_whitening(jax.random.key(1), problem.dim, row, Concatenate(), width=16, depth=1)
    whitening = regressed(start, simulations.z, x)
    affine = whitening(scale(problem.encode(jax.tree.map(jnp.asarray, oracle.data))))
    truth = oracle.truth(oracle.data)
    assert np.allclose(affine.mean, truth.mean, atol=0.05)
    assert np.allclose(affine.factor @ affine.factor.T, truth.covariance, atol=0.05 * truth.covariance.max())
    loss = whitening_loss(whitening, Simulations(simulations.z, x), jax.random.key(0))
    expected = 0.5 * problem.dim + 0.5 * np.linalg.slogdet(truth.covariance)[1]
    assert abs(float(loss) - expected) < 0.05


def test_target_mix_cancels_all_noise_for_a_gaussian():
    """(1 - k) u + k (u_s + s^2 grad log p) is the exact denoiser, for every u."""
    precision = jnp.array([1.0, 25.0])
    u = jax.random.normal(jax.random.key(0), (500, 2)) / jnp.sqrt(precision)
    level = jnp.full(500, 0.7)
    noisy = jnp.array([0.3, -0.2])
    share = target_mix(level, precision)
    target = u + share * (noisy + 0.49 * (-precision * u) - u)
    assert np.allclose(target, noisy / (1.0 + 0.49 * precision), atol=1e-5)


def test_unbiased_before_any_training(mixture):
    """The whole chain (whitening, network, sampler, weights) on a posterior that was never trained."""
    oracle, trained = mixture
    posterior = si.NPSE(trained.problem, **SMALL | {"num_steps": 1}).fit(jax.random.key(0))
    target = posterior.condition(**oracle.data).target
    drawn = weighted_draws(jax.random.key(1), posterior.proposal, target, 1024, None, 0, 20_000)
    value, error = log_evidence(drawn.log_weight)
    assert effective_sample_size(drawn.log_weight) < 19_000
    assert abs(value - oracle.truth(oracle.data).log_evidence) < 5 * error


def unexposed(y=None):
    """Counts of which the first has no exposure: the gradient of its term is not a number."""
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 3):
        numpyro.sample("y", dist.Poisson(np.array([0.0, 5.0, 9.0]) * jnp.exp(b)), obs=y)


def called(y=None):
    """The same rates from a program without derivatives."""
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    shape = jax.ShapeDtypeStruct((), jnp.result_type(float))
    rate = jax.pure_callback(np.exp, shape, b, vmap_method="expand_dims")
    with numpyro.plate("rows", 3):
        numpyro.sample("y", dist.Poisson(np.array([0.0, 5.0, 9.0]) * rate), obs=y)


@pytest.mark.parametrize("model", [unexposed, called])
def test_fit_does_without_gradients_where_there_are_none(model):
    y = np.array([0, 7, 15])
    posterior = si.NPSE(model, **SMALL | {"num_steps": 100}).fit(jax.random.key(0))
    draws = posterior.sample(jax.random.key(1), 4000, y=y)
    grid = np.linspace(-4.0, 4.0, 4001)
    weight = np.exp(y.sum() * grid - 14 * np.exp(grid) - grid**2 / 2)
    exact = (weight * grid).sum() / weight.sum()
    sd = np.sqrt((weight * (grid - exact) ** 2).sum() / weight.sum())
    w = np.exp(np.asarray(draws.log_weight, np.float64) - np.max(draws.log_weight))
    mean = (w * np.asarray(draws.sites["b"])).sum() / w.sum()
    assert abs(mean - exact) < 5 * sd / np.sqrt(draws.certificate.ess)
