"""The posterior of paths of a physical process: conditioned on an end it draws, weighs and certifies."""

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._tree import own_broadcasting
from scoreinfer._typing import Key
from scoreinfer.draws import DrawInfo, Draws
from scoreinfer.evidence.bank import ForwardBank, Outliers
from scoreinfer.evidence.certificate import MAX_UNSEEN, ForwardCheck, certify_weights, seen
from scoreinfer.evidence.witnesses import Judged, gather, judge
from scoreinfer.montecarlo.reference import reference_of
from scoreinfer.montecarlo.weights import effective_sample_size
from scoreinfer.paths import (
    LearnedBackward,
    corrected_path,
    draw_path,
    probability_flow,
)
from scoreinfer.paths.particles import ResampledPaths
from scoreinfer.paths.proposal import END_STATE, AbstractPaths, KnownEnd, PathProposal
from scoreinfer.posterior.base import AbstractConditioned, AbstractPosterior, warn_of_outlier
from scoreinfer.posterior.checkpoint_paths import PathParts, write_paths
from scoreinfer.problem import Problem
from scoreinfer.process import PhysicsProcess
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted
from scoreinfer.samplers.batches import Defence, weighted_draws
from scoreinfer.simulators.outputs import real_numbers
from scoreinfer.training.loop import History

NUM_PARTICLES = 32
"""Particles of each draw where the weights of single paths are poor."""


