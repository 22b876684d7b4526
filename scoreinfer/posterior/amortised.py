"""The amortised posterior. Conditioned on data, it draws, weighs the draws and certifies the batch."""

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from scoreinfer._tree import own_broadcasting
from scoreinfer._typing import Key
from scoreinfer.agreement import misdrawn_latents, say_misdrawn
from scoreinfer.draws import DrawInfo, Draws
from scoreinfer.errors import TrainingWarning, warn
from scoreinfer.evidence.bank import Outliers
from scoreinfer.evidence.certificate import MAX_K_HAT, ForwardCheck, certify_weights
from scoreinfer.evidence.witnesses import Judged, gather, judge
from scoreinfer.montecarlo.langevin import Moves, rejuvenate
from scoreinfer.montecarlo.reference import Prior, reference_of
from scoreinfer.montecarlo.resampling import resample_indices
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence, pareto_smooth
from scoreinfer.nets.embedding import flatten
from scoreinfer.posterior.base import AbstractConditioned, AbstractPosterior, warn_of_outlier
from scoreinfer.posterior.checkpoint_amortised import Parts, write_posterior
from scoreinfer.posterior.design_range import check_design, rank_within_design
from scoreinfer.problem import Problem
from scoreinfer.samplers.amortised import AbstractAmortised
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted, bounded_target
from scoreinfer.samplers.batches import Defence, weigh_rows, weighted_draws
from scoreinfer.samplers.focused import focus
from scoreinfer.samplers.refined import refine
from scoreinfer.samplers.tuned import THOROUGH, TunedProposal
from scoreinfer.simulators.dataset import explained
from scoreinfer.simulators.store import Store
from scoreinfer.simulators.validity import Validity, failure_weights
from scoreinfer.training.loop import TrainingHistory

NUM_EXPLAINING = 64
"""Number of stored simulations that explain the data and are weighed under the proposal. Chosen by judgement."""
UNWEIGHED = "uncertified: not weighed yet. Run the simulator on the draws (`simulate`), then `weigh` them."
"""Reason in the certificate of draws that need `Conditioned.weigh`."""
ENOUGH = 0.25
"""ESS/N of a focused proposal below which its score is trained further. Chosen by judgement."""


