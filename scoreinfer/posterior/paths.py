"""Learning physics in reverse: ``fit(..., process=Physics("x"))``, and the posterior of paths it returns."""

import dataclasses
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._errors import MisspecificationWarning
from scoreinfer._typing import Key, Sites
from scoreinfer.draws import Draws
from scoreinfer.evidence.bank import ForwardBank, Outliers
from scoreinfer.evidence.certificate import MAX_OUTLYING, MAX_UNSEEN, ForwardCheck, certify, seen
from scoreinfer.evidence.witnesses import Judged, gather, judge
from scoreinfer.montecarlo.reference import reference_of
from scoreinfer.montecarlo.weights import effective_sample_size
from scoreinfer.paths import (
    LearnedBackward,
    corrected_path,
    draw_path,
    probability_flow,
)
from scoreinfer.paths.build import features_of
from scoreinfer.paths.particles import ResampledPaths
from scoreinfer.paths.proposal import END_STATE, KnownEnd, PathProposal, StartedPaths
from scoreinfer.posterior.path_checkpoint import PathParts, write_paths
from scoreinfer.problem import Problem
from scoreinfer.process import PhysicsProcess
from scoreinfer.samplers.base import Proposer, Weighted
from scoreinfer.samplers.batches import Defence, constrain, weighted_draws
from scoreinfer.simulators.outputs import real_numbers
from scoreinfer.training.loop import History

NUM_PARTICLES = 32
"""Particles of each draw where the weights of single paths are poor."""


