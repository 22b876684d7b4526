"""Data that change outside a model's arguments, or in place: no kernel and no posterior answers for the old ones."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC

import doubles
import scoreinfer as si
from scoreinfer.mcmc import score_sde

OLD, NEW = np.array([0.3, 0.6, 0.9]), np.array([1.2, 1.5, 1.8])
LANGEVIN = [si.mcmc.MALA, si.mcmc.ULA, si.mcmc.UnderdampedLangevin]


class Model:
    """Normal data around a normal mean, of variance 1 / 4; the data are the object's own."""

    def __init__(self, data):
        self.data, self.scale = data, 0.5

    def __call__(self):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", 3):
            numpyro.sample("y", dist.Normal(a, self.scale), obs=self.data)

    def given(self, y):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", 3):
            numpyro.sample("y", dist.Normal(a, self.scale), obs=y)

    def mean(self):
        precision = 1 / self.scale**2
        return precision * self.data.sum() / (1 + 3 * precision)


class Around(doubles.GaussianProposal):
    """Normal around the exact mean."""

    def context(self, target):
        return 4 * target.y["y"].sum() / 13 + self.shift


def run(mcmc, *args, key=0):
    mcmc.run(random.key(key), *args)
    return float(np.mean(np.asarray(mcmc.get_samples()["a"])))


def mcmc_of(kernel, **options):
    defaults = {"num_warmup": 200, "num_samples": 800, "num_chains": 2, "chain_method": "vectorized"}
    return MCMC(kernel, **(defaults | options), progress_bar=False)


def rebind(model):
    model.data = NEW


def edit(model):
    model.data[:] = NEW


CHANGES = pytest.mark.parametrize(
    "change", [pytest.param(rebind, marks=pytest.mark.slow), edit], ids=["rebind", "edit"]
)


# --- posteriors --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    model = Model(OLD.copy())
    return model, si.NPSE(model, num_steps=60, width=16, depth=1, progress_bar=False).fit(random.key(0))


@pytest.fixture
def fitted(learned):
    learned[0].__init__(OLD.copy())
    return learned


@CHANGES
def test_posterior_answers_for_the_data_as_they_are(fitted, change):
    model, posterior = fitted
    for number in range(2):
        draws = posterior.sample(random.key(1), 2000)
        weight = np.exp(np.asarray(draws.log_weight - jax.nn.logsumexp(draws.log_weight), np.float64))
        assert abs(weight @ np.asarray(draws.sites["a"]) - model.mean()) < 0.05
        np.testing.assert_allclose(draws.observed["y"], model.data, rtol=1e-6)
        focused = posterior.condition().focus(random.key(2), num_steps=0).sample(random.key(1), 2000)
        np.testing.assert_allclose(focused.observed["y"], model.data, rtol=1e-6)
        if number == 0:
            change(model)
    model.scale = 0.6
    with pytest.raises(ValueError, match="give another model"):
        posterior.sample(random.key(1), 100)


@pytest.mark.parametrize(
    "kind", [lambda p: si.ScoreSDE(posterior=p), lambda p: si.mcmc.AnnealedLangevin(p, num_levels=10, num_steps=20)],
    ids=["ScoreSDE", "AnnealedLangevin"],
)  # fmt: skip
def test_kernels_of_a_posterior_answer_for_the_data_as_they_are(fitted, kind):
    model, posterior = fitted
    mcmc = mcmc_of(kind(posterior), num_warmup=20, num_samples=300)
    for change in (None, edit, lambda model: setattr(model, "data", OLD)):
        if change is not None:
            change(model)
        assert abs(run(mcmc) - model.mean()) < 0.15


