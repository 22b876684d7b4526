"""Smoothing: paths of states given all observations, drawn backwards through the members of a filter."""

import jax
from jaxtyping import Array, Float

from scoreinfer._program import execute
from scoreinfer._typing import Key
from scoreinfer.filters.base import Members
from scoreinfer.filters.run import FilterRun
from scoreinfer.montecarlo.feynman_kac import draw_backwards

BATCH = 64
"""Paths drawn at once, each of which weighs all members. It limits the memory."""


def smooth(key: Key, run: FilterRun, *, num: int) -> Float[Array, "num times *state"]:
    """Draw paths from p(x_1, ..., x_T | y_1, ..., y_T) by backward simulation.

    The last state is drawn from the last members by weight. Going backwards, member i of time k is drawn with
    probability proportional to its weight times f(x_(k+1) | x_k^i), x_(k+1) the state drawn before.

    Args:
        key: random key.
        run: the run of a filter.
        num: number N' of paths.

    Returns:
        The paths.

    Raises:
        ValueError: if the transition has no density.

    Exactness: consistent as the number of members grows, for particle filters. For others, as biased as their members
        are. The cost is N' T N densities of the transition, N the number of members.

    References: Godsill, Doucet and West 2004, JASA 99(465), algorithm 1.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> import scoreinfer as si
        >>> space = si.StateSpace(
        ...     initial=dist.Normal(0.0, 1.0),
        ...     transition=lambda t0, t1, x: dist.Normal(0.9 * x, 0.5),
        ...     observation=lambda t, x: dist.Poisson(jnp.exp(x)),
        ... )
        >>> y, method = jnp.array([1.0, 0.0]), si.filters.BootstrapFilter()
        >>> run = si.filter(jax.random.key(0), space, method=method, num_members=100, y=y)
        >>> si.smooth(jax.random.key(1), run, num=20).shape
        (20, 2)
    """
    log_transition = run.series.model.log_transition
    if log_transition is None:
        raise ValueError(
            "`smooth` needs the density of the transition, and this model only simulates it (a transition that takes a "
            "key, or without noise, or a scan whose carry holds more than its sites). Write `transition` as "
            "`(t0, t1, x) -> distribution`, or sample the whole state in the body of the scan."
        )

    def path(key: Key, ts: Float[Array, " times"], members: Members) -> Float[Array, "times dim"]:
        log_move = lambda k, x, new: log_transition(ts[k - 1], ts[k], x, new)  # noqa: E731
        return draw_backwards(key, members.x, members.log_weight, log_move)

    def paths(keys: Array, ts: Array, members: Members) -> Array:
        return jax.lax.map(lambda key: path(key, ts, members), keys, batch_size=min(BATCH, num))

    found = execute(paths, jax.random.split(key, num), run.ts, run.cycles.analysis.members)
    return found.reshape(num, run.ts.size, *run.series.model.shape)
