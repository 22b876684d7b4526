"""Score matching via differentiable physics (SMDP): learn physics in reverse, from simulated or recorded paths."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._tree import own_broadcasting
from scoreinfer._typing import Key
from scoreinfer.paths import LearnedBackward, linear_frame
from scoreinfer.paths.build import Reversal, read_reversal, samplers, untrained_kernels
from scoreinfer.paths.losses import Windows, check_windows
from scoreinfer.paths.proposal import pinned
from scoreinfer.posterior.checkpoint_paths import read_paths
from scoreinfer.posterior.npse import NPSE
from scoreinfer.posterior.path_data import Data, make_data, read_source, simulate_truths
from scoreinfer.posterior.path_evidence import forward_bank, judge_paths, simulated_ends
from scoreinfer.posterior.path_training import Plan, train_kernels
from scoreinfer.posterior.paths import PathPosterior
from scoreinfer.problem import Problem
from scoreinfer.process import Physics
from scoreinfer.process.physics import Step
from scoreinfer.samplers.amortised import AmortisedProposal, default_sampler


@dataclass(frozen=True, eq=False)
class SMDP:
    """Score matching via differentiable physics: the forward SDE is a model's physical process, learned in reverse.

    All other latent sites are unknown parameters. They are drawn and weighed jointly with the paths. Any states may be
    observed. First every transition is learned by regression. A network then learns the residuals, only if the exact
    weights of paths say that regression is not enough: linear physics needs no network.

    Args:
        model: a NumPyro model.
        site: name of an ``EulerMaruyama`` or `PhysicsPath` site of the model.
        reverse: one physics step backwards, ``reverse(t0, t1, x)``: from the state ``x`` at time ``t1`` to the earlier
            time ``t0``. None means x - (Phi(x) - x), a step with minus the drift. The learned correction is added to
            it, so that any function is correct; a stable one is learned faster. With strong dissipation, the identity
            is better than an explicit step back. With transport and dissipation, reverse the transport only.
        waves: learn in Fourier space, one wavenumber at a time. For fields on periodic grids with the same laws at
            every point. For linear physics the regression is then sufficient at any field size. For other physics,
            give a `ConvNet` as ``net``; it sees and moves fields.
        separate: input of the network. True (separate updates): the result of the backward physics step, which the
            network then corrects. False (joint updates): the state before that step. The output has the same meaning;
            if the backward physics is good, its result is nearer to the corrected state.
        num_simulations: fixed budget of paths. A tenth of them is held out for validation and early stopping. None
            means fresh paths in every epoch.
        num_steps: largest number of optimiser steps; 0 means regression only.
        batch_size: paths per step.
        learning_rate: peak learning rate.
        width: width of the perceptron.
        depth: number of residual blocks of the perceptron.
        net: a network that replaces the perceptron, such as a `ConvNet` for fields. Every step then takes one
            transition of each of its ``batch_size`` paths, instead of 2048 transitions.
        windows: window lengths of the multi-step loss, such as (2, 4, 8), for reverse solvers that are unstable
            without it. Each length is one more stage of training, after the stage on single transitions. A `Windows`
            also sets noise, truncated gradients and memory.
        target_share: training stops when so large a share of paths to simulated ends is effective (the mean of ESS/N
            over 32 of them), or where more steps hardly increase it. ``history.shares`` are the shares measured, and
            ``history.stopped`` says what ended the training. If the model has no density, the validation loss decides.
            None means all ``num_steps``, for the score itself: unweighted draws and the probability flow may still
            become better when the weights no longer do.
        max_seconds: wall time of `fit` after which no further steps are trained. None means no limit. With a limit the
            weights depend on the clock.
        trajectories: recorded or simulated paths of this process on its own time grid. Training uses them instead of
            fresh simulations.
        resimulate: use only the first states of the ``trajectories``, and simulate the physics of the model with new
            noise from them in every epoch. Training then overfits the first states only, and has less noise
            (`scoreinfer.paths.path_controls`). Correct if the recorded paths follow the physics of the model.
        observed: names of the observed sites. Necessary if the model does not show them without data.
        progress_bar: show progress bars on a terminal.

    Raises:
        ValueError: if ``model`` is a `Problem`, ``resimulate`` has no ``trajectories``, both ``trajectories`` and
            ``num_simulations`` are given, or ``target_share`` is not a share.

    Exactness: biased as a density, like every learned posterior. Its weighted draws are exact.

    References: Holzschuh, Vegetti and Thuerey 2023, arXiv 2301.10250.
    """

    model: Any  # a Callable; `__post_init__` refuses a `Problem` with a message
    site: str
    reverse: Step | None = None
    waves: bool = False
    separate: bool = False
    num_simulations: int | None = None
    num_steps: int = 10_000
    batch_size: int = 256
    learning_rate: float = 1e-2
    width: int = 32
    depth: int = 1
    net: Callable | None = None
    windows: tuple[int, ...] | Windows = ()
    target_share: float | None = 0.85
    max_seconds: float | None = None
    trajectories: Float[Array | np.ndarray, "num times *state"] | None = None
    resimulate: bool = False
    observed: tuple[str, ...] | None = None
    progress_bar: bool = True

    def __post_init__(self) -> None:
        """Check the options that do not depend on the model's arguments."""
        if isinstance(self.model, Problem):
            raise ValueError("Physics is read from the NumPyro model itself: expected the model, got a `Problem`.")
        if self.resimulate and self.trajectories is None:
            raise ValueError(
                "`resimulate` needs the first states of `trajectories`, but there are none. Pass `trajectories`."
            )
        if self.target_share is not None and not 0 < self.target_share < 1:
            raise ValueError(
                f"`target_share` must be between 0 and 1, or None for all `num_steps`, got {self.target_share}."
            )
        if self.trajectories is not None and self.num_simulations is not None:
            raise ValueError(
                "Expected `trajectories` or `num_simulations`, got both. Leave out `num_simulations`: recorded paths "
                "are the whole budget."
            )

    @property
    def physics(self) -> Physics:
        """The process and how it is reversed, as a `Physics`."""
        return Physics(self.site, self.reverse, self.waves, self.separate)

    @own_broadcasting
    def fit(self, key: Key, *args: Any, **kwargs: Any) -> PathPosterior:
        """Learn the physics in reverse, for the design (covariates, times, shapes) of these model arguments.

        Paths are drawn backwards by learned kernels, from the last state. Unknown parameters are drawn before the path,
        and so is the last state if it is not observed with Gaussian noise. An amortised posterior (`NPSE`), which is
        learned too, draws both. The kernels are conditioned on the parameters, and on the observation if it depends on
        earlier states. Their backward physics uses one value of the parameters.

        ``num_simulations`` is the budget of the kernels only. The amortised posterior takes simulations of its own, and
        2048 more paths measure the distances between simulated ends, judge the kernels and check the weights.

        Args:
            key: random key; the same key gives the same weights.
            *args: the model's own arguments. Data may be left out; they are ignored.
            **kwargs: the model's own keyword arguments.

        Returns:
            The `PathPosterior`, with the history of its training.

        Raises:
            UnsupportedModel: if the model cannot be read or simulated, or the site is not a process in time.
            ValueError: if trajectories do not fit the process, are not finite or are given with unknown parameters, if
                ``net`` does not fit the state, ``windows`` do not fit the process, or simulations are not finite.
        """
        end = None if self.max_seconds is None else time.perf_counter() + self.max_seconds
        streams = _streams(key)
        reversal = read_reversal(self.physics, self.model, *args, observed=self.observed, **kwargs)
        windows = check_windows(self.windows, reversal.physics.num_steps)
        copies = 1 if self.net is None else 3
        source = read_source(reversal, self.trajectories, self.resimulate, self.num_simulations, copies)
        data = make_data(streams.data, reversal, source)
        backward = _start_from(self, streams.net, reversal, data)
        start = _learn_start(self, streams.start, reversal)
        truths = simulate_truths(streams.truths, reversal)
        problem, end_problem = reversal.problem, pinned(reversal.problem)
        answers = problem if problem.observed else end_problem
        judge = judge_paths(answers, samplers(reversal, backward, data.scale, start).paths, truths)
        backward, history = train_kernels(streams.training, backward, data, source, windows, _plan(self, end), judge)
        paths, known = samplers(reversal, backward, data.scale, start)
        bank = forward_bank(streams.bank, answers, paths, truths)
        outliers = simulated_ends(answers, paths, truths.y)
        return PathPosterior(problem, end_problem, paths, known, bank, outliers, history)

    def load(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> PathPosterior:
        """Load a saved posterior of paths for the model that it was fitted to, as `NPSE.load` does.

        `load` uses these options only: the physics, which is code and not saved (``site``, ``reverse``, ``waves``,
        ``separate``), ``observed`` and ``net`` (a module of the same structure, trained or not).

        Args:
            path: the folder that `PathPosterior.save` wrote.
            *args: the model's own arguments, as for `fit`; data may be left out.
            **kwargs: the model's own keyword arguments.

        Raises:
            UnsupportedModel: if the model cannot be read, or the site is not a process in time.
            UnreadableFile: if the files are missing, truncated, changed, of another version, or were not written by
                `PathPosterior.save`.
            ValueError: if sites, densities or physics of the model differ from those of the learned model (the message
                names them), or if a module of the user's own is needed.

        Exactness: weights are always computed from the given model, never from the files.
        """
        reversal = read_reversal(self.physics, self.model, *args, observed=self.observed, **kwargs)
        built, parts = read_paths(Path(path), reversal, self.net)
        problem, end_problem = reversal.problem, pinned(reversal.problem)
        return PathPosterior(
            problem, end_problem, *built, parts.bank, parts.outliers, parts.history, parts.num_particles
        )


class _Streams(NamedTuple):
    """Independent random streams of one training."""

    data: Key
    net: Key
    training: Key
    start: Key
    truths: Key
    bank: Key


@eqx.filter_jit
def _streams(key: Key) -> _Streams:
    return _Streams(*jax.random.split(key, len(_Streams._fields)))


def _plan(options: SMDP, end: float | None) -> Plan:
    return Plan(
        options.num_steps, options.batch_size, options.learning_rate, None if options.net is None else 1,
        options.target_share, end, options.progress_bar,
    )  # fmt: skip


def _start_from(options: SMDP, key: Key, reversal: Reversal, data: Data) -> LearnedBackward:
    """Make the kernels of the regression, with an untrained network."""
    physics, training = reversal.physics, data.training
    usual = jnp.zeros(training.context.shape[1], jnp.float32)
    frame = linear_frame(physics, training.states, training.context, reversal.num_parameters, training.known)
    return untrained_kernels(key, physics, frame, usual, options.net, options.width, options.depth)


def _learn_start(options: SMDP, key: Key, reversal: Reversal) -> AmortisedProposal | None:
    """Learn the sampler of what is drawn before a path: unknown parameters, and the last state if it is not known."""
    beginnings = reversal.start_problem
    if beginnings is None:
        return None
    by = default_sampler(beginnings.dim, weighed=True)  # its density is a factor of the weights of paths
    num_steps = max(options.num_steps, 1)
    return (
        NPSE(beginnings, num_steps=num_steps, sampler=by, progress_bar=options.progress_bar).fit(key).proposal.amortised
    )
