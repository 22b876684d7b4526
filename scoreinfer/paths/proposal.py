"""Smoothing: draws of whole paths given how they ended, as proposals that the model's own density weighs.

The latent vector of the problem is the whole path (and unknown parameters), so that weights, evidence, certificates
and chains are those of any other proposal: log w = log p(path, y) - log q(path | y), log q the sum of the backward
kernels' and the start's.
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
"""Name under which an exactly known last state stands among the observed sites."""


class Beginning(NamedTuple):
    """What is drawn, or known, before a path is drawn backwards.

    Args:
        parameters: unknown parameters; none, where all are known.
        end: the state that the kernels start from.
    """

    parameters: Float[Array, " parameters"]
    end: Float[Array, " dim"]


class AbstractPaths(AbstractDensityProposal):
    """Paths drawn backwards, with the parts that resampling along the way needs one by one."""

    backward: eqx.AbstractVar[AbstractBackward]
    num_steps: eqx.AbstractVar[int]

    @abc.abstractmethod
    def begin(self, key: Key, context: Any) -> tuple[Beginning, Float[Array, ""]]:
        """Draw what has to be known before the path; compute its log density."""

    @abc.abstractmethod
    def log_begin(self, key: Key, context: Any, begun: Beginning) -> Float[Array, ""]:
        """Compute the log density of a given beginning."""

    @abc.abstractmethod
    def kernels(self, context: Any, parameters: Float[Array, " parameters"]) -> AbstractBackward:
        """Return the kernels for these parameters and this observation."""

    @abc.abstractmethod
    def physics_of(self, problem: Problem, parameters: Float[Array, " parameters"]) -> PhysicsProcess:
        """Return the physics of these parameters."""

    @abc.abstractmethod
    def parts(self, context: Any, z: Float[Array, " dim"]) -> tuple[Beginning, Float[Array, "times dim"]]:
        """Cut a latent vector into what stands at the beginning and the path from there."""

    @abc.abstractmethod
    def join(self, parameters: Float[Array, " parameters"], path: Float[Array, "times dim"]) -> Float[Array, " dim"]:
        """Invert `parts`."""

    @abc.abstractmethod
    def meets(self, context: Any, begun: Beginning) -> Bool[Array, ""]:
        """Say whether a path starts where this observation has it."""

    @abc.abstractmethod
    def features(self, target: Target) -> Float[Array, " features"]:
        """Standardise what is known of an end, to tell a far one by."""

    def propose(self, key, context):
        """Draw the beginning and a path that leads to it; compute ``log_q``."""
        for_start, for_path = jax.random.split(key)
        begun, log_start = self.begin(for_start, context)
        path, log_q = draw_path(for_path, self.kernels(context, begun.parameters), begun.end, self.num_steps)
        return self.join(begun.parameters, path), log_start + log_q

    def log_q(self, key, context, z):
        """Compute the ``log_q`` of a given path; minus infinity where it misses a known end."""
        begun, path = self.parts(context, z)
        kernels = self.kernels(context, begun.parameters)
        log_q = self.log_begin(key, context, begun) + log_path(kernels, path)
        return jnp.where(self.meets(context, begun), log_q, -jnp.inf)


class PathProposal(AbstractPaths):
    """Paths drawn backwards from what is known of their end.

    Args:
        backward: the kernels.
        site: the observed site that the kernels start from: a Gaussian observation of the last state, whose noise is
            one more step of the process (`scoreinfer.process.physics.add_noise_stage`); or `END_STATE`.
        num_steps: number of kernels from the end that is known to the beginning.

    Exactness: ``log_q`` is the exact log density of the path (given its end, where that is known), so weighting by
        log p(path, y) - log_q is exact whatever the kernels are.
    """

    backward: AbstractBackward
    num_steps: int = eqx.field(static=True)
    site: str = eqx.field(static=True)

    def context(self, target: Target) -> Float[Array, " dim"]:
        """Return where the kernels start."""
        return self.backward.process.flatten(target.y[self.site].astype(jnp.result_type(float)))

    def begin(self, key, context):
        """Return where the kernels start, and zero: nothing is drawn."""
        return Beginning(context[:0], context), jnp.zeros((), context.dtype)

    def log_begin(self, key, context, begun):
        """Return zero: nothing is drawn."""
        return jnp.zeros((), context.dtype)

    def kernels(self, context, parameters):
        """Return the kernels, which are the same for every end."""
        return self.backward

    def physics_of(self, problem, parameters):
        """Return the physics, in which everything is known."""
        return self.backward.process

    def parts(self, context, z):
        """Cut a latent vector into what stands at the beginning and the path from there."""
        path = self.backward.process.flatten(z.reshape(-1, *self.backward.process.shape))
        if self.site != END_STATE:
            path = jnp.concatenate([path, context[None]])
        return Beginning(path[-1, :0], path[-1]), path

    def join(self, parameters, path):
        """Invert `parts`; the noise of an observation is no state."""
        states = self.backward.process.unflatten(path)
        return (states if self.site == END_STATE else states[:-1]).reshape(-1)

    def meets(self, context, begun):
        """Say whether a path starts where this observation has it."""
        return _close(begun.end, context)

    def features(self, target):
        """Standardise the end."""
        assert isinstance(self.backward, LearnedBackward)
        end = self.backward.frame.standardise(self.num_steps - 1, self.context(target))
        return end.astype(jnp.float32)


PARAMETERS = "unknown parameters"
"""Name under which they stand beside observed sites among the conditions of kernels; no site is called so."""


def layout_conditions(standardiser: Standardiser, conditions: Sites) -> Context:
    """Lay out encoded conditions as kernels see them: standardised, parameters first."""
    seen = standardiser(conditions)
    parameters = {name: seen.pop(name) for name in (PARAMETERS,) if name in seen}
    return jnp.concatenate([flatten(parameters), flatten(seen)])


class Given(NamedTuple):
    """What one observation means to `StartedPaths`.

    Args:
        start: to the start.
        end: where the kernels start, where that is known.
        conditions: what kernels are conditioned on besides parameters, encoded.
    """

    start: Any
    end: Float[Array, " dim"] | None
    conditions: Sites


class StartedPaths(AbstractPaths):
    """Paths drawn backwards once a learned sampler has drawn what has to be known before: parameters, last state.

    For unknown parameters of the physics, for whatever is observed of the last state (parts of it, functions of it),
    and for observations of earlier states. The kernels are conditioned on the parameters drawn, and on the observation
    where that sees earlier states.

    Args:
        start: the learned sampler of the parameters and, unless ``site`` says it, the last state (see `beginning`).
        backward: the kernels.
        standardiser: the scale of the kernels' conditions; it knows those that matter, and no others.
        site: the site that the kernels start from, as for `PathProposal`; None: from a last state drawn by ``start``.
        unknowns: the parts of a latent vector.
        num_steps: number of kernels from where they start to the beginning.

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
        """Whether kernels are conditioned on the observation, which sees earlier states."""
        return bool(self.standardiser.centre.keys() - {PARAMETERS})

    def context(self, target: Target) -> Given:
        """Embed one observation."""
        y, process = target.y, self.backward.process
        end = None if self.site is None else process.flatten(y[self.site].astype(jnp.result_type(float)))
        start = self.start.embed(self._seen_by_start(target))
        return Given(start, end, encode(target.problem, y) if self.sees_path else {})

    def _seen_by_start(self, target: Target) -> Sites:
        known = self.site == END_STATE
        seen = {END_STATE: target.y[END_STATE]} if known else encode(target.problem, target.y)
        return self.start.standardiser(seen)

    def begin(self, key, context):
        """Draw parameters, and the last state where it is not known; compute their log density."""
        drawn, log_start = self.start.propose(key, context.start)
        parameters, end = jnp.split(drawn, [self.unknowns.num_parameters])
        return Beginning(parameters, end if context.end is None else context.end), log_start

    def log_begin(self, key, context, begun):
        """Compute the log density of given parameters and last state."""
        drawn = begun.parameters if context.end is not None else jnp.concatenate(begun)
        return self.start.log_q(key, context.start, drawn)

    def kernels(self, context, parameters):
        """Condition the kernels on parameters, and on the observation where it sees earlier states."""
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
        """Cut a latent vector into what stands at the beginning and the path from there."""
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
        """Say whether a path starts where this observation has it."""
        return jnp.array(True) if context.end is None else _close(begun.end, context.end)

    def features(self, target):
        """Standardise what the start sees of the observation."""
        return flatten(self._seen_by_start(target))


