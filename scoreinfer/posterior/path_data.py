"""Paths to learn from: simulated, recorded, or simulated from recorded first states; and what networks see of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices
from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites
from scoreinfer.errors import UnsupportedModel
from scoreinfer.model import unknowns
from scoreinfer.paths import LearnedBackward, path_controls
from scoreinfer.paths.build import Reversal
from scoreinfer.paths.losses import PathBatch, Transitions
from scoreinfer.paths.proposal import END_STATE, PARAMETERS, layout_conditions
from scoreinfer.problem import Problem
from scoreinfer.process import PhysicsProcess
from scoreinfer.simulators.outputs import real_numbers
from scoreinfer.training.simulations import Simulations, Standardiser, check_finite, encode, standardiser

NUM_PILOT, PER_STEP = 8192, 64
"""Paths for the regression: least number, and number per step. Toy process, 500 steps: ESS/N .87 instead of .68."""
POOL = 8192
"""Largest number of fresh paths in one epoch; every path has many transitions. Chosen by judgement."""
BLOCK = 2048
"""Simulations per compiled call, whatever they are for: one program simulates all. Chosen by judgement."""
MAX_NUMBERS = 1 << 26
"""Approximate largest number of floats in one epoch's paths; bounds the memory. Chosen by judgement."""


class Simulated(NamedTuple):
    """Simulated paths.

    Args:
        states: the paths, each state a vector of components.
        conditions: what the kernels are conditioned on (parameters, observations), encoded, paths first.
    """

    states: Float[Array, "num times dim"]
    conditions: Sites


class Truths(NamedTuple):
    """Simulated latent vectors with their observations (or their last states, if nothing is observed)."""

    z: Float[Array, "num dim"]
    y: Sites


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


class Source(NamedTuple):
    """The source of the paths.

    Args:
        recorded: recorded paths that are all there is to learn from. None means that paths are simulated.
        draw: simulates the given number of paths, from the recorded first states if there are any.
        num_simulations: fixed budget of simulated paths. None means no budget.
        controlled: the physics for control variates. None means no control variates.
        room: largest number of paths in memory at once.
    """

    recorded: Float[Array, "num times *state"] | None
    draw: Callable[[Key, int], Simulated]
    num_simulations: int | None
    controlled: PhysicsProcess | None
    room: int

    @property
    def online(self) -> bool:
        """Whether every epoch has fresh paths."""
        return self.recorded is None and self.num_simulations is None

    @property
    def pool(self) -> int:
        """Number of fresh paths in one epoch."""
        return min(POOL, self.room)


class Data(NamedTuple):
    """Paths for training, held-out paths, and the standardiser of the conditions."""

    scale: Standardiser
    training: Conditions
    validation: Conditions


def read_source(
    reversal: Reversal, trajectories: Any, resimulate: bool, num_simulations: int | None, copies: int
) -> Source:
    """Check the recorded paths, and set up the simulation of further ones.

    Args:
        reversal: the model and its physics.
        trajectories: recorded paths. None means that there are none.
        resimulate: whether only the first states of ``trajectories`` are used.
        num_simulations: fixed budget of simulated paths. None means no budget.
        copies: number of arrays of a path's size that training keeps.
    """
    problem, physics = reversal.problem, reversal.physics
    if problem.simulate is None:
        raise UnsupportedModel(f"`fit` needs simulations, but this model cannot be simulated: {problem.not_simulable}")
    if reversal.num_parameters and trajectories is not None:
        raise ValueError(
            "`trajectories` need a model without unknown parameters, got one with "
            f"{reversal.num_parameters} unknown dimensions. Leave `trajectories` out, or fix the parameters."
        )
    recorded = None if trajectories is None else check_trajectories(trajectories, reversal.free)

    def draw(key: Key, num: int) -> Simulated:
        if recorded is None:
            return _simulated(key, reversal, num)
        for_paths, for_ends = jax.random.split(key)
        return _recorded(for_ends, _rolled_forward(for_paths, reversal.free, recorded[:, 0], num), reversal)

    only = None if resimulate else recorded
    controlled = physics if only is None and _has_controls(reversal) else None
    return Source(
        only, draw, num_simulations, controlled, MAX_NUMBERS // (physics.num_steps * physics.dim * copies) + 1
    )


