"""Learning physics in reverse: ``fit(..., process=Physics("x"))``, and the posterior of paths it returns."""

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

from scoreinfer._errors import MisspecificationWarning, UnsupportedModel
from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites
from scoreinfer.backward import (
    LearnedBackward,
    corrected_path,
    draw_path,
    linear_frame,
    path_controls,
    probability_flow,
    through_time,
)
from scoreinfer.certificate import MAX_OUTLYING, MAX_UNSEEN, ForwardCheck, certify, seen
from scoreinfer.correct import effective_sample_size, log_effective_share
from scoreinfer.drawing import Defence, constrain, draw_rows, weigh_rows, weighted_draws
from scoreinfer.draws import Draws
from scoreinfer.forward import ForwardBank, Outliers, outliers
from scoreinfer.model import unknowns
from scoreinfer.outputs import real_numbers
from scoreinfer.particles import ResampledPaths
from scoreinfer.path_checkpoint import PathParts, read_paths, write_paths
from scoreinfer.path_losses import PathBatch, Transitions, Windows, check_windows, multistep_loss, transition_loss
from scoreinfer.problem import Problem
from scoreinfer.process import Physics, PhysicsProcess
from scoreinfer.proposal import Proposal, Proposer, Weighted
from scoreinfer.reversal import Reversal, features_of, read_reversal, samplers, untrained
from scoreinfer.simulation import Standardiser, check_finite, encode, simulate, standardiser
from scoreinfer.smoothing import END_STATE, PARAMETERS, KnownEnd, PathProposal, StartedPaths, layout_conditions
from scoreinfer.train import Budget, History, train
from scoreinfer.witnesses import Judged, gather, judge, reference_of

NUM_PILOT, PER_STEP = 8192, 64
"""Least number of paths that regression learns from, and of these for every step: the noise of all steps adds up."""
PENALTY = 200.0
"""Penalty of learned variances on a fixed budget of paths, times their number."""
FAR_OUT = 0.7
"""How much more rare states count where controls take the noise away (see `spread_weight`)."""
POOL = 8192
"""Paths in a pool of fresh simulations: every one has many transitions."""
MAX_NUMBERS = 1 << 26
"""Numbers in a pool of simulated paths: bounds the memory."""
TRANSITIONS = 2048
"""Transitions per optimiser step."""
NUM_BANK, NUM_PROPOSALS = 128, 24
"""Simulated truths of the forward check, and proposals that each is held against."""
NUM_PARTICLES = 32
"""Particles of each draw where the weights of single paths are poor."""
NUM_ENDS = 2048
"""Simulated ends that a given end's distance is compared with."""


class Simulated(NamedTuple):
    """Paths in components, and what the kernels of each are conditioned on, encoded."""

    states: Float[Array, "num times dim"]
    conditions: Sites


class Conditioned(NamedTuple):
    """Paths in components, what the kernels of each are conditioned on, as they see it, and what its noise tells."""

    states: Float[Array, "num times dim"]
    context: Float[Array, "num context"]
    known: Float[Array, "num steps dim"]


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

        See `scoreinfer.particles`. Each draw then costs ``num_particles`` paths, which pays where the weights of single
        paths are worse than one in that many. ``ScoreSDE(posterior=posterior.resampled(32))`` moves whole paths by
        particle independent Metropolis, and weighs those that local moves have changed by conditional SMC. 1: plain
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
        `scoreinfer.backward.corrected_path`).

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

        Exactness: biased, as good as the training; see `scoreinfer.backward.probability_flow`.
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


