"""The training loop: optax, averaged weights, legs of growing length. Every run records why it ended.

The learning rate warms up and decays in every leg. Every leg after the first doubles the steps taken so far. At its end
a *judge* says how good the weights are: for samplers, the effective share of exact weights. Training stops where that
is good enough, or where a leg gained next to nothing, neither in share nor in validation loss.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from tqdm.auto import tqdm

from scoreinfer._devices import spread
from scoreinfer._program import over_devices
from scoreinfer._typing import Key
from scoreinfer.errors import TrainingWarning, warn
from scoreinfer.figures import draw_losses, draw_shares, row_of_axes
from scoreinfer.training.losses import mean_loss
from scoreinfer.training.resume import Progress, keep_progress, resume_progress

FINISHED, EARLY, INTERRUPTED = "finished", "early", "interrupted"
"""The budget is spent; the validation loss grew; the user interrupted the run (`History.stopped`)."""
GOOD, FLAT, OUT_OF_TIME = "good enough", "flat", "out of time"
"""The judge is content; the last leg gained too little; `max_seconds` are over (`History.stopped`)."""
BAD_LOSS, BAD_SIMULATIONS = "loss not finite", "simulations not finite"
"""Failures that end a training run (`History.stopped`)."""
KEEP_SECONDS = 2.0
"""Least time between two writes of a run to disk, in seconds. Chosen by judgement."""
LEAST_GAIN, LEAST_FALL = 0.03, 0.002
"""Relative gain of the share, or without a judge fall of the validation loss, below which a leg is flat. Chosen by
judgement."""
Loss = Callable[[PyTree, PyTree, Key], Float[Array, ""]]
"""A loss: ``(module, batch, key) -> scalar``."""
Judge = Callable[[Key, PyTree], float]
"""A judge: ``(key, module) -> share``, larger is better. It gets the same key every time."""


class History(NamedTuple):
    """Record of a training run.

    Args:
        loss: mean training loss of each epoch.
        validation: validation loss of the averaged weights after each epoch.
        num_steps: number of optimiser steps taken.
        num_simulations: simulations drawn (online) or held (fixed budget).
        seconds: wall time in seconds, including compilation.
        stopped: why the run ended: ``good enough``, ``flat``, ``finished``, ``early``, ``out of time``,
            ``interrupted``, ``loss not finite`` or ``simulations not finite``.
        shares: what the judge said, at the start and after each leg; empty without a judge.
        share_steps: optimiser steps before each of the ``shares``.
        share_seconds: wall time before each of the ``shares``.
    """

    loss: np.ndarray
    validation: np.ndarray
    num_steps: int
    num_simulations: int
    seconds: float
    stopped: str
    shares: tuple[float, ...] = ()
    share_steps: tuple[int, ...] = ()
    share_seconds: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        """Largest share that the judge saw; NaN without a judge."""
        return max(self.shares, default=math.nan)

    def plot(self) -> Any:
        """Plot the losses over optimiser steps, and the effective share of exact weights over time.

        Returns:
            Two matplotlib axes.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        return _plot({"training": self})

    def __str__(self) -> str:
        """Say what stopped the run, when, and how good it was then."""
        judged = f", effective share {self.share:.2f}" if self.shares else ""
        return f"{self.stopped} after {self.num_steps:,} steps, {self.seconds:.1f} s{judged}"


