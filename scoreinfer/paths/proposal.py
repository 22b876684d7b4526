"""Smoothing: proposals that draw whole paths backwards, weighed by the model's density of paths.

    log w = log p(path, y) - log q(path | y)

log q is the log density of the start plus those of all backward kernels. The latent vector of the problem is the whole
path and the unknown parameters. Weights, evidence, certificates and chains are therefore those of any proposal.
"""

import abc
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scoreinfer._tree import Layout
from scoreinfer._typing import Key, Sites
from scoreinfer.model import Unknowns, unknowns
from scoreinfer.montecarlo.reference import AbstractReference
from scoreinfer.nets.embedding import flatten
from scoreinfer.paths import AbstractBackward, Context, Kernel, LearnedBackward, draw_path, log_path
from scoreinfer.problem import Problem, Site
from scoreinfer.process import PhysicsProcess
from scoreinfer.samplers.amortised import AmortisedProposal
from scoreinfer.samplers.base import AbstractDensityProposal, Target
from scoreinfer.training.simulations import Standardiser, encode

END_STATE = "end_state"
"""Name of an exactly known last state among the observed sites."""


class Beginning(NamedTuple):
    """The start of a path that is drawn backwards.

    Args:
        parameters: unknown parameters; an empty vector if there are none.
        end: the state from which the kernels start.
    """

    parameters: Float[Array, " parameters"]
    end: Float[Array, " dim"]