def make_data(key: Key, reversal: Reversal, source: Source) -> Data:
    """Make the paths for the regression (and for training on a fixed budget), and the held-out paths."""
    if source.recorded is None:
        num = min(max(NUM_PILOT, PER_STEP * reversal.physics.num_steps), source.room)
        pilot = source.draw(key, source.num_simulations or num)
    else:
        pilot = _recorded(key, source.recorded, reversal)
    scale = standardiser(pilot.conditions) if pilot.conditions else Standardiser({}, {})
    training, validation = _held_out(_condition(scale, source.controlled, pilot), max(len(pilot.states) // 10, 1))
    return Data(scale, training, validation)


def fresh(key: Key, source: Source, scale: Standardiser) -> Conditions:
    """Simulate the paths of one epoch."""
    return _condition(scale, source.controlled, source.draw(key, source.pool))


@eqx.filter_jit
def _condition(scale: Standardiser, physics: PhysicsProcess | None, drawn: Simulated) -> Conditions:
    """Standardise the conditions, and compute control variates from the noise of ``physics`` (zeros without it)."""
    context = jnp.zeros((len(drawn.states), 0), jnp.float32)
    if drawn.conditions:
        context = jax.vmap(partial(layout_conditions, scale))(drawn.conditions)
    known = jnp.zeros_like(drawn.states[:, 1:]) if physics is None else path_controls(physics, drawn.states)
    return Conditions(drawn.states, context, known)


@eqx.filter_jit
def _held_out(paths: Conditions, num: int) -> tuple[Conditions, Conditions]:
    training, validation = (jax.tree.map(lambda x, i=i: x[i], paths) for i in (slice(num, None), slice(num)))
    return training, validation


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


# --- simulated paths


def simulate_truths(key: Key, reversal: Reversal) -> Truths:
    """Simulate `BLOCK` latent vectors and their observations (or their last states, if nothing is observed)."""
    return _checked_block(key, reversal, np.arange(BLOCK)).truths


def _simulated(key: Key, reversal: Reversal, num: int) -> Simulated:
    """Simulate paths. If the last step is the noise of an observation, the observation is the last state."""
    return in_batches(lambda rows: _checked_block(key, reversal, rows).paths, num, BLOCK)


class _Block(NamedTuple):
    """Simulations, as truths and as paths to learn from; and whether every number is finite."""

    truths: Truths
    paths: Simulated
    simulations: Simulations
    finite: Bool[Array, ""]


def _checked_block(key: Key, reversal: Reversal, rows: Int[Array | np.ndarray, " num"]) -> _Block:
    block = _block(key, reversal, rows)
    if not bool(block.finite):
        check_finite(block.simulations)
    return block


@over_devices
def _block(key: Key, reversal: Reversal, rows: Int[Array | np.ndarray, " num"]) -> _Block:
    """Simulate; draw i depends only on ``key`` and i."""
    problem, physics, end = reversal.problem, reversal.physics, reversal.end
    assert problem.simulate is not None
    simulate: Callable = problem.simulate

    def one(row: Array) -> tuple[Array, Sites, Sites]:
        z, y = simulate(jax.random.fold_in(key, row))
        return z, y, encode(problem, y)

    z, y, x = map_rows(one, None)(jnp.asarray(rows))
    parameters, paths = jax.vmap(unknowns(problem, reversal.site).parts)(z)
    conditions = ({PARAMETERS: parameters} if parameters.size else {}) | (x if reversal.conditioned else {})
    drawn = Simulated(_with_ends(physics, paths, None if end is None else x[end.site]), conditions)
    if not problem.observed:
        y = {END_STATE: paths.reshape(len(z), -1, *physics.shape)[:, -1]}
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((z, x))]).all()
    return _Block(Truths(z, y), drawn, Simulations(z, x), finite)


@eqx.filter_jit
def _with_ends(physics, z, ends):
    paths = z.reshape(z.shape[0], -1, *physics.shape)
    if ends is not None:
        paths = jnp.concatenate([paths, ends[:, None]], axis=1)
    return physics.flatten(paths)


# --- recorded paths


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


# --- what the network sees


def transitions(backward: LearnedBackward, paths: Conditions, size: int) -> Transitions:
    """Whiten all transitions by the frame, so that training does not run the physics; ``size`` paths at a time."""
    return in_batches(lambda rows: _whitened(backward, _rows(paths, rows)), len(paths.states), size)


def path_batch(backward: LearnedBackward, paths: Conditions, size: int) -> PathBatch:
    """Make the batch of the multi-step loss."""
    return PathBatch(transitions(backward, paths, size), paths.states)


@eqx.filter_jit
def _rows(paths: Conditions, rows: Int[Array, " num"]) -> Conditions:
    return jax.tree.map(lambda x: x[rows], paths)


@eqx.filter_jit
def _whitened(backward: LearnedBackward, paths: Conditions) -> Transitions:
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
