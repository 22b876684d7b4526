"""Score matching via differentiable physics (SMDP): learn physics in reverse, from simulated or recorded paths."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._tree import in_batches, own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.errors import UnsupportedModel
from scoreinfer.evidence.bank import ForwardBank, Outliers, outliers
from scoreinfer.model import unknowns
from scoreinfer.montecarlo.weights import log_effective_share
from scoreinfer.paths import LearnedBackward, linear_frame, path_controls, through_time
from scoreinfer.paths.build import Reversal, read_reversal, samplers, untrained_kernels
from scoreinfer.paths.losses import PathBatch, Transitions, Windows, check_windows, multistep_loss, transition_loss
from scoreinfer.paths.proposal import END_STATE, PARAMETERS, AbstractPaths, StartedPaths, layout_conditions, pinned
from scoreinfer.posterior.checkpoint_paths import read_paths
from scoreinfer.posterior.npse import NPSE
from scoreinfer.posterior.paths import PathPosterior, path_features
from scoreinfer.problem import Problem
from scoreinfer.process import Physics, PhysicsProcess
from scoreinfer.process.physics import Step
from scoreinfer.samplers.amortised import AmortisedProposal, default_sampler
from scoreinfer.samplers.base import Target
from scoreinfer.simulators.outputs import real_numbers
from scoreinfer.training.loop import FINISHED, INTERRUPTED, Budget, History, train
from scoreinfer.training.simulations import Standardiser, check_finite, encode, simulate_joint, standardiser

NUM_PILOT, PER_STEP = 8192, 64
"""Paths for the regression: least number, and number per step. Toy process, 500 steps: ESS/N .87 instead of .68."""
PENALTY = 200.0
"""Penalty of learned variances on a fixed budget of N paths is ``PENALTY`` / N. Chosen by judgement."""
FAR_OUT = 0.7
"""Argument ``far_out`` of `spread_weight` if control variates reduce the noise. Chosen by judgement."""
POOL = 8192
"""Largest number of fresh paths in one epoch; every path has many transitions. Chosen by judgement."""
MAX_NUMBERS = 1 << 26
"""Approximate largest number of floats in one epoch's paths; bounds the memory. Chosen by judgement."""
TRANSITIONS = 2048
"""Transitions per optimiser step of a perceptron. Chosen by judgement."""
PATIENCE = 30
"""Epochs without a better validation loss after which training on a fixed budget stops. Chosen by judgement."""
NUM_BANK, NUM_PROPOSALS = 128, 24
"""Simulated paths in the forward check, and proposals that each is compared with. Chosen by judgement."""
NUM_ENDS = 2048
"""Simulated ends with which the distance of a given end is compared. Chosen by judgement."""


