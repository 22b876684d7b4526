"""Tapers are Gaspari and Cohn's and positive definite; blocks hold what lies near."""

import jax.numpy as jnp
import numpy as np
import pytest

from scoreinfer.filters.taper import everywhere, gaspari_cohn, grid, near

LINE = np.abs(np.subtract.outer(np.arange(9.0), np.arange(9.0)))


def test_the_taper_is_the_convolution_of_a_tent_with_itself():
    """In space, in cylindrical coordinates: how the curve is defined."""
    along, across = np.meshgrid(np.linspace(-1.0, 3.0, 801), np.linspace(0.0, 1.0, 201), indexing="ij")
    shifts = np.linspace(0.0, 2.3, 13)
    overlap = [
        np.sum(across * np.maximum(1 - np.hypot(along, across), 0) * np.maximum(1 - np.hypot(along - r, across), 0))
        for r in shifts
    ]
    np.testing.assert_allclose(gaspari_cohn(jnp.asarray(shifts), 1.0), np.array(overlap) / overlap[0], atol=2e-4)
    assert np.allclose(gaspari_cohn(jnp.asarray(3.0 * shifts), 3.0), gaspari_cohn(jnp.asarray(shifts), 1.0), atol=1e-6)


def test_rounding_makes_no_taper_negative():
    """Just inside its end the curve is smaller than the rounding of its terms; filters take its root."""
    assert gaspari_cohn(jnp.sqrt(jnp.arange(70.0)), 4.0).min() == 0.0


@pytest.mark.parametrize("locality", [grid((30,), 6.0), grid((6, 5), 2.0, periodic=False), near(LINE, 3.0)])
def test_tapers_are_positive_definite(locality):
    everyone = jnp.arange(locality.num)
    taper = np.asarray(locality.taper(everyone[:, None], everyone), float)
    assert np.linalg.eigvalsh(taper).min() > -1e-5 and np.all(np.diagonal(taper) == 1)


@pytest.mark.parametrize(
    ("locality", "distance"),
    [
        (grid((9,), 3.0, periodic=False), LINE),
        (grid((9,), 3.0), np.minimum(LINE, 9 - LINE)),
        (near(LINE, 3.0), LINE),
        (near(lambda i, j: jnp.abs(i - j).astype(float), 3.0, 9), LINE),
        (grid((4, 4), 9.0), None),
        (everywhere(5), np.zeros((5, 5))),
    ],
)
def test_blocks_hold_what_lies_near_once_and_the_centre_first(locality, distance):
    for i, (row, present) in enumerate(zip(np.asarray(locality.index), np.asarray(locality.present), strict=True)):
        assert row[0] == i and present[0]
        expected = range(locality.num) if distance is None else np.flatnonzero(distance[i] <= 3.0)
        assert sorted(row[present]) == list(expected)


def test_distances_on_a_closed_surface():
    far = grid((4, 6), 2.0).distance
    assert far(jnp.array(0), jnp.array([5, 18, 14])).tolist() == pytest.approx([1.0, 1.0, 8**0.5])


@pytest.mark.parametrize("matrix", [LINE[:4], LINE + 1.0, np.triu(LINE)])
def test_what_is_no_distance_is_refused(matrix):
    with pytest.raises(ValueError, match="symmetric matrix of distances"):
        near(matrix, 2.0)
    with pytest.raises(ValueError, match="needs `num`"):
        near(lambda i, j: jnp.abs(i - j), 2.0)


def matrix_like(*args, **kwargs):
    """Blocks from a matrix."""
    return near(LINE, *args, **kwargs)


def grid_like(*args, **kwargs):
    """The same blocks from a grid."""
    return grid((9,), *args, periodic=False, **kwargs)


@pytest.mark.parametrize("make", [matrix_like, grid_like])
def test_radius_zero_means_independent_and_bad_numbers_are_refused(make):
    alone = make(0.0)
    assert alone.index.tolist() == [[i] for i in range(9)]
    assert alone.taper(jnp.arange(9), jnp.arange(9)).tolist() == [1.0] * 9
    assert make(4.0).half_width == 2.0 and make(4.0, half_width=0.5).half_width == 0.5
    for bad in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="`half_width` must be positive"):
            make(4.0, half_width=bad)
    with pytest.raises(ValueError, match="`radius` must not be negative"):
        make(-1.0)
