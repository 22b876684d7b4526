"""The training loop: optax, averaged weights, validation and early stopping. Every run records why it ended."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree
from tqdm.auto import tqdm

from scoreinfer._typing import Key
from scoreinfer.errors import TrainingWarning, warn
from scoreinfer.training.losses import mean_loss
from scoreinfer.training.resume import Progress, keep_progress, resume_progress

FINISHED, EARLY, INTERRUPTED = "finished", "early", "interrupted"
"""Normal reasons why a training run ends, and interruption by the user (`History.stopped`)."""
BAD_LOSS, BAD_SIMULATIONS = "loss not finite", "simulations not finite"
"""Failures that end a training run (`History.stopped`)."""
KEEP_SECONDS = 2.0
"""Least time between two writes of a run to disk, in seconds. Chosen by judgement."""
Loss = Callable[[PyTree, PyTree, Key], Float[Array, ""]]
"""A loss: ``(module, batch, key) -> scalar``."""


class History(NamedTuple):
    """Record of a training run.

    Args:
        loss: mean training loss of each epoch.
        validation: validation loss of the averaged weights after each epoch.
        num_steps: number of optimiser steps taken.
        num_simulations: simulations drawn (online) or held (fixed budget).
        seconds: wall time in seconds, including compilation.
        stopped: why the run ended: ``finished``, ``early``, ``interrupted``, ``loss not finite`` or
            ``simulations not finite``.
    """

    loss: np.ndarray
    validation: np.ndarray
    num_steps: int
    num_simulations: int
    seconds: float
    stopped: str


class Budget(NamedTuple):
    """Length and settings of a training run.

    Args:
        num_steps: number of optimiser steps.
        batch_size: simulations per step.
        epoch_steps: steps per epoch. An epoch is one compiled scan over one pool of simulations.
        learning_rate: peak of the learning rate, which warms up and then decays as a cosine.
        patience: training stops after this number of epochs without a better validation loss. None means never.
    """

    num_steps: int
    batch_size: int = 512
    epoch_steps: int = 250
    learning_rate: float = 2e-3
    patience: int | None = None


class TrainingHistory(NamedTuple):
    """The two training runs behind a posterior: the whitening map, then the score.

    Args:
        whitening: record of the training of the whitening map.
        score: record of the training of the score.
        budget: planned training of the score. None means it is not known.
    """

    whitening: History
    score: History
    budget: Budget | None = None

    @property
    def num_simulations(self) -> int:
        """Number of simulations that trained the score."""
        return self.score.num_simulations


class _State(NamedTuple):
    weights: PyTree
    average: PyTree
    optimiser: PyTree
    step: Float[Array, ""]


def _optimiser(budget: Budget) -> optax.GradientTransformation:
    warmup = min(100, budget.num_steps // 10 + 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, budget.learning_rate, warmup, max(budget.num_steps, warmup + 1), 0.01 * budget.learning_rate
    )
    return optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99)))


def train(
    key: Key,
    module: PyTree,
    loss: Loss,
    pools: Callable[[Key], PyTree],
    validation: PyTree,
    budget: Budget,
    *,
    progress_bar: bool = True,
    title: str = "training",
    checkpoint: Path | None = None,
) -> tuple[PyTree, History]:
    """Minimise ``loss`` over minibatches of pools of simulations; return the best averaged weights.

    Args:
        key: random key; the same key gives the same weights.
        module: the pytree to train; its inexact arrays are the weights.
        loss: ``(module, batch, key) -> scalar``.
        pools: ``key -> batch``: the simulations of one epoch, new ones (online) or always the same (fixed budget).
        validation: held-out simulations.
        budget: length and settings of training.
        progress_bar: whether to show a progress bar with the losses, if standard error is a terminal.
        title: label of the progress bar and of messages.
        checkpoint: file in which the run is kept. If it exists, training resumes from it. None means no file.

    Returns:
        ``module`` with the averaged weights of the smallest validation loss, and the record of the run. A run that
        ends too early returns the best weights so far, with a `TrainingWarning`.

    Raises:
        KeyboardInterrupt: if the user interrupts a run with a ``checkpoint``; the run is kept first.
        FloatingPointError: if the run ends before any epoch has a finite loss.
        UnreadableFile: if ``checkpoint`` is damaged or belongs to other networks.
    """
    weights = eqx.filter(module, eqx.is_inexact_array)
    task = _Task(key, module, loss, pools, validation, budget)
    state = _State(weights, weights, _optimiser(budget).init(weights), jnp.zeros((), jnp.float32))
    progress = Progress(state, weights)
    if checkpoint is not None:
        progress = resume_progress(checkpoint, progress)
    kept = began = time.perf_counter()
    spent = progress.seconds
    bar = tqdm(
        total=task.num_epochs, initial=len(progress.loss), desc=title, disable=None if progress_bar else True,
        leave=False,
    )  # fmt: skip
    try:
        while not progress.stopped:
            progress = _next_epoch(task, progress)
            now = time.perf_counter()
            progress = progress._replace(seconds=spent + now - began)
            bar.set_postfix_str(" ".join(f"{value:.4f}" for value in (*progress.loss[-1:], *progress.validation[-1:])))
            bar.update()
            if checkpoint is not None and (progress.stopped or now - kept > KEEP_SECONDS):
                keep_progress(checkpoint, progress)
                kept = time.perf_counter()
    except KeyboardInterrupt:
        if checkpoint is not None:
            keep_progress(checkpoint, progress)
            raise
        progress = progress._replace(stopped=INTERRUPTED)
    finally:
        bar.close()
    return eqx.combine(progress.best, module), _history(task, progress, title)


class _Task(NamedTuple):
    """Arguments of `train`."""

    key: Key
    module: PyTree
    loss: Loss
    pools: Callable[[Key], PyTree]
    validation: PyTree
    budget: Budget

    @property
    def num_epochs(self) -> int:
        """Number of epochs in the budget."""
        return -(-self.budget.num_steps // self.budget.epoch_steps)


def _next_epoch(task: _Task, progress: Progress) -> Progress:
    """Train for one epoch. The result depends only on the task, the progress so far and the number of the epoch."""
    epoch, budget = len(progress.loss), task.budget
    for_pool, for_epoch = jax.random.split(jax.random.fold_in(task.key, epoch))
    for_validation = jax.random.fold_in(task.key, task.num_epochs)
    pool = task.pools(for_pool)
    if not bool(_all_finite(pool)):
        return progress._replace(stopped=BAD_SIMULATIONS)
    state, mean = _run_epoch(task.loss, budget, task.module, progress.state, pool, for_epoch)
    value = float(_validate(task.loss, task.module, state.average, task.validation, for_validation))
    progress = progress._replace(
        state=state,
        loss=(*progress.loss, float(mean)),
        validation=(*progress.validation, value),
        num_simulations=progress.num_simulations + jax.tree.leaves(pool)[0].shape[0],
    )
    if not np.isfinite(progress.loss[-1] + value):
        return progress._replace(stopped=BAD_LOSS)
    if value < progress.best_value:
        progress = progress._replace(best=state.average, best_value=value, best_epoch=epoch)
    if budget.patience is not None and epoch - progress.best_epoch >= budget.patience:
        return progress._replace(stopped=EARLY)
    return progress._replace(stopped=FINISHED) if epoch + 1 >= task.num_epochs else progress


def _history(task: _Task, progress: Progress, title: str) -> History:
    """Make the record of a run; warn if the run did not finish.

    Raises:
        FloatingPointError: if no epoch has a finite loss.
    """
    num_done = len(progress.loss)
    history = History(
        np.array(progress.loss), np.array(progress.validation), num_done * task.budget.epoch_steps,
        progress.num_simulations, progress.seconds, progress.stopped,
    )  # fmt: skip
    if history.stopped not in (FINISHED, EARLY):
        message = f"{title} ended after {num_done} of {task.num_epochs} epochs: {history.stopped}."
        if not np.isfinite(progress.best_value):
            raise FloatingPointError(
                f"{message} No epoch has a finite loss, so there are no weights to return. Check that the model's "
                "simulations and density are finite."
            )
        warn(f"{message} The best weights so far are returned.", TrainingWarning)
    return history


@eqx.filter_jit
def _run_epoch(
    loss: Loss, budget: Budget, module: PyTree, state: _State, pool: PyTree, key: Key
) -> tuple[_State, Float[Array, ""]]:
    """Take ``epoch_steps`` optimiser steps on minibatches of the shuffled pool; return the mean loss."""
    optimiser = _optimiser(budget)
    size = jax.tree.leaves(pool)[0].shape[0]
    for_order, for_steps = jax.random.split(key)
    need = budget.epoch_steps * budget.batch_size
    repeats = -(-need // size)
    orders = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(for_order, repeats))
    rows = orders.ravel()[:need].reshape(budget.epoch_steps, budget.batch_size)

    def step(state, inputs):
        rows, key = inputs
        batch = jax.tree.map(lambda leaf: leaf[rows], pool)
        value, gradient = jax.value_and_grad(lambda w: loss(eqx.combine(w, module), batch, key))(state.weights)
        updates, memory = optimiser.update(gradient, state.optimiser, state.weights)
        new = optax.apply_updates(state.weights, updates)
        decay = jnp.minimum(0.999, (1.0 + state.step) / (10.0 + state.step))
        average = optax.incremental_update(new, state.average, 1.0 - decay)
        return _State(new, average, memory, state.step + 1), value

    state, values = jax.lax.scan(step, state, (rows, jax.random.split(for_steps, budget.epoch_steps)))
    return state, values.mean()


@eqx.filter_jit
def _validate(loss: Loss, module: PyTree, average: PyTree, validation: PyTree, key: Key) -> Float[Array, ""]:
    return mean_loss(loss, eqx.combine(average, module), validation, key)


@eqx.filter_jit
def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