class AbstractPaths(AbstractDensityProposal):
    """Proposals that draw paths backwards. Their parts are separate methods, for resampling along the path.

    Exactness: ``log_q`` is the exact log density of what ``propose`` draws, so that weights are exact for any kernels.
    """

    backward: eqx.AbstractVar[AbstractBackward]
    num_steps: eqx.AbstractVar[int]

    @abc.abstractmethod
    def begin(self, key: Key, context: Any) -> tuple[Beginning, Float[Array, ""]]:
        """Draw the start of the path; compute its log density."""

    @abc.abstractmethod
    def log_begin(self, key: Key, context: Any, begun: Beginning) -> Float[Array, ""]:
        """Compute the log density of a given start."""

    @abc.abstractmethod
    def kernels(self, context: Any, parameters: Float[Array, " parameters"]) -> AbstractBackward:
        """Return the kernels for these parameters and this observation."""

    @abc.abstractmethod
    def physics_of(self, problem: Problem, parameters: Float[Array, " parameters"]) -> PhysicsProcess:
        """Return the physics of these parameters."""

    @abc.abstractmethod
    def parts(self, context: Any, z: Float[Array, " dim"]) -> tuple[Beginning, Float[Array, "times dim"]]:
        """Split a latent vector into the start and the path (times ascending, the start's ``end`` last)."""

    @abc.abstractmethod
    def join(self, parameters: Float[Array, " parameters"], path: Float[Array, "times dim"]) -> Float[Array, " dim"]:
        """Invert `parts`."""

    @abc.abstractmethod
    def meets(self, context: Any, begun: Beginning) -> Bool[Array, ""]:
        """Return whether the end of a path is the known end; true if none is known."""

    @abc.abstractmethod
    def features(self, target: Target) -> Float[Array, " features"]:
        """Compute the standardised features of the observation or end, to detect outliers."""

    def propose(self, key, context):
        """Draw the start and a path that leads to it; compute ``log_q``."""
        for_start, for_path = jax.random.split(key)
        begun, log_start = self.begin(for_start, context)
        z, log_q = self.propose_from(for_path, context, begun)
        return z, log_start + log_q

    def propose_from(self, key: Key, context: Any, begun: Beginning) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw a path that leads to a given start; compute the log density of the path."""
        path, log_q = draw_path(key, self.kernels(context, begun.parameters), begun.end, self.num_steps)
        return self.join(begun.parameters, path), log_q

    def log_q(self, key, context, z):
        """Compute the ``log_q`` of a given path; minus infinity if it misses a known end."""
        begun, path = self.parts(context, z)
        kernels = self.kernels(context, begun.parameters)
        log_q = self.log_begin(key, context, begun) + log_path(kernels, path)
        return jnp.where(self.meets(context, begun), log_q, -jnp.inf)


class PathProposal(AbstractPaths):
    """Paths drawn backwards from a known end or from a Gaussian observation of it.

    Args:
        backward: the kernels.
        site: the observed site from which the kernels start. Either a Gaussian observation of the last state, whose
            noise is one more step of the process (`scoreinfer.process.physics.add_noise_stage`), or `END_STATE`.
        num_steps: number of kernels from that site to the first state.

    Exactness: ``log_q`` is the exact log density of the path (given its end, if that is known). Weighting by
        log p(path, y) - log_q is therefore exact for any kernels.
    """

    backward: AbstractBackward
    num_steps: int = eqx.field(static=True)
    site: str = eqx.field(static=True)

    def context(self, target: Target) -> Float[Array, " dim"]:
        """Return the state from which the kernels start."""
        return self.backward.process.flatten(target.y[self.site].astype(jnp.result_type(float)))

    def begin(self, key, context):
        """Return the state from which the kernels start, and the log density zero, because nothing is drawn."""
        return Beginning(context[:0], context), jnp.zeros((), context.dtype)

    def log_begin(self, key, context, begun):
        """Return zero, because nothing is drawn."""
        return jnp.zeros((), context.dtype)

    def kernels(self, context, parameters):
        """Return the kernels, which do not depend on the context."""
        return self.backward

    def physics_of(self, problem, parameters):
        """Return the physics, which has no unknown parameters."""
        return self.backward.process

    def parts(self, context, z):
        """Split a latent vector into the start and the path."""
        path = self.backward.process.flatten(z.reshape(-1, *self.backward.process.shape))
        if self.site != END_STATE:
            path = jnp.concatenate([path, context[None]])
        return Beginning(path[-1, :0], path[-1]), path

    def join(self, parameters, path):
        """Invert `parts`; an observation at the end of the path is not part of the latent vector."""
        states = self.backward.process.unflatten(path)
        return (states if self.site == END_STATE else states[:-1]).reshape(-1)

    def meets(self, context, begun):
        """Return whether the end of a path is the known end."""
        return _close(begun.end, context)

    def features(self, target):
        """Compute the standardised end."""
        assert isinstance(self.backward, LearnedBackward)
        end = self.backward.frame.standardise(self.num_steps - 1, self.context(target))
        return end.astype(jnp.float32)


PARAMETERS = "unknown parameters"
"""Name of the unknown parameters among the conditions of the kernels. No site may have this name."""


def layout_conditions(standardiser: Standardiser, conditions: Sites) -> Context:
    """Make the context of the kernels from encoded conditions: one standardised vector, parameters first."""
    seen = standardiser(conditions)
    parameters = {name: seen.pop(name) for name in (PARAMETERS,) if name in seen}
    return jnp.concatenate([flatten(parameters), flatten(seen)])


class Given(NamedTuple):
    """The context of `StartedPaths` for one observation.

    Args:
        start: the context of the sampler of the start.
        end: the state from which the kernels start. None means that it is drawn.
        conditions: encoded observations that the kernels are conditioned on.
    """

    start: Any
    end: Float[Array, " dim"] | None
    conditions: Sites


class StartedPaths(AbstractPaths):
    """Paths drawn backwards after a learned sampler has drawn the start: parameters, last state.

    For unknown parameters of the physics, for any observation of the last state (parts or functions of it), and for
    observations of earlier states. The kernels are conditioned on the drawn parameters, and on the observation if it
    depends on earlier states.

    Args:
        start: the learned sampler of the parameters and, if ``site`` is None, of the last state (see `beginning`).
        backward: the kernels.
        standardiser: the standardiser of the kernels' conditions; it contains the conditions in use, and no others.
        site: the site from which the kernels start, as for `PathProposal`. None means a last state drawn by ``start``.
        unknowns: positions of parameters and path in a latent vector.
        num_steps: number of kernels from their start to the first state.

    Exactness: as for `PathProposal`, for paths and parameters jointly.
    """

    backward: LearnedBackward
    num_steps: int = eqx.field(static=True)
    start: AmortisedProposal
    standardiser: Standardiser
    site: str | None = eqx.field(static=True)
    unknowns: Unknowns = eqx.field(static=True)

    @property
    def sees_path(self) -> bool:
        """Whether the kernels are conditioned on the observation, because it depends on earlier states."""
        return bool(self.standardiser.centre.keys() - {PARAMETERS})

    def context(self, target: Target) -> Given:
        """Compute the contexts of the start and of the kernels for one observation."""
        y, process = target.y, self.backward.process
        end = None if self.site is None else process.flatten(y[self.site].astype(jnp.result_type(float)))
        start = self.start.embed(self._seen_by_start(target))
        return Given(start, end, encode(target.problem, y) if self.sees_path else {})

    def _seen_by_start(self, target: Target) -> Sites:
        known = self.site == END_STATE
        seen = {END_STATE: target.y[END_STATE]} if known else encode(target.problem, target.y)
        return self.start.standardiser(seen)

    def begin(self, key, context):
        """Draw the parameters, and the last state if it is not known; compute their log density."""
        drawn, log_start = self.start.propose(key, context.start)
        parameters, end = jnp.split(drawn, [self.unknowns.num_parameters])
        return Beginning(parameters, end if context.end is None else context.end), log_start

    def log_begin(self, key, context, begun):
        """Compute the log density of given parameters and last state."""
        drawn = begun.parameters if context.end is not None else jnp.concatenate(begun)
        return self.start.log_q(key, context.start, drawn)

    def kernels(self, context, parameters):
        """Condition the kernels on the parameters, and on the observation if it depends on earlier states."""
        conditions = {PARAMETERS: parameters} | context.conditions
        return self.backward.given(layout_conditions(self.standardiser, conditions))

    def physics_of(self, problem, parameters):
        """Make the physics of these parameters."""
        process, found = self.backward.process, self.unknowns
        if not parameters.size:
            return process
        assert process.given is not None
        return process.given(problem.latent_sites(found.join(parameters, jnp.zeros(found.path, parameters.dtype))))

    def parts(self, context, z):
        """Split a latent vector into the start and the path."""
        process = self.backward.process
        parameters, states = self.unknowns.parts(z)
        path = process.flatten(states.reshape(-1, *process.shape))
        if context.end is not None and self.site != END_STATE:
            path = jnp.concatenate([path, context.end[None]])
        return Beginning(parameters, path[-1]), path

    def join(self, parameters, path):
        """Invert `parts`."""
        found = self.unknowns
        return found.join(parameters, self.backward.process.unflatten(path).reshape(-1)[: found.path])

    def meets(self, context, begun):
        """Return whether the end of a path is the known end; true if none is known."""
        return jnp.array(True) if context.end is None else _close(begun.end, context.end)

    def features(self, target):
        """Compute the standardised observation, as the sampler of the start sees it."""
        return flatten(self._seen_by_start(target))


class KnownEnd(AbstractReference):
    """Simulated paths whose last state is replaced by the known one.

    Args:
        paths: the sampler of such paths.
        target: the posterior of paths to the known end.

    Exactness: exact draws of parameters and earlier states from the prior, and their exact, normalised density.
    """

    paths: AbstractPaths
    target: Target

    @property
    def is_prior(self):
        """Return True."""
        return True

    def sample(self, key):
        """Simulate a path, and replace its last state by the known one."""
        simulate = self.target.problem.simulate
        assert simulate is not None
        begun, path = self.paths.parts(self.paths.context(self.target), simulate(key)[0])
        end = self.paths.backward.process.flatten(self.target.y[END_STATE].astype(path.dtype))
        return self.paths.join(begun.parameters, path.at[-1].set(end))

    def log_density(self, z):
        """Compute the log prior density of parameters and earlier states."""
        begun, path = self.paths.parts(self.paths.context(self.target), z)
        physics, last = self.paths.physics_of(self.target.problem, begun.parameters), path.shape[0] - 2
        step = Kernel(physics.forward(last, path[-2]), physics.scale[last])
        return self.target.problem.log_prior(z) - step.log_density(path[-1])


def _close(end: Float[Array, " dim"], known: Float[Array, " dim"]) -> Bool[Array, ""]:
    return jnp.allclose(end, known, rtol=1e-4, atol=1e-5)


def beginning(problem: Problem, process: PhysicsProcess, physics: str, site: str | None) -> Problem:
    """Make the problem of the start that `StartedPaths` draws. It can be simulated and has no density.

    Args:
        problem: the problem of parameters and paths.
        process: the physics.
        physics: name of the physics site.
        site: the site from which the kernels start. None means a drawn last state. `END_STATE` means a known last
            state, which then is the only observed site.
    """
    assert problem.simulate is not None
    simulate, found = problem.simulate, unknowns(problem, physics)
    state = Site(END_STATE, process.shape, "float32", "real", process.dim)
    drawn = tuple(latent for latent in problem.latents if latent.name != physics) + ((state,) if site is None else ())

    def simulate_beginning(key: Key) -> tuple[Float[Array, " dim"], Sites]:
        z, y = simulate(key)
        parameters, path = found.parts(z)
        last = path.reshape(-1, *process.shape)[-1]
        if site is None:
            parameters = jnp.concatenate([parameters, process.flatten(last)])
        return parameters, {END_STATE: last} if site == END_STATE else y

    def no_density(z: Float[Array, " dim"], *_: Any) -> Float[Array, ""]:
        raise ValueError("Expected a problem with a density, but the start of a backward path has none. Simulate it.")

    layout = Layout(tuple(site.name for site in drawn), tuple((site.size,) for site in drawn))
    return Problem(
        dim=layout.dim,
        latents=drawn,
        observed=(state._replace(size=0),) if site == END_STATE else problem.observed,
        log_prior=no_density,
        log_likelihood=no_density,
        constrain=layout.unflatten,
        latent_sites=layout.unflatten,
        unconstrain=layout.flatten,
        simulate=simulate_beginning,
        simulate_observation=None,
        encode=(lambda y: {END_STATE: y[END_STATE]}) if site == END_STATE else problem.encode,
        read=problem.read,
        has_density=False,
        recipe=partial(beginning, problem, process, physics, site),
    )


def pinned(problem: Problem) -> Problem:
    """Make the problem of paths whose last state is known, from the problem of paths and parameters.

    Its likelihood is one. Its evidence is the density of the process at the known end.
    """
    return dataclasses.replace(
        problem, observed=(), log_likelihood=lambda z, y: jnp.zeros((), z.dtype), pointwise_log_likelihood=None,
        recipe=partial(pinned, problem),
    )  # fmt: skip
