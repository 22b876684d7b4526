"""Laws of every noising process: closed marginals agree with the SDE's own coefficients and with composed steps."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from scoreinfer.process import VE, VP, SubVP

PROCESSES = [VE(), VP(), SubVP()]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_steps_compose_to_the_marginal(process):
    times = jnp.linspace(0.0, 1.0, 7)
    x, variance = jnp.array([0.7]), jnp.array(0.0)
    for t0, t1 in itertools.pairwise(times):
        mean, extra = process.step(t0, t1, x)
        variance = (mean[0] / x[0]) ** 2 * variance + extra
        x = mean
    scale = jnp.exp(process.log_scale(times[-1]) - process.log_scale(times[0]))
    end, start = times[-1], times[0]
    expected = jnp.exp(2 * process.log_scale(end)) * (process.level(end) ** 2 - process.level(start) ** 2)
    assert jnp.allclose(x, 0.7 * scale, rtol=1e-4)
    assert jnp.allclose(variance, expected, rtol=1e-3)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_coefficients_are_the_derivatives_of_a_short_step(process):
    t, h, x = jnp.array(0.6), 1e-3, jnp.array([1.3])
    mean, variance = process.step(t - h / 2, t + h / 2, x)
    assert jnp.allclose((mean - x) / h, process.drift(t, x), rtol=0.05, atol=0.05)
    assert jnp.allclose(variance / h, process.diffusion(t) ** 2, rtol=0.05)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_levels_increase(process):
    levels = process.levels(12)
    assert levels.shape == (13,)
    assert bool((jnp.diff(levels) > 0).all())
    assert jnp.allclose(levels[jnp.array([0, -1])], jax.vmap(process.level)(jnp.array([0.0, 1.0])))
