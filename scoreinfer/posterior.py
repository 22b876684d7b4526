"""The amortised posterior: ``fit`` a score SDE on a model's own simulations, then draw, weigh and certify."""

import dataclasses
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm.auto import tqdm

from scoreinfer._errors import MisspecificationWarning, TrainingWarning, UnsupportedModel
from scoreinfer._tree import arrays_by_name, in_batches, own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.agreement import misdrawn_latents, say_misdrawn
from scoreinfer.certificate import MAX_K_HAT, MAX_OUTLYING, ForwardCheck, certify
from scoreinfer.checkpoint import Parts, foreign_outputs, read_posterior, write_posterior
from scoreinfer.correct import effective_sample_size, log_evidence, pareto_smooth, rejuvenate, resample_indices
from scoreinfer.drawing import Defence, constrain, weigh_rows, weighted_draws
from scoreinfer.draws import Draws
from scoreinfer.focus import focus
from scoreinfer.forward import Outliers, outliers
from scoreinfer.losses import ScoreBatch, denoising_loss, score_module, target_precision, whitening_loss
from scoreinfer.model import from_numpyro
from scoreinfer.nets import Concatenate, Embedding
from scoreinfer.nets.embedding import flatten
from scoreinfer.path_losses import Windows
from scoreinfer.paths import PathPosterior, fit_paths, load_paths
from scoreinfer.problem import Problem
from scoreinfer.process import Physics
from scoreinfer.proposal import Proposal, Weighted, default_sampler
from scoreinfer.refinement import AmortisedProposal, refine
from scoreinfer.resuming import open_run
from scoreinfer.sampling import AbstractSampler
from scoreinfer.simulation import (
    BATCH,
    Simulations,
    Standardiser,
    check_finite,
    encoded,
    has_gradient,
    simulate,
    standardiser,
)
from scoreinfer.storage import digest
from scoreinfer.store import Store
from scoreinfer.stored import StoredSimulations, explained, stored_simulations, with_outputs
from scoreinfer.tempering import Prior
from scoreinfer.train import Budget, TrainingHistory, train
from scoreinfer.validity import Validity, failure_weights, learn_validity
from scoreinfer.whitening import Whitening, identity, linear_whitening
from scoreinfer.witnesses import Judged, gather, judge, reference_of

NUM_PILOT = 8192
NUM_OUTLIERS = 512
"""Simulations kept to tell outliers by."""
NUM_EXPLAINING = 64
"""Stored simulations that explain the data, held against the proposal."""
POOL = 32_768
UNWEIGHED = "uncertified: not weighed yet. Run the simulator on the draws (`simulate`), then `weigh` them."
ENOUGH = 0.25
"""Effective share of a focused proposal's draws below which its score is trained further."""


