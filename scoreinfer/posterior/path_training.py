"""The training of backward kernels: the regression is judged first; a network is trained only where it falls short."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from scoreinfer._typing import Key
from scoreinfer.paths import LearnedBackward, Windows, through_time
from scoreinfer.paths.losses import multistep_loss, transition_loss
from scoreinfer.posterior.path_data import Data, Source, fresh, path_batch, transitions
from scoreinfer.training.loop import FINISHED, GOOD, INTERRUPTED, OUT_OF_TIME, Budget, History, Judge, train

PENALTY = 200.0
"""Penalty of learned variances on a fixed budget of N paths is ``PENALTY`` / N. Chosen by judgement."""
FAR_OUT = 0.7
"""Argument ``far_out`` of `spread_weight` if control variates reduce the noise. Chosen by judgement."""
TRANSITIONS = 2048
"""Transitions per optimiser step of a perceptron. Chosen by judgement."""
PATIENCE = 30
"""Epochs of a leg without a better validation loss after which training on a fixed budget stops. Chosen by
judgement."""
EPOCH = 250
"""Least number of optimiser steps per epoch; the first leg of training has four epochs. Chosen by judgement."""


class Plan(NamedTuple):
    """How the network is trained.

    Args:
        num_steps: largest number of optimiser steps of all stages together; 0 means regression only.
        batch_size: paths per step.
        learning_rate: peak learning rate.
        num_pairs: transitions of each path per step. None means `TRANSITIONS` of all paths together.
        target_share: share at which training stops. None means that every stage takes all of its steps.
        end: time of `time.perf_counter` after which training stops. None means no limit.
        progress_bar: whether to show progress bars.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    num_pairs: int | None
    target_share: float | None
    end: float | None
    progress_bar: bool


def train_kernels(
    key: Key,
    backward: LearnedBackward,
    data: Data,
    source: Source,
    windows: Windows,
    plan: Plan,
    judge: Judge | None,
) -> tuple[LearnedBackward, History]:
    """Train the network of the kernels if the regression alone falls short of the target.

    There is one stage for each window length; length 1 means single transitions only. Later stages follow only if the
    target is not reached.

    Args:
        key: random key.
        backward: the kernels of the regression, with an untrained network.
        data: paths for training and held-out paths.
        source: makes fresh paths.
        windows: windows of the multi-step loss.
        plan: length and settings of training.
        judge: says how large the effective share is. None means that the validation loss decides.

    Returns:
        The trained kernels, and the record of all stages.
    """
    stages = (1, *windows.lengths)
    keys = _keys(key, len(stages) + 1)
    asked = judge if plan.target_share is not None else None
    alone = _judge_regression(keys[0], backward, len(data.training.states), plan, asked)
    if alone.stopped:
        return backward, alone
    network, histories = backward.network, []
    for for_stage, window in zip(keys[1:], stages, strict=True):
        task = _stage(backward, data, source, windows, plan, window)
        network, history = train(
            for_stage, network, *task, _budget(plan, data, source, len(stages)), judge=asked,
            progress_bar=plan.progress_bar, title=f"backward kernels, window {window}",
        )  # fmt: skip
        histories.append(history)
        if history.stopped in (GOOD, INTERRUPTED, OUT_OF_TIME):
            break
    return eqx.tree_at(lambda tree: tree.network, backward, network), _joined(histories)


@eqx.filter_jit
def _keys(key: Key, num: int) -> tuple[Key, ...]:
    return tuple(jax.random.split(key, num))


def _judge_regression(
    key: Key, backward: LearnedBackward, num_simulations: int, plan: Plan, judge: Judge | None
) -> History:
    """Make the record of the regression. ``stopped`` is empty if a network has to be trained."""
    start, stopped, shares = time.perf_counter(), "", np.zeros(0)
    if plan.num_steps == 0:
        stopped = FINISHED
    elif judge is not None and plan.target_share is not None:
        shares = np.nan_to_num([judge(key, backward.network)])
        stopped = GOOD if shares[0] >= plan.target_share else ""
    if not stopped and plan.end is not None and time.perf_counter() > plan.end:
        stopped = OUT_OF_TIME
    seconds, num = time.perf_counter() - start, len(shares)
    return History(
        np.zeros(0), np.zeros(0), 0, num_simulations, seconds, stopped, tuple(shares.tolist()), num * (0,),
        num * (seconds,),
    )  # fmt: skip


def _budget(plan: Plan, data: Data, source: Source, num_stages: int) -> Budget:
    """Make the budget of one stage. The number of epochs is a power of two, so that every leg doubles the steps."""
    num_steps = max(plan.num_steps // num_stages, 1)
    doublings = max((num_steps // EPOCH).bit_length() - 1, 0)
    return Budget(
        num_steps,
        min(plan.batch_size, len(data.training.states)),
        -(-num_steps // 2**doublings),
        plan.learning_rate,
        None if source.online else PATIENCE,
        num_legs=1 if plan.target_share is None else max(doublings - 1, 1),
        target_share=plan.target_share or 1.0,
        max_seconds=None if plan.end is None else max(plan.end - time.perf_counter(), 0.0),
    )


def _stage(
    backward: LearnedBackward, data: Data, source: Source, windows: Windows, plan: Plan, window: int
) -> tuple[Callable, Callable, Any]:
    """Make the loss, the pools and the held-out paths of one stage."""
    num, online = len(data.training.states), source.online
    settings: dict[str, Any] = {
        "times": through_time(backward.process),
        "num_pairs": plan.num_pairs or max(TRANSITIONS // min(plan.batch_size, num), 1),
        "penalty": 0.0 if online else PENALTY / num,
        "far_out": 0.0 if source.controlled is None else FAR_OUT,
    }
    size = source.pool if online else num
    prepare: Callable = partial(transitions if window == 1 else path_batch, backward, size=size)
    loss: Callable = partial(transition_loss, **settings)
    if window > 1:
        loss = partial(multistep_loss, **settings, backward=backward, window=window, how=windows)
    fixed = None if online else prepare(data.training)

    def pools(key: Key) -> Any:
        return prepare(fresh(key, source, data.scale)) if online else fixed

    return loss, pools, prepare(data.validation)


def _joined(histories: list[History]) -> History:
    """Join the records of several stages; steps and seconds of later ones go on from those before."""
    first = histories[0]
    for then in histories[1:]:
        first = History(
            np.concatenate([first.loss, then.loss]),
            np.concatenate([first.validation, then.validation]),
            first.num_steps + then.num_steps,
            first.num_simulations + then.num_simulations,
            first.seconds + then.seconds,
            then.stopped,
            first.shares + then.shares,
            first.share_steps + tuple(first.num_steps + steps for steps in then.share_steps),
            first.share_seconds + tuple(first.seconds + seconds for seconds in then.share_seconds),
        )
    return first
