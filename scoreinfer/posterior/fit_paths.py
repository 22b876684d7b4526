"""Learning physics in reverse: simulated or recorded paths, regression, then the network of the backward kernels."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._errors import UnsupportedModel
from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites
from scoreinfer.evidence.bank import ForwardBank, Outliers, outliers
from scoreinfer.model import unknowns
from scoreinfer.montecarlo.weights import log_effective_share
from scoreinfer.paths import LearnedBackward, linear_frame, path_controls, through_time
from scoreinfer.paths.build import Reversal, features_of, read_reversal, samplers, untrained
from scoreinfer.paths.losses import PathBatch, Transitions, Windows, check_windows, multistep_loss, transition_loss
from scoreinfer.paths.proposal import END_STATE, PARAMETERS, PathProposal, StartedPaths, layout_conditions
from scoreinfer.posterior.path_checkpoint import read_paths
from scoreinfer.posterior.paths import PathPosterior
from scoreinfer.problem import Problem
from scoreinfer.process import Physics, PhysicsProcess
from scoreinfer.samplers.amortised import Proposal
from scoreinfer.samplers.batches import draw_rows, weigh_rows
from scoreinfer.simulators.outputs import real_numbers
from scoreinfer.training.loop import Budget, History, train
from scoreinfer.training.simulations import Standardiser, check_finite, encode, simulate, standardiser

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
