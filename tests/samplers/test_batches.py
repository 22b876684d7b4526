"""Weights under mixtures, and where densities are zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from doubles import location_scale_problem
from scoreinfer.errors import UnsupportedModel
from scoreinfer.montecarlo.reference import Prior
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import Target, Weighted, _weighted
from scoreinfer.samplers.batches import Defence, mixed
from scoreinfer.samplers.single import learn


def without(**parts):
    return Problem(**vars(location_scale_problem()) | parts)


def test_draws_that_the_model_rules_out_weigh_nothing_in_a_mixture():
    """Whatever the proposal's density is there: zero, positive or unknown."""
    nothing = jnp.full(3, -jnp.inf)
    drawn = Weighted(jnp.zeros((3, 2)), jnp.array([jnp.nan, -jnp.inf, jnp.inf]), nothing)
    np.testing.assert_array_equal(mixed(Defence(Prior(location_scale_problem()), 0.5), drawn).log_weight, nothing)


def test_weights_stay_unknown_where_the_density_is():
    drawn = Weighted(jnp.zeros((1, 2)), jnp.full(1, jnp.nan), jnp.full(1, jnp.nan))
    assert np.isnan(mixed(Defence(Prior(location_scale_problem()), 0.5), drawn).log_weight).all()


@pytest.mark.parametrize(("log_q", "expected"), [(-jnp.inf, -jnp.inf), (1.0, -jnp.inf), (jnp.nan, jnp.nan)])
def test_draws_that_model_and_proposal_rule_out_weigh_nothing(log_q, expected):
    target = Target(without(log_likelihood=lambda z, y: -jnp.inf), {"y": jnp.zeros(5)})
    np.testing.assert_array_equal(_weighted(target, jnp.zeros(2), jnp.asarray(log_q)).log_weight, expected)


def test_one_posterior_without_a_density_is_refused_before_it_is_learned():
    with pytest.raises(UnsupportedModel, match="no density: use `fit`"):
        learn(jax.random.key(0), Target(without(has_density=False), {"y": jnp.zeros(5)}))
