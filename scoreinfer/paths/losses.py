"""Losses of physics in reverse: functions ``(network, batch, key, ...) -> scalar`` for the one training loop.

Kernels: the likelihood of single transitions, and the multi-step loss as its regulariser. Scores: transition denoising,
and implicit and sliced score matching, which see single states alone, as baselines. All learn grad log p itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.paths.learned import LearnedBackward, LearnedScore, heads


class Windows(NamedTuple):
    """How the multi-step loss unrolls kernels, for ``SMDP(model, site, windows=Windows((2, 4, 8)))``.

    Args:
        lengths: steps of a window, one stage of training for each.
        noisy: draw from the kernels on the way instead of taking their means, for solvers that only noise shows to be
            unstable. The states then are not the path's own, which biases more (two components of an
            Ornstein-Uhlenbeck process, windows (2, 4): half of the draws count instead of nine tenths).
        truncate: pass gradients back through this many steps at a time; None: through the whole window.
        kept: states kept in memory for the way back of the gradient, of every window and at every level: segments
            between them are unrolled again, and theirs. About ``kept`` log(length) / log(kept) states in all, for that
            many more passes. None: every state.
        share: weight of the multi-step loss beside the likelihood of single transitions.

    >>> Windows((2, 4, 8), kept=4).lengths
    (2, 4, 8)
    """

    lengths: tuple[int, ...] = ()
    noisy: bool = False
    truncate: int | None = None
    kept: int | None = None
    share: float = 0.1


def check_windows(windows: Windows | tuple[int, ...], num_steps: int) -> Windows:
    """Check windows against the number of steps of a process."""
    windows = windows if isinstance(windows, Windows) else Windows(tuple(windows))
    if not all(1 <= length <= num_steps for length in windows.lengths):
        raise ValueError(
            "`windows` must have at least one step and not be longer than the process, "
            f"{num_steps} steps, got {windows.lengths}."
        )
    for name, least in (("truncate", 1), ("kept", 2)):
        value = getattr(windows, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` of `Windows` must be None or at least {least}, got {value}.")
    if not windows.share > 0:
        raise ValueError(f"`share` of `Windows` must be positive, got {windows.share}.")
    return windows


class Transitions(NamedTuple):
    """Paths as the backward kernels' network sees them, one row per step.

    Args:
        v: standardised state at the end of every step (and what else the network sees, see `LearnedBackward`).
        rest: what regression leaves of the state before, in units of its residual factor.
        context: what the kernels are conditioned on besides.
        known: what is added to ``rest`` for less noise, of mean zero given v (see `path_controls`).
    """

    v: Float[Array, "num steps features"]
    rest: Float[Array, "num steps dim"]
    context: Float[Array, "num context"]
    known: Float[Array, "num steps dim"]


def transition_loss(
    network: Callable,
    batch: Transitions,
    key: Key,
    *,
    times: tuple[Float[Array, " steps"], Float[Array, "steps 1"]],
    num_pairs: int,
    penalty: float = 0.0,
    far_out: float = 0.0,
) -> Float[Array, ""]:
    """Compute minus the mean log density of single backward transitions, per component, without its constant.

    Its mean part is the one-step loss of the reverse SDE in units of the step's noise (the loss divided by dt^2 where
    noise and steps are uniform). ``num_pairs`` steps of each path are picked at random: never in the order of time, in
    which training forgets all but the last. ``penalty`` times the mean squared log scale is added: learned variances
    are what a fixed budget of paths is overfitted with first.

    References: Holzschuh et al. 2023, arXiv 2301.10250, equation 4.
    """
    num, steps, _ = batch.v.shape
    k = jax.random.randint(key, (num, num_pairs), 0, steps)

    def one(v, rest, context, known, k):
        move, log_scale = heads(network, v[k], times[0][k], jnp.concatenate([times[1][k], context]))
        square = (rest[k] - move) ** 2 - 2 * known[k] * move
        fit = 0.5 * square * jnp.exp(-2 * log_scale) + log_scale
        return spread_weight(v[k, : rest.shape[1]], far_out) * (fit + penalty * log_scale**2).mean()

    return jax.vmap(jax.vmap(one, in_axes=(None, None, None, None, 0)))(*batch, k).mean()


def spread_weight(v: Float[Array, " dim"], far_out: float) -> Float[Array, ""]:
    """Weigh a standardised state by its distance from the mean, in root mean square over components.

    As if the variance of a single normal component were 1 / (1 - ``far_out``), up to `RAREST`: its tails are learned
    as if they were less rare. Of many components it makes no difference: their distances are all alike.
    """
    return jnp.exp(0.5 * far_out * (jnp.minimum((v**2).mean(), RAREST**2) - 1))


RAREST = 4.0
"""Standard deviations beyond which states count for no more."""


def rollout_loss(
    network: Callable,
    paths: Float[Array, "num times dim"],
    key: Key,
    *,
    backward: LearnedBackward,
    window: int,
    num_windows: int,
    how: Windows = Windows(),
    contexts: Float[Array, "num context"] | None = None,
) -> Float[Array, ""]:
    """Compute the multi-step loss: kernels' means unrolled over windows, every state held against the path's own.

    Squared errors are in units of the step's noise, averaged over the window, which starts from its true end. Steps
    are recomputed on the way back of the gradient (checkpointed): what is kept of each is at most one state, whatever
    the network's size.

    Args:
        network: what is trained.
        paths: simulated or recorded paths.
        key: random key.
        backward: the kernels around the network.
        window: number of steps unrolled.
        num_windows: windows picked at random from each path.
        how: noise, truncation, memory.
        contexts: what the kernels are conditioned on besides, for each path.

    Exactness: biased as a definition of the score: beyond one step its minimum drifts towards conditional means of
        far states. It makes an unstable reverse solver stable; the score is what `transition_loss` learns.

    References: Holzschuh et al. 2023, arXiv 2301.10250, equation 6.
    """
    backward = eqx.tree_at(lambda tree: tree.network, backward, network)
    last = backward.process.num_steps - window
    for_starts, for_noise = jax.random.split(key)
    starts = jax.random.randint(for_starts, (paths.shape[0], num_windows), 0, last + 1)
    for_noise = jax.random.split(for_noise, starts.shape)

    def one(path: Array, context: Array, start: Array, key: Key) -> Array:
        given = backward.given(context)

        def back(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
            x, total = carry
            if how.truncate is not None:
                x = jnp.where((i + 1) % how.truncate == 0, jax.lax.stop_gradient(x), x)
            kernel = given(start + i, x)
            new = kernel.mean
            if how.noisy:  # the noise has no gradient: it would teach the kernels to have none
                new = new + jax.lax.stop_gradient(kernel.draw(jax.random.fold_in(key, i))[0] - new)
            error = (((new - path[start + i]) / backward.process.scale[start + i]) ** 2).mean()
            return (new, total + error), None

        end = (path[start + window], jnp.zeros((), path.dtype))
        return _unroll(back, end, jnp.arange(window)[::-1], how.kept)[1] / window

    if contexts is None:
        contexts = jnp.zeros((paths.shape[0], 0), jnp.float32)
    return jax.vmap(jax.vmap(one, in_axes=(None, None, 0, 0)))(paths, contexts, starts, for_noise).mean()


def _unroll(back: Callable, carry: tuple, steps: Int[Array, " num"], kept: int | None) -> tuple:
    """Scan, keeping ``kept`` carries of every level for the way back of the gradient (None: all).

    References: Griewank 1992, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
    differentiation"; Chen et al. 2016, arXiv 1604.06174, section 4.2.
    """
    if kept is None or steps.size <= kept:
        return jax.lax.scan(jax.checkpoint(back), carry, steps)[0]
    size = -(-steps.size // kept)
    first = steps.size % size
    if first:
        carry = _unroll(back, carry, steps[:first], kept)

    @jax.checkpoint
    def segment(carry: tuple, steps: Array) -> tuple[tuple, None]:
        return _unroll(back, carry, steps, kept), None

    return jax.lax.scan(segment, carry, steps[first:].reshape(-1, size))[0]


class PathBatch(NamedTuple):
    """Paths, and their transitions as the network sees them."""

    transitions: Transitions
    paths: Float[Array, "num times dim"]


def multistep_loss(
    network: Callable,
    batch: PathBatch,
    key: Key,
    *,
    times: tuple[Float[Array, " steps"], Float[Array, "steps 1"]],
    num_pairs: int,
    penalty: float,
    far_out: float = 0.0,
    backward: LearnedBackward,
    window: int,
    how: Windows,
) -> Float[Array, ""]:
    """Compute the likelihood of single transitions plus the multi-step loss, as its regulariser."""
    for_pairs, for_windows = jax.random.split(key)
    single = transition_loss(
        network, batch.transitions, for_pairs, times=times, num_pairs=num_pairs, penalty=penalty, far_out=far_out
    )
    num_windows = max(num_pairs // window, 1)
    unrolled = rollout_loss(
        network, batch.paths, for_windows, backward=backward, window=window, num_windows=num_windows, how=how,
        contexts=batch.transitions.context,
    )  # fmt: skip
    return single + how.share * unrolled


def _pairs(paths: Array, key: Key, num_pairs: int) -> tuple[Array, Array, Array]:
    """Pick steps of each path at random: their numbers, the states before, the states after."""
    k = jax.random.randint(key, (paths.shape[0], num_pairs), 0, paths.shape[1] - 1)
    rows = jnp.arange(paths.shape[0])[:, None]
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    return k.reshape(-1), flat(paths[rows, k]), flat(paths[rows, k + 1])


def transition_denoising_loss(
    network: Callable, paths: Float[Array, "num times dim"], key: Key, *, score: LearnedScore, num_pairs: int
) -> Float[Array, ""]:
    """Compute denoising score matching on the process's own transitions.

    E || sqrt(Q) S(x_{k+1}) + (x_{k+1} - Phi(x_k)) / sqrt(Q) ||^2: the gradient of a transition's log density is an
    unbiased target of the score at its end, exactly, however long the step.

    References: Vincent 2011; Song et al. 2021, arXiv 2011.13456, equation 7.
    """
    score = eqx.tree_at(lambda tree: tree.network, score, network)

    def one(k: Array, old: Array, new: Array) -> Array:
        scale = score.process.scale[k]
        noise = (new - score.process.forward(k, old)) / scale
        return ((scale * score.at(k, new) + noise) ** 2).mean()

    return jax.vmap(one)(*_pairs(paths, key, num_pairs)).mean()


def implicit_score_loss(
    network: Callable,
    paths: Float[Array, "num times dim"],
    key: Key,
    *,
    score: LearnedScore,
    num_pairs: int,
    sliced: bool = False,
) -> Float[Array, ""]:
    """Compute implicit score matching, E[ |S|^2 / 2 + div S ], in units of each component's spread.

    ``sliced``: the divergence by one random direction a state, E[ |S|^2 / 2 + v dS v ] (variance-reduced form), where
    the whole Jacobian is too dear.

    References: Hyvarinen 2005, JMLR 6, theorem 1; Song et al. 2019, arXiv 1905.07088, equation 8.
    """
    score = eqx.tree_at(lambda tree: tree.network, score, network)
    for_pairs, for_directions = jax.random.split(key)
    k, _, new = _pairs(paths, for_pairs, num_pairs)
    directions = jax.random.rademacher(for_directions, new.shape, new.dtype)

    def one(k: Array, x: Array, direction: Array) -> Array:
        centre, spread = score.frame.centre[k], score.frame.spread[k]

        def scaled(v: Array) -> Array:
            return spread * score.at(k, centre + spread * v)

        v = score.frame.standardise(k, x)
        if sliced:
            value, slope = jax.jvp(scaled, (v,), (direction,))
            divergence = direction @ slope
        else:
            value, divergence = scaled(v), jnp.trace(jax.jacfwd(scaled)(v))
        return (0.5 * value @ value + divergence) / x.size

    return jax.vmap(one)(k, new, directions).mean()
