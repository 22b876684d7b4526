"""Local scores: the score of a long path from the score of short windows of it.

For a Markov process, what is seen of one time depends on distant times little, once the times between are seen. So the
denoiser of a state is taken from the window of 2 k + 1 times around it; states near an end use the outermost window.

References: Rozet and Louppe 2023, arXiv 2306.10574 (scores of windows, folded over a path).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Shaped

from scoreinfer.score.base import AbstractScore


class LocalScore(AbstractScore):
    """The score of a path, folded from the score of windows.

    All windows share one score, so the process must be stationary, given the context; and states must be in units in
    which all times have the same scale.

    Args:
        window: score of a flat window, ``(2 k + 1) dim`` numbers.
        k: half-width of the window, in times.
        dim: number of components of a state.
        context: what the score is told of every time: the flat rows of a window are its ``y``. None: it is told ``y``.

    Raises:
        ValueError: by ``denoise``, if the path is shorter than a window, or no whole number of states, or the context
            has another number of times.

    Exactness: biased: a state's denoiser sees its window alone. Consistent as k grows: a window as long as the path
        gives the path's own score.

    >>> from scoreinfer.score import GaussianScore
    >>> local = LocalScore(GaussianScore(jnp.zeros(3), jnp.eye(3)), k=1, dim=1)
    >>> local.denoise(jnp.array(1.0), jnp.array([2.0, 4.0, 6.0, 8.0, 10.0])).tolist()  # independent times: x / 2
    [1.0, 2.0, 3.0, 4.0, 5.0]
    """

    window: AbstractScore
    k: int = eqx.field(static=True)
    dim: int = eqx.field(static=True)
    context: Float[Array, "times seen"] | None = None

    def denoise(self, level, x, y=None):
        """Compute the centre of every window's denoiser, and the outer states of the first and the last."""
        return self._folded(self._over_windows(lambda row, told: self.window.denoise(level, row, told), x, y))

    def moments(self, level, x, y=None):
        """Compute the denoiser, and the windows' own variances."""
        mean, variance = self._over_windows(lambda row, told: self.window.moments(level, row, told), x, y)
        return self._folded(mean), self._folded(variance)

    def jacobian(self, level, x, y=None):
        """Compute dD/dx, which is zero between times that share no window."""
        num = self._num_times(x)
        path, times = x.reshape(num, self.dim), jnp.arange(num)
        first = jnp.clip(times - self.k, 0, num - 1 - 2 * self.k)  # of the window from which a time is taken
        seen = first[:, None] + jnp.arange(2 * self.k + 1)

        def state(row: Float[Array, " length"], place: Int[Array, ""], told: PyTree) -> Float[Array, " dim"]:
            return self.window.denoise(level, row, told).reshape(-1, self.dim)[place]

        told, axis = self._told(seen, y)
        parts = jax.vmap(jax.jacrev(state), (0, 0, axis))(path[seen].reshape(num, -1), times - first, told)
        parts = parts.reshape(num, self.dim, -1, self.dim).swapaxes(1, 2)  # time, time in the window, to, from
        whole = jnp.zeros((num, num, self.dim, self.dim), x.dtype).at[times[:, None], seen].set(parts)
        return whole.swapaxes(1, 2).reshape(x.size, x.size)

    def pull_rows(self, level, x, rows, y=None):
        """Compute ``rows`` times dD/dx, by as many products for each window as a state has components."""
        return rows @ self.jacobian(level, x, y)

    def _over_windows(self, function: Callable[[Array, PyTree], PyTree], x: Float[Array, " path"], y: PyTree) -> PyTree:
        """Call a function of a window, and of what is told of it, on all windows."""
        path = x.reshape(self._num_times(x), self.dim)
        told, axis = self._told(windows(jnp.arange(len(path)), self.k), y)
        return jax.vmap(function, (0, axis))(windows(path, self.k).reshape(-1, (2 * self.k + 1) * self.dim), told)

    def _told(self, times: Int[Array, "windows length"], y: PyTree) -> tuple[PyTree, int | None]:
        """Return what the score is told of windows of these times, and the axis of the windows."""
        return (y, None) if self.context is None else (self.context[times].reshape(len(times), -1), 0)

    def _folded(self, rows: Float[Array, "windows length"]) -> Float[Array, " path"]:
        rows = rows.reshape(len(rows), 2 * self.k + 1, self.dim)
        return jnp.concatenate([rows[0, : self.k], rows[:, self.k], rows[-1, self.k + 1 :]]).reshape(-1)

    def _num_times(self, x: Float[Array, " path"]) -> int:
        num, rest = divmod(x.size, self.dim)
        if rest or num < 2 * self.k + 1:
            raise ValueError(
                f"A window of {2 * self.k + 1} times, each of {self.dim} numbers, needs a path at least as long, and a "
                f"whole number of states; got {x.size} numbers. Use a smaller `k`."
            )
        if self.context is not None and len(self.context) != num:
            raise ValueError(f"The context must have a row for each of the {num} times, got {len(self.context)} rows.")
        return num


def windows(path: Shaped[Array, "times *dim"], k: int) -> Shaped[Array, "windows length *dim"]:
    """Cut a path into all its windows of 2 k + 1 times: what a window's score is trained on."""
    starts = jnp.arange(len(path) - 2 * k)
    return path[starts[:, None] + jnp.arange(2 * k + 1)]
