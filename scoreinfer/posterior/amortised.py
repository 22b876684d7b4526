"""The amortised posterior: conditioned on data it draws, weighs and certifies."""

import dataclasses
import os
import time
import warnings
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
from scoreinfer.errors import TrainingWarning
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
from scoreinfer.problem import Problem
from scoreinfer.samplers.amortised import AbstractAmortised
from scoreinfer.samplers.base import Target, Weighted
from scoreinfer.samplers.batches import Defence, weigh_rows, weighted_draws
from scoreinfer.samplers.focused import focus
from scoreinfer.samplers.refined import refine
from scoreinfer.simulators.dataset import explained
from scoreinfer.simulators.store import Store
from scoreinfer.simulators.validity import Validity, failure_weights
from scoreinfer.training.loop import TrainingHistory

NUM_EXPLAINING = 64
"""Stored simulations that explain the data, held against the proposal."""
UNWEIGHED = "uncertified: not weighed yet. Run the simulator on the draws (`simulate`), then `weigh` them."
ENOUGH = 0.25
"""Effective share of a focused proposal's draws below which its score is trained further."""


class Conditioned(AbstractConditioned):
    """The amortised posterior of one observation.

    Args:
        proposal: the learned sampler, adapted to the observation or not.
        target: the posterior density.
        posterior: the amortised posterior that it comes from.
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

        The certificate rests on witnesses, draws near the posterior that owe nothing to the proposal (see
        `scoreinfer.evidence.witnesses`). Where some of them lie where the proposal hardly draws, or the batch is
        refused, a density fitted to half of them joins the proposal, the batch is drawn again, and the other half
        judges it. ``info.witnessed`` is the share of the draws that come from that density.

        Args:
            key: random key; draw i depends on ``key`` and i alone, whatever the batch size.
            num: number of draws.
            batch_size: draws per compiled call: bounds the memory.
            prior_fraction: share of the draws taken from the prior instead (a defensive mixture: bounds the
                weights by the likelihood over the share; pays where the posterior is not far from the prior).
            max_proposals: where given, propose until the effective sample size reaches ``num`` and k-hat is below
                0.7, or this many proposals are spent, then resample to ``num`` equally weighted draws and move each by
                ``num_moves`` Metropolis-adjusted Langevin steps, so that certainty can be bought with time.
            num_moves: see ``max_proposals``.
            thorough: look for modes that the proposal misses in 16 times as many draws of the prior.
            progress_bar: show a progress bar over batches.

        Returns:
            `Draws`; weighted, or equally weighted after resampling. With a foreign simulator no density is at hand:
            with a ``likelihood`` they are weighed afterwards (`weigh`), else never.

        Raises:
            ValueError: where a ``prior_fraction`` is asked of a prior that cannot be drawn from.

        Warns:
            MisspecificationWarning: where the observation lies further from the simulations than 99 % of them from
                each other.

        Exactness: the weights are exact importance weights for any training; averages under them are consistent as
            ``num`` grows. Resampled and moved draws are consistent as the proposals grow; with ``max_proposals`` the
            weights decide when to stop, and a batch that is refused may be drawn again: then their mean, the evidence,
            is consistent but no longer unbiased.
        """
        start, problem = time.perf_counter(), self.target.problem
        defence = self._defence(prior_fraction)
        streams = _streams(key)
        limit = max(num, max_proposals) if max_proposals is not None and problem.has_density else num

        def propose(key: Key, defence: Defence | None) -> Weighted:
            batches = partial(weighted_draws, key, self.proposal, self.target, batch_size, defence)
            with tqdm(total=limit, desc="drawing", disable=None if progress_bar else True, leave=False) as bar:
                drawn = batches(0, num, bar.update)
                while drawn.num < limit and not _enough(drawn.log_weight, num):
                    more = batches(drawn.num, min(num, limit - drawn.num), bar.update)
                    drawn = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), drawn, more)
            return drawn

        drawn = propose(streams.draws, defence)
        again = partial(propose, streams.mended) if defence is None else None
        judged = self._judge(streams, drawn, defence, again, thorough)
        drawn, certificate = judged.drawn, judged.certificate
        warn_of_outlier(certificate.distance_rank)
        history = self.posterior.history
        info = DrawInfo(
            judged.num_proposals,
            judged.num_proposals * self.proposal.amortised.sampler.num_evaluations,
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
        """Adapt the proposal to the observation: its place and scale first, then where need be the score.

        For a posterior far narrower than the prior, whose amortised draws miss by a fraction of its width, and for
        one learned badly, as on a fixed budget of simulations: seconds for an affine map adapted by importance
        sampling (see `scoreinfer.samplers.focused`), and where less than a quarter of the draws is then effective, a
        minute for a score trained on the posterior's own gradient (see `scoreinfer.samplers.refined`). The
        ``posterior`` of the result answers for other observations as before.

        Args:
            key: random key.
            num_steps: optimiser steps of the score, where it is trained further; 0: it is not.
            progress_bar: show progress bars over its training.

        Exactness: exact weights as before: the result is another proposal with a known density.
        """
        for_affine, for_score = jax.random.split(_streams(key).focus)
        focused, share = focus(for_affine, self.proposal.amortised, self.target)
        proposal: AbstractAmortised = focused
        if 0.0 < share < ENOUGH and num_steps > 0:
            try:
                refined, new_share = refine(for_score, focused, self.target, num_steps, progress_bar=progress_bar)
                proposal = refined if new_share > share else focused
            except FloatingPointError as error:
                warnings.warn(f"The score was not trained further: {error}", TrainingWarning, stacklevel=3)
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
        problem, y = self.target.problem, self.target.y
        if problem.observation is None:
            raise ValueError("Weights need a likelihood: fit with `likelihood=`, for data whose density is known.")
        runs = runs if isinstance(runs, Store) else Store(runs)
        z, log_likelihood = explained(problem, runs, y)
        if not np.array_equal(z, draws.unconstrained):
            raise ValueError(
                f"`{runs.path}` must hold one run of the simulator for each of the {draws.num} draws, got {runs}, not "
                "of these draws alone. Run `simulate(key, draws, simulator, draws.num, store=...)` to its end."
            )
        log_joint = _log_priors(problem, draws.unconstrained) + log_likelihood
        log_weight = log_joint - draws.log_q
        certificate = certify_weights(log_weight, self._stored_check(key, simulations, log_weight))
        num_failed = int(np.isneginf(log_likelihood).sum())
        if num_failed:
            failed = f"the simulator failed at {num_failed} draws, which count as impossible"
            certificate = certificate._replace(reason=f"{certificate.reason}; {failed}")
        info = (draws.info or DrawInfo(draws.num))._replace(num_failed=num_failed)
        return draws._replace(log_weight=log_weight, log_joint=log_joint, certificate=certificate, info=info)

    def _stored_check(
        self, key: Key, simulations: Store | str | os.PathLike[str] | None, log_weight: Array
    ) -> ForwardCheck:
        """Hold the stored simulations that explain the data, as the likelihood picks them, against the proposal."""
        outlying, problem = ForwardCheck(jnp.zeros(0), self._distance_rank()), self.target.problem
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

    def _distance_rank(self) -> float:
        outliers = self.posterior.outliers
        return np.nan if outliers is None else float(outliers.rank(_features(self.proposal, self.target)))

    def _defence(self, prior_fraction: float) -> Defence | None:
        problem = self.target.problem
        if prior_fraction <= 0:
            return None
        if problem.simulate is None:
            raise ValueError(f"`prior_fraction` needs draws from the prior; there are none: {problem.not_simulable}")
        if wrong := misdrawn_latents(problem):
            raise ValueError(f"`prior_fraction` needs draws that the prior's density describes; {say_misdrawn(wrong)}")
        return Defence(Prior(problem), prior_fraction)

    def _judge(
        self,
        streams: "_Streams",
        drawn: Weighted,
        defence: Defence | None,
        again: Callable[[Defence], Weighted] | None,
        thorough: bool,
    ) -> Judged:
        """Judge a batch, by witnesses where there are a density and a prior to gather them from."""
        problem = self.target.problem
        outlying = ForwardCheck(jnp.zeros(0), self._distance_rank())
        if not problem.has_density:
            certificate = certify_weights(None, outlying)
            unweighed = problem.observation is not None
            return Judged(drawn, certificate._replace(reason=UNWEIGHED) if unweighed else certificate, drawn.num)
        if problem.simulate is None:
            return Judged(drawn, certify_weights(drawn.log_weight, outlying), drawn.num)
        witnesses = gather(streams.witnesses, reference_of(problem), self.target, thorough=thorough)
        return judge(streams.judging, self.proposal, self.target, drawn, witnesses, defence, again, outlying)


class Posterior(AbstractPosterior):
    """An amortised posterior: one training, any number of observations of the same design.

    Args:
        problem: the problem that it answers.
        proposal: the learned sampler.
        outliers: simulations by which an outlier is told; None: none is.
        history: how it was trained.
        validity: probability that a foreign simulator succeeds, by which draws are weighed; None: it always does, or
            its failures are not to be undone.
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
            ValueError: where the data are missing, not finite, of another shape or another design.
        """
        return Conditioned(self.proposal, Target(self.problem, self.problem.read(args, kwargs)), self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a folder: ``config.json`` and ``weights.safetensors``, plain data for `scoreinfer.load`.

        A saved posterior that is already there is replaced; each file is written whole or not at all (a process killed
        between the two leaves neither the old nor the new one, and `load` says so). What was
        adapted to one observation (`Conditioned.focus`) is saved as it is. The model is not saved: it is code.

        Args:
            path: a new folder, or one that holds a saved posterior.

        Raises:
            ValueError: where the folder holds anything else, or a part (a sampler or a score of another kind) cannot
                be described by plain data.
        """
        write_posterior(Path(path), self.problem, Parts(self.proposal, self.outliers, self.history, self.validity))


def _enough(log_weight: Float[Array, " num"], wanted: int) -> bool:
    return effective_sample_size(log_weight) >= wanted and pareto_smooth(log_weight)[1] < MAX_K_HAT


def _moved(
    key: Key, target: Target, drawn: Weighted, log_evidence: float, num: int, num_moves: int
) -> tuple[Weighted, Moves]:
    """Resample to equally weighted draws and move each; all weigh the evidence."""
    z, log_target, moves = rejuvenate(key, target, drawn.z, drawn.log_weight, num, num_moves)
    return Weighted(z, jnp.full(num, log_evidence, log_target.dtype), log_target), moves


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
def _features(proposal: AbstractAmortised, target: Target) -> Float[Array, " features"]:
    return flatten(proposal.features(target))