class Posterior(eqx.Module):
    """An amortised posterior: one training, any number of observations of the same design.

    Args:
        proposal: the learned sampler.
        outliers: simulations by which an outlier is told; None: none is.
        history: how it was trained.
        validity: probability that a foreign simulator succeeds, by which draws are weighed; None: it always does, or
            its failures are not to be undone.
    """

    proposal: AmortisedProposal
    outliers: Outliers | None
    history: TrainingHistory | None = None
    validity: Validity | None = None

    @property
    def problem(self) -> Problem:
        """The problem this posterior answers."""
        return self.proposal.problem

    def context(self, y: Sites) -> Any:
        """Embed one observation (see `Proposal.context`)."""
        return self.proposal.context(y)

    def propose(self, key: Key, context: Any) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and its ``log_q`` (see `Proposal.propose`)."""
        return self.proposal.propose(key, context)

    def log_q(self, key: Key, context: Any, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z (see `Proposal.log_q`)."""
        return self.proposal.log_q(key, context, z)

    @own_broadcasting
    def focus(
        self, key: Key, *args: Any, num_steps: int = 4000, progress_bar: bool = False, **kwargs: Any
    ) -> "Posterior":
        """Adapt the proposal to one observation: its place and scale first, then where need be the score.

        For a posterior far narrower than the prior, whose amortised draws miss by a fraction of its width, and for
        one learned badly, as on a fixed budget of simulations: seconds for an affine map adapted by importance
        sampling (see `scoreinfer.focus`), and where less than a quarter of the draws is then effective, a minute for
        a score trained on the posterior's own gradient (see `scoreinfer.refinement`). The result still answers for
        other observations.

        Args:
            key: random key.
            *args: the model's own arguments, with the data.
            num_steps: optimiser steps of the score, where it is trained further; 0: it is not.
            progress_bar: show progress bars over its training.
            **kwargs: the model's own keyword arguments.

        Exactness: exact weights as before: the result is another proposal with a known density.
        """
        y = self.problem.read(args, kwargs)
        streams = _streams(key)
        for_affine, for_score = jax.random.split(streams.focus)
        original = self.proposal if isinstance(self.proposal, Proposal) else self.proposal.original
        focused, share = focus(for_affine, original, y)
        proposal: AmortisedProposal = focused
        if 0.0 < share < ENOUGH and num_steps > 0:
            try:
                refined, new_share = refine(for_score, focused, y, num_steps, progress_bar=progress_bar)
                proposal = refined if new_share > share else focused
            except FloatingPointError as error:
                warnings.warn(f"The score was not trained further: {error}", TrainingWarning, stacklevel=3)
        return dataclasses.replace(self, proposal=proposal)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a folder: ``config.json`` and ``weights.safetensors``, plain data for `load`.

        A saved posterior that is already there is replaced; each file is written whole or not at all (a process killed
        between the two leaves neither the old nor the new one, and `load` says so). What was
        adapted to one observation (`focus`) is saved as it is. The model is not saved: it is code.

        Args:
            path: a new folder, or one that holds a saved posterior.

        Raises:
            ValueError: where the folder holds anything else, or a part (a sampler or a score of another kind) cannot
                be described by plain data.
        """
        write_posterior(Path(path), Parts(self.proposal, self.outliers, self.history, self.validity))

    @own_broadcasting
    def sample(
        self,
        key: Key,
        num: int,
        *args: Any,
        batch_size: int = 1024,
        prior_fraction: float = 0.0,
        max_proposals: int | None = None,
        num_moves: int = 20,
        thorough: bool = False,
        progress_bar: bool = False,
        **kwargs: Any,
    ) -> Draws:
        """Draw from the posterior of one observation, weigh every draw, and certify the batch.

        The certificate rests on witnesses, draws near the posterior that owe nothing to the proposal (see
        `scoreinfer.witnesses`). Where some of them lie where the proposal hardly draws, or the batch is refused, a
        density fitted to half of them joins the proposal, the batch is drawn again, and the other half judges it.
        ``info["witnessed"]`` is the share of the draws that come from that density.

        Args:
            key: random key; draw i depends on ``key`` and i alone, whatever the batch size.
            num: number of draws.
            *args: the model's own arguments, with the data.
            batch_size: draws per compiled call: bounds the memory.
            prior_fraction: share of the draws taken from the prior instead (a defensive mixture: bounds the
                weights by the likelihood over the share; pays where the posterior is not far from the prior).
            max_proposals: where given, propose until the effective sample size reaches ``num`` and k-hat is below
                0.7, or this many proposals are spent, then resample to ``num`` equally weighted draws and move each by
                ``num_moves`` Metropolis-adjusted Langevin steps, so that certainty can be bought with time.
            num_moves: see ``max_proposals``.
            thorough: look for modes that the proposal misses in 16 times as many draws of the prior.
            progress_bar: show a progress bar over batches.
            **kwargs: the model's own keyword arguments.

        Returns:
            `Draws`; weighted, or equally weighted after resampling. With a foreign simulator no density is at hand:
            with a ``likelihood`` they are weighed afterwards (`weigh`), else never.

        Raises:
            ValueError: where the data are missing, not finite, of another shape or another design, or a
                ``prior_fraction`` is asked of a foreign simulator.

        Warns:
            MisspecificationWarning: where the observation lies further from the simulations than 99 % of them from
                each other.

        Exactness: the weights are exact importance weights for any training; averages under them are consistent as
            ``num`` grows. Resampled and moved draws are consistent as the proposals grow; with ``max_proposals`` the
            weights decide when to stop, and a batch that is refused may be drawn again: then their mean, the evidence,
            is consistent but no longer unbiased.
        """
        start = time.perf_counter()
        problem = self.problem
        y = problem.read(args, kwargs)
        if prior_fraction > 0 and problem.simulate is None:
            raise ValueError(f"`prior_fraction` needs draws from the prior; there are none: {problem.not_simulable}")
        if prior_fraction > 0 and (wrong := misdrawn_latents(problem)):
            raise ValueError(f"`prior_fraction` needs draws that the prior's density describes; {say_misdrawn(wrong)}")
        streams = _streams(key)
        defence = Defence(Prior(problem), prior_fraction) if prior_fraction > 0 else None
        limit = max(num, max_proposals) if max_proposals is not None and problem.has_density else num

        def propose(key: Key, defence: Defence | None) -> Weighted:
            batches = partial(weighted_draws, key, self.proposal, y, batch_size, defence)
            with tqdm(total=limit, desc="drawing", disable=None if progress_bar else True, leave=False) as bar:
                drawn = batches(0, num, bar.update)
                while drawn.num < limit and not _enough(drawn.log_weight, num):
                    more = batches(drawn.num, min(num, limit - drawn.num), bar.update)
                    drawn = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), drawn, more)
            return drawn

        drawn = propose(streams.draws, defence)
        again = partial(propose, streams.mended) if defence is None else None
        drawn, certificate, num_proposals, witnessed = self._judge(streams, y, drawn, defence, again, thorough)
        info: dict[str, Any] = {
            "num_proposals": num_proposals,
            "num_score_evaluations": num_proposals * self.proposal.sampler.num_evaluations,
            "num_simulations": None if self.history is None else self.history.num_simulations,
            "witnessed": witnessed,
        }
        _warn_of_outlier(certificate.distance_rank)
        moved = max_proposals is not None and bool(np.isfinite(certificate.log_evidence))
        if moved:
            density = jax.tree_util.Partial(problem.log_joint, y=y)
            values, log_joint, moves = rejuvenate(
                streams.moves, density, drawn.values, drawn.log_weight, num, num_moves
            )
            drawn = Weighted(values, log_joint - certificate.log_evidence, log_joint)
            info |= {"move_accept_prob": float(moves.accept_prob), "move_step_size": float(moves.step_size)}
        sites = constrain(problem, drawn.values, batch_size)
        info |= {"seconds": time.perf_counter() - start}
        # Moved draws weigh the same to the letter, not just to rounding.
        log_weight = jnp.full(drawn.num, certificate.log_evidence) if moved else drawn.log_weight
        draws = Draws(sites, drawn.values, log_weight, drawn.log_q, drawn.log_joint, y, certificate, info)
        if problem.has_density:
            return draws
        undone = None if self.validity is None else failure_weights(self.validity, draws.values)
        return draws._replace(log_weight=undone, log_joint=None)

    @own_broadcasting
    def weigh(
        self,
        key: Key,
        draws: Draws,
        runs: Store | str | os.PathLike[str],
        simulations: Store | str | os.PathLike[str] | None = None,
    ) -> Draws:
        """Weigh draws by what the foreign simulator made of them, and certify the batch.

        For posteriors fitted with a ``likelihood``. ``runs`` holds the simulator's outputs at these very draws, which
        ``simulate(key, draws, simulator, draws.num, store=...)`` runs and records.

        Args:
            key: random key.
            draws: what `sample` gave, not resampled.
            runs: the store of the simulator's runs on these draws.
            simulations: the store the posterior was learned from. Its runs tell whether the proposal misses what
                explains the data, and the batch is refused where hardly any of them does; without it only the weights
                speak.

        Returns:
            The draws, weighted. Those at which the simulator failed have weight zero, and the certificate says so.

        Raises:
            ValueError: where the posterior was fitted without a likelihood, or ``runs`` are not those of the draws.

        Exactness: exact importance weights, for any training, of the model in which failing has probability zero; with
            a random simulator too (its own density is not needed: outputs are drawn from it).
        """
        problem, y = self.problem, draws.observed
        if problem.observation is None:
            raise ValueError("Weights need a likelihood: fit with `likelihood=`, for data whose density is known.")
        runs = runs if isinstance(runs, Store) else Store(runs)
        z, log_likelihood = explained(problem, runs, y)
        if not np.array_equal(z, draws.values):
            raise ValueError(
                f"`{runs.path}` must hold one run of the simulator for each of the {draws.num} draws, got {runs}, not "
                "of these draws alone. Run `simulate(key, draws, simulator, draws.num, store=...)` to its end."
            )
        log_joint = _log_priors(problem, draws.values) + log_likelihood
        log_weight = log_joint - draws.log_q
        certificate = certify(log_weight, self._stored_check(key, simulations, log_weight, y))
        num_failed = int(np.isneginf(log_likelihood).sum())
        if num_failed:
            failed = f"the simulator failed at {num_failed} draws, which count as impossible"
            certificate = certificate._replace(reason=f"{certificate.reason}; {failed}")
        info = draws.info | {"num_failed": num_failed}
        return draws._replace(log_weight=log_weight, log_joint=log_joint, certificate=certificate, info=info)

    def _stored_check(
        self, key: Key, simulations: Store | str | os.PathLike[str] | None, log_weight: Array, y: Sites
    ) -> ForwardCheck:
        """Hold the stored simulations that explain the data, as the likelihood picks them, against the proposal."""
        outlying = ForwardCheck(jnp.zeros(0), self._distance_rank(y))
        if simulations is None:
            return outlying
        stored = simulations if isinstance(simulations, Store) else Store(simulations)
        for_rows, for_paths = jax.random.split(key)
        z, log_likelihood = explained(self.problem, stored, y)
        informative = effective_sample_size(log_likelihood)
        source = "the stored simulations that explain the data"
        if informative == 0.0:
            return outlying._replace(source=source, num_informative=0.0, num_first=len(z))
        rows = resample_indices(for_rows, log_likelihood, NUM_EXPLAINING)
        told = weigh_rows(for_paths, self.proposal, y, jnp.arange(NUM_EXPLAINING), z[rows])
        log_joint = _log_priors(self.problem, z[rows]) + log_likelihood[rows]
        excess = log_joint - told.log_q - log_evidence(log_weight)[0]
        return ForwardCheck(excess, outlying.distance_rank, source, informative, len(z))

    def _distance_rank(self, y: Sites) -> float:
        return np.nan if self.outliers is None else float(self.outliers.rank(_features(self.proposal, y)))

    def _judge(
        self,
        streams: "_Streams",
        y: Sites,
        drawn: Weighted,
        defence: Defence | None,
        again: Callable[[Defence], Weighted] | None,
        thorough: bool,
    ) -> Judged:
        """Judge a batch, by witnesses where there are a density and a prior to gather them from."""
        problem = self.problem
        outlying = ForwardCheck(jnp.zeros(0), self._distance_rank(y))
        if not problem.has_density:
            certificate = certify(None, outlying)
            unweighed = problem.observation is not None
            return Judged(drawn, certificate._replace(reason=UNWEIGHED) if unweighed else certificate, drawn.num)
        if problem.simulate is None:
            return Judged(drawn, certify(drawn.log_weight, outlying), drawn.num)
        target = jax.tree_util.Partial(problem.log_joint, y=y)
        witnesses = gather(streams.witnesses, reference_of(problem), target, thorough=thorough)
        return judge(streams.judging, self.proposal, y, drawn, witnesses, defence, again, outlying)


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


def _warn_of_outlier(distance_rank: float) -> None:
    if distance_rank <= MAX_OUTLYING:
        message = (
            f"The observation lies further from the model's simulations than {1 - distance_rank:.1%} of them from each "
            f"other (distance rank {distance_rank:.3f}; this warning is given to {MAX_OUTLYING:.0%} of the model's own "
            "data). The model may be misspecified: compare the data with simulations before trusting any posterior."
        )
        warnings.warn(message, MisspecificationWarning, stacklevel=5)


def _enough(log_weight: Float[Array, " num"], wanted: int) -> bool:
    return effective_sample_size(log_weight) >= wanted and pareto_smooth(log_weight)[1] < MAX_K_HAT


class _Streams(NamedTuple):
    """Independent random streams of one user's key, so that one key may focus, draw and move."""

    draws: Key
    moves: Key
    focus: Key
    witnesses: Key
    judging: Key
    mended: Key


def _streams(key: Key) -> _Streams:
    return _Streams(*jax.random.split(key, len(_Streams._fields)))


@eqx.filter_jit
def _log_priors(problem: Problem, z: Float[Array, "num dim"]) -> Float[Array, " num"]:
    return jax.vmap(problem.log_prior)(z)


@eqx.filter_jit
def _features(proposal: AmortisedProposal, y: Sites) -> Float[Array, " features"]:
    return flatten(proposal.features(y))


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
            has less noise (`scoreinfer.backward.path_controls`); right where the physics of the model is that of the
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
