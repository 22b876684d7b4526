"""Every process, score and bijection keeps its laws; see `transport_laws`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transport_laws as laws
from scoreinfer.samplers.diffusion import ReverseSDE

SIGMAS = 5


def cases(registry):
    """Run a test for every entry of a registry."""
    return pytest.mark.parametrize("name", registry())


# --- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def process(name):
    with jax.enable_x64(True):
        yield laws.processes()[name]


@cases(laws.processes)
@pytest.mark.parametrize("law", [laws.marginal_is_off, laws.coefficients_are_off, laws.composition_is_off])
def test_marginals_coefficients_and_transitions_are_of_one_process(process, law):
    assert law(process) < 1e-6


@cases(laws.processes)
def test_densities_are_those_of_multivariate_normals(process):
    assert laws.density_is_off(process) < 1e-6


@cases(laws.processes)
def test_simulated_steps_have_the_marginal(process):
    assert laws.simulation_is_off(process) < SIGMAS


@cases(laws.steps)
def test_coefficients_are_the_derivatives_of_a_short_step(name):
    with jax.enable_x64(True):
        assert laws.short_step_is_off(laws.steps()[name]) < 1e-4


@cases(laws.physics)
def test_paths_of_physics_are_made_of_its_steps(name):
    assert laws.paths_are_off(laws.physics()[name]) < SIGMAS


@cases(laws.noisings)
def test_levels_increase_and_are_those_of_the_marginals(name):
    process = laws.noisings()[name].process
    levels = process.levels(12)
    marginals = jax.vmap(process.marginal)(jnp.linspace(0.0, 1.0, 13))
    assert (np.diff(levels) > 0).all()
    np.testing.assert_allclose(levels, marginals.factor / marginals.mean, rtol=1e-5)


def test_a_schedule_alone_is_no_process():
    with pytest.raises(TypeError, match="Noising"):
        ReverseSDE(laws.VP())


# --- scores --------------------------------------------------------------------------------------------------------


@cases(laws.scores)
@pytest.mark.parametrize(
    "law", [laws.tweedie_is_off, laws.posterior_is_off, laws.moments_are_off, laws.jacobian_is_off]
)
def test_exact_scores_are_those_of_the_noisy_marginal(name, law):
    assert law(laws.scores()[name]()) < 1e-3


@cases(lambda: laws.scores() | laws.learned_scores())
def test_parts_of_a_score_agree(name):
    case = (laws.scores() | laws.learned_scores())[name]()
    assert laws.parts_are_off(getattr(case, "score", case)) < 1e-5


# --- bijections ----------------------------------------------------------------------------------------------------


@cases(laws.bijections)
@pytest.mark.parametrize(
    "law",
    [
        laws.inverse_is_off,
        laws.log_det_is_off,
        laws.pull_is_off,
        laws.batch_is_off,
        laws.vmap_is_off,
    ],
)
def test_bijections_change_variables(name, law):
    assert law(laws.bijections()[name]) < 1e-3


def test_affine_maps_compose():
    first, second = laws.bijections()["affine"], laws.Affine(jnp.arange(3.0), jnp.tril(jnp.full((3, 3), 0.5)))
    w = laws.inputs()
    np.testing.assert_allclose(second.after(first).forward(w), second.forward(first.forward(w)), rtol=1e-5, atol=1e-5)
