"""Neural posterior score estimation: simulate, learn the whitening map, learn the score in the whitened space."""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from scoreinfer._memory import default_memory, map_rows
from scoreinfer._program import over_devices
from scoreinfer._tree import in_batches, own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.errors import TrainingWarning, UnsupportedModel, warn
from scoreinfer.evidence.bank import Outliers, outliers
from scoreinfer.identity import describe_run
from scoreinfer.model import Designs, problem_of
from scoreinfer.nets import Embedding, MaskedGroups, MaskedRows
from scoreinfer.nets.embedding import flatten
from scoreinfer.posterior.amortised import Posterior
from scoreinfer.posterior.checkpoint import foreign_outputs
from scoreinfer.posterior.checkpoint_amortised import read_posterior
from scoreinfer.posterior.design_range import trained_designs
from scoreinfer.posterior.rows import default_embedding
from scoreinfer.problem import Problem
from scoreinfer.samplers.amortised import (
    AbstractAmortised,
    AmortisedProposal,
    Architecture,
    Size,
    default_sampler,
    untrained,
)
from scoreinfer.samplers.diffusion import AbstractSampler
from scoreinfer.samplers.judge import NUM_OBSERVATIONS, Judge
from scoreinfer.samplers.tuned import MAX_TUNED_DIM, TunedProposal
from scoreinfer.score.network import ConditionalScore
from scoreinfer.simulators.dataset import StoredSimulations, stored_simulations, with_outputs
from scoreinfer.simulators.store import Store
from scoreinfer.simulators.validity import Validity, learn_validity
from scoreinfer.training.grouped import GroupWhitening, standardised
from scoreinfer.training.loop import EARLY, FINISHED, FLAT, GOOD, Budget, History, Loss, TrainingHistory, train
from scoreinfer.training.losses import ScoreBatch, denoising_loss, target_precision, whitening_loss
from scoreinfer.training.resume import open_run
from scoreinfer.training.simulations import (
    BATCH,
    Simulations,
    Standardiser,
    check_finite,
    encode,
    encoded,
    has_gradient,
    simulate_joint,
    simulate_with_data,
    standardiser,
)
from scoreinfer.training.whitening import Whitening, regressed

NUM_PILOT = 8192
"""Number of simulations for the scales and the first whitening map. Chosen by judgement."""
NUM_OUTLIERS = 512
"""Number of simulations that the posterior keeps to detect outliers. Chosen by judgement."""
POOL = 32_768
"""Largest number of fresh simulations in one epoch. Chosen by judgement."""
LEAST_SIMULATIONS = 256
"""Least number of simulations of one epoch, however large they are. Chosen by judgement."""
FIRST = Size(32, 2)
"""Size of the first score network, if the posterior has a density to judge it by. Chosen by judgement."""
FIRST_STEPS = 0.5
"""Share of the steps that the first network may take. Chosen by judgement: its steps are several times cheaper."""
NUM_LEGS = 5
"""Legs of every training: it may end after a sixteenth of its steps, an eighth, and so on. Chosen by judgement."""
WHITENING_TIME = 1 / 3
"""Share of ``max_seconds`` that the whitening map may take. Chosen by judgement."""
PATIENCE = 30
"""Epochs without a better validation loss after which training on a fixed budget stops. Chosen by judgement."""