def fit_paths(
    key: Key,
    model: Callable,
    *args: Any,
    process: Physics,
    trajectories: Float[Array | np.ndarray, "num times *state"] | None = None,
    resimulate: bool = False,
    num_simulations: int | None = None,
    num_steps: int = 10_000,
    batch_size: int = 256,
    learning_rate: float = 4e-3,
    width: int = 32,
    depth: int = 2,
    net: Callable | None = None,
    windows: tuple[int, ...] | Windows = (),
    learn_start: Callable[[Key, Problem], Proposal],
    observed: tuple[str, ...] | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> PathPosterior:
    """Learn the physics of a model in reverse; see `scoreinfer.fit`, whose ``process=`` leads here.

    ``learn_start`` learns the posterior of the last state, where not that state itself is observed with Gaussian noise,
    and of other latent sites than the process, its unknown parameters. The kernels are conditioned on parameters, and
    on the observation where it sees earlier states; the reverse physics that they start from is that of one value of
    the parameters.

    The backward kernels keep to the budget; the learned start takes simulations of its own, and 2048 more paths tell
    how far simulated ends lie from each other.

    Raises:
        UnsupportedModel: where the model cannot be simulated.
        ValueError: where trajectories do not fit the process or are not finite, or parameters are unknown beside them,
            or there are none to be resimulated, or ``net`` does not fit the state.
    """
    reversal = read_reversal(process, model, *args, observed=observed, **kwargs)
    problem, physics, end, conditioned = reversal.problem, reversal.physics, reversal.end, reversal.conditioned
    if problem.simulate is None:
        raise UnsupportedModel(f"`fit` learns from simulations, and this model has none: {problem.not_simulable}")
    if reversal.num_parameters and trajectories is not None:
        raise ValueError("`trajectories` say nothing of the parameters they came from: leave them out, or fix these.")
    if resimulate and trajectories is None:
        raise ValueError("`resimulate` runs the physics again from the first states of `trajectories`; there are none.")
    recorded = None if trajectories is None else check_trajectories(trajectories, reversal.free)
    windows = check_windows(windows, physics.num_steps)
    for_pilot, for_net, for_training, for_start, for_truths, for_bank = jax.random.split(key, 6)
    controlled = physics if (recorded is None or resimulate) and _has_controls(reversal) else None
    room = MAX_NUMBERS // (physics.num_steps * physics.dim * (1 if net is None else 3)) + 1

    def paths(key: Key, num: int) -> Simulated:
        if recorded is None:
            return _simulated(key, problem, process.site, physics, end, conditioned, num)
        for_paths, for_ends = jax.random.split(key)
        again = _rolled_forward(for_paths, reversal.free, recorded[:, 0], num)
        return _recorded(for_ends, again, problem, physics, end, conditioned)

    if recorded is not None and num_simulations is not None:
        raise ValueError("Expected `trajectories` or `num_simulations`, got both: recorded paths are the whole budget.")
    online = resimulate or (recorded is None and num_simulations is None)
    if recorded is None or resimulate:
        num_pilot = max(NUM_PILOT, PER_STEP * physics.num_steps)
        pilot = paths(for_pilot, num_simulations or min(num_pilot, room))
    else:
        pilot = _recorded(for_pilot, recorded, problem, physics, end, conditioned)
    scale = standardiser(pilot.conditions)
    standardised = _condition(scale, controlled, pilot)
    held_out = max(len(pilot.states) // 10, 1)
    training, validation = (
        jax.tree.map(lambda x, i=i: x[i], standardised) for i in (slice(held_out, None), slice(held_out))
    )
    usual = jnp.zeros(training.context.shape[1], jnp.float32)
    frame = linear_frame(physics, training.states, training.context, reversal.num_parameters, training.known)
    start_from = untrained(for_net, physics, frame, usual, net, width, depth)
    per_stage = max(num_steps // (1 + len(windows.lengths)), 1)
    patience = None if online else 30
    budget = Budget(per_stage, min(batch_size, len(training.states)), min(250, per_stage), learning_rate, patience)

    def pool(key: Key) -> Conditioned:
        return _condition(scale, controlled, paths(key, min(POOL, room)))

    fresh = pool if online else None
    if num_steps == 0:
        backward, history = start_from, History(np.zeros(0), np.zeros(0), 0, len(training.states), 0.0, "finished")
    else:
        num_pairs = 1 if net is not None else max(TRANSITIONS // budget.batch_size, 1)
        backward, history = _learn(
            for_training, start_from, training, validation, fresh, windows, num_pairs, budget,
            0.0 if controlled is None else FAR_OUT, progress_bar,
        )  # fmt: skip

    beginnings = reversal.start_problem
    start = None if beginnings is None else learn_start(for_start, beginnings)
    proposal, known = samplers(reversal, backward, scale, start)
    z, y = _joint(for_truths, proposal)
    bank = _bank(for_bank, proposal, z[:NUM_BANK], jax.tree.map(lambda leaf: leaf[:NUM_BANK], y))
    return PathPosterior(proposal, known, bank, _ends(proposal, y), history)


def _learn(
    key: Key,
    backward: LearnedBackward,
    training: Conditioned,
    validation: Conditioned,
    fresh: Callable[[Key], Conditioned] | None,
    windows: Windows,
    num_pairs: int,
    budget: Budget,
    far_out: float,
    progress_bar: bool,
) -> tuple[LearnedBackward, History]:
    """Train the network, one stage for each length of windows (1: single transitions alone)."""
    options: dict[str, Any] = {
        "times": through_time(backward.process),
        "num_pairs": num_pairs,
        "penalty": PENALTY / len(training.states) if fresh is None else 0.0,
        "far_out": far_out,
    }
    network, histories, stages = backward.network, [], (1, *windows.lengths)
    for for_stage, window in zip(jax.random.split(key, len(stages)), stages, strict=True):
        prepare: Callable = partial(_transitions if window == 1 else _path_batch, backward)
        if window == 1:
            loss: Callable = partial(transition_loss, **options)
        else:
            loss = partial(multistep_loss, **options, backward=backward, window=window, how=windows)
        seen = prepare(training) if fresh is None else None

        def pools(key: Key, prepare: Callable = prepare, seen: Any = seen) -> Any:
            return seen if fresh is None else prepare(fresh(key))

        title = f"backward kernels, window {window}"
        network, history = train(
            for_stage, network, loss, pools, prepare(validation), budget, progress_bar=progress_bar, title=title
        )
        histories.append(history)
        if history.stopped == "interrupted":
            break
    return eqx.tree_at(lambda tree: tree.network, backward, network), _joined(histories)


def _joined(histories: list[History]) -> History:
    """Make one history of several stages."""
    loss, validation = (np.concatenate([getattr(h, name) for h in histories]) for name in ("loss", "validation"))
    num_steps, num_simulations = sum(h.num_steps for h in histories), sum(h.num_simulations for h in histories)
    seconds = sum(h.seconds for h in histories)
    return History(loss, validation, num_steps, num_simulations, seconds, histories[-1].stopped)


def load_paths(
    path: Path,
    process: Physics,
    model: Callable,
    *args: Any,
    net: Callable | None = None,
    observed: tuple[str, ...] | None = None,
    **kwargs: Any,
) -> PathPosterior:
    """Load a saved posterior of paths; see `scoreinfer.load`, whose ``process=`` leads here."""
    reversal = read_reversal(process, model, *args, observed=observed, **kwargs)
    built, parts = read_paths(path, reversal, net)
    return PathPosterior(*built, parts.bank, parts.outliers, parts.history, parts.num_particles)


@eqx.filter_jit
def _condition(scale: Standardiser, physics: PhysicsProcess | None, drawn: Simulated) -> Conditioned:
    """Standardise conditions, and compute controls from the noise of ``physics`` (None: none)."""
    context = jnp.zeros((len(drawn.states), 0), jnp.float32)
    if drawn.conditions:
        context = jax.vmap(partial(layout_conditions, scale))(drawn.conditions)
    known = jnp.zeros_like(drawn.states[:, 1:]) if physics is None else path_controls(physics, drawn.states)
    return Conditioned(drawn.states, context, known)


def _has_controls(reversal: Reversal) -> bool:
    """Tell whether `path_controls` hold: for kernels given the next state alone, of physics with derivatives."""
    if reversal.num_parameters or reversal.conditioned:
        return False
    physics = reversal.free
    try:
        jax.eval_shape(lambda x: jax.vjp(partial(physics.forward, 0), x)[1](x), jnp.zeros(physics.dim))
    except (TypeError, ValueError, NotImplementedError):  # a callback, a loop of unknown length
        return False
    return True


def _simulated(key, problem, site, physics, end, conditioned, num):
    """Simulate paths, with the observation as their last state where the process ends in its noise."""
    drawn = simulate(key, problem, num)
    check_finite(drawn)
    parameters, paths = jax.vmap(unknowns(problem, site).parts)(drawn.z)
    conditions = ({PARAMETERS: parameters} if parameters.size else {}) | (drawn.x if conditioned else {})
    return Simulated(_with_ends(physics, paths, None if end is None else drawn.x[end.site]), conditions)


@eqx.filter_jit
def _with_ends(physics, z, ends):
    paths = z.reshape(z.shape[0], -1, *physics.shape)
    if ends is not None:
        paths = jnp.concatenate([paths, ends[:, None]], axis=1)
    return physics.flatten(paths)


def check_trajectories(trajectories: Any, physics: PhysicsProcess) -> Float[Array, "num times *state"]:
    """Check recorded paths against the process (without the noise of an observation)."""
    paths = jnp.asarray(real_numbers("`trajectories`", trajectories).values, jnp.result_type(float))
    expected = (physics.num_steps + 1, *physics.shape)
    if paths.shape[1:] != expected or paths.shape[0] < 2:
        raise ValueError(
            "`trajectories` must have shape (num, times, *state) like the model's process, that is (2 or more, "
            f"{', '.join(map(str, expected))}), got {paths.shape}."
        )
    finite = np.isfinite(paths).reshape(len(paths), -1).all(1)
    if not finite.all():
        raise ValueError(
            f"`trajectories` must be finite, but {np.sum(~finite)} of the {len(paths)} hold numbers that are not, "
            f"first number {int(np.argmin(finite))}. Drop those in which the simulator or the record failed."
        )
    return paths


@eqx.filter_jit
def _rolled_forward(
    key: Key, physics: PhysicsProcess, starts: Float[Array, "recorded *state"], num: int
) -> Float[Array, "num times *state"]:
    """Simulate paths anew from recorded first states, each as often as the others."""
    starts = physics.flatten(starts)[jnp.arange(num) % len(starts)]
    return physics.unflatten(jax.vmap(physics.simulate)(jax.random.split(key, num), starts))


def _recorded(key, paths, problem, physics, end, conditioned):
    """Observe the ends of paths (or whatever else is observed of them)."""
    num = len(paths)
    z, x = paths.reshape(num, -1), {}
    if end is not None or conditioned:
        keys = jax.random.split(key, num)
        x = _observed_of(keys, problem, z)
    return Simulated(_with_ends(physics, z, None if end is None else x[end.site]), x if conditioned else {})


@eqx.filter_jit
def _observed_of(keys: Array, problem: Problem, z: Float[Array, "num dim"]) -> Sites:
    assert problem.simulate_observation is not None
    observe: Callable = problem.simulate_observation
    return jax.vmap(lambda key, path: encode(problem, observe(key, path)))(keys, z)


def _transitions(backward: LearnedBackward, paths: Conditioned) -> Transitions:
    num = len(paths.states)
    return in_batches(lambda i: _transition_rows(backward, jax.tree.map(lambda x: x[i], paths)), num, min(num, 4096))


def _path_batch(backward: LearnedBackward, paths: Conditioned) -> PathBatch:
    return PathBatch(_transitions(backward, paths), paths.states)


@eqx.filter_jit
def _transition_rows(backward: LearnedBackward, paths: Conditioned) -> Transitions:
    """Whiten transitions by the frame, so that training need not run the physics."""
    frame = backward.frame

    def whiten(factor: Array, x: Array) -> Array:
        x = x / factor if factor.ndim == 1 else jax.scipy.linalg.solve_triangular(factor, x.T, lower=True).T
        return x.astype(jnp.float32)

    def one(k: Array, old: Array, new: Array, known: Array) -> tuple[Array, Array, Array]:
        rest = old - jax.vmap(lambda x, c: frame.mean(backward.process, k, x, c))(new, paths.context)
        v = jax.vmap(lambda x: backward.features(k, x))(new)
        return v, whiten(frame.factor[k], rest), whiten(frame.factor[k], known)

    by_step = (x.swapaxes(0, 1) for x in (paths.states[:, :-1], paths.states[:, 1:], paths.known))
    v, rest, known = (
        x.swapaxes(0, 1) for x in jax.lax.map(lambda row: one(*row), (jnp.arange(backward.process.num_steps), *by_step))
    )
    return Transitions(v, rest, paths.context, known)


@eqx.filter_jit
def _joint(key: Key, proposal: PathProposal | StartedPaths) -> tuple[Float[Array, "num dim"], Sites]:
    """Simulate paths and what is known of each."""
    assert proposal.problem.simulate is not None
    z, y = jax.lax.map(proposal.problem.simulate, jax.random.split(key, NUM_ENDS), batch_size=256)
    if proposal.site == END_STATE:
        path = z
        if isinstance(proposal, StartedPaths):
            path = jax.vmap(proposal.unknowns.parts)(z)[1]
        y = {END_STATE: path.reshape(NUM_ENDS, -1, *proposal.backward.process.shape)[:, -1]}
    return z, y


@eqx.filter_jit
def _bank(key: Key, proposal: PathProposal | StartedPaths, z: Float[Array, "num dim"], y: Sites) -> ForwardBank:
    """Hold simulated paths against the proposals for their own observations.

    Exactness: log_excess estimates log p(path | y) - log q(path | y); exact as proposals grow in number.
    """
    rows = jnp.arange(NUM_PROPOSALS)

    def one(inputs):
        key, z, y = inputs
        for_truth, for_draws = jax.random.split(key)
        truth = weigh_rows(for_truth, proposal, y, rows[:1], z[None]).log_weight[0]
        log_ws = draw_rows(for_draws, proposal, y, rows).log_weight
        log_ws = jnp.where(jnp.isnan(log_ws), -jnp.inf, log_ws)
        total = jax.nn.logsumexp(log_ws)
        return features_of(proposal, y), truth - total + jnp.log(NUM_PROPOSALS), log_effective_share(log_ws)

    features, excess, share = jax.lax.map(one, (jax.random.split(key, z.shape[0]), z, y), batch_size=32)
    return ForwardBank(features, excess, share)


@eqx.filter_jit
def _ends(proposal: PathProposal | StartedPaths, y: Sites) -> Outliers:
    return outliers(jax.vmap(lambda y: features_of(proposal, y))(y))
