"""Reversal: read a model and its physics, and build kernels and samplers that run the physics backwards.

`SMDP.fit` trains these objects; `SMDP.load` fills them with saved arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.model import NoisyEnd, from_numpyro, noisy_end, read_physics, sees_path, unknowns
from scoreinfer.nets import ConditionalMLP, ResidualMLP
from scoreinfer.paths import Frame, LearnedBackward, OnWaves, elapsed
from scoreinfer.paths.proposal import END_STATE, AbstractPaths, PathProposal, StartedPaths, beginning, pinned
from scoreinfer.problem import Problem
from scoreinfer.process import Physics, PhysicsProcess
from scoreinfer.process.physics import add_noise_stage
from scoreinfer.samplers.amortised import AmortisedProposal
from scoreinfer.training.simulations import Standardiser


class Reversal(NamedTuple):
    """A model whose physics is run in reverse.

    Args:
        problem: the problem of the model.
        site: name of its physics site.
        free: the physics, without the noise of an observation.
        end: the observed site, if it is the only one and observes the last state with Gaussian noise; otherwise None.
        conditioned: whether the observation depends on earlier states, so that the kernels are conditioned on it.
        physics: the physics; the noise of ``end``, if there is one, is its last step. It is static data of compiled
            functions, so it is made once.
        start_problem: the problem of what is drawn before the path (parameters, last state). None means that nothing
            is.
    """

    problem: Problem
    site: str
    free: PhysicsProcess
    end: NoisyEnd | None
    conditioned: bool
    physics: PhysicsProcess
    start_problem: Problem | None = None

    @property
    def num_parameters(self) -> int:
        """Number of unconstrained dimensions of all latent sites except the physics."""
        return sum(latent.size for latent in self.problem.latents if latent.name != self.site)

    @property
    def start_site(self) -> str | None:
        """The site from which the kernels of `StartedPaths` start. None means that they start from a drawn state."""
        if not self.problem.observed:
            return END_STATE
        return None if self.end is None else self.end.site


class Samplers(NamedTuple):
    """The samplers around learned kernels.

    Args:
        paths: sampler for observations (for known ends, if the model observes nothing).
        known_end: sampler for exactly known ends. None means that the kernels cannot start from one.
    """

    paths: AbstractPaths
    known_end: AbstractPaths | None


def read_reversal(
    process: Physics, model: Callable, *args: Any, observed: tuple[str, ...] | None = None, **kwargs: Any
) -> Reversal:
    """Read a model and its physics.

    Raises:
        UnsupportedModel: if the model cannot be read, or its physics is not a process in time.
    """
    problem = from_numpyro(model, *args, observed=observed, **kwargs)
    free = read_physics(process, model, *args, **kwargs)
    simulable = problem.simulate is not None
    end = noisy_end(process.site, model, *args, **kwargs) if simulable and len(problem.observed) == 1 else None
    conditioned = simulable and end is None and sees_path(problem, process.site, free.num_steps + 1)
    physics = free if end is None else add_noise_stage(free, end.scale)
    reversal = Reversal(problem, process.site, free, end, conditioned, physics)
    return reversal._replace(start_problem=_start_problem(reversal))


def _start_problem(reversal: Reversal) -> Problem | None:
    problem = reversal.problem
    if not reversal.num_parameters and (reversal.end is not None or not problem.observed):
        return None
    whole = problem if problem.observed else pinned(problem)
    return beginning(whole, reversal.physics, reversal.site, reversal.start_site)


def samplers(
    reversal: Reversal, backward: LearnedBackward, standardiser: Standardiser, start: AmortisedProposal | None
) -> Samplers:
    """Build the samplers from learned kernels and, if `Reversal.start_problem` is not None, the sampler of the start.

    Exactness: the weights of the samplers are exact for any kernels and any ``start``.
    """
    problem, num_steps = reversal.problem, backward.process.num_steps

    def started() -> StartedPaths:
        assert start is not None
        parts = unknowns(problem, reversal.site)
        return StartedPaths(backward, num_steps, start, standardiser, reversal.start_site, parts)

    known: AbstractPaths | None = None
    if not reversal.num_parameters and not reversal.conditioned:
        known = PathProposal(backward, reversal.free.num_steps, END_STATE)
    elif not problem.observed:
        known = started()
    if reversal.end is not None and not reversal.num_parameters:
        return Samplers(PathProposal(backward, num_steps, reversal.end.site), known)
    if problem.observed:
        return Samplers(started(), known)
    assert known is not None
    return Samplers(known, known)


def untrained_kernels(
    key: Key,
    process: PhysicsProcess,
    frame: Frame,
    usual: Float[Array, " context"],
    net: Callable | None,
    width: int,
    depth: int,
) -> LearnedBackward:
    """Make the kernels of the regression, with an untrained network: a perceptron, or ``net`` if it is given.

    Raises:
        ValueError: if ``net`` does not fit the state.
    """
    separate = process.source is not None and process.source.separate
    if net is None:
        net = _perceptron(key, process.dim, 1 + usual.size, 2 * process.dim, width, depth)
        return LearnedBackward(process, frame, net, usual, separate=separate)
    backward = LearnedBackward(process, frame, net, usual, getattr(net, "physics", False), separate)
    first = jnp.zeros((), int)
    fits = f"`net` must return a vector of {2 * process.dim} numbers, two for each component of the state"

    def output() -> Array:
        log_time, time = elapsed(process, first)
        return net(backward.features(first, frame.centre[0]), log_time, jnp.concatenate([time, usual]))

    try:
        returned = jax.eval_shape(output)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{fits}, but fails. Make it for the state's shape {process.shape}. Error: {error}") from error
    if returned.shape != (2 * process.dim,):
        raise ValueError(f"{fits}, got shape {returned.shape}. Make it for the state's shape {process.shape}.")
    if process.waves:
        on_waves = OnWaves(net, ResidualMLP(key, 2 + usual.size, process.dim, width=32, depth=1), process.shape)
        backward = eqx.tree_at(lambda tree: tree.network, backward, on_waves)
    return backward


@eqx.filter_jit
def _perceptron(key: Key, num_in: int, num_context: int, num_out: int, width: int, depth: int) -> ConditionalMLP:
    return ConditionalMLP(key, num_in, num_context, num_out, width=width, depth=depth)