@dataclass(frozen=True, eq=False)
class NPSE:
    """Neural posterior score estimation: learn the amortised posterior of a model from the model's own simulations.

    Training has two stages. The first learns the whitening map of each observation by Gaussian likelihood. The second
    learns the score in the whitened space by denoising score matching. If the joint density has a usable gradient, the
    second stage also uses target-score matching.

    Outcomes end the training. A judge draws for held-out observations and computes the effective share of the exact
    weights. A ladder of proposals is climbed until the share reaches ``target_share``: the regression, the whitening
    map, a small score network, the large one. Each of them is trained until the share is reached, or neither share nor
    validation loss improve, and the next one is learned only if it falls short. ``tune=True`` adds a rung without
    training after the whitening map: the learned Gaussian of each observation is tuned to its exact density when it is
    drawn from (see `scoreinfer.samplers.tuned`). It is kept if its share is the largest. Without a density the
    validation loss decides alone, and there is no small network. ``print(posterior.history)`` says what ended the
    training.

    Args:
        model: a NumPyro model, or a `Problem`.
        num_simulations: fixed budget of simulations. A tenth of them is held out for validation and early stopping.
            None means fresh simulations in every epoch.
        num_steps: largest number of optimiser steps of the score. The whitening map takes at most as many before
            (a quarter of it on a fixed budget), the small score network half as many.
        batch_size: simulations per step.
        learning_rate: peak learning rate.
        width: width of the large score network. The network of the whitening map is twice as wide (as wide on a fixed
            budget).
        depth: number of residual blocks of the large score network.
        embedding: module that maps the standardised observed sites (a dictionary) to one vector. None means that they
            are concatenated.
        sampler: the sampler of the draws. None means the probability flow up to 16 dimensions, with the fewest steps
            that keep 95 % of the largest effective share, and the reverse SDE above.
        target_score: whether training uses gradients of the joint density. None means: if they exist, are finite, pass
            a test by Stein's identity, and their mean square in the whitened space is below 10,000 in every dimension
            (larger ones have almost no share in the loss).
        observed: names of the observed sites. Necessary if the model does not show them without data.
        designs: draws those arguments of the model that differ from data set to data set (masks, times, covariates,
            numbers of rows), as a dictionary of arrays of fixed shapes, from a key. Every simulation has a fresh
            design. The posterior is then learned for all of them, and `Posterior.condition` takes them with the data.
        missing: names of observed sites in whose data NaN stands for a missing entry. ``designs`` then gives, under
            these names, which entries are there, as an array of booleans. Only for entries that are missing whatever
            their values are: where that tells something, the mask is data, and a site of the model.
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
        target_share: effective share of exact weights, of a typical held-out observation, at which training stops.
        max_seconds: seconds of training after which it stops. None means no limit. With a limit the weights depend on
            the clock.
        max_memory: bytes that the simulations of one epoch may take. Where 32,768 of them (8192 at first) take more,
            fewer are made, and every epoch makes fewer steps with them: the weights then depend on this number. None
            means one gibibyte, or a quarter of the device's memory where that is less. Not bounded by it: the
            networks, the batch of one step, and a budget of simulations or a store that is given.
        tune: whether the posterior may be one that is tuned to each observation, in up to 32 dimensions and without a
            ``sampler`` of your own. Draws for an observation then begin with up to 40,000 evaluations of the density.
            Useful where posteriors are far narrower than a network can learn, as those of differential equations.
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
    designs: Designs | None = None
    missing: tuple[str, ...] = ()
    simulations: Store | str | os.PathLike[str] | None = None
    likelihood: Callable[..., Any] | None = None
    invalid: Literal["learn", "drop", "raise"] = "learn"
    checkpoint: str | os.PathLike[str] | None = None
    target_share: float = 0.8
    max_seconds: float | None = None
    max_memory: int | None = None
    tune: bool = False
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
        problem = self._problem(args, kwargs)
        embedding = default_embedding(streams.embedding, problem) if self.embedding is None else self.embedding
        data = _read(self, streams.pilot, problem, embedding)
        course = _Course(
            self, streams, data, embedding, _open_checkpoint(self, key, data, embedding), _judge(streams, data)
        )
        proposal, history = _learn(course)
        problem, stored = data.problem, data.stored
        if stored is None and data.validation.num < NUM_OUTLIERS:
            usual = _standardise(
                data.scale, simulate_joint(streams.bank, problem, NUM_OUTLIERS, batch=_batch(data.most))
            ).x
        else:
            usual = _first(data.validation.x, min(NUM_OUTLIERS, data.validation.num))
        validity = _validity(self, streams.validity, stored)
        known = trained_designs(streams.designs, problem) if problem.designs else _outliers(usual)
        return Posterior(problem, proposal, known, history, validity)

    def _problem(self, args: tuple, kwargs: dict[str, Any]) -> Problem:
        return problem_of(self.model, args, kwargs, self.observed, self.designs, self.missing)

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
        problem = self._problem(args, kwargs)
        if self.likelihood is not None:
            options = dataclasses.replace(self, invalid="learn")  # the probability of success is in the folder
            problem = _stored(options, jax.random.key(0), problem).problem
        else:
            outputs = foreign_outputs(Path(path))
            problem = problem if outputs is None else with_outputs(problem, outputs)
        return Posterior(problem, *read_posterior(Path(path), problem, self.embedding))


def fit(key: Key, model: Callable | Problem, *args: Any, designs: Designs | None = None, **kwargs: Any) -> Posterior:
    """Learn the posterior of a model with the defaults of `NPSE`: ``NPSE(model).fit(key, *args, **kwargs)``.

    Args:
        key: random key.
        model: a NumPyro model, or a `Problem`.
        *args: the model's own arguments.
        designs: draws the arguments that differ from data set to data set; see `NPSE`. A model with an argument of
            this name needs ``NPSE(model).fit``.
        **kwargs: the model's own keyword arguments.

    Raises what `NPSE.fit` raises.

    >>> import numpyro, numpyro.distributions as dist, scoreinfer as si
    >>> def model(y=None):
    ...     z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> posterior = si.NPSE(model, num_steps=20, width=8, depth=1, progress_bar=False).fit(jax.random.key(0))
    >>> posterior.problem.dim, posterior.history.num_simulations
    (1, 7373)
    """
    return NPSE(model, designs=designs).fit(key, *args, **kwargs)


def load(
    path: str | os.PathLike[str], model: Callable | Problem, *args: Any, designs: Designs | None = None, **kwargs: Any
) -> Posterior:
    """Load a saved posterior: ``NPSE(model, designs=designs).load(path, *args, **kwargs)``.

    Raises what `NPSE.load` raises.
    """
    return NPSE(model, designs=designs).load(path, *args, **kwargs)


class _Streams(NamedTuple):
    """Independent random streams of one training."""

    pilot: Key
    white: Key
    net: Key
    train: Key
    score: Key
    bank: Key
    validity: Key
    judge: Key
    large: Key
    tuning: Key
    embedding: Key
    designs: Key


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
        y: observations of the first held-out simulations.
        most: largest number of simulations of one epoch.
    """

    problem: Problem
    scale: Standardiser
    training: Simulations
    validation: Simulations
    renew: Callable[[Key, bool], Simulations] | None
    online: bool
    stored: StoredSimulations | None
    y: Sites
    most: int = POOL

    def pool(self, key: Key, gradient: bool) -> Simulations:
        """Make the simulations of one epoch, with gradients of the log density if ``gradient`` is true."""
        return self.training if self.renew is None else self.renew(key, gradient)