class Conditioned(AbstractConditioned):
    """The amortised posterior of one observation.

    Args:
        proposal: the learned sampler; after `focus` it is adapted to the observation.
        target: the posterior density.
        posterior: the amortised posterior, for any observation.
    """

    proposal: AbstractAmortised
    target: Target
    posterior: "Posterior"

    @own_broadcasting
    def sample(
        self,
        key: Key,
        num: int,
        *,
        batch_size: int = 1024,
        prior_fraction: float = 0.0,
        max_proposals: int | None = None,
        num_moves: int = 20,
        thorough: bool = False,
        progress_bar: bool = False,
    ) -> Draws:
        """Draw from the posterior, weigh every draw, and certify the batch.

        The certificate uses witnesses: draws near the posterior that do not depend on the proposal (see
        `scoreinfer.evidence.witnesses`). If the proposal misses some of them, or the batch is not certified, a density
        is fitted to half of the witnesses and mixed with the proposal. Then the batch is drawn again, and the other
        half of the witnesses checks it. ``info.witnessed`` is the share of the draws from the fitted density.

        Args:
            key: random key. Draw i depends on ``key`` and i only, not on the batch size.
            num: number of draws.
            batch_size: draws per compiled call; bounds the memory.
            prior_fraction: share of the draws that come from the prior (a defensive mixture). It bounds the weights by
                the likelihood divided by this share, and is useful if the posterior is close to the prior.
            max_proposals: largest number of proposals. If given, `sample` proposes until the effective sample size is
                ``num`` and k-hat is below 0.7, or until this number is reached. It then resamples to ``num`` equally
                weighted draws and moves each by Langevin steps. None means ``num`` proposals and no resampling.
            num_moves: number of Metropolis-adjusted Langevin steps after resampling.
            thorough: search for missed modes in 16 times as many draws of the prior.
            progress_bar: show a progress bar over batches.

        Returns:
            `Draws`; weighted, or equally weighted after resampling. A foreign simulator has no density. Its draws are
            weighed afterwards by `weigh` if there is a ``likelihood``. Otherwise the only weights are 1 / v(z), if the
            probability of success v was learned.

        Raises:
            ValueError: if ``prior_fraction`` is positive and the prior cannot be drawn from.

        Warns:
            MisspecificationWarning: if the observation is farther from the simulations than 99 % of them are from each
                other.

        Exactness: the weights are exact importance weights for any training. Averages with them are consistent as
            ``num`` grows. Resampled and moved draws are consistent as the number of proposals grows. The mean weight
            (the evidence) is unbiased, but only consistent with ``max_proposals`` or after a second batch, because
            weights then decide when to stop or which batch is returned.
        """
        start, problem = time.perf_counter(), self.target.problem
        proposal = self.proposal.at(self.target)
        defence = self._defence(prior_fraction)
        streams = _streams(key)
        limit = max(num, max_proposals) if max_proposals is not None and problem.has_density else num

        def propose(key: Key, defence: Defence | None) -> Weighted:
            batches = partial(weighted_draws, key, proposal, self.target, batch_size, defence)
            with tqdm(total=limit, desc="drawing", disable=None if progress_bar else True, leave=False) as bar:
                drawn = batches(0, num, bar.update)
                while drawn.num < limit and not _enough(drawn.log_weight, num):
                    more = batches(drawn.num, min(num, limit - drawn.num), bar.update)
                    drawn = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), drawn, more)
            return drawn

        drawn = propose(streams.draws, defence)
        again = partial(propose, streams.mended) if defence is None else None
        judged = self._judge(streams, proposal, drawn, defence, again, thorough)
        drawn, certificate = judged.drawn, judged.certificate
        warn_of_outlier(certificate.distance_rank)
        history = self.posterior.history
        info = DrawInfo(
            judged.num_proposals,
            judged.num_proposals * self.proposal.num_evaluations,
            None if history is None else history.num_simulations,
            witnessed=judged.witnessed,
        )
        if max_proposals is not None and np.isfinite(certificate.log_evidence):
            drawn, moves = _moved(streams.moves, self.target, drawn, certificate.log_evidence, num, num_moves)
            info = info._replace(move_accept_prob=float(moves.accept_prob), move_step_size=float(moves.step_size))
        draws = self._draws(drawn, certificate, info, batch_size)
        draws = draws._replace(info=info._replace(seconds=time.perf_counter() - start))
        if problem.has_density:
            return draws
        validity = self.posterior.validity
        undone = None if validity is None else failure_weights(validity, draws.unconstrained)
        return draws._replace(log_weight=undone, log_joint=None)

    @own_broadcasting
    def focus(self, key: Key, *, num_steps: int = 4000, progress_bar: bool = False) -> "Conditioned":
        """Adapt the proposal to the observation: first its location and scale, then, if necessary, the score.

        Useful for a posterior much narrower than the prior, and for a badly learned one (few simulations). First an
        affine map is adapted by importance sampling, which takes seconds (see `scoreinfer.samplers.focused`). If ESS/N
        is then below 0.25, the score is trained on the gradient of the posterior, which takes about a minute (see
        `scoreinfer.samplers.refined`). A tuned proposal (see `scoreinfer.samplers.tuned`) is only tuned more
        thoroughly, which takes seconds, or with ``num_steps=0`` as always, but once for all draws.

        Args:
            key: random key.
            num_steps: optimiser steps of the score, if it is trained; 0 means no training.
            progress_bar: show progress bars of the training.

        Returns:
            The posterior of the same observation, with the adapted proposal. Unless that is tuned, its ``posterior``
            draws for any other observation as before; a tuned one draws the same there, with exact weights.

        Warns:
            TrainingWarning: if the training of the score failed; the adapted affine map is then used.

        Exactness: the weights are exact, because the adapted proposal has a known density too.
        """
        if isinstance(self.proposal, TunedProposal):
            tuned = dataclasses.replace(self.proposal, effort=THOROUGH) if num_steps else self.proposal
            mixture = tuned.at(self.target)
            return Conditioned(mixture, self.target, dataclasses.replace(self.posterior, proposal=mixture))
        for_affine, for_score = jax.random.split(_streams(key).focus)
        focused, share = focus(for_affine, self.proposal.amortised, self.target)
        proposal: AbstractAmortised = focused
        if 0.0 < share < ENOUGH and num_steps > 0:
            try:
                refined, new_share = refine(for_score, focused, self.target, num_steps, progress_bar=progress_bar)
                proposal = refined if new_share > share else focused
            except FloatingPointError as error:
                warn(f"Only the affine map was adapted, not the score: {error}", TrainingWarning)
        posterior = dataclasses.replace(self.posterior, proposal=proposal)
        return Conditioned(proposal, self.target, posterior)

    @own_broadcasting
    def weigh(
        self,
        key: Key,
        draws: Draws,
        runs: Store | str | os.PathLike[str],
        simulations: Store | str | os.PathLike[str] | None = None,
    ) -> Draws:
        """Weigh draws with the outputs of the foreign simulator at these draws, and certify the batch.

        For posteriors that were fitted with a ``likelihood``. First run the simulator on the draws:
        ``simulate(key, draws, simulator, draws.num, store=...)``.

        Args:
            key: random key.
            draws: the draws that `sample` returned, not resampled.
            runs: the store of the simulator's runs on these draws.
            simulations: the store from which the posterior was learned. Its runs that explain the data check whether
                the proposal misses a part of the posterior. The batch is not certified if hardly any run explains the
                data. None means that only the weights are checked.

        Returns:
            The draws, weighted. Draws at which the simulator failed have weight zero; the certificate gives their
            number.

        Raises:
            ValueError: if the posterior was fitted without a likelihood, ``draws`` are of other data, or ``runs`` are
                not runs on the draws.

        Exactness: exact importance weights for any training, for the model in which failure has probability zero. This
            holds for random simulators too: their outputs are drawn, so that their density is not needed.
        """
        problem, y = self.target.problem, self.target.y
        if problem.observation is None:
            raise ValueError(
                "`weigh` needs a posterior that was fitted with a likelihood, got one without. Fit it with "
                "`NPSE(..., likelihood=...)` if the density of the data given the outputs is known."
            )
        self._check_data(draws)
        runs = runs if isinstance(runs, Store) else Store(runs)
        z, log_likelihood = explained(problem, runs, y)
        if not np.array_equal(z, draws.unconstrained):
            raise ValueError(
                f"`{runs.path}` must hold exactly one run of the simulator for each of the {draws.num} draws, got "
                f"{runs}, which differs. Run `simulate(key, draws, simulator, draws.num, store=...)` to its end."
            )
        log_joint = _log_priors(problem, draws.unconstrained) + log_likelihood
        log_weight = log_joint - draws.log_q
        certificate = certify_weights(log_weight, self._stored_check(key, simulations, log_weight))
        num_failed = int(np.isneginf(log_likelihood).sum())
        if num_failed:
            failed = f"the simulator failed at {num_failed} draws, which have weight zero"
            certificate = certificate._replace(reason=f"{certificate.reason}; {failed}")
        info = (draws.info or DrawInfo(draws.num))._replace(num_failed=num_failed)
        return draws._replace(log_weight=log_weight, log_joint=log_joint, certificate=certificate, info=info)

    def _stored_check(
        self, key: Key, simulations: Store | str | os.PathLike[str] | None, log_weight: Array
    ) -> ForwardCheck:
        """Weigh stored simulations under the proposal; they are resampled by their likelihood of the data."""
        outlying, problem = ForwardCheck(jnp.zeros(0), self._distance_rank(key)), self.target.problem
        if simulations is None:
            return outlying
        stored = simulations if isinstance(simulations, Store) else Store(simulations)
        for_rows, for_paths = jax.random.split(key)
        z, log_likelihood = explained(problem, stored, self.target.y)
        informative = effective_sample_size(log_likelihood)
        source = "the stored simulations that explain the data"
        if informative == 0.0:
            return outlying._replace(source=source, num_informative=0.0, num_first=len(z))
        rows = resample_indices(for_rows, log_likelihood, NUM_EXPLAINING)
        weighed = weigh_rows(for_paths, self.proposal, self.target, jnp.arange(NUM_EXPLAINING), z[rows])
        log_joint = _log_priors(problem, z[rows]) + log_likelihood[rows]
        excess = log_joint - weighed.log_q - log_evidence(log_weight)[0]
        return ForwardCheck(excess, outlying.distance_rank, source, informative, len(z))

    def _distance_rank(self, key: Key) -> float:
        outliers, problem, y = self.posterior.outliers, self.target.problem, self.target.y
        if outliers is None or (problem.designs and problem.simulate_observation is None):
            return np.nan
        if problem.designs:
            return float(rank_within_design(jax.random.fold_in(key, 1), self.proposal.amortised, problem, y))
        return float(outliers.rank(_features(self.proposal, self.target)))

    def _defence(self, prior_fraction: float) -> Defence | None:
        problem = self.target.problem
        if prior_fraction <= 0:
            return None
        if problem.simulate is None:
            raise ValueError(
                f"`prior_fraction` must be 0 for a model that cannot be simulated, got {prior_fraction}. This model: "
                f"{problem.not_simulable}"
            )
        if wrong := misdrawn_latents(problem):
            raise ValueError(
                "`prior_fraction` needs draws from the prior that follow its density, but "
                f"{say_misdrawn(wrong)} Leave `prior_fraction` out."
            )
        return Defence(Prior(problem), prior_fraction)

    def _judge(
        self,
        streams: "_Streams",
        proposal: AbstractProposal,
        drawn: Weighted,
        defence: Defence | None,
        again: Callable[[Defence], Weighted] | None,
        thorough: bool,
    ) -> Judged:
        """Check a batch, with witnesses if the model has a density and can be simulated."""
        problem = self.target.problem
        outlying = ForwardCheck(jnp.zeros(0), self._distance_rank(streams.judging))
        if not problem.has_density:
            certificate = certify_weights(None, outlying)
            unweighed = problem.observation is not None
            return Judged(drawn, certificate._replace(reason=UNWEIGHED) if unweighed else certificate, drawn.num)
        if problem.simulate is None:
            return Judged(drawn, certify_weights(drawn.log_weight, outlying), drawn.num)
        witnesses = gather(streams.witnesses, reference_of(problem), self.target, thorough=thorough)
        return judge(streams.judging, proposal, self.target, drawn, witnesses, defence, again, outlying)