class KnownEnd(AbstractReference):
    """Simulated paths whose last state is put where it is known to be.

    Args:
        paths: the sampler of such paths.
        target: the posterior of paths to the known end.

    Exactness: normalised: the density is that of the earlier states alone.
    """

    paths: AbstractPaths
    target: Target

    def sample(self, key):
        """Simulate a path, and put its last state in its place."""
        simulate = self.target.problem.simulate
        assert simulate is not None
        begun, path = self.paths.parts(self.paths.context(self.target), simulate(key)[0])
        end = self.paths.backward.process.flatten(self.target.y[END_STATE].astype(path.dtype))
        return self.paths.join(begun.parameters, path.at[-1].set(end))

    def log_density(self, z):
        """Compute the log density of the earlier states."""
        begun, path = self.paths.parts(self.paths.context(self.target), z)
        physics, last = self.paths.physics_of(self.target.problem, begun.parameters), path.shape[0] - 2
        step = Kernel(physics.forward(last, path[-2]), physics.scale[last])
        return self.target.problem.log_prior(z) - step.log_density(path[-1])


def _close(end: Float[Array, " dim"], known: Float[Array, " dim"]) -> Bool[Array, ""]:
    return jnp.allclose(end, known, rtol=1e-4, atol=1e-5)


def beginning(problem: Problem, process: PhysicsProcess, physics: str, site: str | None) -> Problem:
    """Make the problem of what `StartedPaths` draws first; it can be simulated and has no density.

    Args:
        problem: the problem of parameters and paths.
        process: the physics.
        physics: name of the physics site.
        site: what the kernels start from: None, an observed site, or `END_STATE`, then observed in place of all else.
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
        raise ValueError("The beginning of a path drawn backwards has no density of its own here.")

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
    """Make the problem of paths whose last state is known, from that of paths (and parameters).

    Its "likelihood" is one: the density of the path at its known end is all there is, and the evidence is the density
    of the process at that end.
    """
    return dataclasses.replace(
        problem, observed=(), log_likelihood=lambda z, y: jnp.zeros((), z.dtype), recipe=partial(pinned, problem)
    )