class _Course(NamedTuple):
    """What all stages of one training share.

    Args:
        options: the options.
        streams: the random streams.
        data: the simulations.
        embedding: the untrained embedding.
        folder: folder in which the stages are stored. None means that they are not.
        judge: judge of the proposals. None means that the posterior has no density.
    """

    options: NPSE
    streams: _Streams
    data: _Data
    embedding: Embedding
    folder: Path | None
    judge: Judge | None

    def untrained(self, key: Key, size: Size) -> AmortisedProposal:
        """Make an untrained proposal with a score network of this size."""
        architecture = _architecture(self.options, self.data, size)
        proposal = untrained(self.streams.white, key, self.data.problem, architecture, self.embedding)
        return dataclasses.replace(proposal, standardiser=self.data.scale)

    def train(
        self,
        title: str,
        key: Key,
        module: Any,
        loss: Loss,
        pools: Callable[[Key], Any],
        validation: Any,
        budget: Budget,
        proposal_of: Callable[[Any], AmortisedProposal],
    ) -> tuple[AmortisedProposal, History]:
        """Train one stage; return the proposal with the trained module, and the record."""
        judge = self.judge
        module, history = train(
            key, module, loss, pools, validation, budget, title=title, progress_bar=self.options.progress_bar,
            judge=None if judge is None else lambda _, module: judge.share(proposal_of(module)),
            checkpoint=None if self.folder is None else self.folder / f"{title.replace(' ', '_')}.safetensors",
        )  # fmt: skip
        return proposal_of(module), history


