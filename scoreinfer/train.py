"""The one training loop: optax, averaged weights, validation, early stop, and a clear end whatever happens."""

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree
from tqdm.auto import tqdm

from scoreinfer._errors import TrainingWarning
from scoreinfer._typing import Key
from scoreinfer.losses import mean_loss

Loss = Callable[[PyTree, PyTree, Key], Float[Array, ""]]


class History(NamedTuple):
    """What happened in a training run, one entry per epoch.

    Args:
        loss: mean training loss of each epoch.
        validation: validation loss of the averaged weights after each epoch.
        num_steps: optimiser steps done.
        num_simulations: simulations drawn (online) or held (fixed budget).
        seconds: wall time, compilation included.
        stopped: why it ended: ``finished``, ``early``, ``interrupted``, ``loss not finite`` or
            ``simulations not finite``.
    """

    loss: np.ndarray
    validation: np.ndarray
    num_steps: int
    num_simulations: int
    seconds: float
    stopped: str


class Budget(NamedTuple):
    """How long and how to train.

    Args:
        num_steps: optimiser steps.
        batch_size: simulations per step.
        epoch_steps: steps per compiled scan, and per fresh pool of simulations.
        learning_rate: peak of the warm-up and cosine schedule.
        patience: epochs without a better validation loss after which a fixed budget stops; None: never.
    """

    num_steps: int
    batch_size: int = 512
    epoch_steps: int = 250
    learning_rate: float = 2e-3
    patience: int | None = None


class TrainingHistory(NamedTuple):
    """The two training runs behind a posterior: the whitening map, then the score.

    Args:
        whitening: what happened to the whitening map.
        score: what happened to the score.
        budget: how the score was to be trained.
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
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


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
) -> tuple[PyTree, History]:
    """Minimise ``loss`` over minibatches of pools of simulations; return the best averaged weights.

    Args:
        key: random key; the same key gives the same weights.
        module: what to train: a pytree whose inexact arrays are the weights.
        loss: ``(module, batch, key) -> scalar``.
        pools: ``key -> batch``: the simulations of one epoch, fresh (online) or always the same (fixed budget).
        validation: simulations no step ever sees.
        budget: length and manner of training.
        progress_bar: show a progress bar with the loss (never when standard error is not a terminal).
        title: the progress bar's label.

    Raises:
        FloatingPointError: when the loss is not finite before any epoch has ended well.
    """
    weights = eqx.filter(module, eqx.is_inexact_array)
    num_epochs = -(-budget.num_steps // budget.epoch_steps)
    start, for_validation = time.perf_counter(), jax.random.fold_in(key, num_epochs)
    state = _State(weights, weights, _optimiser(budget).init(weights), jnp.zeros((), jnp.float32))
    best, best_value, best_epoch = None, np.inf, 0
    losses, values, simulations, stopped = [], [], 0, "finished"
    bar = tqdm(total=num_epochs, desc=title, disable=None if progress_bar else True, leave=False)
    try:
        for epoch in range(num_epochs):
            for_pool, for_epoch = jax.random.split(jax.random.fold_in(key, epoch))
            pool = pools(for_pool)
            if not bool(_all_finite(pool)):
                stopped = "simulations not finite"
                break
            state, value = _run_epoch(loss, budget, module, state, pool, for_epoch)
            simulations += jax.tree.leaves(pool)[0].shape[0]
            losses.append(float(value))
            values.append(float(_validate(loss, module, state.average, validation, for_validation)))
            if not np.isfinite(losses[-1] + values[-1]):
                stopped = "loss not finite"
                break
            if values[-1] < best_value:
                best, best_value, best_epoch = state.average, values[-1], epoch
            bar.set_postfix(loss=f"{losses[-1]:.4f}", validation=f"{values[-1]:.4f}")
            bar.update()
            if budget.patience is not None and epoch - best_epoch >= budget.patience:
                stopped = "early"
                break
    except KeyboardInterrupt:
        stopped = "interrupted"
    bar.close()
    steps = len(losses) * budget.epoch_steps
    history = History(np.array(losses), np.array(values), steps, simulations, time.perf_counter() - start, stopped)
    if stopped not in ("finished", "early"):
        message = f"{title} ended after {len(losses)} of {num_epochs} epochs: {stopped}."
        if best is None:
            raise FloatingPointError(f"{message} No epoch had ended well, so there are no weights to keep.")
        warnings.warn(f"{message} The best weights so far are kept.", TrainingWarning, stacklevel=2)
    return eqx.combine(best, module), history


@eqx.filter_jit
def _run_epoch(
    loss: Loss, budget: Budget, module: PyTree, state: _State, pool: PyTree, key: Key
) -> tuple[_State, Float[Array, ""]]:
    """Take ``epoch_steps`` optimiser steps over shuffled passes through the pool."""
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
