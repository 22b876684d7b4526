"""Losses of backward kernels: functions ``(network, batch, key, ...) -> scalar`` for `scoreinfer.training.loop`.

The likelihood of single transitions, with the multi-step loss as a regulariser. They learn grad log p itself, without a
factor.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.paths.learned import LearnedBackward, heads


class Windows(NamedTuple):
    """How the multi-step loss unrolls kernels, for ``SMDP(model, site, windows=Windows((2, 4, 8)))``.

    Args:
        lengths: numbers of steps of a window; each is one stage of training.
        noisy: unroll draws of the kernels instead of their means, for solvers that are unstable only with noise. The
            unrolled states then differ from the path, which increases the bias (Ornstein-Uhlenbeck process with two
            components, windows (2, 4): ESS/N .5 instead of .9).
        truncate: number of steps after which gradients are cut. None means gradients through the whole window.
        kept: number of states that the backward pass of the gradient keeps in memory, per window and level. The
            segments between them are unrolled again, recursively. This keeps about ``kept`` log(length) / log(kept)
            states, for log(length) / log(kept) more passes. None means that every state is kept.
        share: weight of the multi-step loss relative to the likelihood of single transitions.

    >>> Windows((2, 4, 8), kept=4).lengths
    (2, 4, 8)
    """

    lengths: tuple[int, ...] = ()
    noisy: bool = False
    truncate: int | None = None
    kept: int | None = None
    share: float = 0.1


def check_windows(windows: Windows | tuple[int, ...], num_steps: int) -> Windows:
    """Check windows against the number of steps of a process.

    Raises:
        ValueError: if a window is empty or longer than the process, or another option of `Windows` is out of range.
    """
    windows = windows if isinstance(windows, Windows) else Windows(tuple(windows))
    if not all(1 <= length <= num_steps for length in windows.lengths):
        raise ValueError(
            "`windows` must have at least one step and not be longer than the process, "
            f"{num_steps} steps, got {windows.lengths}. Choose other lengths."
        )
    for name, least in (("truncate", 1), ("kept", 2)):
        value = getattr(windows, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` of `Windows` must be None or at least {least}, got {value}.")
    if not windows.share > 0:
        raise ValueError(f"`share` of `Windows` must be positive, got {windows.share}.")
    return windows


class Transitions(NamedTuple):
    """Transitions of paths, as inputs and targets of the backward kernels' network, one row per step.

    Args:
        v: standardised state at the end of every step, and the other inputs of the network (see `LearnedBackward`).
        rest: residual of the regression of the state before, in units of the frame's factor.
        context: further conditions of the kernels.
        known: control variates of ``rest``, in the same units; their mean given v is zero (see `path_controls`).
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

    The part with the means is the one-step loss of the reverse SDE in units of the step's noise (the loss divided by
    dt^2, if noise and steps are uniform). Steps are picked at random, because training in the order of time forgets all
    steps except the last.

    Args:
        network: the trained network.
        batch: the transitions.
        key: random key.
        times: `through_time` of the process.
        num_pairs: number of steps picked from each path.
        penalty: factor of the mean squared log scale, which is added. On a fixed budget of paths the learned variances
            overfit first.
        far_out: see `spread_weight`.

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
    """Compute the weight of a standardised state in the loss, so that rare states are learned better.

        exp(far_out (r^2 - 1) / 2),    r = min(root mean square of v, RAREST)

    For one normal component this is the same as training with the variance 1 / (1 - ``far_out``). With many components
    all distances r are similar, and the weights have no effect.
    """
    return jnp.exp(0.5 * far_out * (jnp.minimum((v**2).mean(), RAREST**2) - 1))


RAREST = 4.0
"""Distance, in standard deviations, above which the weight of a state does not increase. Chosen by judgement."""


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
    """Compute the multi-step loss: unroll the kernels' means over windows, compare every state with the path.

    Every window starts from its last state on the path. Squared errors are in units of the step's noise and averaged
    over the window. Steps are recomputed in the backward pass of the gradient (checkpointing), which keeps at most one
    state per step for any size of the network.

    Args:
        network: the trained network.
        paths: simulated or recorded paths.
        key: random key.
        backward: the kernels that contain the network.
        window: number of unrolled steps.
        num_windows: number of windows picked at random from each path.
        how: noise, truncation, memory.
        contexts: further conditions of the kernels for each path. None means no conditions.

    Exactness: biased as a loss of the score: for more than one step its minimum moves towards conditional means of
        distant states. It makes an unstable reverse solver stable; `transition_loss` learns the score.

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
            if how.noisy:  # no gradient through the noise: it would train the kernels to have none
                new = new + jax.lax.stop_gradient(kernel.draw(jax.random.fold_in(key, i))[0] - new)
            error = (((new - path[start + i]) / backward.process.scale[start + i]) ** 2).mean()
            return (new, total + error), None

        end = (path[start + window], jnp.zeros((), path.dtype))
        return _unroll(back, end, jnp.arange(window)[::-1], how.kept)[1] / window

    if contexts is None:
        contexts = jnp.zeros((paths.shape[0], 0), jnp.float32)
    return jax.vmap(jax.vmap(one, in_axes=(None, None, 0, 0)))(paths, contexts, starts, for_noise).mean()


def _unroll(back: Callable, carry: tuple, steps: Int[Array, " num"], kept: int | None) -> tuple:
    """Scan, and keep ``kept`` carries per level for the backward pass of the gradient. None means all.

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
    """Paths and their transitions (see `Transitions`)."""

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
    """Compute `transition_loss` plus `Windows.share` times `rollout_loss`, which is its regulariser."""
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
