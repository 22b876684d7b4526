"""Fitting an amortised posterior: simulations, then the whitening map, then the score in the whitened space."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._errors import TrainingWarning, UnsupportedModel
from scoreinfer._tree import arrays_by_name, in_batches, own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.affine import identity
from scoreinfer.evidence.bank import Outliers, outliers
from scoreinfer.files import digest
from scoreinfer.model import from_numpyro
from scoreinfer.nets import Concatenate, Embedding
from scoreinfer.nets.embedding import flatten
from scoreinfer.paths.losses import Windows
from scoreinfer.posterior.amortised import Posterior
from scoreinfer.posterior.checkpoint import foreign_outputs, read_posterior
from scoreinfer.posterior.fit_paths import fit_paths, load_paths
from scoreinfer.posterior.paths import PathPosterior
from scoreinfer.problem import Problem
from scoreinfer.process import Physics
from scoreinfer.samplers.amortised import Proposal, default_sampler
from scoreinfer.samplers.diffusion import AbstractSampler
from scoreinfer.score.network import score_module
from scoreinfer.simulators.dataset import StoredSimulations, stored_simulations, with_outputs
from scoreinfer.simulators.store import Store
from scoreinfer.simulators.validity import learn_validity
from scoreinfer.training.loop import Budget, TrainingHistory, train
from scoreinfer.training.losses import ScoreBatch, denoising_loss, target_precision, whitening_loss
from scoreinfer.training.resume import open_run
from scoreinfer.training.simulations import (
    BATCH,
    Simulations,
    Standardiser,
    check_finite,
    encoded,
    has_gradient,
    simulate,
    standardiser,
)
from scoreinfer.training.whitening import Whitening, linear_whitening

NUM_PILOT = 8192
NUM_OUTLIERS = 512
"""Simulations kept to tell outliers by."""
POOL = 32_768


@overload
def load(
    path: str | os.PathLike[str], model: Callable | Problem, *args: Any, process: None = None, **kwargs: Any
) -> Posterior: ...


@overload
def load(
    path: str | os.PathLike[str], model: Callable, *args: Any, process: Physics, **kwargs: Any
) -> PathPosterior: ...


def load(
    path: str | os.PathLike[str],
    model: Callable | Problem,
    *args: Any,
    embedding: Embedding | None = None,
    observed: tuple[str, ...] | None = None,
    simulations: Store | str | os.PathLike[str] | None = None,
    likelihood: Callable[..., Any] | None = None,
    process: Physics | None = None,
    net: Callable | None = None,
    **kwargs: Any,
) -> Posterior | PathPosterior:
    """Load a saved posterior for the model it was fitted to.

    Nothing in the files is executed and nothing is trained or compiled for a template: the networks' shapes follow
    from the model and from ``config.json``. What was saved on one kind of device loads on any other.

    Args:
        path: the folder that `Posterior.save` or `PathPosterior.save` wrote.
        model: the model, or the `Problem`, that the posterior was fitted to.
        *args: the model's own arguments, as for `fit`; data may be left out.
        embedding: where `fit` was given an embedding module of the user's own: one like it, trained or not.
        observed: as for `fit`.
        simulations: for a posterior fitted with a ``likelihood``: a store of the same simulator.
        likelihood: as for `fit`.
        process: for a posterior of paths: as for `fit`, the physics in reverse included, which is code.
        net: where `fit` was given a network of the user's own: one like it, trained or not.
        **kwargs: the model's own keyword arguments.

    Raises:
        UnreadableFile: where the files are missing, truncated, changed, from a newer version or not ours.
        ValueError: where sites, densities or physics of the model differ from those of the model that was learned (the
            message says which), or a module of the user's own is needed.

    Exactness: the loaded posterior draws the same as the saved one, to the last bit on the same machine. Whatever
        the files hold, weights are computed from the model at hand.
    """
    if process is not None:
        if isinstance(model, Problem):
            raise ValueError("Physics is read from a NumPyro model: `load` it with the model, not with a `Problem`.")
        return load_paths(Path(path), process, model, *args, net=net, observed=observed, **kwargs)
    problem = model if isinstance(model, Problem) else from_numpyro(model, *args, observed=observed, **kwargs)
    if likelihood is not None:
        problem = _stored(jax.random.key(0), problem, simulations, likelihood, "learn", None).problem
    else:
        outputs = foreign_outputs(Path(path))
        problem = problem if outputs is None else with_outputs(problem, outputs)
    return Posterior(*read_posterior(Path(path), problem, embedding))


@overload
def fit(key: Key, model: Callable | Problem, *args: Any, process: None = None, **kwargs: Any) -> Posterior: ...


@overload
def fit(key: Key, model: Callable, *args: Any, process: Physics, **kwargs: Any) -> PathPosterior: ...


@own_broadcasting
def fit(
    key: Key,
    model: Callable | Problem,
    *args: Any,
    num_simulations: int | None = None,
    num_steps: int = 10_000,
    batch_size: int = 256,
    learning_rate: float = 4e-3,
    width: int = 96,
    depth: int = 3,
    embedding: Embedding | None = None,
    sampler: AbstractSampler | None = None,
    target_score: bool | None = None,
    observed: tuple[str, ...] | None = None,
    simulations: Store | str | os.PathLike[str] | None = None,
    likelihood: Callable[..., Any] | None = None,
    invalid: str = "learn",
    checkpoint: str | os.PathLike[str] | None = None,
    process: Physics | None = None,
    net: Callable | None = None,
    trajectories: Float[Array | np.ndarray, "num times *state"] | None = None,
    resimulate: bool = False,
    windows: tuple[int, ...] | Windows = (),
    progress_bar: bool = True,
    **kwargs: Any,
) -> Posterior | PathPosterior:
    """Learn the posterior of a model, for every observation of its design, from the model's own simulations.

    First the whitening map of each observation is learned by Gaussian likelihood, then the score in the whitened
    space by denoising (and target-score matching where the joint density has a usable gradient).

    Args:
        key: random key; the same key gives the same weights.
        model: a NumPyro model, or a `Problem`.
        *args: the model's own arguments; data may be left out, and are not looked at.
        num_simulations: fixed budget of simulations, a tenth of them held out for validation and early stopping.
            None: fresh simulations at every epoch.
        num_steps: optimiser steps of the score; the whitening map takes as many of its own
            (a quarter of that on a fixed budget). With ``process`` 0 leaves regression alone.
        batch_size: simulations per step.
        learning_rate: peak learning rate.
        width: width of the score network (that of the whitening map is twice as wide).
        depth: residual blocks of the score network.
        embedding: module from the standardised observed sites (a dictionary) to one vector. None: side by side.
        sampler: how draws are made. None: the flow up to 16 dimensions, the reverse SDE beyond.
        target_score: use gradients of the joint density in training. None: where there are any, finite ones, that pass
            Stein's identity.
        observed: names of the observed sites, where they cannot be told from the model without data.
        simulations: a store of foreign simulations (`scoreinfer.simulate`), or its folder; ``model`` is their prior.
            The posterior is then asked by the outputs' names, ``posterior.sample(key, num, y=data)``. A store larger
            than its ``memory`` is never read whole: every epoch takes other rows.
        likelihood: where the density of the data given the simulator's outputs is known: a NumPyro model
            ``likelihood(parameters, outputs, ...data)`` of the data alone, told parameters and outputs by name. Data
            to learn from are drawn from it, anew for every epoch, and draws can be weighed (`Posterior.weigh`).
        invalid: what to do about rows of the store that failed or are not finite. ``learn``: learn the probability
            of success v(z) and weigh draws by 1 / v(z), right where failing has nothing to do with the data that
            would have come out. ``drop``: learn from the others alone, biased towards where the simulator works (and
            right where failing is part of the model). ``raise``.
        checkpoint: folder in which the training is kept every few seconds, and from which it goes on where it is
            there. A run that was killed and started again with the same arguments ends with the weights, to the last
            bit, of one that was not (on the same machine, on the CPU). Interrupted, it is kept and the interrupt
            goes on; without a folder an interrupted training keeps the best weights so far.
        process: the site of the model that is a physical process; other latent sites are unknown parameters, drawn and
            weighed jointly with its paths, and any states may be observed. Then its reverse is learned, transition by
            transition, and the result is a `PathPosterior`; ``embedding``, ``sampler``, ``target_score``,
            ``simulations``, ``likelihood`` and ``checkpoint`` are of no use to it.
        net: with ``process``: the network, such as a `ConvNet` for fields, instead of a perceptron of ``width`` and
            ``depth``. Every step then takes one transition of each of its ``batch_size`` simulations, not 2048.
        trajectories: recorded or simulated paths of that process on its own grid, to learn from instead of fresh
            simulations.
        resimulate: with ``trajectories``: take their first states alone, and run the model's physics and noise anew
            from these for every epoch. Nothing but the beginnings is learned by heart then, and what is learned from
            has less noise (`scoreinfer.paths.path_controls`); right where the physics of the model is that of the
            record.
        windows: with ``process``: lengths of the windows of the multi-step loss, such as (2, 4, 8), one stage of
            training each after that on single transitions; for reverse solvers that are not stable alone. `Windows`
            says more: noise, truncated gradients, memory.
        progress_bar: show progress bars on a terminal.
        **kwargs: the model's own keyword arguments.

    Returns:
        The `Posterior`, or with ``process`` the `PathPosterior`, with the history of its training.

    Raises:
        UnsupportedModel: where the model cannot be read or simulated.
        ValueError: where simulations are not finite, or another training is kept in the folder ``checkpoint``.
        UnreadableFile: where what is in that folder is damaged.

    Exactness: biased as a density, like every learned posterior; its weighted draws are exact.

    References: Geffner et al. 2023, arXiv 2209.14249 (neural posterior score estimation); Karras et al. 2022,
    arXiv 2206.00364 (preconditioning).
    """
    if process is not None or net is not None or trajectories is not None or windows or resimulate:
        if process is None or isinstance(model, Problem):
            raise ValueError(
                "Physics is learned from a NumPyro model with `process=Physics(site)`, for which alone `net`, "
                "`trajectories`, `resimulate` and `windows` are."
            )
        of_no_use = {
            "embedding": embedding, "sampler": sampler, "target_score": target_score, "simulations": simulations,
            "likelihood": likelihood, "checkpoint": checkpoint,
        }  # fmt: skip
        given = ", ".join(f"`{name}`" for name, value in of_no_use.items() if value is not None)
        if given:
            raise ValueError(f"Expected none of the options that are of no use with `process`, got {given}.")

        def learn_start(key: Key, last: Problem) -> Proposal:
            by = default_sampler(last.dim, weighed=True)  # within the weights of whole paths
            start = fit(key, last, num_steps=max(num_steps, 1), sampler=by, progress_bar=progress_bar)
            assert isinstance(start.proposal, Proposal)
            return start.proposal

        return fit_paths(
            key, model, *args, process=process, trajectories=trajectories, resimulate=resimulate,
            num_simulations=num_simulations, num_steps=num_steps, batch_size=batch_size, learning_rate=learning_rate,
            width=width, depth=depth, net=net, windows=windows, learn_start=learn_start, observed=observed,
            progress_bar=progress_bar, **kwargs,
        )  # fmt: skip
    settings = {
        "num_simulations": num_simulations, "num_steps": num_steps, "batch_size": batch_size,
        "learning_rate": learning_rate, "width": width, "depth": depth, "sampler": str(sampler),
        "target_score": target_score,
    }  # fmt: skip
    problem = model if isinstance(model, Problem) else from_numpyro(model, *args, observed=observed, **kwargs)
    names = ("pilot", "white", "net", "train", "score", "bank", "validity")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    stored = None
    if simulations is not None or likelihood is not None:
        stored = _stored(keys["pilot"], problem, simulations, likelihood, invalid, num_simulations)
    if stored is not None:
        problem, num_simulations = stored.problem, len(stored.z)
    elif problem.simulate is None:
        raise UnsupportedModel(f"`fit` learns from simulations, and this model has none: {problem.not_simulable}")
    online = num_simulations is None
    use_gradient = stored is None and target_score is not False and has_gradient(problem)
    if target_score and not use_gradient:
        raise ValueError(
            "`target_score=True` needs the gradient of the joint density, and this model has none (a loop or a call "
            "that cannot be differentiated, or no density at all). Leave it out: the score is learned without."
        )
    if stored is None:
        pilot = simulate(keys["pilot"], problem, num_simulations or NUM_PILOT, gradient=use_gradient)
        if pilot.gradient is not None and target_score is None and not jnp.isfinite(pilot.gradient).all():
            pilot, use_gradient = pilot._replace(gradient=None), False
    else:
        pilot = encoded(problem, stored.z, stored.y)
    check_finite(pilot)
    scale = standardiser(pilot.x)
    pilot = _standardise(scale, pilot)
    held_out = max(pilot.num // 10, 1) if stored is None else stored.num_held_out
    validation, training = _rows(pilot, slice(None, held_out)), _rows(pilot, slice(held_out, None))
    batch_size = min(batch_size, training.num)
    epoch_steps = min(250, num_steps) if online else min(250, num_steps, -(-2 * training.num // batch_size))
    budget = Budget(num_steps, batch_size, epoch_steps, learning_rate, patience=None if online else 30)
    pool_size = min(POOL, epoch_steps * batch_size)

    renew = None if stored is None else stored.renew
    unchanging = not online and renew is None

    def pools(key: Key, gradient: bool = False) -> Simulations:
        if online:
            return _standardise(scale, simulate(key, problem, pool_size, gradient=gradient))
        return training if renew is None else _standardise(scale, encoded(problem, *renew(key)))

    embedding = Concatenate() if embedding is None else embedding
    stages: list[Path | None] = [None, None]
    if checkpoint is not None:
        all_z = None if stored is None else stored.all_z
        start = all_z, pilot.z, pilot.x, scale, embedding
        open_run(Path(checkpoint), key, settings | _fingerprint(problem, start))
        stages = [Path(checkpoint) / f"{stage}.safetensors" for stage in ("whitening", "score")]
    # On a fixed budget a large whitening map would learn its simulations by heart.
    size = {"width": 2 * width, "depth": 3} if online else {"width": width, "depth": 2}
    whitening = linear_whitening(keys["white"], training.z, training.x, embedding, **size)
    short = budget._replace(num_steps=num_steps if online else num_steps // 4)
    whitening, white_history = train(
        keys["train"],
        whitening,
        whitening_loss,
        pools,
        validation,
        short,
        progress_bar=progress_bar,
        title="whitening",
        checkpoint=stages[0],
    )

    whitened = _whiten(whitening, training)
    precision = target_precision(whitened, target_score) if use_gradient else None
    module = score_module(keys["net"], problem.dim, embedding, training.x, width=width, depth=depth)
    loss = jax.tree_util.Partial(denoising_loss, precision=precision)
    module, score_history = train(
        keys["score"],
        module,
        loss,
        lambda key: whitened if unchanging else _whiten(whitening, pools(key, precision is not None)),
        _whiten(whitening, validation),
        budget,
        progress_bar=progress_bar,
        title="score",
        checkpoint=stages[1],
    )
    sampler = sampler or default_sampler(problem.dim, weighed=problem.has_density or problem.observation is not None)
    adjustment = identity(problem.dim)
    proposal = Proposal(scale, whitening, adjustment, module.embedding, module.score, sampler, problem)
    history = TrainingHistory(white_history, score_history, budget)
    if stored is None:
        usual = _standardise(scale, simulate(keys["bank"], problem, NUM_OUTLIERS))
        return Posterior(proposal, _outliers(usual.x), history)
    validity = None
    if invalid == "learn" and not stored.valid.all():
        success = jnp.asarray(stored.valid, jnp.float32)
        validity = learn_validity(keys["validity"], stored.all_z, success, progress_bar=progress_bar)
    return Posterior(proposal, _outliers(_rows(validation.x, slice(None, NUM_OUTLIERS))), history, validity)


def _stored(
    key: Key,
    prior: Problem,
    store: Store | str | os.PathLike[str] | None,
    likelihood: Callable[..., Any] | None,
    invalid: str,
    num_simulations: int | None,
) -> StoredSimulations:
    """Read a store to learn from."""
    if store is None:
        raise ValueError("A `likelihood` needs `simulations`: the store of the simulator whose outputs it is about.")
    if invalid not in ("learn", "drop", "raise") or num_simulations is not None:
        raise ValueError(
            f"With `simulations`, `invalid` must be 'learn', 'drop' or 'raise', got {invalid!r}, and `num_simulations` "
            f"must be left to the store, got {num_simulations}."
        )
    stored = stored_simulations(key, prior, store, likelihood)
    num, num_bad = len(stored.valid), int(np.sum(~stored.valid))
    if num_bad and invalid == "raise":
        raise ValueError(
            f"{num_bad} of {num} simulations failed or are not finite. Let `fit` learn where (invalid='learn'), or "
            "leave them out (invalid='drop'), which biases the posterior towards where the simulator works."
        )
    if num_bad and invalid == "drop":
        warnings.warn(
            f"{num_bad} of {num} simulations are left out: the posterior is biased towards where the simulator works.",
            TrainingWarning,
            stacklevel=4,
        )
    return stored


def _fingerprint(problem: Problem, start: tuple) -> dict[str, Any]:
    """Describe what a training depends on besides its settings: the sites, the simulations, the embedding."""
    arrays = {name: np.asarray(leaf) for name, leaf in arrays_by_name(start).items()}
    sites = [f"{site.name} {site.shape} {site.support}" for site in (*problem.latents, *problem.observed)]
    return {"sites": sites, "embedding": type(start[-1]).__qualname__, "simulations": digest(arrays)}


def _outliers(x: Sites) -> Outliers:
    return outliers(jax.vmap(flatten)(x))


def _rows(tree, where):
    return jax.tree.map(lambda leaf: leaf[where], tree)


@eqx.filter_jit
def _standardise(scale: Standardiser, simulations: Simulations) -> Simulations:
    return simulations._replace(x=jax.vmap(scale)(simulations.x))


def _whiten(whitening: Whitening, simulations: Simulations) -> ScoreBatch:
    """Move simulations, and the gradients of their log density, to the whitened space."""
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