def _read(options: NPSE, key: Key, problem: Problem, embedding: Embedding) -> _Data:
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
    most = _most_simulations(options, problem)
    num = options.num_simulations or min(NUM_PILOT, most)
    pilot, y = simulate_with_data(key, problem, num, gradient=use_gradient, batch=_batch(most))
    if pilot.gradient is not None and options.target_score is None and not _all_finite(pilot.gradient):
        pilot = pilot._replace(gradient=None)
    check_finite(pilot)
    scale = standardiser(pilot.x, _row_axes(embedding))
    online = options.num_simulations is None
    size = min(POOL, most, min(250, options.num_steps) * options.batch_size)

    def renew(key: Key, gradient: bool) -> Simulations:
        return _standardise(scale, simulate_joint(key, problem, size, gradient=gradient, batch=_batch(most)))

    training, validation = _held_out(scale, pilot, max(pilot.num // 10, 1))
    y = _first(y, min(NUM_OBSERVATIONS, validation.num))
    return _Data(problem, scale, training, validation, renew if online else None, online, None, y, most)


def _row_axes(embedding: Embedding) -> tuple[int, ...]:
    """Return the lengths of the axes along which an embedding treats all entries alike."""
    if isinstance(embedding, MaskedGroups):
        return embedding.num_groups, embedding.within.num_rows
    return (embedding.num_rows,) if isinstance(embedding, MaskedRows) else ()


def _most_simulations(options: NPSE, problem: Problem) -> int:
    """Compute how many simulations fit in the memory: a power of two, and at least `LEAST_SIMULATIONS`.

    A simulation is there eight times: as drawn, encoded, standardised and whitened, those of the epoch and the first
    ones, and once more each while batches are joined.
    """
    assert problem.simulate is not None
    z, y = jax.eval_shape(problem.simulate, jax.random.key(0))
    x = jax.eval_shape(partial(encode, problem), y)
    each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((z, y, [x] * 7)))
    memory = default_memory() if options.max_memory is None else options.max_memory
    return max(LEAST_SIMULATIONS, 1 << max((memory // max(each, 1)).bit_length() - 1, 0))


def _batch(most: int) -> int:
    """Choose the number of simulations per compiled call: a small part of the largest number."""
    return min(BATCH, max(most // 8, 64))


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

    training, validation = _held_out(scale, pilot, stored.num_held_out)
    return _Data(problem, scale, training, validation, None if renew_rows is None else renew, False, stored, {})


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
    if data.online and data.most < POOL:  # large simulations: no more than two passes through those of an epoch
        epoch_steps = min(epoch_steps, -(-2 * data.most // batch_size))
    patience = None if data.online else PATIENCE
    return Budget(
        options.num_steps, batch_size, epoch_steps, options.learning_rate, patience, NUM_LEGS, options.target_share,
        options.max_seconds,
    )  # fmt: skip


def _open_checkpoint(options: NPSE, key: Key, data: _Data, embedding: Embedding) -> Path | None:
    """Open the checkpoint folder for the files of the training stages."""
    if options.checkpoint is None:
        return None
    folder = Path(options.checkpoint)
    settings = {
        "num_simulations": None if data.online else data.training.num + data.validation.num,
        "num_steps": options.num_steps, "batch_size": options.batch_size, "learning_rate": options.learning_rate,
        "width": options.width, "depth": options.depth, "sampler": str(options.sampler),
        "target_score": options.target_score, "target_share": options.target_share, "max_seconds": options.max_seconds,
        "tune": options.tune, "largest_pool": min(data.most, POOL),
    }  # fmt: skip
    all_z = None if data.stored is None else data.stored.all_z
    simulated = [(part.z, part.x) for part in (data.validation, data.training)]
    start = (all_z, simulated, data.scale, embedding)
    open_run(folder, key, settings | describe_run(data.problem, embedding, start))
    return folder


def _judge(streams: _Streams, data: _Data) -> Judge | None:
    """Make the judge, whose observations are held out of the training; None without a density."""
    problem, num = data.problem, min(NUM_OBSERVATIONS, data.validation.num)
    judged = problem.has_density and problem.simulate is not None
    return Judge(streams.judge, problem, data.y, num, _first(data.validation.z, num)) if judged else None


def _architecture(options: NPSE, data: _Data, score: Size) -> Architecture:
    """Choose the hyperparameters. The whitening map is small on a fixed budget, so that it does not overfit."""
    problem, width = data.problem, options.width
    weighed = problem.has_density or problem.observation is not None
    sampler = options.sampler or default_sampler(problem.dim, weighed=weighed)
    whitening = Size(2 * width, 3) if data.online else Size(width, 2)
    return Architecture(whitening, score, sampler)


def _learn(course: _Course) -> tuple[AbstractAmortised, TrainingHistory]:
    """Climb the ladder: whitening map, tuning, small and large score network; choose the number of sampler steps."""
    options, streams, judge, budget = course.options, course.streams, course.judge, _budget(course.options, course.data)
    own = Size(options.width, options.depth)
    two = judge is not None and options.width > FIRST.width
    start, whitening = _learn_whitening(course, budget, course.untrained(streams.net, FIRST if two else own))
    if whitening.share >= options.target_share:
        proposal = start if judge is None or options.sampler is not None else judge.fewest_steps(start)
        return proposal, TrainingHistory(whitening, _nothing_to_learn(whitening.share), budget)
    tuned, tuned_share = _tuned(course, start)
    if tuned is not None and tuned_share >= options.target_share:
        return tuned, TrainingHistory(whitening, _nothing_to_learn(tuned_share), budget, tuned_share=tuned_share)
    first = budget._replace(num_steps=max(int(FIRST_STEPS * budget.num_steps), 1)) if two else budget
    proposal, score = _learn_score(course, "small score" if two else "score", _left(first, whitening), start)
    smaller = None
    if two and score.stopped in (FLAT, FINISHED, EARLY):
        smaller, large = score, dataclasses.replace(course.untrained(streams.large, own), whitening=start.whitening)
        larger, score = _learn_score(course, "score", _left(budget, whitening, smaller), large)
        proposal = larger if score.share > smaller.share else proposal
    history = TrainingHistory(whitening, score, budget, smaller, tuned_share)
    if tuned is not None and max(run.share for run in (score, smaller or score)) < tuned_share:
        return tuned, history
    if judge is not None and options.sampler is None:
        proposal = judge.fewest_steps(proposal)
    return proposal, history


def _tuned(course: _Course, start: AmortisedProposal) -> tuple[TunedProposal | None, float]:
    """Make the proposal that is tuned to every observation, and judge it; None where it would not be of use."""
    wanted = course.options.tune and course.options.sampler is None and course.data.problem.dim <= MAX_TUNED_DIM
    if course.judge is None or not wanted:
        return None, math.nan
    tuned = TunedProposal(start, jax.random.bits(course.streams.tuning, (2,), jnp.uint32))
    return tuned, course.judge.tuned_share(tuned)


def _nothing_to_learn(share: float) -> History:
    """Make the record of a training that did not need to begin."""
    return History(np.zeros(0), np.zeros(0), 0, 0, 0.0, GOOD, (share,), (0,), (0.0,))


def _left(budget: Budget, *before: History) -> Budget:
    """Subtract the seconds of the stages before."""
    if budget.max_seconds is None:
        return budget
    return budget._replace(max_seconds=max(budget.max_seconds - sum(run.seconds for run in before), 0.0))


def _learn_whitening(course: _Course, budget: Budget, proposal: AmortisedProposal) -> tuple[AmortisedProposal, History]:
    options, data = course.options, course.data
    short = budget._replace(
        num_steps=options.num_steps if data.online else max(options.num_steps // 4, 1),
        max_seconds=None if budget.max_seconds is None else WHITENING_TIME * budget.max_seconds,
    )
    first = proposal.whitening
    if isinstance(first, GroupWhitening):
        whitening: Any = standardised(first, data.training.z)
    else:
        whitening = regressed(first, data.training.z, data.training.x)
    proposal, history = course.train(
        "whitening", course.streams.train, whitening, whitening_loss, lambda key: data.pool(key, False),
        data.validation, short, lambda module: dataclasses.replace(proposal, whitening=module),
    )  # fmt: skip
    return proposal, history._replace(num_simulations=history.num_simulations + data.training.num)  # the regression's


def _learn_score(
    course: _Course, title: str, budget: Budget, proposal: AmortisedProposal
) -> tuple[AmortisedProposal, History]:
    options, data, whitening = course.options, course.data, proposal.whitening
    batch = _batch(data.most)
    whitened = _whiten(whitening, data.training, batch)
    use_gradient = data.training.gradient is not None
    precision = target_precision(whitened, options.target_score) if use_gradient else None

    def pool(key: Key) -> ScoreBatch:
        return whitened if data.renew is None else _whiten(whitening, data.pool(key, precision is not None), batch)

    def proposal_of(module: ConditionalScore) -> AmortisedProposal:
        return dataclasses.replace(proposal, embedding=module.embedding, score=module.score)

    return course.train(
        title, course.streams.score, ConditionalScore(proposal.embedding, proposal.score),
        jax.tree_util.Partial(denoising_loss, precision=precision), pool, _whiten(whitening, data.validation, batch),
        budget, proposal_of,
    )  # fmt: skip


def _validity(options: NPSE, key: Key, stored: StoredSimulations | None) -> Validity | None:
    """Learn the probability that the simulator succeeds; None if it never failed or ``invalid`` is not ``learn``."""
    if stored is None or options.invalid != "learn" or stored.valid.all():
        return None
    success = jnp.asarray(stored.valid, jnp.float32)
    return learn_validity(key, stored.all_z, success, progress_bar=options.progress_bar)


@eqx.filter_jit
def _held_out(scale: Standardiser, simulations: Simulations, num: int) -> tuple[Simulations, Simulations]:
    """Standardise simulations; split them into training simulations and ``num`` held-out ones."""
    simulations = simulations._replace(x=jax.vmap(scale)(simulations.x))
    return _rows(simulations, slice(num, None)), _rows(simulations, slice(None, num))


@eqx.filter_jit
def _outliers(x: Sites) -> Outliers:
    return outliers(jax.vmap(flatten)(x))


@eqx.filter_jit
def _first(tree, num: int):
    return _rows(tree, slice(None, num))


@eqx.filter_jit
def _all_finite(x: Array) -> Array:
    return jnp.isfinite(x).all()


def _rows(tree, where):
    return jax.tree.map(lambda leaf: leaf[where], tree)


@eqx.filter_jit
def _standardise(scale: Standardiser, simulations: Simulations) -> Simulations:
    return simulations._replace(x=jax.vmap(scale)(simulations.x))


def _whiten(whitening: Whitening | GroupWhitening, simulations: Simulations, batch: int) -> ScoreBatch:
    """Map simulations, and the gradients of their log density, to the whitened space."""
    return in_batches(lambda i: _whiten_rows(whitening, simulations, i), simulations.num, batch)


@over_devices
def _whiten_rows(
    whitening: Whitening | GroupWhitening, simulations: Simulations, rows: Int[Array, " num"]
) -> ScoreBatch:

    def one(simulation):
        affine = whitening(simulation.x)
        gradient = simulation.gradient
        gradient = jnp.zeros_like(simulation.z) if gradient is None else affine.factor.T @ gradient
        u = affine.inverse(simulation.z.astype(jnp.float32))
        return ScoreBatch(u, simulation.x, gradient.astype(jnp.float32))

    return map_rows(one, None)(_rows(simulations, rows))