class Budget(NamedTuple):
    """Length and settings of a training run.

    Args:
        num_steps: largest number of optimiser steps.
        batch_size: simulations per step.
        epoch_steps: steps per epoch. An epoch is one compiled scan over one pool of simulations.
        learning_rate: peak of the learning rate, which warms up and then decays as a cosine in every leg.
        patience: training stops after this number of epochs of a leg without a better validation loss. None means
            never.
        num_legs: number of legs. The last one takes half of the steps, the one before a quarter, and so on.
        target_share: share at which the judge is content.
        max_seconds: wall time after which training stops. None means no limit. With a limit the weights depend on the
            clock.
    """

    num_steps: int
    batch_size: int = 512
    epoch_steps: int = 250
    learning_rate: float = 2e-3
    patience: int | None = None
    num_legs: int = 1
    target_share: float = 0.8
    max_seconds: float | None = None

    @property
    def leg_ends(self) -> tuple[int, ...]:
        """Epochs after which a leg ends.

        >>> Budget(10_000, num_legs=5).leg_ends
        (3, 5, 10, 20, 40)
        """
        num_epochs = max(-(-self.num_steps // self.epoch_steps), 1)
        return tuple(sorted({-(-num_epochs // 2**later) for later in range(self.num_legs)}))


class TrainingHistory(NamedTuple):
    """The training runs behind a posterior: the whitening map, then the score.

    Args:
        whitening: record of the training of the whitening map.
        score: record of the training of the score.
        budget: planned training of the score. None means it is not known.
        smaller: record of the training of a smaller score network, which fell short. None means there was none.
        tuned_share: effective share of the whitening map after its tuning to each observation; NaN if it was not tuned.
    """

    whitening: History
    score: History
    budget: Budget | None = None
    smaller: History | None = None
    tuned_share: float = math.nan

    @property
    def runs(self) -> dict[str, History]:
        """The records by name, in the order of the training."""
        runs = {"whitening": self.whitening, "smaller score": self.smaller, "score": self.score}
        return {name: run for name, run in runs.items() if run is not None}

    @property
    def num_simulations(self) -> int:
        """Number of simulations in all runs."""
        return sum(run.num_simulations for run in self.runs.values())

    def plot(self) -> Any:
        """Plot all runs, as `History.plot` does one."""
        return _plot(self.runs)

    def __str__(self) -> str:
        """Say of every run what stopped it, when, and how good it was then."""
        told = {name: str(run) for name, run in self.runs.items()}
        if not math.isnan(self.tuned_share):
            told["tuned to each observation"] = f"effective share {self.tuned_share:.2f}"
        return "\n".join(f"{name}: {text}" for name, text in told.items())


def _plot(runs: dict[str, History]) -> Any:
    """Plot losses and shares of runs, each run's shares after those of the runs before it."""
    axes, began = row_of_axes(2), 0.0
    for name, run in runs.items():
        if len(run.loss):
            draw_losses(axes[0], run.num_steps / len(run.loss), run.loss.tolist(), run.validation.tolist(), name)
        if run.shares:
            draw_shares(axes[1], [began + seconds for seconds in run.share_seconds], run.shares, name)
        began += run.seconds
    return axes


class _State(NamedTuple):
    weights: PyTree
    average: PyTree
    optimiser: PyTree


class _Epoch(NamedTuple):
    """What an epoch gives: the new state, the training loss, the validation loss, whether the pool was finite."""

    state: _State
    loss: Float[Array, ""]
    validation: Float[Array, ""]
    finite: Bool[Array, ""]


class _Rate(NamedTuple):
    """The learning rate of a leg, as numbers: epochs of any leg and run share one program.

    Args:
        peak: largest learning rate.
        first: steps of the leg before this epoch.
        length: steps of the leg.
    """

    peak: Float[Array | np.ndarray, ""]
    first: Float[Array | np.ndarray, ""]
    length: Float[Array | np.ndarray, ""]

    def at(self, step: Float[Array, ""]) -> Float[Array, ""]:
        """Compute the rate: at most 100 steps of warm-up, then a cosine from the peak to a hundredth of it."""
        warmup = jnp.minimum(100.0, jnp.floor(self.length / 10.0) + 1.0)
        part = jnp.clip((step - warmup) / jnp.maximum(self.length - warmup, 1.0), 0.0, 1.0)
        return jnp.asarray(self.peak) * jnp.minimum(step / warmup, 0.01 + 0.99 * 0.5 * (1.0 + jnp.cos(jnp.pi * part)))


def _optimiser() -> optax.GradientTransformation:
    return optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99)))


@eqx.filter_jit
def _begin(module: PyTree) -> _State:
    weights = eqx.filter(module, eqx.is_inexact_array)
    return _State(weights, weights, _optimiser().init(weights))


def train(
    key: Key,
    module: PyTree,
    loss: Loss,
    pools: Callable[[Key], PyTree],
    validation: PyTree,
    budget: Budget,
    *,
    judge: Judge | None = None,
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
        validation: held-out simulations. None means that every epoch has new ones: then the mean of the training loss
            over the second half of an epoch is its validation loss.
        budget: length and settings of training.
        judge: ``(key, module) -> share``, asked before training and after every leg. None means that the validation
            loss decides.
        progress_bar: whether to show a progress bar with the losses, if standard error is a terminal.
        title: label of the progress bar and of messages.
        checkpoint: file in which the run is kept. If it exists, training resumes from it. None means no file.

    Returns:
        ``module`` with the best averaged weights, and the record of the run. In a leg the weights of the smallest
        validation loss are best; among legs those of the largest share, or later ones of a smaller loss and about the
        same share. A run that ends too early returns the best
        weights so far, with a `TrainingWarning`.

    Raises:
        KeyboardInterrupt: if the user interrupts a run with a ``checkpoint``; the run is kept first.
        FloatingPointError: if the run ends before any epoch has a finite loss.
        UnreadableFile: if ``checkpoint`` is damaged or belongs to other networks.
    """
    task = _Task(key, module, loss, pools, validation, budget, judge)
    state = _begin(module)
    progress = Progress(state, state.weights, state.weights)
    if checkpoint is not None:
        progress = resume_progress(checkpoint, progress)
    kept = began = time.perf_counter()
    spent = progress.seconds
    bar = tqdm(
        total=budget.leg_ends[-1], initial=len(progress.loss), desc=title, disable=None if progress_bar else True,
        leave=False,
    )  # fmt: skip
    try:
        if judge is not None and not progress.shares:
            progress = _judged(task, progress)
        while not progress.stopped:
            progress = _next_epoch(task, progress)
            now = time.perf_counter()
            progress = _out_of_time(task, progress._replace(seconds=spent + now - began))
            bar.set_postfix_str(" ".join(f"{value:.4f}" for value in (*progress.loss[-1:], *progress.validation[-1:])))
            bar.update()
            if checkpoint is not None and (progress.stopped or now - kept > KEEP_SECONDS):
                keep_progress(checkpoint, progress)
                kept = time.perf_counter()
    except KeyboardInterrupt:
        if checkpoint is not None:
            keep_progress(checkpoint, progress)
            raise
        progress = _end_leg(task, progress._replace(stopped=INTERRUPTED))
    finally:
        bar.close()
    return eqx.combine(progress.chosen, module), _history(task, progress, title)


class _Task(NamedTuple):
    """Arguments of `train`."""

    key: Key
    module: PyTree
    loss: Loss
    pools: Callable[[Key], PyTree]
    validation: PyTree
    budget: Budget
    judge: Judge | None


def _next_epoch(task: _Task, progress: Progress) -> Progress:
    """Train for one epoch. The result depends only on the task, the progress so far and the number of the epoch."""
    epoch, budget = len(progress.loss), task.budget
    begin, end = _leg(budget, epoch)
    for_pool, for_epoch, for_validation = _keys(task.key, np.array(epoch), np.array(budget.leg_ends[-1]))
    peak, first, length = budget.learning_rate, (epoch - begin) * budget.epoch_steps, (end - begin) * budget.epoch_steps
    rate = _Rate(np.array(peak, np.float32), np.array(first, np.float32), np.array(length, np.float32))
    pool = task.pools(for_pool)
    done = _run_epoch(
        task.loss, (budget.epoch_steps, budget.batch_size), rate, task.module, progress.state, pool, task.validation,
        for_epoch, for_validation,
    )  # fmt: skip
    if not bool(done.finite):
        return _end_leg(task, progress._replace(stopped=BAD_SIMULATIONS))
    progress = progress._replace(
        state=done.state,
        loss=(*progress.loss, float(done.loss)),
        validation=(*progress.validation, float(done.validation)),
        num_simulations=progress.num_simulations + jax.tree.leaves(pool)[0].shape[0],
    )
    value = progress.validation[-1]
    if not np.isfinite(progress.loss[-1] + value):
        return _end_leg(task, progress._replace(stopped=BAD_LOSS))
    if value < progress.best_value:
        progress = progress._replace(best=done.state.average, best_value=value, best_epoch=epoch)
    if budget.patience is not None and epoch - progress.best_epoch >= budget.patience:
        return _end_leg(task, progress._replace(stopped=EARLY))
    return _end_leg(task, progress) if epoch + 1 == end else progress


def _leg(budget: Budget, epoch: int) -> tuple[int, int]:
    """Return the first epoch of the leg that an epoch belongs to, and the first epoch after it."""
    ends = (0, *budget.leg_ends)
    number = next(i for i, end in enumerate(ends) if end > epoch)
    return ends[number - 1], ends[number]


def _end_leg(task: _Task, progress: Progress) -> Progress:
    """Compare the best weights of the leg with the best so far; stop if that is what they say."""
    if not math.isfinite(progress.best_value):
        return progress
    fall = progress.least_value - progress.best_value
    better, gained = fall > 0, fall >= LEAST_FALL
    if task.judge is not None:
        before = max(progress.shares)
        progress = _judged(task, progress)
        gain = progress.shares[-1] / before - 1.0 if before > 0 else math.inf
        better, gained = gain > -LEAST_GAIN if gained else gain > 0, gained or gain >= LEAST_GAIN
    if better:
        progress = progress._replace(chosen=progress.best)
    if len(progress.loss) > _flat_from(task.budget) and not gained:
        progress = progress._replace(stopped=progress.stopped or FLAT)
    if len(progress.loss) >= task.budget.leg_ends[-1]:
        progress = progress._replace(stopped=progress.stopped or FINISHED)
    least = min(progress.least_value, progress.best_value)
    return progress._replace(least_value=least, best_value=math.inf, best_epoch=len(progress.loss))


def _judged(task: _Task, progress: Progress) -> Progress:
    """Ask the judge about the best weights of the leg."""
    assert task.judge is not None
    _, _, for_judge = _keys(task.key, np.array(0), np.array(task.budget.leg_ends[-1] + 1))
    share = float(np.nan_to_num(task.judge(for_judge, eqx.combine(progress.best, task.module))))
    return progress._replace(
        shares=(*progress.shares, share),
        share_steps=(*progress.share_steps, len(progress.loss) * task.budget.epoch_steps),
        share_seconds=(*progress.share_seconds, progress.seconds),
        stopped=progress.stopped or (GOOD if share >= task.budget.target_share else ""),
    )


def _flat_from(budget: Budget) -> int:
    """Epochs that are never too flat: the first leg starts from nothing."""
    return budget.leg_ends[0]


def _out_of_time(task: _Task, progress: Progress) -> Progress:
    limit = task.budget.max_seconds
    if progress.stopped or limit is None or progress.seconds < limit:
        return progress
    return _end_leg(task, progress._replace(stopped=OUT_OF_TIME))


def _history(task: _Task, progress: Progress, title: str) -> History:
    """Make the record of a run; warn if the run did not finish.

    Raises:
        FloatingPointError: if no epoch has a finite loss.
    """
    num_done = len(progress.loss)
    history = History(
        np.array(progress.loss), np.array(progress.validation), num_done * task.budget.epoch_steps,
        progress.num_simulations, progress.seconds, progress.stopped, progress.shares, progress.share_steps,
        progress.share_seconds,
    )  # fmt: skip
    if history.stopped in (INTERRUPTED, BAD_LOSS, BAD_SIMULATIONS):
        message = f"{title} ended after {num_done} of {task.budget.leg_ends[-1]} epochs: {history.stopped}."
        if not any(np.isfinite(progress.validation)):
            raise FloatingPointError(
                f"{message} No epoch has a finite loss, so there are no weights to return. Check that the model's "
                "simulations and density are finite."
            )
        warn(f"{message} The best weights so far are returned.", TrainingWarning)
    return history


@eqx.filter_jit
def _keys(key: Key, epoch: Int[Array | np.ndarray, ""], last: Int[Array | np.ndarray, ""]) -> tuple[Key, Key, Key]:
    """Make the keys of an epoch: for its pool, for its steps, and the one for all validation."""
    for_pool, for_epoch = jax.random.split(jax.random.fold_in(key, epoch))
    return for_pool, for_epoch, jax.random.fold_in(key, last)


@over_devices
def _run_epoch(
    loss: Loss,
    sizes: tuple[int, int],
    rate: _Rate,
    module: PyTree,
    state: _State,
    pool: PyTree,
    validation: PyTree,
    key: Key,
    for_validation: Key,
) -> _Epoch:
    """Take ``sizes[0]`` optimiser steps on minibatches of ``sizes[1]`` rows of the shuffled pool; validate."""
    optimiser, (num_steps, batch_size) = _optimiser(), sizes
    size = jax.tree.leaves(pool)[0].shape[0]
    for_order, for_steps = jax.random.split(key)
    repeats = -(-num_steps * batch_size // size)
    orders = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(for_order, repeats))
    rows = orders.ravel()[: num_steps * batch_size].reshape(num_steps, batch_size)

    def step(state, inputs):
        number, rows, key = inputs
        batch = spread(jax.tree.map(lambda leaf: leaf[rows], pool))
        value, gradient = jax.value_and_grad(lambda w: loss(eqx.combine(w, module), batch, key))(state.weights)
        updates, memory = optimiser.update(gradient, state.optimiser, state.weights)
        new = jax.tree.map(lambda w, update: w - rate.at(number) * update, state.weights, updates)
        decay = jnp.minimum(0.999, (1.0 + number) / (10.0 + number))  # every leg has its own average
        average = optax.incremental_update(new, state.average, 1.0 - decay)
        return _State(new, average, memory), value

    numbers = rate.first + jnp.arange(num_steps, dtype=jnp.float32)
    state, values = jax.lax.scan(step, state, (numbers, rows, jax.random.split(for_steps, num_steps)))
    value = values[num_steps // 2 :].mean()
    if validation is not None:
        value = mean_loss(loss, eqx.combine(state.average, module), validation, for_validation)
    return _Epoch(state, values.mean(), value, _all_finite(pool))


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
