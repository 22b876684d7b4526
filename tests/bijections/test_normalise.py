import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import oracles
from scoreinfer.bijections.asinh import fit_tails
from scoreinfer.bijections.base import fisher_product, pull
from scoreinfer.bijections.noncentring import fit_scales
from scoreinfer.montecarlo.moves import CHAIN_LENGTH, SHORT, LangevinMoves
from scoreinfer.montecarlo.population import first_population
from scoreinfer.montecarlo.reference import Overdispersed
from scoreinfer.montecarlo.tempering import advance, begin

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def funnel():
    """Draws of a funnel, and the gradients of its log density."""
    target = oracles.funnel(4)
    values = jnp.asarray(target.sample(np.random.default_rng(0), 8192), jnp.float32)
    return target, values, -jax.vmap(jax.grad(target.potential))(values)


@pytest.fixture(scope="module")
def hierarchy():
    """Draws of groups' effects about their mean, shifted and scaled by it and by their log spread, and gradients."""

    def log_density(z):
        mean, log_spread, effects = z[0], z[1], z[2:]
        unit = (effects - mean) * jnp.exp(-log_spread)
        return -0.5 * ((mean / 3) ** 2 + log_spread**2 + (unit**2).sum()) - effects.size * log_spread

    mean, log_spread, *unit = np.random.default_rng(1).normal(size=(6, 8192)) * np.array([[3.0], *[[1.0]] * 5])
    values = jnp.asarray(np.stack([mean, log_spread, *(mean + np.exp(log_spread) * unit)], axis=1), jnp.float32)
    return values, jax.vmap(jax.grad(log_density))(values)


def test_scales_of_a_funnel_and_of_a_hierarchy_are_undone(funnel, hierarchy):
    """What is left is normal and independent: of that the product of variance and Fisher information is 1."""
    for values, gradient in (funnel[1:], hierarchy):
        scales = jax.jit(fit_scales)(values, gradient)
        w = scales.inverse(values)
        assert fisher_product(values, gradient).max() > 10
        assert np.allclose(fisher_product(w, pull(scales, w, gradient)), 1.0, atol=0.15)
        assert np.allclose(scales.forward(w), values, rtol=1e-4, atol=1e-4)


def test_scales_of_separate_modes_are_left_alone():
    fit = jax.jit(fit_scales)
    for density in oracles.densities()[:2]:
        values = jnp.asarray(density.sample(np.random.default_rng(0), 4096), jnp.float32)
        scales = fit(values, -jax.vmap(jax.grad(density.potential))(values))
        assert (np.asarray(scales.inverse(values)) == values).all()


def test_tails_are_bent_and_modes_are_not(funnel):
    _, values, gradient = funnel
    tails = jax.jit(fit_tails)(values, gradient)
    assert (np.asarray(tails.bend) > 0).tolist() == [False, True, True, True]
    w = tails.inverse(values)
    before, after = (np.asarray(fisher_product(v, g)) for v, g in ((values, gradient), (w, pull(tails, w, gradient))))
    assert (after[1:] < 0.02 * before[1:]).all()
    two_modes = oracles.gaussian_mixture_density("two", np.array([[-1.0, 0.0], [30.0, 5.0]]), 0.3, 30.0)
    values = jnp.asarray(two_modes.sample(np.random.default_rng(0), 2000), jnp.float32)
    assert (np.asarray(fit_tails(values, -jax.vmap(jax.grad(two_modes.potential))(values)).bend) == 0).all()


def test_a_parent_scales_what_it_explains_a_little():
    """Data hide the scale of the last two coordinates in part: it explains a tenth of their log squares."""
    slopes = np.array([1.0, 1.0, 1.0, 0.4, 0.4])
    rng = np.random.default_rng(3)
    parent = rng.normal(size=(8000, 1))
    w = rng.normal(size=(8000, 5))
    scale = np.exp(parent * slopes)
    values, of_rest = np.hstack([parent, w * scale]), -w / scale
    of_parent = -parent + ((w**2 - 1) * slopes).sum(1, keepdims=True)
    gradient = jnp.asarray(np.hstack([of_parent, of_rest]), jnp.float32)
    scales = jax.jit(fit_scales)(jnp.asarray(values, jnp.float32), gradient)
    (row,) = np.flatnonzero(np.asarray(scales.parents) == 0)
    found = np.asarray(scales.log_scale[1 + row] / scales.width[row])
    assert np.allclose(found, [0.0, *slopes], atol=0.06)


@pytest.mark.parametrize(("short", "length"), [(False, CHAIN_LENGTH), (True, SHORT)])
def test_moves_leave_a_funnel_where_it_is(funnel, short, length):
    target, values, _ = funnel
    log_density = jax.tree_util.Partial(lambda z: -target.potential(z))
    moves = LangevinMoves(Overdispersed(jnp.zeros(4), jnp.ones(4)), log_density, np.array(24), short)
    particles = begin(moves, first_population(values, len(values)), np.array(1.0))
    for key in jax.random.split(KEY, 3):
        particles = advance(key, moves, particles, np.array(1.0))
    assert np.allclose(
        particles.seen.target_gradient, -jax.vmap(jax.grad(target.potential))(particles.values), rtol=1e-2, atol=1e-2
    )
    # Starts are independent and exact, so the states of different chains are. Neighbours are of one chain.
    v, unit = (np.asarray(part[::length]) for part in (particles.values[:, 0], particles.values[:, 1:]))
    assert np.abs(v - values[::length, 0]).mean() > 0.5  # they have moved
    bound = 5 / np.sqrt(len(v))
    assert abs(v.mean()) < 3 * bound
    assert abs(v.std() / 3 - 1) < bound / np.sqrt(2)
    unit = unit * np.exp(-v[:, None] / 2)
    assert np.abs(unit.mean(0)).max() < bound
    assert np.abs(unit.std(0) - 1).max() < bound / np.sqrt(2)


def test_overdispersed_is_a_multivariate_t():
    reference = Overdispersed(jnp.array([1.0, -2.0]), jnp.array([2.0, 0.5]))
    z = np.array([[0.0, 0.0], [30.0, -2.5]])
    known = stats.multivariate_t.logpdf(z, [1.0, -2.0], np.diag([4.0, 0.25]), 3.0)
    assert np.allclose(jax.vmap(reference.log_density)(jnp.asarray(z, jnp.float32)), known, rtol=1e-4)
    draws = np.asarray(jax.vmap(reference.sample)(jax.random.split(KEY, 4000)), np.float64)
    marginals = (draws - [1.0, -2.0]) / [2.0, 0.5]
    assert min(stats.kstest(column, stats.t(3).cdf).pvalue for column in marginals.T) > 1e-4
