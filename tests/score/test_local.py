"""Local scores: exact where a window is the path, nearer to the path's score the wider the window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scoreinfer.score import AbstractScore, GaussianScore
from scoreinfer.score.local import LocalScore, windows

DIM, LEVEL = 2, jnp.array(0.8)


def chain(times):
    """Compute the covariance of a stationary autoregression with two coupled components."""
    transition = np.array([[0.8, 0.3], [-0.3, 0.8]]) * 0.95
    step = np.eye(2) - transition @ transition.T  # stationary covariance: the identity
    assert np.linalg.eigvalsh(step).min() > 0
    powers = [np.linalg.matrix_power(transition, lag) for lag in range(times)]
    block = lambda i, j: powers[i - j] if i >= j else powers[j - i].T  # noqa: E731
    covariance = np.block([[block(i, j) for j in range(times)] for i in range(times)])
    return GaussianScore(jnp.zeros(times * DIM), jnp.asarray(covariance, jnp.float32))


def test_wider_windows_come_nearer_to_the_score_of_the_path():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(15 * DIM,)), jnp.float32) * 1.3
    exact = chain(15).denoise(LEVEL, x)
    errors = [
        float(jnp.abs(LocalScore(chain(2 * k + 1), k, DIM).denoise(LEVEL, x) - exact).max()) for k in (1, 2, 4, 7)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[0] > 0.05 and errors[2] < 0.05 and errors[3] < 1e-4


def test_moments_are_those_of_the_windows():
    x = jnp.linspace(-1.0, 2.0, 9 * DIM)
    local, window = LocalScore(chain(5), 2, DIM), chain(5)
    mean, variance = local.moments(LEVEL, x)
    np.testing.assert_allclose(mean, local.denoise(LEVEL, x), atol=1e-5)
    centre = window.moments(LEVEL, x[2 * DIM : 7 * DIM])[1][2 * DIM : 3 * DIM]
    np.testing.assert_allclose(variance[4 * DIM : 5 * DIM], centre, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_jacobian_is_that_of_the_denoiser(k):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(9 * DIM,)), jnp.float32)
    local = LocalScore(Bent(chain(2 * k + 1)), k, DIM)
    plain = jax.jacfwd(lambda v: local.denoise(LEVEL, v))(x)
    np.testing.assert_allclose(local.jacobian(LEVEL, x), plain, atol=1e-5)
    rows = jnp.eye(9 * DIM)[::4]
    np.testing.assert_allclose(local.pull_rows(LEVEL, x, rows), plain[::4], atol=1e-5)


def test_every_window_is_told_its_own_context():
    x, context = jnp.linspace(-1.0, 2.0, 9 * DIM), jnp.sin(jnp.arange(18.0)).reshape(9, 2)
    local = LocalScore(Moved(chain(5)), 2, DIM, context)
    away = local.denoise(LEVEL, x) - LocalScore(chain(5), 2, DIM).denoise(LEVEL, x)
    sums = context.sum(1)
    centres = jnp.convolve(sums, jnp.ones(5), "valid")[jnp.clip(jnp.arange(9) - 2, 0, 4)]
    np.testing.assert_allclose(away.reshape(9, DIM), jnp.tile(centres[:, None], DIM), atol=1e-5)
    plain = jax.jacfwd(lambda v: local.denoise(LEVEL, v))(x)
    np.testing.assert_allclose(local.jacobian(LEVEL, x), plain, atol=1e-5)


class Moved(AbstractScore):
    """A denoiser that is moved by the sum of what it is told."""

    straight: AbstractScore

    def denoise(self, level, x, y=None):
        return self.straight.denoise(level, x) + y.sum()


class Bent(AbstractScore):
    """A denoiser with a curve, so that its Jacobian depends on the place."""

    straight: AbstractScore

    def denoise(self, level, x, y=None):
        return jnp.sin(self.straight.denoise(level, x, y)) + 0.1 * x[::-1] ** 2


def test_windows_are_all_pieces_in_order():
    cut = windows(jnp.arange(12.0).reshape(6, 2), 1)
    assert cut.shape == (4, 3, 2)
    np.testing.assert_array_equal(cut[2, 0], [4.0, 5.0])


@pytest.mark.parametrize("size", [4, 9])
def test_a_window_longer_than_the_path_is_refused(size):
    with pytest.raises(ValueError, match="window of 5 times"):
        LocalScore(chain(5), 2, DIM).denoise(LEVEL, jnp.zeros(size))
