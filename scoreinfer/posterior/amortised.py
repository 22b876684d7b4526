"""The amortised posterior: ``fit`` a score SDE on a model's own simulations, then draw, weigh and certify."""

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

from scoreinfer._errors import MisspecificationWarning, TrainingWarning
from scoreinfer._tree import own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.agreement import misdrawn_latents, say_misdrawn
from scoreinfer.draws import Draws
from scoreinfer.evidence.bank import Outliers
from scoreinfer.evidence.certificate import MAX_K_HAT, MAX_OUTLYING, ForwardCheck, certify
from scoreinfer.evidence.witnesses import Judged, gather, judge
from scoreinfer.montecarlo.langevin import rejuvenate
from scoreinfer.montecarlo.reference import Prior, reference_of
from scoreinfer.montecarlo.resampling import resample_indices
from scoreinfer.montecarlo.weights import effective_sample_size, log_evidence, pareto_smooth
from scoreinfer.nets.embedding import flatten
from scoreinfer.posterior.checkpoint import Parts, write_posterior
from scoreinfer.problem import Problem
from scoreinfer.samplers.amortised import Proposal
from scoreinfer.samplers.base import Weighted
from scoreinfer.samplers.batches import Defence, constrain, weigh_rows, weighted_draws
from scoreinfer.samplers.focused import focus
from scoreinfer.samplers.refined import AmortisedProposal, refine
from scoreinfer.simulators.dataset import explained
from scoreinfer.simulators.store import Store
from scoreinfer.simulators.validity import Validity, failure_weights
from scoreinfer.training.loop import TrainingHistory

NUM_EXPLAINING = 64
"""Stored simulations that explain the data, held against the proposal."""
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

        For a posterior far narrower than the prior, whose amortised draws miss by a fraction of its width, and for one
        learned badly, as on a fixed budget of simulations: seconds for an affine map adapted by importance sampling
        (see `scoreinfer.samplers.focused`), and where less than a quarter of the draws is then effective, a minute for
        a score trained on the posterior's own gradient (see `scoreinfer.samplers.refined`). The result still answers
        for other observations.

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
        `scoreinfer.evidence.witnesses`). Where some of them lie where the proposal hardly draws, or the batch is
        refused, a density fitted to half of them joins the proposal, the batch is drawn again, and the other half
        judges it. ``info["witnessed"]`` is the share of the draws that come from that density.

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
