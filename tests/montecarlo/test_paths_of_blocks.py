"""Matrices that couple neighbouring times, Hamiltonian moves, and paths drawn backwards, against dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np

from scoreinfer.montecarlo.feynman_kac import AbstractFeynmanKac, draw_backwards, run
from scoreinfer.montecarlo.hamiltonian import Place, hamiltonian_step
from scoreinfer.montecarlo.tridiagonal import factorise

TIMES, DIM = 4, 2


def blocks(seed=0):
    """Make a positive definite matrix that couples neighbouring times, and its blocks."""
    rng = np.random.default_rng(seed)
    size = TIMES * DIM
    root = np.zeros((size, size))
    for k in range(TIMES):
        here = slice(k * DIM, (k + 1) * DIM)
        root[here, here] = np.tril(rng.normal(size=(DIM, DIM)), -1) + np.diag(rng.uniform(1.0, 2.0, DIM))
        if k:
            root[here, (k - 1) * DIM : k * DIM] = 0.5 * rng.normal(size=(DIM, DIM))
    matrix = root @ root.T
    four = matrix.reshape(TIMES, DIM, TIMES, DIM).swapaxes(1, 2)
    diagonal = np.stack([four[k, k] for k in range(TIMES)])
    below = np.stack([four[k + 1, k] for k in range(TIMES - 1)])
    return matrix, root, factorise(jnp.asarray(diagonal, jnp.float32), jnp.asarray(below, jnp.float32))


def test_factors_solve_as_dense_ones_do():
    _, root, factor = blocks()
    v = np.random.default_rng(1).normal(size=(TIMES, DIM))
    found = factor.solve(jnp.asarray(v, jnp.float32)), factor.solve_transposed(jnp.asarray(v, jnp.float32))
    np.testing.assert_allclose(found[0].ravel(), np.linalg.solve(root, v.ravel()), atol=1e-4)
    np.testing.assert_allclose(found[1].ravel(), np.linalg.solve(root.T, v.ravel()), atol=1e-4)


def test_hamiltonian_moves_leave_a_density_invariant():
    """Exact draws of a skewed density stay exact: each number is the logarithm of an exponential one."""
    _, _, factor = blocks()
    num = 4000
    exact = np.log(np.random.default_rng(0).gamma(1.0, size=(num, TIMES, DIM)))  # density exp(v - exp(v))

    def see(x):
        log_density = lambda x: (x - jnp.exp(x)).sum()  # noqa: E731
        return Place(x, *jax.value_and_grad(log_density)(x), ())

    def moved(key, x):
        keys = jax.random.split(key, 3)
        step = lambda place, key: hamiltonian_step(key, see, place, factor, jnp.float32(0.6), 4)  # noqa: E731
        place, accept = jax.lax.scan(step, see(x), keys)
        return place.x, accept.mean()

    x, accept = jax.jit(jax.vmap(moved))(jax.random.split(jax.random.key(0), num), jnp.asarray(exact, jnp.float32))
    assert 0.5 < float(accept.mean()) < 0.98
    for power in (1, 2, 3):
        moments = np.asarray(x, np.float64) ** power
        expected, error = (exact**power).mean(), (exact**power).std() / np.sqrt(num)
        assert np.abs(moments.mean(0) - expected).max() < 5 * error * np.sqrt(1 + 1 / (TIMES * DIM))


class Walk(AbstractFeynmanKac[jax.Array]):
    """A Gaussian walk that is seen at every time as 1."""

    num_steps: int = 3

    def initial(self, key):
        return jax.random.normal(key, ())

    def log_initial(self, first):
        return -0.5 * (first - 1) ** 2

    def propagate(self, key, k, old):
        return old + jax.random.normal(key, ())

    def log_potential(self, k, old, new):
        return -0.5 * (new - 1) ** 2


def walk_covariance():
    precision = 2 * np.eye(4) + np.diag([1.0, 1.0, 1.0, 0.0])
    precision -= np.eye(4, k=1) + np.eye(4, k=-1)
    return np.linalg.inv(precision)


def test_sweeps_around_a_reference_are_gibbs_steps():
    """Exact paths stay exact, however few the particles, and forget where they began."""
    covariance, num = walk_covariance(), 4000
    mean = covariance @ np.ones(4)
    exact = mean + np.random.default_rng(0).normal(size=(num, 4)) @ np.linalg.cholesky(covariance).T

    def swept(key, path):
        for_run, for_path = jax.random.split(key)
        found = run(for_run, Walk(), 4, path)
        return draw_backwards(for_path, found.states, found.log_weight, lambda k, old, new: -0.5 * (new - old) ** 2)

    keys = jax.random.split(jax.random.key(1), num)
    x = np.asarray(jax.jit(jax.vmap(swept))(keys, jnp.asarray(exact, jnp.float32)), np.float64)
    assert (np.abs(x.mean(0) - mean) < 5 * np.sqrt(covariance.diagonal() / num)).all()
    square = np.outer(covariance.diagonal(), covariance.diagonal()) + covariance**2
    assert (np.abs(np.cov(x.T) - covariance) < 5 * np.sqrt(square / num)).all()
    assert ((x != exact.astype(np.float32)).mean(0) > 0.3).all()
