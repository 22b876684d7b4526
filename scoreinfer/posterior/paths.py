"""The posterior of paths of a physical process. Conditioned on data or an end, it draws, weighs and certifies paths."""

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

from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices
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
"""Particles per draw if ESS/N of single paths is below 1 / ``NUM_PARTICLES``. Chosen by judgement."""


class ConditionedPaths(AbstractConditioned):
    """The posterior of paths for one observation, or for one exactly known last state.

    Args:
        proposal: the learned sampler of single paths.
        target: the posterior density.
        posterior: the posterior of paths, for any observation.
    """

    proposal: AbstractPaths
    target: Target
    posterior: "PathPosterior"

    @own_broadcasting
    def sample(self, key: Key, num: int, *, batch_size: int = 1024, thorough: bool = False) -> Draws:
        """Draw paths (and parameters), weigh every draw, and certify the batch.

        If ESS/N is below 1/32, the batch is drawn again with 32 particles per path (see `PathPosterior.resampled`), and
        the batch with the larger ESS is returned. ``info.num_particles`` is its number of particles.

        Args:
            key: random key. Draw i depends on ``key`` and i only, not on the batch size.
            num: number of paths.
            batch_size: paths per compiled call; bounds the memory.
            thorough: search for missed modes in 16 times as many simulated paths.

        Returns:
            `Draws`; the physics site has shape ``(num, times, *state)``. For a known end the log evidence is the log
            density of the process at this end.

        Warns:
            MisspecificationWarning: if the end is farther from the simulated ends than 99 % of them are from each
                other.

        Exactness: exact weights under the model's density of paths, for any training. The evidence is consistent. It is
            unbiased only if the number of particles was set by `PathPosterior.resampled` and ``info.witnessed`` is
            zero, because otherwise weights may decide which batch is returned.
        """
        start, asked = time.perf_counter(), self.posterior.num_particles
        # Draws use the numbers from zero up, these keys the largest ones.
        for_again, for_checks, for_mended = (jax.random.fold_in(key, 2**32 - i) for i in (1, 2, 3))

        def draw(key: Key, num_particles: int, defence: Defence | None = None) -> Weighted:
            by = with_particles(self.proposal, num_particles)
            return weighted_draws(key, by, self.target, max(batch_size // num_particles, 1), defence, 0, num)

        num_particles, num_left = asked or 1, 0
        drawn = draw(key, num_particles)
        share = effective_sample_size(drawn.log_weight) / num
        if asked is None and 0.0 < share < 1 / NUM_PARTICLES:
            resampled, num_left = draw(for_again, NUM_PARTICLES), num * NUM_PARTICLES
            if effective_sample_size(resampled.log_weight) / num > share:
                drawn, num_particles, num_left = resampled, NUM_PARTICLES, num
        # Paths to a known end have no density in the space of all paths, so no density can be fitted to them.
        again = None if self._known else partial(draw, for_mended, num_particles)
        judged = self._judge(for_checks, with_particles(self.proposal, num_particles), drawn, again, thorough)
        warn_of_outlier(judged.certificate.distance_rank)
        info = DrawInfo(
            num_left + judged.num_proposals * num_particles,
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
        """Check a batch with witnesses; if these are too few (as for fields), with simulations near the observation.

        ``by`` is the proposal, with or without resampling along the path.
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
        """Select the simulated evidence near the observation or the known end."""
        paths, target = self.posterior.paths, self.target
        if self._known and self.posterior.problem.observed:
            if not isinstance(paths, PathProposal):
                return ForwardCheck(jnp.zeros(0))  # its features are observations, not ends
            target = Target(self.posterior.problem, {paths.site: target.y[END_STATE]})  # as if it were an observation
        x = path_features(paths, target)
        return self.posterior.bank.check(x)._replace(distance_rank=float(self.posterior.outliers.rank(x)))


class PathPosterior(AbstractPosterior):
    """The posterior of paths of a physical process, for any observation or any exactly known last state.

    Args:
        problem: the inference problem.
        end_problem: the problem of paths whose last state is known.
        paths: the learned sampler for observations (for known ends, if the model observes nothing).
        known_end: the learned sampler for exactly known ends. None means that known ends need another model: this one
            has observations, and also unknown parameters or observations of earlier states.
        bank: weights of simulated paths under the proposal. They are the evidence if witnesses are too few. They are
            also used for known ends, because the kernels are the same.
        outliers: simulated ends with which outlying ends are detected.
        history: the history of the training.
        num_particles: particles per draw (see `resampled`). None means one, or `NUM_PARTICLES` if the weights of
            single paths are poor.
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
        """The learned sampler, with resampling along the path if `resampled` set more than one particle."""
        return with_particles(self.paths, self.num_particles or 1)

    @property
    def backward(self) -> LearnedBackward:
        """The learned backward kernels."""
        assert isinstance(self.paths.backward, LearnedBackward)
        return self.paths.backward

    @property
    def process(self) -> PhysicsProcess:
        """The physics; the Gaussian noise of an observation of the last state is its last step."""
        return self.backward.process

    @own_broadcasting
    def condition(self, *args: Any, **kwargs: Any) -> ConditionedPaths:
        """Return the posterior of the data in these model arguments.

        Args:
            *args: the model's own arguments, with the data.
            **kwargs: the model's own keyword arguments.

        Raises:
            ValueError: if the data are missing, not finite, or have another shape or another design, or if the model
                observes nothing.
        """
        y = self.problem.read(args, kwargs)
        if not self.problem.observed:
            raise ValueError(
                "`condition` needs observed sites, but this model has none. Pass the last state to `condition_on_end`."
            )
        return ConditionedPaths(self.paths, Target(self.problem, y), self)

    @own_broadcasting
    def condition_on_end(self, end_state: Float[Array | np.ndarray, "..."]) -> ConditionedPaths:
        """Return the posterior of the earlier states for an exactly known last state.

        Args:
            end_state: the last state, with the state's shape.

        Raises:
            ValueError: if the end has a wrong shape or is not finite, or the kernels cannot start from a known end
                (``known_end`` is None).
        """
        proposal, end = self._from_known(), self._checked(end_state)
        return ConditionedPaths(proposal, Target(self.end_problem, {END_STATE: end}), self)

    def resampled(self, num_particles: int) -> "PathPosterior":
        """Return a copy that draws every path by particles with resampling along the path.

        See `scoreinfer.paths.particles`. Each draw costs ``num_particles`` paths. This is worth the cost if ESS/N of
        single paths is below 1 / ``num_particles``. ``ScoreSDE(posterior=posterior.resampled(32))`` proposes whole
        paths by particle independent Metropolis. It weighs paths that local moves have changed by conditional SMC.

        Args:
            num_particles: particles per draw. 1 means the weights of single paths, even if they are poor.

        Raises:
            ValueError: if ``num_particles`` is less than 1, or the kernels have no moments for the bridging densities.

        Exactness: exact weights, as without resampling. The evidence is unbiased.

        References: Andrieu, Doucet and Holenstein 2010, "Particle Markov chain Monte Carlo methods".
        """
        if num_particles < 1:
            raise ValueError(f"`num_particles` must be at least 1, got {num_particles}.")
        with_particles(self.paths, num_particles)
        return dataclasses.replace(self, num_particles=num_particles)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a folder: ``config.json`` and ``weights.safetensors``, plain data for `SMDP.load`.

        Files are written as by `Posterior.save`. The model and its physics are not saved, because they are code.

        Args:
            path: a new folder, or one that holds a saved posterior.

        Raises:
            ValueError: if the folder holds anything else, or a part was replaced by one of another size.
        """
        parts = PathParts(self.paths, self.bank, self.outliers, self.history, self.num_particles)
        write_paths(Path(path), self.problem, parts)

    def reverse_sde(
        self, key: Key, end_state: Float[Array | np.ndarray, "..."], num_corrections: int = 0
    ) -> Float[Array, "..."]:
        """Draw one unweighted path backwards from each known end.

        Args:
            key: random key.
            end_state: known ends, batch axes first.
            num_corrections: number of Langevin steps with the learned score after every step (predictor-corrector, see
                `scoreinfer.paths.corrected_path`).

        Raises:
            ValueError: if the kernels are conditioned on more than a known end.

        Exactness: biased; the bias depends on the training. Use `sample` for weighted paths.
        """
        ends = self._flat(end_state)
        return self._shaped(_reverse_rows(key, self._unconditioned(), ends, num_corrections), end_state)

    def probability_flow(self, end_state: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
        """Run the probability flow backwards from known ends: one deterministic path each, not posterior draws.

        Args:
            end_state: known ends, batch axes first.

        Raises:
            ValueError: if the kernels are conditioned on more than a known end.

        Exactness: biased; the bias depends on the training. See `scoreinfer.paths.probability_flow`.
        """
        return self._shaped(_flow_rows(self._unconditioned(), self._flat(end_state)), end_state)

    def _from_known(self) -> AbstractPaths:
        if self.known_end is None:
            raise ValueError(
                "A known end needs kernels that start from it, but these are for observations with unknown "
                "parameters or earlier states. Pass data to `condition`, or fit the model without its observed sites."
            )
        return self.known_end

    def _unconditioned(self) -> PathProposal:
        known = self._from_known()
        if not isinstance(known, PathProposal):
            raise ValueError(
                "A path from an end alone needs a model without unknown parameters, but these kernels need the "
                "parameters' values. Use `condition_on_end(...).sample`, which draws parameters and paths."
            )
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
            raise ValueError(
                f"`end_state` must have the state's shape {self.process.shape}, got {end.shape}. Pass one last state."
            )
        if not bool(jnp.isfinite(end).all()):
            raise ValueError(
                f"`end_state` must be finite, but {int((~jnp.isfinite(end)).sum())} of its numbers are not."
            )
        return end


def with_particles(paths: AbstractPaths, num_particles: int) -> AbstractProposal:
    """Return the sampler with resampling along the path; with one particle, the sampler of single paths."""
    return paths if num_particles == 1 else ResampledPaths(paths, num_particles)


@eqx.filter_jit
def path_features(paths: AbstractPaths, target: Target) -> Float[Array, " features"]:
    """Compute the standardised features of the observation or end, to detect outliers."""
    return paths.features(target)


@over_devices
def _reverse_rows(
    key: Key, proposal: PathProposal, ends: Float[Array, "num dim"], num_corrections: int
) -> Float[Array, "num times dim"]:
    backward, num_steps = proposal.backward, proposal.num_steps
    assert isinstance(backward, LearnedBackward)

    def one(key: Key, end: Float[Array, " dim"]) -> Float[Array, "times dim"]:
        if num_corrections == 0:
            return draw_path(key, backward, end, num_steps)[0]
        return corrected_path(key, backward, end, num_steps, num_corrections)

    return map_rows(one, None)(jax.random.split(key, ends.shape[0]), ends)


@over_devices
def _flow_rows(proposal: PathProposal, ends: Float[Array, "num dim"]) -> Float[Array, "num times dim"]:
    return map_rows(lambda end: probability_flow(proposal.backward, end, proposal.num_steps), None)(ends)
