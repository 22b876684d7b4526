"""Neural posterior score estimation: simulate, learn the whitening map, learn the score in the whitened space."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from scoreinfer._tree import in_batches, own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.errors import TrainingWarning, UnsupportedModel, warn
from scoreinfer.evidence.bank import Outliers, outliers
from scoreinfer.identity import describe_run
from scoreinfer.model import problem_of
from scoreinfer.nets import Concatenate, Embedding
from scoreinfer.nets.embedding import flatten
from scoreinfer.posterior.amortised import Posterior
from scoreinfer.posterior.checkpoint import foreign_outputs
from scoreinfer.posterior.checkpoint_amortised import read_posterior
from scoreinfer.problem import Problem
from scoreinfer.samplers.amortised import AmortisedProposal, Architecture, Size, default_sampler, untrained
from scoreinfer.samplers.diffusion import AbstractSampler
from scoreinfer.score.network import ConditionalScore
from scoreinfer.simulators.dataset import StoredSimulations, stored_simulations, with_outputs
from scoreinfer.simulators.store import Store
from scoreinfer.simulators.validity import Validity, learn_validity
from scoreinfer.training.loop import Budget, History, TrainingHistory, train
from scoreinfer.training.losses import ScoreBatch, denoising_loss, target_precision, whitening_loss
from scoreinfer.training.resume import open_run
from scoreinfer.training.simulations import (
    BATCH,
    Simulations,
    Standardiser,
    check_finite,
    encoded,
    has_gradient,
    simulate_joint,
    standardiser,
)
from scoreinfer.training.whitening import Whitening, regressed

NUM_PILOT = 8192
"""Number of simulations for the scales and the first whitening map. Chosen by judgement."""
NUM_OUTLIERS = 512
"""Number of simulations that the posterior keeps to detect outliers. Chosen by judgement."""
POOL = 32_768
"""Largest number of fresh simulations in one epoch. Chosen by judgement."""
PATIENCE = 30
"""Epochs without a better validation loss after which training on a fixed budget stops. Chosen by judgement."""


@dataclass(frozen=True, eq=False)
class NPSE:
    """Neural posterior score estimation: learn the amortised posterior of a model from the model's own simulations.

    Training has two stages. The first learns the whitening map of each observation by Gaussian likelihood. The second
    learns the score in the whitened space by denoising score matching. If the joint density has a usable gradient, the
    second stage also uses target-score matching.

    Args:
        model: a NumPyro model, or a `Problem`.
        num_simulations: fixed budget of simulations. A tenth of them is held out for validation and early stopping.
            None means fresh simulations in every epoch.
        num_steps: optimiser steps of the score. The whitening map takes the same number of steps before
            (a quarter of it on a fixed budget).
        batch_size: simulations per step.
        learning_rate: peak learning rate.
        width: width of the score network. The network of the whitening map is twice as wide (as wide on a fixed
            budget).
        depth: number of residual blocks of the score network.
        embedding: module that maps the standardised observed sites (a dictionary) to one vector. None means that they
            are concatenated.
        sampler: the sampler of the draws. None means the probability flow up to 16 dimensions and the reverse SDE
            above.
        target_score: whether training uses gradients of the joint density. None means: if they exist, are finite, pass
            a test by Stein's identity, and their mean square in the whitened space is below 10,000 in every dimension
            (larger ones have almost no share in the loss).
        observed: names of the observed sites. Necessary if the model does not show them without data.
        simulations: a store of the runs of a foreign simulator (`scoreinfer.simulators.simulate`), or its folder.
            ``model`` is then the prior of the runs. Data are passed by the names of the outputs:
            ``posterior.sample(key, num, y=data)``. A store larger than its ``memory`` is never read as a whole: every
            epoch reads other rows.
        likelihood: a NumPyro model ``likelihood(parameters, outputs, ...data)`` of the data alone, for simulators
            whose data have a known density given the outputs. Parameters and outputs are passed by name. Training
            draws new data from it in every epoch. `Conditioned.weigh` needs it to weigh draws.
        invalid: what happens to rows of the store that failed or are not finite. ``learn``: learn the probability of
            success v(z) and weigh draws by 1 / v(z); correct if failure does not depend on the data that the run would
            have produced. ``drop``: learn from the other rows only; biased towards parameters at which the simulator
            works, but correct if failure is part of the model. ``raise``: raise a `ValueError`.
        checkpoint: folder in which the training is stored every few seconds. If it holds a training, `fit` continues
            it. A run that is killed and started again with the same arguments ends with the same weights to the last
            bit as an uninterrupted run (on the same machine, on the CPU). An interrupt (Ctrl-C) stores the training
            and is raised again; without a folder, an interrupted training keeps the best weights so far.
        progress_bar: show progress bars on a terminal.

    Raises:
        ValueError: if ``likelihood`` is given without ``simulations``, or ``invalid`` or ``num_simulations`` do not
            fit a store.

    Exactness: biased as a density, like every learned posterior. Its weighted draws are exact.

    References: Geffner et al. 2023, arXiv 2209.14249 (neural posterior score estimation); Karras et al. 2022,
    arXiv 2206.00364 (preconditioning).
    """

    model: Callable | Problem
    num_simulations: int | None = None
    num_steps: int = 10_000
    batch_size: int = 256
    learning_rate: float = 4e-3
    width: int = 96
    depth: int = 3
    embedding: Embedding | None = None
    sampler: AbstractSampler | None = None
    target_score: bool | None = None
    observed: tuple[str, ...] | None = None
    simulations: Store | str | os.PathLike[str] | None = None
    likelihood: Callable[..., Any] | None = None
    invalid: Literal["learn", "drop", "raise"] = "learn"
    checkpoint: str | os.PathLike[str] | None = None
    progress_bar: bool = True

    def __post_init__(self) -> None:
        """Check the options that do not depend on the model's arguments."""
        if self.likelihood is not None and self.simulations is None:
            raise ValueError(
                "`likelihood` needs `simulations`, got None. Pass the store of the simulator that it belongs to."
            )
        if self.simulations is not None and (
            self.invalid not in ("learn", "drop", "raise") or self.num_simulations is not None
        ):
            raise ValueError(
                f"With `simulations`, `invalid` must be 'learn', 'drop' or 'raise', got {self.invalid!r}, and "
                f"`num_simulations` must be None, got {self.num_simulations}: the store is the budget."
            )

    @own_broadcasting
    def fit(self, key: Key, *args: Any, **kwargs: Any) -> Posterior:
        """Learn the posterior for all observations with the design (covariates, shapes) of these model arguments.

        Args:
            key: random key; the same key gives the same weights.
            *args: the model's own arguments. Data may be left out; they are ignored.
            **kwargs: the model's own keyword arguments.

        Returns:
            The `Posterior`, with the history of its training.

        Raises:
            UnsupportedModel: if the model cannot be read or simulated.
            ValueError: if simulations are not finite, ``target_score`` needs a gradient that does not exist, runs of
                the store failed and ``invalid`` is ``raise``, or the folder ``checkpoint`` holds another training.
            UnreadableFile: if a file in the folder ``checkpoint`` is damaged.
        """
        streams = _Streams(*jax.random.split(key, len(_Streams._fields)))
        data = _read(self, streams.pilot, problem_of(self.model, args, kwargs, self.observed))
        budget = _budget(self, data)
        embedding = Concatenate() if self.embedding is None else self.embedding
        stages = _open_checkpoint(self, key, data, embedding)
        problem, stored = data.problem, data.stored
        proposal = untrained(streams.white, streams.net, problem, _architecture(self, data), embedding)
        proposal = dataclasses.replace(proposal, standardiser=data.scale)
        proposal, white_history = _learn_whitening(self, streams.train, data, budget, proposal, stages[0])
        proposal, score_history = _learn_score(self, streams.score, data, budget, proposal, stages[1])
        history = TrainingHistory(white_history, score_history, budget)
        if stored is None:
            usual = _standardise(data.scale, simulate_joint(streams.bank, problem, NUM_OUTLIERS)).x
        else:
            usual = _rows(data.validation.x, slice(None, NUM_OUTLIERS))
        validity = _validity(self, streams.validity, stored)
        return Posterior(problem, proposal, _outliers(usual), history, validity)

    def load(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Posterior:
        """Load a saved posterior for the model that it was fitted to.

        Nothing in the files is executed, and nothing is trained: the shapes of the networks follow from the model and
        from ``config.json``. A posterior that was saved on one kind of device loads on any other. `load` uses these
        options only: ``embedding`` (one of the same structure, trained or not), ``observed``, ``likelihood`` and
        ``simulations`` (a store of the same simulator).

        Args:
            path: the folder that `Posterior.save` wrote.
            *args: the model's own arguments, as for `fit`; data may be left out.
            **kwargs: the model's own keyword arguments.

        Raises:
            UnreadableFile: if the files are missing, truncated, changed, of another version, or were not written by
                `Posterior.save`.
            ValueError: if sites or densities of the model differ from those of the learned model (the message names
                them), or if a module of the user's own is needed.

        Exactness: on the same machine the loaded posterior gives the same draws as the saved one, to the last bit.
            Weights are always computed from the given model, never from the files.
        """
        problem = problem_of(self.model, args, kwargs, self.observed)
        if self.likelihood is not None:
            options = dataclasses.replace(self, invalid="learn")  # the probability of success is in the folder
            problem = _stored(options, jax.random.key(0), problem).problem
        else:
            outputs = foreign_outputs(Path(path))
            problem = problem if outputs is None else with_outputs(problem, outputs)
        return Posterior(problem, *read_posterior(Path(path), problem, self.embedding))


def fit(key: Key, model: Callable | Problem, *args: Any, **kwargs: Any) -> Posterior:
    """Learn the posterior of a model with the defaults of `NPSE`: ``NPSE(model).fit(key, *args, **kwargs)``.

    Raises what `NPSE.fit` raises.

    >>> import numpyro, numpyro.distributions as dist, scoreinfer as si
    >>> def model(y=None):
    ...     z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> posterior = si.NPSE(model, num_steps=20, width=8, depth=1, progress_bar=False).fit(jax.random.key(0))
    >>> posterior.problem.dim, posterior.history.num_simulations
    (1, 5120)
    """
    return NPSE(model).fit(key, *args, **kwargs)


def load(path: str | os.PathLike[str], model: Callable | Problem, *args: Any, **kwargs: Any) -> Posterior:
    """Load a saved posterior: ``NPSE(model).load(path, *args, **kwargs)``. Raises what `NPSE.load` raises."""
    return NPSE(model).load(path, *args, **kwargs)


class _Streams(NamedTuple):
    """Independent random streams of one training."""

    pilot: Key
    white: Key
    net: Key
    train: Key
    score: Key
    bank: Key
    validity: Key


class _Data(NamedTuple):
    """The simulations for training and validation.

    Args:
        problem: the problem.
        scale: the standardiser of the observations.
        training: standardised simulations for training.
        validation: held-out standardised simulations.
        renew: makes the simulations of one epoch from a random key and a flag for gradients. None means ``training``
            in every epoch.
        online: whether every epoch has fresh simulations, without a budget.
        stored: the rows of the store. None means that there is no store.
    """

    problem: Problem
    scale: Standardiser
    training: Simulations
    validation: Simulations
    renew: Callable[[Key, bool], Simulations] | None
    online: bool
    stored: StoredSimulations | None

    def pool(self, key: Key, gradient: bool) -> Simulations:
        """Make the simulations of one epoch, with gradients of the log density if ``gradient`` is true."""
        return self.training if self.renew is None else self.renew(key, gradient)


def _read(options: NPSE, key: Key, problem: Problem) -> _Data:
    """Simulate the model, or read the store."""
    if options.simulations is not None:
        return _read_store(options, key, problem)
    if problem.simulate is None:
        raise UnsupportedModel(f"`fit` needs simulations, but this model cannot be simulated: {problem.not_simulable}")
    use_gradient = options.target_score is not False and has_gradient(problem)
    if options.target_score and not use_gradient:
        raise ValueError(
            "`target_score=True` needs the gradient of the joint density, but this model has none (it has no density, "
            "or a loop or call that cannot be differentiated). Leave `target_score` out to learn without gradients."
        )
    pilot = simulate_joint(key, problem, options.num_simulations or NUM_PILOT, gradient=use_gradient)
    if pilot.gradient is not None and options.target_score is None and not jnp.isfinite(pilot.gradient).all():
        pilot = pilot._replace(gradient=None)
    check_finite(pilot)
    scale = standardiser(pilot.x)
    online = options.num_simulations is None
    size = min(POOL, min(250, options.num_steps) * options.batch_size)

    def renew(key: Key, gradient: bool) -> Simulations:
        return _standardise(scale, simulate_joint(key, problem, size, gradient=gradient))

    training, validation = _held_out(_standardise(scale, pilot), max(pilot.num // 10, 1))
    return _Data(problem, scale, training, validation, renew if online else None, online, None)


def _read_store(options: NPSE, key: Key, prior: Problem) -> _Data:
    stored = _stored(options, key, prior)
    problem, renew_rows = stored.problem, stored.renew
    if options.target_score:
        raise ValueError(
            "`target_score=True` needs the gradient of the joint density, but stored runs have none. Leave it out."
        )
    pilot = encoded(problem, stored.z, stored.y)
    check_finite(pilot)
    scale = standardiser(pilot.x)

    def renew(key: Key, gradient: bool) -> Simulations:
        assert renew_rows is not None
        return _standardise(scale, encoded(problem, *renew_rows(key)))

    training, validation = _held_out(_standardise(scale, pilot), stored.num_held_out)
    return _Data(problem, scale, training, validation, None if renew_rows is None else renew, False, stored)


def _stored(options: NPSE, key: Key, prior: Problem) -> StoredSimulations:
    """Read the rows of a store; raise or warn about failed rows as ``options.invalid`` says."""
    assert options.simulations is not None
    stored = stored_simulations(key, prior, options.simulations, options.likelihood)
    num, num_bad = len(stored.valid), int(np.sum(~stored.valid))
    if num_bad and options.invalid == "raise":
        raise ValueError(
            f"Expected simulations without failures, but {num_bad} of {num} failed or are not finite. Learn the "
            "probability of success (invalid='learn'), or leave these rows out (invalid='drop'), which biases the "
            "posterior towards parameters at which the simulator works."
        )
    if num_bad and options.invalid == "drop":
        warn(
            f"{num_bad} of {num} simulations failed or are not finite and are left out. This biases the posterior "
            "towards parameters at which the simulator works.",
            TrainingWarning,
        )
    return stored


def _budget(options: NPSE, data: _Data) -> Budget:
    batch_size = min(options.batch_size, data.training.num)
    passes = -(-2 * data.training.num // batch_size)
    epoch_steps = min(250, options.num_steps) if data.online else min(250, options.num_steps, passes)
    patience = None if data.online else PATIENCE
    return Budget(options.num_steps, batch_size, epoch_steps, options.learning_rate, patience)


def _open_checkpoint(options: NPSE, key: Key, data: _Data, embedding: Embedding) -> tuple[Path | None, Path | None]:
    """Open the checkpoint folder; return the files of the two training stages (None without a folder)."""
    if options.checkpoint is None:
        return None, None
    folder = Path(options.checkpoint)
    settings = {
        "num_simulations": None if data.online else data.training.num + data.validation.num,
        "num_steps": options.num_steps, "batch_size": options.batch_size, "learning_rate": options.learning_rate,
        "width": options.width, "depth": options.depth, "sampler": str(options.sampler),
        "target_score": options.target_score,
    }  # fmt: skip
    all_z = None if data.stored is None else data.stored.all_z
    simulated = [(part.z, part.x) for part in (data.validation, data.training)]
    start = (all_z, simulated, data.scale, embedding)
    open_run(folder, key, settings | describe_run(data.problem, embedding, start))
    return folder / "whitening.safetensors", folder / "score.safetensors"


def _architecture(options: NPSE, data: _Data) -> Architecture:
    """Choose the hyperparameters. The whitening map is small on a fixed budget, so that it does not overfit."""
    problem, width = data.problem, options.width
    weighed = problem.has_density or problem.observation is not None
    sampler = options.sampler or default_sampler(problem.dim, weighed=weighed)
    whitening = Size(2 * width, 3) if data.online else Size(width, 2)
    return Architecture(whitening, Size(width, options.depth), sampler)


def _learn_whitening(
    options: NPSE, key: Key, data: _Data, budget: Budget, proposal: AmortisedProposal, checkpoint: Path | None
) -> tuple[AmortisedProposal, History]:
    short = budget._replace(num_steps=options.num_steps if data.online else options.num_steps // 4)
    whitening, history = train(
        key, regressed(proposal.whitening, data.training.z, data.training.x), whitening_loss,
        lambda key: data.pool(key, False), data.validation, short, progress_bar=options.progress_bar,
        title="whitening", checkpoint=checkpoint,
    )  # fmt: skip
    return dataclasses.replace(proposal, whitening=whitening), history


def _learn_score(
    options: NPSE, key: Key, data: _Data, budget: Budget, proposal: AmortisedProposal, checkpoint: Path | None
) -> tuple[AmortisedProposal, History]:
    whitening = proposal.whitening
    whitened = _whiten(whitening, data.training)
    use_gradient = data.training.gradient is not None
    precision = target_precision(whitened, options.target_score) if use_gradient else None

    def pool(key: Key) -> ScoreBatch:
        return whitened if data.renew is None else _whiten(whitening, data.pool(key, precision is not None))

    module, history = train(
        key, ConditionalScore(proposal.embedding, proposal.score),
        jax.tree_util.Partial(denoising_loss, precision=precision), pool, _whiten(whitening, data.validation), budget,
        progress_bar=options.progress_bar, title="score", checkpoint=checkpoint,
    )  # fmt: skip
    return dataclasses.replace(proposal, embedding=module.embedding, score=module.score), history


def _validity(options: NPSE, key: Key, stored: StoredSimulations | None) -> Validity | None:
    """Learn the probability that the simulator succeeds; None if it never failed or ``invalid`` is not ``learn``."""
    if stored is None or options.invalid != "learn" or stored.valid.all():
        return None
    success = jnp.asarray(stored.valid, jnp.float32)
    return learn_validity(key, stored.all_z, success, progress_bar=options.progress_bar)


def _held_out(simulations: Simulations, num: int) -> tuple[Simulations, Simulations]:
    """Split simulations into training simulations and ``num`` held-out ones."""
    return _rows(simulations, slice(num, None)), _rows(simulations, slice(None, num))


def _outliers(x: Sites) -> Outliers:
    return outliers(jax.vmap(flatten)(x))


def _rows(tree, where):
    return jax.tree.map(lambda leaf: leaf[where], tree)


@eqx.filter_jit
def _standardise(scale: Standardiser, simulations: Simulations) -> Simulations:
    return simulations._replace(x=jax.vmap(scale)(simulations.x))


def _whiten(whitening: Whitening, simulations: Simulations) -> ScoreBatch:
    """Map simulations, and the gradients of their log density, to the whitened space."""
    return in_batches(lambda i: _whiten_rows(whitening, simulations, i), simulations.num, BATCH)


@eqx.filter_jit
def _whiten_rows(whitening: Whitening, simulations: Simulations, rows: Int[Array, " num"]) -> ScoreBatch:

    def one(simulation):
        affine = whitening(simulation.x)
        gradient = simulation.gradient
        gradient = jnp.zeros_like(simulation.z) if gradient is None else affine.factor.T @ gradient
        u = affine.inverse(simulation.z.astype(jnp.float32))
        return ScoreBatch(u, simulation.x, gradient.astype(jnp.float32))

    return jax.vmap(one)(_rows(simulations, rows))