class Posterior(AbstractPosterior):
    """An amortised posterior: trained once, for any observation with the same design (covariates, shapes).

    With ``NPSE(designs=...)``, for any observation with a design like those of the training.

    Args:
        problem: the inference problem.
        proposal: the learned sampler.
        outliers: simulations with which outlying observations are detected. With designs, these are designs, and data
            are compared with fresh simulations of their own design. None means no detection.
        history: the history of the training.
        validity: probability v(z) that a foreign simulator succeeds; draws are weighed by 1 / v(z). None means no such
            weights.
    """

    problem: Problem = eqx.field(static=True)
    proposal: AbstractAmortised
    outliers: Outliers | None
    history: TrainingHistory | None = None
    validity: Validity | None = None

    @own_broadcasting
    def condition(self, *args: Any, **kwargs: Any) -> Conditioned:
        """Return the posterior of the data in these model arguments.

        Args:
            *args: the model's own arguments, with the data.
            **kwargs: the model's own keyword arguments.

        Raises:
            ValueError: if the data are missing, not finite, or have another shape or another design. With ``designs``,
                if the design is not like those of the training.
        """
        y = self.problem.read(args, kwargs)
        check_design(self.problem, self.outliers, y)
        return Conditioned(self.proposal, bounded_target(self.problem, y), self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a folder: ``config.json`` and ``weights.safetensors``, plain data for `scoreinfer.load`.

        A saved posterior in the folder is replaced. Each file is written completely or not at all. If the process is
        killed between the two files, neither posterior can be loaded, and `load` raises an error. A proposal adapted by
        `Conditioned.focus` is saved in its adapted form. The model is not saved, because it is code.

        Args:
            path: a new folder, or one that holds a saved posterior.

        Raises:
            ValueError: if the folder holds anything else, or plain data cannot describe a part (a sampler or score of
                another class).
        """
        write_posterior(Path(path), self.problem, Parts(self.proposal, self.outliers, self.history, self.validity))


def _enough(log_weight: Float[Array, " num"], wanted: int) -> bool:
    return effective_sample_size(log_weight) >= wanted and pareto_smooth(log_weight)[1] < MAX_K_HAT


def _moved(
    key: Key, target: Target, drawn: Weighted, log_evidence: float, num: int, num_moves: int
) -> tuple[Weighted, Moves]:
    """Resample to equally weighted draws and move each. Every weight is the evidence."""
    z, log_target, moves = rejuvenate(key, target, drawn.z, drawn.log_weight, num, num_moves)
    return Weighted(z, jnp.full(num, log_evidence, log_target.dtype), log_target), moves


class _Streams(NamedTuple):
    """Independent random streams of one key, so that the same key can be used in `focus` and `sample`."""

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
def _features(proposal: AbstractAmortised, target: Target) -> Float[Array, " features"]:
    return flatten(proposal.features(target))
