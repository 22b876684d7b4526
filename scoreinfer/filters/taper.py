"""Localisation: which points lie near which, and how far a sample covariance between two of them is believed.

A small ensemble cannot tell a weak correlation from none. A taper is a number between 0 and 1 that falls with the
distance of two points. It multiplies their sample covariance, or the precision of what one of them tells of the other.
Where the taper is positive definite, so is every block of its product with a sample covariance (Schur's theorem),
although the sample covariance itself has no more than N - 1 directions.

References: Gaspari and Cohn 1999, QJRMS 125, equation 4.10; Houtekamer and Mitchell 2001, MWR 129.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Numbered = Int[Array, "..."]
Distance = Callable[[Numbered, Numbered], Float[Array, "..."]]
"""Distances between points, given by their numbers; the arguments broadcast against each other."""


def gaspari_cohn(distance: Float[Array, "*shape"], half_width: float | Float[Array, ""]) -> Float[Array, "*shape"]:
    """Compute the taper rho of Gaspari and Cohn 1999, equation 4.10: a fifth-order curve, near a Gaussian's.

    Args:
        distance: distances, not negative.
        half_width: c; the taper is .208 at distance c and 0 from 2 c on. It is near exp(-(r / c)^2 1.67).

    Exactness: exact: positive definite for distances in the plane or in space; along a ring where 2 c is less than half
        of its length.

    >>> gaspari_cohn(jnp.array([0.0, 1.0, 2.0, 5.0]), 1.0).round(3).tolist()
    [1.0, 0.20800000429153442, 0.0, 0.0]
    """
    r = jnp.abs(distance) / half_width
    near = (((-0.25 * r + 0.5) * r + 0.625) * r - 5.0 / 3.0) * r**2 + 1.0
    far = ((((r / 12.0 - 0.5) * r + 0.625) * r + 5.0 / 3.0) * r - 5.0) * r + 4.0 - 2.0 / (3.0 * jnp.maximum(r, 1.0))
    return jnp.where(r < 1.0, near, jnp.where(r < 2.0, jnp.maximum(far, 0.0), 0.0))  # rounding makes it negative near 2


class Wrapped(eqx.Module):
    """Euclidean distances between points with coordinates, along closed axes the shorter way round."""

    position: Float[Array, "num axes"]
    period: Float[Array, " axes"]

    def __call__(self, i: Numbered, j: Numbered) -> Float[Array, "..."]:
        """Compute the distance of i from j."""
        way = jnp.abs(self.position[i] - self.position[j])
        return jnp.sqrt(jnp.sum(jnp.minimum(way, self.period - way) ** 2, axis=-1))


class Listed(eqx.Module):
    """Distances from a matrix."""

    matrix: Float[Array, "num num"]

    def __call__(self, i: Numbered, j: Numbered) -> Float[Array, "..."]:
        """Look the distance of i from j up."""
        return self.matrix[i, j]


class Locality(eqx.Module):
    """Blocks: for every point those near it, itself first; and the taper between any two points.

    Args:
        index: numbers of the points of every block.
        present: which of them exist; blocks of different sizes are padded.
        distance: distances between points.
        half_width: half-width of the taper.

    Exactness: biased: what a block does not hold, or the taper suppresses, is taken as uncorrelated.
    """

    index: Int[Array, "num block"]
    present: Bool[Array, "num block"]
    distance: Distance
    half_width: float = eqx.field(static=True)

    @property
    def num(self) -> int:
        """Number of points."""
        return self.index.shape[0]

    def taper(self, i: Numbered, j: Numbered) -> Float[Array, "..."]:
        """Compute rho of the distance between i and j."""
        return gaspari_cohn(self.distance(i, j), self.half_width)


def _half_width(radius: float, half_width: float | None) -> float:
    """Check radius and half-width; choose the half-width where it is not given."""
    if not radius >= 0.0:
        raise ValueError(f"`radius` must not be negative, got {radius:g}. Give 0 for components that are independent.")
    if half_width is None:
        return 0.5 * radius if radius > 0.0 else 1.0  # a block of one point knows the distance 0 alone
    if not half_width > 0.0:
        raise ValueError(
            f"`half_width` must be positive, got {half_width:g}. Give `radius=0` for components that are independent, "
            "or leave `half_width` out."
        )
    return half_width


def grid(shape: Sequence[int], radius: float, *, periodic: bool = True, half_width: float | None = None) -> Locality:
    """Make the blocks of a regular grid, neighbours one apart, points in the order of `numpy.ravel`.

    Args:
        shape: number of points along each axis.
        radius: a block holds the points not farther from its centre than this; 0 makes all independent.
        periodic: whether the axes are closed.
        half_width: half-width of the taper; where not given half of the radius, at which the taper then ends.

    Raises:
        ValueError: if ``radius`` is negative, or ``half_width`` is not positive.

    >>> grid((10,), 2.0).index[0].tolist()
    [0, 9, 1, 8, 2]
    """
    size = np.asarray(shape)
    reach = [np.arange(-min(int(radius), (n - 1) // 2), min(int(radius), n // 2) + 1) for n in size]
    if not periodic:
        reach = [np.arange(-min(int(radius), n - 1), min(int(radius), n - 1) + 1) for n in size]
    offset = np.stack([axis.ravel() for axis in np.meshgrid(*reach, indexing="ij")], axis=1)
    offset = offset[(offset**2).sum(1) <= radius**2]
    offset = offset[np.argsort((offset**2).sum(1), kind="stable")]
    position = np.stack([axis.ravel() for axis in np.indices(tuple(shape))], axis=1)
    near = position[:, None, :] + offset
    present = np.ones(near.shape[:2], bool) if periodic else np.all((near >= 0) & (near < size), axis=2)
    index = np.ravel_multi_index(tuple(np.moveaxis(near % size, 2, 0)), tuple(shape))
    period = jnp.asarray(size, float) if periodic else jnp.full(size.shape, jnp.inf)
    distance = Wrapped(jnp.asarray(position, float), period)
    return Locality(jnp.asarray(index), jnp.asarray(present), distance, _half_width(radius, half_width))


def near(
    distance: Distance | Float[Array | np.ndarray, "num other"],
    radius: float,
    num: int | None = None,
    *,
    half_width: float | None = None,
) -> Locality:
    """Make the blocks of points with any distances.

    Args:
        distance: a matrix, or a function of two arrays of numbers, which broadcast.
        radius: a block holds the points not farther from its centre than this; 0 makes all independent.
        num: number of points; needed beside a function.
        half_width: half-width of the taper; where not given half of the radius, at which the taper then ends.

    Raises:
        ValueError: if a matrix is not square and symmetric with zeros on its diagonal, ``num`` is missing, ``radius``
            is negative, or ``half_width`` is not positive.

    >>> near(lambda i, j: jnp.abs(i - j), 1.0, 4).present.tolist()[0]
    [True, True, False]
    """
    if callable(distance):
        if num is None:
            raise ValueError("`near` needs `num`, the number of points, beside a function of distances; got None.")
        far: Distance = distance
    else:
        matrix = np.asarray(distance)
        square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
        if not (square and np.allclose(matrix, matrix.T) and not np.diagonal(matrix).any()):
            raise ValueError(
                "`near` needs a square, symmetric matrix of distances with zeros on its diagonal, got one of shape "
                f"{matrix.shape}. Give the distance of every point from every other."
            )
        num, far = len(matrix), Listed(jnp.asarray(matrix, float))
    everyone = jnp.arange(num)
    rows = [np.asarray(far(jnp.int32(i), everyone)) for i in range(num)]
    blocks = [
        [i, *(j for j in np.argsort(row, kind="stable") if j != i and row[j] <= radius)] for i, row in enumerate(rows)
    ]
    width = max(map(len, blocks))
    index = np.array([block + block[:1] * (width - len(block)) for block in blocks])
    present = np.array([[True] * len(block) + [False] * (width - len(block)) for block in blocks])
    return Locality(jnp.asarray(index), jnp.asarray(present), far, _half_width(radius, half_width))


def everywhere(num: int) -> Locality:
    """Make one block of all points, without a taper.

    >>> everywhere(3).index.tolist()
    [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    """
    index = (np.arange(num)[:, None] + np.arange(num)) % num
    distance = Wrapped(jnp.zeros((num, 1)), jnp.ones(1))
    return Locality(jnp.asarray(index), jnp.ones((num, num), bool), distance, 1.0)
