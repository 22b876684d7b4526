"""Terms for diffrax: the closed forms of a Gaussian, on a noising process and on a critically damped one."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from scoreinfer.process import VP, CriticallyDamped, Noising
from scoreinfer.samplers.terms import LevelScore, flow_terms, reverse_terms
from scoreinfer.score import GaussianScore
from scoreinfer.score.velocity import GaussianVelocity

MEAN, VARIANCE = jnp.array([1.5, -0.5]), jnp.array([0.3, 1.7])


def test_the_flow_of_a_gaussian_is_its_affine_map():
    process = Noising(VP())
    score = LevelScore(process, GaussianScore(MEAN, jnp.diag(VARIANCE)))
    start, (scale, factor) = jnp.array([0.7, -1.2]), process.marginal(jnp.array(1.0))
    first, noise = process.marginal(jnp.array(0.0))
    unit = (start - scale * MEAN) / jnp.sqrt(scale**2 * VARIANCE + factor**2)
    expected = first * MEAN + unit * jnp.sqrt(first**2 * VARIANCE + noise**2)
    control = diffrax.PIDController(rtol=1e-5, atol=1e-6)
    found = diffrax.diffeqsolve(
        flow_terms(process, score), diffrax.Tsit5(), 1.0, 0.0, -0.01, start, stepsize_controller=control
    )
    np.testing.assert_allclose(found.ys[0], expected, atol=1e-3)


def test_the_flow_of_a_damped_gaussian_keeps_the_covariances():
    """The flow is linear, x_0 = A x_1 + b, with A C_1 A^T = C_0."""
    damped, one = CriticallyDamped(), jnp.array([0.4])
    velocity = GaussianVelocity(damped, jnp.zeros(1), one)
    score = lambda t, u: jnp.stack([jnp.zeros_like(u[0]), velocity(t, u)])  # noqa: E731
    times = 0.8, 0.2

    def covariance(t):
        move, noise = damped.marginal(jnp.array(t))
        return noise @ noise.T + 0.4 * jnp.outer(move[:, 0], move[:, 0])

    def solve(u):
        control = diffrax.PIDController(rtol=1e-5, atol=1e-7)
        terms = flow_terms(damped, score)
        return diffrax.diffeqsolve(terms, diffrax.Tsit5(), *times, -0.01, u, stepsize_controller=control).ys[0]

    matrix = jnp.concatenate([solve(u[:, None]) for u in jnp.eye(2)], axis=1)
    np.testing.assert_allclose(matrix @ covariance(0.8) @ matrix.T, covariance(0.2), atol=1e-3)


def test_the_reverse_sde_of_a_gaussian_ends_in_it():
    process, num, num_steps = Noising(VP()), 2000, 400
    score = LevelScore(process, GaussianScore(MEAN, jnp.diag(VARIANCE)))

    @jax.jit
    @jax.vmap
    def draw(key):
        for_start, for_path = jax.random.split(key)
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), for_path)
        start, step = jax.random.normal(for_start, (2,)), -1.0 / num_steps
        terms = reverse_terms(process, score, path)
        return diffrax.diffeqsolve(terms, diffrax.Euler(), 1.0, 0.0, step, start, max_steps=num_steps + 1).ys[0]

    x = draw(jax.random.split(jax.random.key(0), num))
    assert (jnp.abs(x.mean(0) - MEAN) < 5 * jnp.sqrt(VARIANCE / num) + 0.01).all()
    assert (jnp.abs(x.var(0) / VARIANCE - 1) < 5 * (2 / num) ** 0.5 + 0.02).all()