class PathPosterior(eqx.Module):
    """The posterior of paths of a physical process, for any end: known exactly, or observed.

    Args:
        paths: the learned sampler for what the model observes (for a model without observations: for known ends).
        known_end: the learned sampler for ends known exactly; None where the model observes something and has unknown
            parameters, or observes earlier states: known ends then are another model's business.
        bank: simulations held against the proposal, for where witnesses at the observation cannot be had; what it says
            of observed ends it says of known ones, which the same kernels lead away from.
        outliers: simulated ends, to tell a far one by.
        history: how it was trained.
        num_particles: particles of each draw (see `resampled`); None: one, and more where their weights are poor.
    """

    paths: PathProposal | StartedPaths
    known_end: PathProposal | StartedPaths | None
    bank: ForwardBank
    outliers: Outliers
    history: History
    num_particles: int | None = eqx.field(static=True, default=None)

    @property
    def proposal(self) -> PathProposal | StartedPaths | ResampledPaths:
        """The learned sampler, resampling along the path where that was asked for."""
        return _with_particles(self.paths, self.num_particles or 1)

    @property
    def problem(self) -> Problem:
        """The problem this posterior answers."""
        return self.paths.problem

    @property
    def backward(self) -> LearnedBackward:
        """The learned backward kernels."""
        assert isinstance(self.paths.backward, LearnedBackward)
        return self.paths.backward

    @property
    def process(self) -> PhysicsProcess:
        """The physics (with the noise of an observation of the end as its last step)."""
        return self.backward.process

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
        _with_particles(self.paths, num_particles)
        return dataclasses.replace(self, num_particles=num_particles)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a folder: ``config.json`` and ``weights.safetensors``, plain data for `load`.

        As `Posterior.save` does. The model and its physics are not saved: they are code.

        Args:
            path: a new folder, or one that holds a saved posterior.

        Raises:
            ValueError: where the folder holds anything else, or a part was replaced by one of another size.
        """
        parts = PathParts(self.paths, self.bank, self.outliers, self.history, self.num_particles)
        write_paths(Path(path), parts)

    def sample(
        self,
        key: Key,
        num: int,
        *args: Any,
        end_state: Float[Array | np.ndarray, "..."] | None = None,
        batch_size: int = 1024,
        thorough: bool = False,
        **kwargs: Any,
    ) -> Draws:
        """Draw paths (and parameters) that lead to an end, weigh every draw, and certify the batch.

        Args:
            key: random key; draw i depends on ``key`` and i alone, whatever the batch size.
            num: number of paths. Where their effective share is below one in 32 they are drawn again, each resampled
                from 32 (see `resampled`; ``info["num_particles"]`` says so), and the better batch is kept.
            *args: the model's own arguments, with the data; not looked at with ``end_state``.
            end_state: the last state, where it is known exactly: then the posterior is that of the earlier states,
                and the log evidence the log density of the process at this end.
            batch_size: paths per compiled call: bounds the memory.
            thorough: look for modes that the proposal misses in 16 times as many simulated paths.
            **kwargs: the model's own keyword arguments.

        Returns:
            `Draws`; the physics site has shape ``(num, times, *state)``.

        Raises:
            ValueError: where the end has a wrong shape or is not finite, data are missing, or an end is given that
                these kernels do not start from (see ``known_end``).

        Exactness: exact weights against the model's own density of paths, whatever was learned. Batches that are drawn
            again are chosen by their weights: their evidence is consistent, and unbiased on request (`resampled`) where
            ``info["witnessed"]`` is zero.
        """
        start = time.perf_counter()
        known = end_state is not None
        proposal = self._from_known() if known else self.paths
        y = {END_STATE: self._checked(end_state)} if known else self.problem.read(args, kwargs)
        if not known and not self.problem.observed:
            raise ValueError("This model observes nothing: give the last state as `end_state=`.")
        # Rows of the stream count from zero.
        for_again, for_checks, for_mended = (jax.random.fold_in(key, 2**32 - i) for i in (1, 2, 3))

        def draw(key: Key, num_particles: int, defence: Defence | None = None) -> Weighted:
            by = _with_particles(proposal, num_particles)
            return weighted_draws(key, by, y, max(batch_size // num_particles, 1), defence, 0, num)

        num_particles = self.num_particles or 1
        drawn = draw(key, num_particles)
        share = effective_sample_size(drawn.log_weight) / num
        if self.num_particles is None and 0.0 < share < 1 / NUM_PARTICLES:
            resampled = draw(for_again, NUM_PARTICLES)
            if effective_sample_size(resampled.log_weight) / num > share:
                drawn, num_particles = resampled, NUM_PARTICLES
        by = _with_particles(proposal, num_particles)
        # Paths to a known end have no density in the space of all paths: nothing can be fitted to them there.
        again = None if known else partial(draw, for_mended, num_particles)
        drawn, certificate, _, witnessed = self._judge(for_checks, proposal, by, y, drawn, again, thorough)
        if certificate.distance_rank <= MAX_OUTLYING:
            warnings.warn(
                f"The end lies further from the simulations than {1 - certificate.distance_rank:.1%} of them from each "
                "other: what was learned there is extrapolation.", MisspecificationWarning, stacklevel=3,
            )  # fmt: skip
        sites = constrain(proposal.problem, drawn.values, batch_size)
        info = {
            "seconds": time.perf_counter() - start,
            "num_simulations": self.history.num_simulations,
            "num_particles": num_particles,
            "witnessed": witnessed,
        }
        return Draws(sites, drawn.values, drawn.log_weight, drawn.log_q, drawn.log_joint, y, certificate, info)

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

    def _from_known(self) -> PathProposal | StartedPaths:
        if self.known_end is None:
            raise ValueError(
                "`end_state=` asks for kernels that start from it, and these are for what the model observes, beside "
                "parameters or earlier states. Give its data, or fit the model without its observed sites."
            )
        return self.known_end

    def _unconditioned(self) -> PathProposal:
        known = self._from_known()
        if isinstance(known, StartedPaths):
            raise ValueError("These kernels need the parameters' values: `sample` draws parameters and paths.")
        return known

    def _flat(self, ends: Any) -> Float[Array, "num dim"]:
        return self.process.flatten(jnp.asarray(ends, jnp.result_type(float))).reshape(-1, self.process.dim)

    def _shaped(self, paths: Float[Array, "num times dim"], ends: Any) -> Float[Array, "..."]:
        state = self.process.shape
        paths = self.process.unflatten(paths)
        return paths.reshape(*np.shape(ends)[: np.ndim(ends) - len(state)], -1, *state)

    def _judge(
        self,
        key: Key,
        proposal: PathProposal | StartedPaths,
        by: Proposer,
        y: Sites,
        drawn: Weighted,
        again: Callable[[Defence], Weighted] | None,
        thorough: bool,
    ) -> Judged:
        """Judge a batch by witnesses at the observation; where these are too few, as in fields, by simulations near it.

        ``by`` is the ``proposal``, resampled along the path or not.
        """
        known, problem = END_STATE in y, proposal.problem
        for_witnesses, for_weights = jax.random.split(key)
        reference = KnownEnd(proposal, proposal.context(y)) if known else reference_of(problem)
        target = jax.tree_util.Partial(problem.log_joint, y=y)
        witnesses = gather(for_witnesses, reference, target, thorough=thorough)
        near = self._near(y)
        if seen(witnesses.num_informative) > MAX_UNSEEN:
            return Judged(drawn, certify(drawn.log_weight, near), drawn.num)
        outlying = near._replace(log_excess=jnp.zeros(0))
        return judge(for_weights, by, y, drawn, witnesses, None, again, outlying)

    def _near(self, y: Sites) -> ForwardCheck:
        """Look up the evidence near an observation or a known end."""
        known = END_STATE in y
        if known and self.problem.observed and isinstance(self.paths, StartedPaths):
            return ForwardCheck(jnp.zeros(0))  # its simulations lie in the space of observations
        if known and isinstance(self.paths, PathProposal):
            y = {self.paths.site: y[END_STATE]}  # the observation it would be without noise
        x = features_of(self.paths, y)
        return self.bank.check(x)._replace(distance_rank=float(self.outliers.rank(x)))

    def _checked(self, end_state: Any) -> Float[Array, "..."]:
        end = jnp.asarray(real_numbers("`end_state`", end_state).values, jnp.result_type(float))
        if end.shape != self.process.shape:
            raise ValueError(f"`end_state` must have the state's shape {self.process.shape}, got {end.shape}.")
        if not bool(jnp.isfinite(end).all()):
            raise ValueError(
                f"`end_state` must be finite, but {int((~jnp.isfinite(end)).sum())} of its numbers are not."
            )
        return end


def _with_particles(paths: PathProposal | StartedPaths, num_particles: int) -> Any:
    return paths if num_particles == 1 else ResampledPaths(paths, num_particles)


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
