"""Pickled posteriors and problems: read from their model again, the same draws to the last bit, or a way out named."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from doubles import Y1, location_scale
from modes import UnknownRate, ornstein_uhlenbeck
from scoreinfer.simulators.dataset import with_likelihood, with_outputs

QUIET = {"progress_bar": False}
TINY = {"num_steps": 20, "width": 8, "depth": 1, "batch_size": 64, **QUIET}
MODES = ornstein_uhlenbeck(4)


def regression(x, y=None, *, noise=0.5):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    count = numpyro.sample("count", dist.Poisson(3.0 + 0.0 * slope))
    numpyro.sample("y", dist.Normal(slope * x, noise * (1.0 + count)).to_event(1), obs=y)


def prior():
    numpyro.sample("a", dist.Normal(0.0, 1.0))


def likelihood(parameters, outputs, y=None):
    numpyro.sample("y", dist.Normal(outputs["y"], 0.3).to_event(1), obs=y)


def ways():
    """List the picklers at hand."""
    found = [pickle.dumps]
    try:
        import cloudpickle
    except ImportError:
        return found
    return [*found, cloudpickle.dumps]


WAYS = pytest.mark.parametrize("dumps", ways(), ids=lambda dumps: dumps.__module__.split(".")[0].strip("_"))


def same_draws(posterior, again, **data):
    ours, theirs = (p.sample(jax.random.key(1), 200, **data) for p in (posterior, again))
    for name in ("unconstrained", "log_weight", "log_q", "sites"):
        jax.tree.map(np.testing.assert_array_equal, getattr(ours, name), getattr(theirs, name))
    assert str(ours.certificate) == str(theirs.certificate)


def test_posteriors_draw_the_same():
    posterior = si.NPSE(location_scale, **TINY).fit(jax.random.key(0))
    again = pickle.loads(pickle.dumps(posterior))
    same_draws(posterior, again, y=Y1)
    assert again.problem.model is location_scale


@WAYS
def test_problems_keep_the_arguments_they_were_read_with(dumps):
    x = np.linspace(-1.0, 1.0, 4)
    for given in ({}, {"y": np.ones(4)}):
        problem = si.from_numpyro(regression, x, noise=0.2, observed=("y", "count"), **given)
        again = pickle.loads(dumps(problem))
        z, y = problem.simulate(jax.random.key(0))
        assert again.latents == problem.latents and again.observed == problem.observed
        assert again.log_joint(z, y) == problem.log_joint(z, y)
        jax.tree.map(
            np.testing.assert_array_equal, again.simulate(jax.random.key(1)), problem.simulate(jax.random.key(1))
        )
    assert copy.copy(problem) is problem and copy.deepcopy(posterior := {"problem": problem})["problem"] is problem
    assert posterior["problem"] is problem


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::scoreinfer.errors.MisspecificationWarning")  # nothing is learned here
def test_posteriors_of_paths_draw_the_same():
    fitted = si.SMDP(MODES.model, "x", num_simulations=200, num_steps=0, **QUIET).fit(jax.random.key(0))
    again = pickle.loads(pickle.dumps(fitted))
    same_draws(fitted, again, y=jnp.array([-1.0, 0.5]))
    assert copy.deepcopy(again.process) is again.process
    for name in ("ts", "scale"):
        np.testing.assert_array_equal(getattr(again.process, name), getattr(fitted.process, name))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::scoreinfer.errors.MisspecificationWarning")
def test_learned_starts_draw_the_same():
    rate = UnknownRate(ornstein_uhlenbeck(4)._replace(rates=np.ones(1), start_sd=np.ones(1)), (0, 2, 4))
    fitted = si.SMDP(rate.model, "x", num_steps=5, width=8, depth=1, **QUIET).fit(jax.random.key(0))
    same_draws(fitted, pickle.loads(pickle.dumps(fitted)), y=np.array([[0.6], [0.3], [0.4]], np.float32))


def test_foreign_problems_come_back():
    problem = si.from_numpyro(prior)
    asked = pickle.loads(pickle.dumps(with_outputs(problem, {"y": (2,)})))
    assert np.array_equal(asked.read((), {"y": [1.0, 2.0]})["y"], [1.0, 2.0])
    known = with_likelihood(problem, likelihood, jnp.arange(3.0)[:, None], {"y": jnp.arange(6.0).reshape(3, 2)})
    again, row = pickle.loads(pickle.dumps(known)), jnp.array([0.3, 0.1, -0.2])
    y = again.read((), {"y": np.zeros(2)})
    assert again.observation.log_likelihood(row, y) == known.observation.log_likelihood(row, y)
    assert again.observed == known.observed and not again.has_density


def test_draws_are_pickled_without_a_problem_that_cannot_be():
    """Models in functions, lambdas, problems made by hand; what needs the problem then says so."""
    kept = si.from_numpyro(location_scale)
    problems = (
        kept,
        si.from_numpyro(lambda y=None: location_scale(y)),
        kept.__class__(**vars(kept) | {"recipe": None}),
    )
    for problem in problems:
        problem = dataclasses.replace(problem, constrain=lambda z: z) if problem is problems[2] else problem
        draws = si.Draws({"a": jnp.arange(3.0)}, jnp.ones((3, 2)), None, jnp.zeros(3), None, {"y": Y1}, problem=problem)
        again = pickle.loads(pickle.dumps(draws))
        assert (again.problem is None) == (problem is not kept)
        jax.tree.map(np.testing.assert_array_equal, again[:6], draws[:6])
        assert copy.deepcopy(draws).problem is problem and copy.copy(draws).problem is problem
    with pytest.raises(ValueError, match=r"as after pickling.*draws\._replace\(problem=posterior\.problem\)"):
        again.to_arviz(jax.random.key(0), log_likelihood=True)


def test_models_that_cannot_be_imported_are_named():
    def local(y=None):
        location_scale(y)

    for model in (local, lambda y=None: location_scale(y)):
        problem = si.from_numpyro(model)
        with pytest.raises(pickle.PicklingError, match=r"move the model to a module.*posterior\.save\(path\)"):
            pickle.dumps(with_outputs(problem, {"y": ()}))
        assert copy.deepcopy([problem])[0] is problem
        cloudpickle = pytest.importorskip("cloudpickle")
        again, z = pickle.loads(cloudpickle.dumps(problem)), jnp.ones(2)
        assert again.log_prior(z) == problem.log_prior(z)
