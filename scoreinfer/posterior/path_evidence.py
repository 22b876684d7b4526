"""What simulated paths say of a sampler of paths: its evidence near any observation, and the judge of its training."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices, run_once
from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites
from scoreinfer.evidence.bank import ForwardBank, Outliers, outliers
from scoreinfer.montecarlo.resampling import next_power
from scoreinfer.montecarlo.weights import log_effective_share
from scoreinfer.paths.proposal import AbstractPaths, Beginning
from scoreinfer.posterior.path_data import Truths
from scoreinfer.posterior.paths import path_features
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import Target
from scoreinfer.training.loop import Judge

NUM_BANK, NUM_PROPOSALS = 128, 24
"""Simulated paths in the forward check, and proposals that each is compared with. Chosen by judgement."""
NUM_JUDGED = 32
"""Simulated paths that the judge uses, and paths per compiled call of the forward check. Chosen by judgement."""


def forward_bank(key: Key, problem: Problem, paths: AbstractPaths, truths: Truths) -> ForwardBank:
    """Compare the weight of each simulated path with the weights of proposals for its own observation.

    Exactness: log_excess estimates log p(path | y) - log q(path | y), consistently as the number of proposals grows.
    """
    drawn = np.array(False)
    found = in_batches(lambda rows: _weighed_truths(key, drawn, problem, paths, truths, rows), NUM_BANK, NUM_JUDGED)
    return ForwardBank(found.features, found.log_excess, found.log_share)


def judge_paths(problem: Problem, paths: AbstractPaths, truths: Truths) -> Judge | None:
    """Make the judge of the kernels' network: the mean effective share of exact path weights.

    Every simulated path of the judge has `NUM_PROPOSALS` proposals that begin as it does (with its parameters and its
    last state, or its observation). The start, which another sampler draws, has no effect on the share. The judge asks
    other simulations than the forward check.

    Returns:
        The judge. None means that the model has no density, so that there are no weights.
    """
    if not problem.has_density:
        return None
    rows, given = np.arange(NUM_BANK, NUM_BANK + NUM_JUDGED), np.array(True)

    def judge(key: Key, network: eqx.Module) -> float:
        learned = eqx.tree_at(lambda tree: tree.backward.network, paths, network)
        return float(np.mean(_weighed_truths(key, given, problem, learned, truths, rows).judged))

    return judge


@run_once
def simulated_ends(problem: Problem, paths: AbstractPaths, y: Sites) -> Outliers:
    """Measure the distances between simulated ends, to detect outlying ones."""
    return outliers(jax.vmap(lambda y: path_features(paths, Target(problem, y)))(y))


class _Weighed(NamedTuple):
    """The weights of simulated paths and of proposals for the observation of each: see `ForwardBank`, `_share`."""

    features: Float[Array, "num features"]
    log_excess: Float[Array, " num"]
    log_share: Float[Array, " num"]
    judged: Float[Array, " num"]


@over_devices
def _weighed_truths(
    key: Key,
    given: Bool[Array | np.ndarray, ""],
    problem: Problem,
    paths: AbstractPaths,
    truths: Truths,
    rows: Int[Array | np.ndarray, " num"],
) -> _Weighed:
    """Weigh simulated paths, and proposals for their observations. ``given``: proposals begin as the simulated path."""

    def one(row: Array) -> _Weighed:
        z, y = jax.tree.map(lambda x: x[row], truths)
        target = Target(problem, y)
        context = paths.context(target)
        for_truth, for_draws = jax.random.split(jax.random.fold_in(key, row))
        own, _ = paths.parts(context, z)

        def draw(key: Key) -> tuple[Array, Array]:
            for_start, for_path = jax.random.split(key)
            begun, log_start = paths.begin(for_start, context)
            begun = Beginning(*(jnp.where(given, a, b) for a, b in zip(own, begun, strict=True)))
            z, log_q = paths.propose_from(for_path, context, begun)
            return z, log_q + jnp.where(given, 0.0, log_start)

        drawn, log_qs = jax.vmap(draw)(jax.random.split(for_draws, NUM_PROPOSALS))
        log_targets = jax.vmap(target)(jnp.concatenate([z[None], drawn]))
        log_ws = log_targets[1:] - log_qs
        log_ws = jnp.where(jnp.isnan(log_ws), -jnp.inf, log_ws)
        excess = log_targets[0] - paths.log_q(for_truth, context, z) - jax.nn.logsumexp(log_ws) + LOG_NUM
        return _Weighed(path_features(paths, target), excess, log_effective_share(log_ws), _share(log_ws))

    return map_rows(one, None)(jnp.asarray(rows))


LOG_NUM = float(np.log(NUM_PROPOSALS))


def _share(log_w: Float[Array, " num"]) -> Float[Array, ""]:
    """Compute ESS/N. Where it is below a half, a few weights cannot tell how small it is; it is then extrapolated.

    If log weights are normal with variance s^2, the share is exp(-s^2), and that of weights to the power b is
    exp(-b^2 s^2). So if a half are effective at the power b, the share is 2^(-1/b^2).

    Exactness: ESS/N of these draws above a half; below, biased if log weights are not normal.
    """
    share = jnp.exp(log_effective_share(log_w))
    power = next_power(log_w, 0.5)
    return jnp.where(share >= 0.5, share, jnp.exp2(-1.0 / power**2))