@dataclass(frozen=True, eq=False)
class SMDP:
    """Score matching via differentiable physics: the forward SDE is a model's physical process, learned in reverse.

    All other latent sites are unknown parameters. They are drawn and weighed jointly with the paths. Any states may be
    observed. First every transition is learned by regression. Then a network learns the residuals.

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
        num_steps: optimiser steps; 0 means regression only.
        batch_size: paths per step.
        learning_rate: peak learning rate.
        width: width of the perceptron.
        depth: number of residual blocks of the perceptron.
        net: a network that replaces the perceptron, such as a `ConvNet` for fields. Every step then takes one
            transition of each of its ``batch_size`` paths, instead of 2048 transitions.
        windows: window lengths of the multi-step loss, such as (2, 4, 8), for reverse solvers that are unstable
            without it. Each length is one more stage of training, after the stage on single transitions. A `Windows`
            also sets noise, truncated gradients and memory.
        trajectories: recorded or simulated paths of this process on its own time grid. Training uses them instead of
            fresh simulations.
        resimulate: use only the first states of the ``trajectories``, and simulate the physics of the model with new
            noise from them in every epoch. Training then overfits the first states only, and has less noise
            (`scoreinfer.paths.path_controls`). Correct if the recorded paths follow the physics of the model.
        observed: names of the observed sites. Necessary if the model does not show them without data.
        progress_bar: show progress bars on a terminal.

    Raises:
        ValueError: if ``model`` is a `Problem`, ``resimulate`` has no ``trajectories``, or both ``trajectories`` and
            ``num_simulations`` are given.

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
    learning_rate: float = 4e-3
    width: int = 32
    depth: int = 2
    net: Callable | None = None
    windows: tuple[int, ...] | Windows = ()
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
        2048 more paths measure the distances between simulated ends.

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
        for_pilot, for_net, for_training, for_start, for_truths, for_bank = jax.random.split(key, 6)
        reversal = read_reversal(self.physics, self.model, *args, observed=self.observed, **kwargs)
        windows = check_windows(self.windows, reversal.physics.num_steps)
        source = _read(self, reversal)
        data = _pilot(self, for_pilot, reversal, source)
        backward = _start_from(self, for_net, reversal, data)
        backward, history = _learn(self, for_training, backward, data, source, windows)
        start = _learn_start(self, for_start, reversal)
        proposal, known = samplers(reversal, backward, data.scale, start)
        problem, end_problem = reversal.problem, pinned(reversal.problem)
        answers = problem if problem.observed else end_problem
        z, y = _joint(for_truths, answers, proposal)
        few = jax.tree.map(lambda leaf: leaf[:NUM_BANK], (z, y))
        bank = _bank(for_bank, answers, proposal, *few)
        return PathPosterior(problem, end_problem, proposal, known, bank, _ends(answers, proposal, y), history)

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


class Simulated(NamedTuple):
    """Simulated paths.

    Args:
        states: the paths, each state a vector of components.
        conditions: what the kernels are conditioned on (parameters, observations), encoded, paths first.
    """

    states: Float[Array, "num times dim"]
    conditions: Sites


class Conditions(NamedTuple):
    """Paths for training.

    Args:
        states: the paths, each state a vector of components.
        context: standardised numbers that the kernels are conditioned on.
        known: control variates (`scoreinfer.paths.path_controls`); zeros if there are none.
    """

    states: Float[Array, "num times dim"]
    context: Float[Array, "num context"]
    known: Float[Array, "num steps dim"]


class _Source(NamedTuple):
    """The source of the paths.

    Args:
        recorded: recorded paths. None means that the model is simulated.
        draw: simulates the given number of paths, from the recorded first states if there are any.
        online: whether every epoch has fresh paths.
        controlled: the physics for control variates. None means no control variates.
        room: largest number of paths in memory at once.
    """

    recorded: Float[Array, "num times *state"] | None
    draw: Callable[[Key, int], Simulated]
    online: bool
    controlled: PhysicsProcess | None
    room: int


class _Data(NamedTuple):
    """Paths for training, held-out paths, and the standardiser of the conditions."""

    scale: Standardiser
    training: Conditions
    validation: Conditions


def _read(options: SMDP, reversal: Reversal) -> _Source:
    """Check the recorded paths, and set up the simulation of further ones."""
    problem, physics = reversal.problem, reversal.physics
    if problem.simulate is None:
        raise UnsupportedModel(f"`fit` needs simulations, but this model cannot be simulated: {problem.not_simulable}")
    if reversal.num_parameters and options.trajectories is not None:
        raise ValueError(
            "`trajectories` need a model without unknown parameters, got one with "
            f"{reversal.num_parameters} unknown dimensions. Leave `trajectories` out, or fix the parameters."
        )
    recorded = None if options.trajectories is None else check_trajectories(options.trajectories, reversal.free)
    simulated = recorded is None or options.resimulate

    def draw(key: Key, num: int) -> Simulated:
        if recorded is None:
            return _simulated(key, reversal, num)
        for_paths, for_ends = jax.random.split(key)
        return _recorded(for_ends, _rolled_forward(for_paths, reversal.free, recorded[:, 0], num), reversal)

    online = options.resimulate or (recorded is None and options.num_simulations is None)
    room = MAX_NUMBERS // (physics.num_steps * physics.dim * (1 if options.net is None else 3)) + 1
    return _Source(recorded, draw, online, physics if simulated and _has_controls(reversal) else None, room)


def _pilot(options: SMDP, key: Key, reversal: Reversal, source: _Source) -> _Data:
    """Make the paths for the regression (and for training on a fixed budget), and the held-out paths."""
    if source.recorded is None or options.resimulate:
        num = max(NUM_PILOT, PER_STEP * reversal.physics.num_steps)
        pilot = source.draw(key, options.num_simulations or min(num, source.room))
    else:
        pilot = _recorded(key, source.recorded, reversal)
    scale = standardiser(pilot.conditions)
    standardised = _condition(scale, source.controlled, pilot)
    held_out = max(len(pilot.states) // 10, 1)
    training, validation = (
        jax.tree.map(lambda x, i=i: x[i], standardised) for i in (slice(held_out, None), slice(held_out))
    )
    return _Data(scale, training, validation)


def _start_from(options: SMDP, key: Key, reversal: Reversal, data: _Data) -> LearnedBackward:
    """Make the kernels of the regression, with an untrained network."""
    physics, training = reversal.physics, data.training
    usual = jnp.zeros(training.context.shape[1], jnp.float32)
    frame = linear_frame(physics, training.states, training.context, reversal.num_parameters, training.known)
    return untrained_kernels(key, physics, frame, usual, options.net, options.width, options.depth)


def _learn(
    options: SMDP, key: Key, backward: LearnedBackward, data: _Data, source: _Source, windows: Windows
) -> tuple[LearnedBackward, History]:
    """Train the network, one stage for each window length; length 1 means single transitions only."""
    training, online = data.training, source.online
    if options.num_steps == 0:
        return backward, History(np.zeros(0), np.zeros(0), 0, len(training.states), 0.0, FINISHED)
    stages = (1, *windows.lengths)
    per_stage = max(options.num_steps // len(stages), 1)
    batch_size = min(options.batch_size, len(training.states))
    budget = Budget(per_stage, batch_size, min(250, per_stage), options.learning_rate, None if online else PATIENCE)
    settings: dict[str, Any] = {
        "times": through_time(backward.process),
        "num_pairs": 1 if options.net is not None else max(TRANSITIONS // batch_size, 1),
        "penalty": 0.0 if online else PENALTY / len(training.states),
        "far_out": 0.0 if source.controlled is None else FAR_OUT,
    }
    network, histories = backward.network, []
    for for_stage, window in zip(jax.random.split(key, len(stages)), stages, strict=True):
        prepare: Callable = partial(_transitions if window == 1 else _path_batch, backward)
        loss: Callable = partial(transition_loss, **settings)
        if window > 1:
            loss = partial(multistep_loss, **settings, backward=backward, window=window, how=windows)
        fixed = None if online else prepare(training)

        def pools(key: Key, prepare: Callable = prepare, fixed: Any = fixed) -> Any:
            if fixed is not None:
                return fixed
            return prepare(_condition(data.scale, source.controlled, source.draw(key, min(POOL, source.room))))

        network, history = train(
            for_stage, network, loss, pools, prepare(data.validation), budget, progress_bar=options.progress_bar,
            title=f"backward kernels, window {window}",
        )  # fmt: skip
        histories.append(history)
        if history.stopped == INTERRUPTED:
            break
    return eqx.tree_at(lambda tree: tree.network, backward, network), _joined(histories)


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


def _joined(histories: list[History]) -> History:
    """Join the histories of several stages."""
    loss, validation = (np.concatenate([getattr(h, name) for h in histories]) for name in ("loss", "validation"))
    num_steps, num_simulations = sum(h.num_steps for h in histories), sum(h.num_simulations for h in histories)
    seconds = sum(h.seconds for h in histories)
    return History(loss, validation, num_steps, num_simulations, seconds, histories[-1].stopped)


@eqx.filter_jit
def _condition(scale: Standardiser, physics: PhysicsProcess | None, drawn: Simulated) -> Conditions:
    """Standardise the conditions, and compute control variates from the noise of ``physics`` (zeros without it)."""
    context = jnp.zeros((len(drawn.states), 0), jnp.float32)
    if drawn.conditions:
        context = jax.vmap(partial(layout_conditions, scale))(drawn.conditions)
    known = jnp.zeros_like(drawn.states[:, 1:]) if physics is None else path_controls(physics, drawn.states)
    return Conditions(drawn.states, context, known)


def _has_controls(reversal: Reversal) -> bool:
    """Say whether `path_controls` are valid: kernels depend on the next state only, and the physics has derivatives."""
    if reversal.num_parameters or reversal.conditioned:
        return False
    physics = reversal.free
    try:
        jax.eval_shape(lambda x: jax.vjp(partial(physics.forward, 0), x)[1](x), jnp.zeros(physics.dim))
    except (TypeError, ValueError, NotImplementedError):  # a callback, a loop of unknown length
        return False
    return True


def _simulated(key: Key, reversal: Reversal, num: int) -> Simulated:
    """Simulate paths. If the last step is the noise of an observation, the observation is the last state."""
    drawn, end = simulate_joint(key, reversal.problem, num), reversal.end
    check_finite(drawn)
    parameters, paths = jax.vmap(unknowns(reversal.problem, reversal.site).parts)(drawn.z)
    conditions = ({PARAMETERS: parameters} if parameters.size else {}) | (drawn.x if reversal.conditioned else {})
    return Simulated(_with_ends(reversal.physics, paths, None if end is None else drawn.x[end.site]), conditions)


@eqx.filter_jit
def _with_ends(physics, z, ends):
    paths = z.reshape(z.shape[0], -1, *physics.shape)
    if ends is not None:
        paths = jnp.concatenate([paths, ends[:, None]], axis=1)
    return physics.flatten(paths)


def check_trajectories(trajectories: Any, physics: PhysicsProcess) -> Float[Array, "num times *state"]:
    """Check recorded paths against the process without the noise of an observation.

    Raises:
        ValueError: if their shape is not that of the process, there are fewer than two, or they are not finite.
    """
    paths = jnp.asarray(real_numbers("`trajectories`", trajectories).values, jnp.result_type(float))
    expected = (physics.num_steps + 1, *physics.shape)
    if paths.shape[1:] != expected or paths.shape[0] < 2:
        raise ValueError(
            "`trajectories` must have the shape (num, times, *state) of the model's process, that is (2 or more, "
            f"{', '.join(map(str, expected))}), got {paths.shape}. Record every state on the grid of the model."
        )
    finite = np.isfinite(paths).reshape(len(paths), -1).all(1)
    if not finite.all():
        raise ValueError(
            f"`trajectories` must be finite, but {np.sum(~finite)} of the {len(paths)} hold numbers that are not, "
            f"first number {int(np.argmin(finite))}. Leave out paths in which the simulator or the recording failed."
        )
    return paths


@eqx.filter_jit
def _rolled_forward(
    key: Key, physics: PhysicsProcess, starts: Float[Array, "recorded *state"], num: int
) -> Float[Array, "num times *state"]:
    """Simulate ``num`` paths from the recorded first states, which are used in turn."""
    starts = physics.flatten(starts)[jnp.arange(num) % len(starts)]
    return physics.unflatten(jax.vmap(physics.simulate)(jax.random.split(key, num), starts))


def _recorded(key: Key, paths: Float[Array, "num times *state"], reversal: Reversal) -> Simulated:
    """Simulate the observations of recorded paths, if the last state or the conditions need them."""
    num, end = len(paths), reversal.end
    z, x = paths.reshape(num, -1), {}
    if end is not None or reversal.conditioned:
        x = _observed_of(jax.random.split(key, num), reversal.problem, z)
    states = _with_ends(reversal.physics, z, None if end is None else x[end.site])
    return Simulated(states, x if reversal.conditioned else {})


@eqx.filter_jit
def _observed_of(keys: Array, problem: Problem, z: Float[Array, "num dim"]) -> Sites:
    assert problem.simulate_observation is not None
    observe: Callable = problem.simulate_observation
    return jax.vmap(lambda key, path: encode(problem, observe(key, path)))(keys, z)


def _transitions(backward: LearnedBackward, paths: Conditions) -> Transitions:
    num = len(paths.states)
    return in_batches(lambda i: _transition_rows(backward, jax.tree.map(lambda x: x[i], paths)), num, min(num, 4096))


def _path_batch(backward: LearnedBackward, paths: Conditions) -> PathBatch:
    return PathBatch(_transitions(backward, paths), paths.states)


@eqx.filter_jit
def _transition_rows(backward: LearnedBackward, paths: Conditions) -> Transitions:
    """Whiten transitions by the frame, so that training does not run the physics."""
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
def _joint(key: Key, problem: Problem, paths: AbstractPaths) -> tuple[Float[Array, "num dim"], Sites]:
    """Simulate `NUM_ENDS` latent vectors and their observations (or their last states, if nothing is observed)."""
    assert problem.simulate is not None
    z, y = jax.lax.map(problem.simulate, jax.random.split(key, NUM_ENDS), batch_size=256)
    if not problem.observed:
        path = jax.vmap(paths.unknowns.parts)(z)[1] if isinstance(paths, StartedPaths) else z
        y = {END_STATE: path.reshape(NUM_ENDS, -1, *paths.backward.process.shape)[:, -1]}
    return z, y


@eqx.filter_jit
def _bank(key: Key, problem: Problem, paths: AbstractPaths, z: Float[Array, "num dim"], y: Sites) -> ForwardBank:
    """Compare the weight of each simulated path with the weights of proposals for its own observation.

    Exactness: log_excess estimates log p(path | y) - log q(path | y), consistently as the number of proposals grows.
    """

    def one(inputs: tuple[Key, Array, Sites]) -> tuple[Array, Array, Array]:
        key, z, y = inputs
        target = Target(problem, y)
        context = paths.context(target)
        for_truth, for_draws = jax.random.split(key)
        truth = paths.weigh(for_truth, target, context, z).log_weight
        keys = jax.random.split(for_draws, NUM_PROPOSALS)
        log_ws = jax.vmap(lambda key: paths.sample(key, target, context).log_weight)(keys)
        log_ws = jnp.where(jnp.isnan(log_ws), -jnp.inf, log_ws)
        mean = jax.nn.logsumexp(log_ws) - jnp.log(NUM_PROPOSALS)
        return path_features(paths, target), truth - mean, log_effective_share(log_ws)

    features, excess, share = jax.lax.map(one, (jax.random.split(key, z.shape[0]), z, y), batch_size=32)
    return ForwardBank(features, excess, share)


@eqx.filter_jit
def _ends(problem: Problem, paths: AbstractPaths, y: Sites) -> Outliers:
    return outliers(jax.vmap(lambda y: path_features(paths, Target(problem, y)))(y))