class ConditionedPaths(AbstractConditioned):
    """The posterior of the paths that lead to one end: known exactly, or observed.

    Args:
        proposal: the learned sampler of single paths.
        target: the posterior density.
        posterior: the posterior for any end that it comes from.
    """

    proposal: AbstractPaths
    target: Target
    posterior: "PathPosterior"

    @own_broadcasting
    def sample(self, key: Key, num: int, *, batch_size: int = 1024, thorough: bool = False) -> Draws:
        """Draw paths (and parameters), weigh every draw, and certify the batch.

        Args:
            key: random key; draw i depends on ``key`` and i alone, whatever the batch size.
            num: number of paths. Where their effective share is below one in 32 they are drawn again, each resampled
                from 32 (see `PathPosterior.resampled`; ``info.num_particles`` says so), and the better batch is kept.
            batch_size: paths per compiled call: bounds the memory.
            thorough: look for modes that the proposal misses in 16 times as many simulated paths.

        Returns:
            `Draws`; the physics site has shape ``(num, times, *state)``. For a known end the log evidence is the log
            density of the process at this end.

        Warns:
            MisspecificationWarning: where the end lies further from the simulated ends than 99 % of them from each
                other.

        Exactness: exact weights against the model's own density of paths, whatever was learned. Batches that are drawn
            again are chosen by their weights: their evidence is consistent, and unbiased on request
            (`PathPosterior.resampled`) where ``info.witnessed`` is zero.
        """
        start, asked = time.perf_counter(), self.posterior.num_particles
        # Rows of the stream count from zero.
        for_again, for_checks, for_mended = (jax.random.fold_in(key, 2**32 - i) for i in (1, 2, 3))

        def draw(key: Key, num_particles: int, defence: Defence | None = None) -> Weighted:
            by = with_particles(self.proposal, num_particles)
            return weighted_draws(key, by, self.target, max(batch_size // num_particles, 1), defence, 0, num)

        num_particles = asked or 1
        drawn = draw(key, num_particles)
        share = effective_sample_size(drawn.log_weight) / num
        if asked is None and 0.0 < share < 1 / NUM_PARTICLES:
            resampled = draw(for_again, NUM_PARTICLES)
            if effective_sample_size(resampled.log_weight) / num > share:
                drawn, num_particles = resampled, NUM_PARTICLES
        # Paths to a known end have no density in the space of all paths: nothing can be fitted to them there.
        again = None if self._known else partial(draw, for_mended, num_particles)
        judged = self._judge(for_checks, with_particles(self.proposal, num_particles), drawn, again, thorough)
        warn_of_outlier(judged.certificate.distance_rank)
        info = DrawInfo(
            judged.num_proposals * num_particles,
            num_simulations=self.posterior.history.num_simulations,
            num_particles=num_particles,
            witnessed=judged.witnessed,
        )
        draws = self._draws(judged.drawn, judged.certificate, info, batch_size)
        return draws._replace(info=info._replace(seconds=time.perf_counter() - start))

    @property
    def _known(self) -> bool:
        return END_STATE in self.target.y

    def _judge(
        self,
        key: Key,
        by: AbstractProposal,
        drawn: Weighted,
        again: Callable[[Defence], Weighted] | None,
        thorough: bool,
    ) -> Judged:
        """Judge a batch by witnesses at the observation; where these are too few, as in fields, by simulations near it.

        ``by`` is the proposal, resampled along the path or not.
        """
        for_witnesses, for_weights = jax.random.split(key)
        known = KnownEnd(self.proposal, self.target)
        reference = known if self._known else reference_of(self.target.problem)
        witnesses = gather(for_witnesses, reference, self.target, thorough=thorough)
        near = self._near()
        if seen(witnesses.num_informative) > MAX_UNSEEN:
            return Judged(drawn, certify_weights(drawn.log_weight, near), drawn.num)
        outlying = near._replace(log_excess=jnp.zeros(0))
        return judge(for_weights, by, self.target, drawn, witnesses, None, again, outlying)

    def _near(self) -> ForwardCheck:
        """Look up the evidence near an observation or a known end."""
        paths, target = self.posterior.paths, self.target
        if self._known and self.posterior.problem.observed:
            if not isinstance(paths, PathProposal):
                return ForwardCheck(jnp.zeros(0))  # its simulations lie in the space of observations
            target = Target(self.posterior.problem, {paths.site: target.y[END_STATE]})  # observed without noise
        x = path_features(paths, target)
        return self.posterior.bank.check(x)._replace(distance_rank=float(self.posterior.outliers.rank(x)))


class PathPosterior(AbstractPosterior):
    """The posterior of paths of a physical process, for any end: known exactly, or observed.

    Args:
        problem: the problem that it answers.
        end_problem: the problem of paths whose last state is known.
        paths: the learned sampler for what the model observes (for a model without observations: for known ends).
        known_end: the learned sampler for ends known exactly; None where the model observes something and has unknown
            parameters, or observes earlier states: known ends then are another model's business.
        bank: simulations held against the proposal, for where witnesses at the observation cannot be had; what it says
            of observed ends it says of known ones, which the same kernels lead away from.
        outliers: simulated ends, to tell a far one by.
        history: how it was trained.
        num_particles: particles of each draw (see `resampled`); None: one, and more where their weights are poor.
    """

    problem: Problem = eqx.field(static=True)
    end_problem: Problem = eqx.field(static=True)
    paths: AbstractPaths
    known_end: AbstractPaths | None
    bank: ForwardBank
    outliers: Outliers
    history: History
    num_particles: int | None = eqx.field(static=True, default=None)

    @property
    def proposal(self) -> AbstractProposal:
        """The learned sampler, resampling along the path where that was asked for."""
        return with_particles(self.paths, self.num_particles or 1)

    @property
    def backward(self) -> LearnedBackward:
        """The learned backward kernels."""
        assert isinstance(self.paths.backward, LearnedBackward)
        return self.paths.backward

    @property
    def process(self) -> PhysicsProcess:
        """The physics (with the noise of an observation of the end as its last step)."""
        return self.backward.process

    @own_broadcasting
    def condition(self, *args: Any, **kwargs: Any) -> ConditionedPaths:
        """Return the posterior of the data in these model arguments.

        Args:
            *args: the model's own arguments, with the data.
            **kwargs: the model's own keyword arguments.

        Raises:
            ValueError: where data are missing, not finite, of another shape or another design, or the model observes
                nothing.
        """
        y = self.problem.read(args, kwargs)
        if not self.problem.observed:
            raise ValueError("This model observes nothing: give the last state to `condition_on_end`.")
        return ConditionedPaths(self.paths, Target(self.problem, y), self)

    @own_broadcasting
    def condition_on_end(self, end_state: Float[Array | np.ndarray, "..."]) -> ConditionedPaths:
        """Return the posterior of earlier states, given that the last state is known exactly.

        Raises:
            ValueError: where the end has a wrong shape or is not finite, or these kernels do not start from a known
                end (see ``known_end``).
        """
        proposal, end = self._from_known(), self._checked(end_state)
        return ConditionedPaths(proposal, Target(self.end_problem, {END_STATE: end}), self)

    def resampled(self, num_particles: int) -> "PathPosterior":
        """Copy the posterior, each draw picked from many that are resampled along the path.

        See `scoreinfer.paths.particles`. Each draw then costs ``num_particles`` paths, which pays where the weights of
        single paths are worse than one in that many. ``ScoreSDE(posterior=posterior.resampled(32))`` moves whole paths
        by particle independent Metropolis, and weighs those that local moves have changed by conditional SMC. 1: plain
        weights, always.

        Args:
            num_particles: particles of each draw.

        Raises:
            ValueError: where there are no particles.

        Exactness: exact weights, the evidence unbiased, as without.

        References: Andrieu, Doucet and Holenstein 2010, "Particle Markov chain Monte Carlo methods".
        """
        if num_particles < 1:
            raise ValueError(f"`num_particles` must be at least 1, got {num_particles}.")
        with_particles(self.paths, num_particles)
        return dataclasses.replace(self, num_particles=num_particles)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a folder: ``config.json`` and ``weights.safetensors``, plain data for `SMDP.load`.

        As `Posterior.save` does. The model and its physics are not saved: they are code.

        Args:
            path: a new folder, or one that holds a saved posterior.

        Raises:
            ValueError: where the folder holds anything else, or a part was replaced by one of another size.
        """
        parts = PathParts(self.paths, self.bank, self.outliers, self.history, self.num_particles)
        write_paths(Path(path), self.problem, parts)

    def reverse_sde(
        self, key: Key, end_state: Float[Array | np.ndarray, "..."], num_corrections: int = 0
    ) -> Float[Array, "..."]:
        """Draw one path backwards from each of many known ends (batch axes first), without weights.

        ``num_corrections`` Langevin steps with the learned score follow every step (predictor-corrector, see
        `scoreinfer.paths.corrected_path`).

        Raises:
            ValueError: where kernels are conditioned on more than a known end.

        Exactness: biased, as good as the training; `sample` weighs its paths.
        """
        ends = self._flat(end_state)
        return self._shaped(_reverse_rows(key, self._unconditioned(), ends, num_corrections), end_state)

    def probability_flow(self, end_state: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
        """Run the probability flow backwards from known ends (batch axes first): one path each, no posterior.

        Raises:
            ValueError: where kernels are conditioned on more than a known end.

        Exactness: biased, as good as the training; see `scoreinfer.paths.probability_flow`.
        """
        return self._shaped(_flow_rows(self._unconditioned(), self._flat(end_state)), end_state)

    def _from_known(self) -> AbstractPaths:
        if self.known_end is None:
            raise ValueError(
                "A known end asks for kernels that start from it, and these are for what the model observes, beside "
                "parameters or earlier states. Give its data, or fit the model without its observed sites."
            )
        return self.known_end

    def _unconditioned(self) -> PathProposal:
        known = self._from_known()
        if not isinstance(known, PathProposal):
            raise ValueError("These kernels need the parameters' values: `sample` draws parameters and paths.")
        return known

    def _flat(self, ends: Any) -> Float[Array, "num dim"]:
        return self.process.flatten(jnp.asarray(ends, jnp.result_type(float))).reshape(-1, self.process.dim)

    def _shaped(self, paths: Float[Array, "num times dim"], ends: Any) -> Float[Array, "..."]:
        state = self.process.shape
        paths = self.process.unflatten(paths)
        return paths.reshape(*np.shape(ends)[: np.ndim(ends) - len(state)], -1, *state)

    def _checked(self, end_state: Any) -> Float[Array, "..."]:
        end = jnp.asarray(real_numbers("`end_state`", end_state).values, jnp.result_type(float))
        if end.shape != self.process.shape:
            raise ValueError(f"`end_state` must have the state's shape {self.process.shape}, got {end.shape}.")
        if not bool(jnp.isfinite(end).all()):
            raise ValueError(
                f"`end_state` must be finite, but {int((~jnp.isfinite(end)).sum())} of its numbers are not."
            )
        return end


def with_particles(paths: AbstractPaths, num_particles: int) -> AbstractProposal:
    """Resample paths along the way, where there is more than one particle."""
    return paths if num_particles == 1 else ResampledPaths(paths, num_particles)


@eqx.filter_jit
def path_features(paths: AbstractPaths, target: Target) -> Float[Array, " features"]:
    """Standardise what is known of an end, to tell a far one by."""
    return paths.features(target)


@eqx.filter_jit
def _reverse_rows(
    key: Key, proposal: PathProposal, ends: Float[Array, "num dim"], num_corrections: int
) -> Float[Array, "num times dim"]:
    backward, num_steps = proposal.backward, proposal.num_steps
    assert isinstance(backward, LearnedBackward)

    def one(key: Key, end: Float[Array, " dim"]) -> Float[Array, "times dim"]:
        if num_corrections == 0:
            return draw_path(key, backward, end, num_steps)[0]
        return corrected_path(key, backward, end, num_steps, num_corrections)

    return jax.vmap(one)(jax.random.split(key, ends.shape[0]), ends)


@eqx.filter_jit
def _flow_rows(proposal: PathProposal, ends: Float[Array, "num dim"]) -> Float[Array, "num times dim"]:
    return jax.vmap(lambda end: probability_flow(proposal.backward, end, proposal.num_steps))(ends)