@pytest.mark.slow
def test_posterior_of_paths_answers_for_the_data_as_they_are():
    """A random walk of unit steps from a normal start, its end observed with unit noise."""
    data = [np.array([1.0])]

    def model():
        start = dist.Normal(jnp.zeros(1), 1.0).to_event(1)
        path = si.PhysicsPath(lambda t0, t1, x: x, 1.0, jnp.arange(3.0), start)
        x = numpyro.sample("x", path)
        numpyro.sample("y", dist.Normal(x[-1], 1.0).to_event(1), obs=data[0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = si.SMDP(model, "x", num_steps=0, progress_bar=False).fit(random.key(0))
    for data[0] in (np.array([1.0]), np.array([-2.0])):
        draws = posterior.sample(random.key(1), 500)
        assert abs(np.asarray(draws.sites["x"])[:, -1, 0].mean() - 0.75 * data[0][0]) < 0.2


def test_learned_anew_for_changed_data(monkeypatch):
    learned = []

    def learn(key, target, effort, **options):
        problem, y = target.problem, target.y
        learned.append(np.asarray(y["y"]))
        return doubles.as_learned(Around(jnp.zeros(1), jnp.full(1, 0.4), problem), y)

    monkeypatch.setattr(score_sde, "learn", learn)
    model = Model(OLD.copy())
    mcmc = mcmc_of(si.ScoreSDE(model, bank_size=32, num_local_steps=0), num_warmup=10)
    for change in (None, edit, lambda model: setattr(model, "data", OLD)):
        if change is not None:
            change(model)
        assert abs(run(mcmc) - model.mean()) < 0.15
    np.testing.assert_allclose(learned, [OLD, NEW], rtol=1e-6)


def test_certificate_is_not_for_other_data_than_the_run(fitted):
    model, posterior = fitted
    mcmc = mcmc_of(si.ScoreSDE(posterior=posterior), num_warmup=20, num_samples=50)
    run(mcmc)
    edit(model)
    with pytest.raises(ValueError, match="changed since this run"):
        si.certify(mcmc)


# --- Langevin kernels --------------------------------------------------------------------------------------------


@CHANGES
@pytest.mark.parametrize("kind", LANGEVIN)
def test_langevin_answers_for_the_data_as_they_are(kind, change):
    """In a second run of the same `MCMC` object, and in another one of the same kernel."""
    model = Model(OLD.copy())
    kernel = kind(model)
    mcmc = mcmc_of(kernel)
    assert abs(run(mcmc) - model.mean()) < 0.15
    change(model)
    assert abs(run(mcmc) - model.mean()) < 0.15
    if kind is si.mcmc.MALA:
        assert abs(run(mcmc_of(kernel)) - model.mean()) < 0.15


@pytest.mark.parametrize("method", ["sequential", "parallel", jax.vmap], ids=["sequential", "parallel", "vmap"])
def test_in_every_chain_method(method):
    model = Model(OLD)
    mcmc = mcmc_of(si.mcmc.MALA(model), chain_method=method)
    for model.data in (OLD, NEW, OLD):
        assert abs(run(mcmc) - model.mean()) < 0.15


def test_covariates_outside_the_arguments_are_read_anew_too():
    model = Model(NEW)
    mcmc = mcmc_of(si.mcmc.MALA(model))
    for model.scale in (0.5, 2.0, 0.5):
        assert abs(run(mcmc) - model.mean()) < 0.15


@pytest.mark.parametrize("jit_model_args", [False, True])
def test_arguments_edited_in_place(jit_model_args):
    model, y = Model(None), OLD.copy()
    mcmc = mcmc_of(si.mcmc.MALA(model.given), jit_model_args=jit_model_args)
    for new in (OLD, NEW, OLD):
        y[:] = new
        model.data = new
        assert abs(run(mcmc, y) - model.mean()) < 0.15


def test_closed_over_data_with_traced_arguments():
    model = Model(OLD)

    def shifted(shift):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", 3):
            numpyro.sample("y", dist.Normal(a, 0.5), obs=model.data + shift)

    mcmc = mcmc_of(si.mcmc.MALA(shifted), jit_model_args=True)
    for model.data in (OLD, NEW):
        for shift in (np.zeros(3), np.ones(3)):
            assert abs(run(mcmc, shift) - 4 * (model.data + shift).sum() / 13) < 0.15


def test_traced_arguments_need_a_run_before():
    kernel = si.mcmc.MALA(Model(None).given)

    def mean(y):
        mcmc = mcmc_of(kernel, num_chains=1)
        mcmc.run(random.key(0), y)
        return mcmc.get_samples()["a"].mean()

    batch = np.stack([OLD, NEW])
    with pytest.raises(ValueError, match="run it once outside"):
        jax.vmap(mean)(batch)
    mean(OLD)
    np.testing.assert_allclose(jax.vmap(mean)(batch), 4 * batch.sum(1) / 13, atol=0.15)


@CHANGES
def test_what_was_warmed_up_on_old_data_says_so(change):
    """The compiled loop of a warmed-up `MCMC` object cannot be told of data outside the arguments."""
    model = Model(OLD.copy())
    mcmc = mcmc_of(si.mcmc.MALA(model))
    mcmc.warmup(random.key(0))
    assert abs(run(mcmc) - model.mean()) < 0.15
    change(model)
    with pytest.raises(ValueError, match="changed since the warm-up"):
        run(mcmc)
    mcmc.warmup(random.key(0))
    assert abs(run(mcmc) - model.mean()) < 0.15
