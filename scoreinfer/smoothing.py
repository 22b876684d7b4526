"""Smoothing: draws of whole paths given how they ended, as proposals that the model's own density weighs.

The latent vector of the problem is the whole path, so that weights, evidence, certificates and chains are those of
any other proposal: log w = log p(path, y) - log q(path | y), log q the sum of the backward kernels' and the start's.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites
from scoreinfer.backward import AbstractBackward, draw_path, log_path
from scoreinfer.problem import Problem, Site
from scoreinfer.process import PhysicsProcess
from scoreinfer.proposal import Proposal

END_STATE = "end_state"
"""Name under which an exactly known last state stands among the observed sites."""


class PathProposal(eqx.Module):
    """Paths drawn backwards from what is known of their end.

    Args:
        backward: the kernels.
        site: the observed site that the kernels start from: a Gaussian observation of the last state, whose noise is
            one more step of the process (`scoreinfer.process.physics.add_noise_stage`); or `END_STATE`.
        problem: the problem, whose latent vector is the path; for `END_STATE` see `pinned`.

    Exactness: ``log_q`` is the exact log density of the path (given its end, where that is known), so weighting by
        log p(path, y) - log_q is exact whatever the kernels are.
    """

    backward: AbstractBackward
    site: str = eqx.field(static=True)
    problem: Problem = eqx.field(static=True)

    @property
    def num_steps(self) -> int:
        """Number of kernels from the end that is known to the beginning."""
        return self.problem.dim // self.backward.process.dim - (self.site == END_STATE)

    def context(self, y: Sites) -> Float[Array, " dim"]:
        """Return where the kernels start."""
        return self.backward.process.flatten(y[self.site].astype(jnp.result_type(float)))

    def propose(self, key: Key, context: Any) -> tuple[Float[Array, " path"], Float[Array, ""]]:
        """Draw one path and compute its ``log_q``."""
        path, log_q = draw_path(key, self.backward, context, self.num_steps)
        return self.backward.process.unflatten(path).reshape(-1)[: self.problem.dim], log_q

    def log_q(self, key: Key, context: Any, z: Float[Array, " path"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given path; minus infinity where it does not end at a known end."""
        path = self.backward.process.flatten(z.reshape(-1, *self.backward.process.shape))
        if self.site != END_STATE:
            return log_path(self.backward, jnp.concatenate([path, context[None]]))
        return jnp.where(jnp.allclose(path[-1], context, rtol=1e-4, atol=1e-5), log_path(self.backward, path), -jnp.inf)


class StartedPaths(eqx.Module):
    """Paths drawn backwards from a last state that is itself drawn for the observation, by a learned sampler.

    For whatever is observed of the last state: parts of it, functions of it. Observations of earlier states enter by
    the weights alone.

    Args:
        start: the learned sampler of the last state's components (see `last_state`).
        backward: the kernels.
        problem: the problem, whose latent vector is the path.

    Exactness: as for `PathProposal`.
    """

    start: Proposal
    backward: AbstractBackward
    problem: Problem = eqx.field(static=True)

    @property
    def num_steps(self) -> int:
        """Number of kernels from the last state to the beginning."""
        return self.backward.process.num_steps

    def context(self, y: Sites) -> Any:
        """Embed one observation."""
        return self.start.context(y)

    def propose(self, key: Key, context: Any) -> tuple[Float[Array, " path"], Float[Array, ""]]:
        """Draw a last state and a path that leads to it; compute ``log_q``."""
        for_end, for_path = jax.random.split(key)
        end, log_start = self.start.propose(for_end, context)
        path, log_q = draw_path(for_path, self.backward, end)
        return self.backward.process.unflatten(path).reshape(-1), log_start + log_q

    def log_q(self, key: Key, context: Any, z: Float[Array, " path"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given path."""
        path = self.backward.process.flatten(z.reshape(-1, *self.backward.process.shape))
        return self.start.log_q(key, context, path[-1]) + log_path(self.backward, path)


def last_state(problem: Problem, process: PhysicsProcess) -> Problem:
    """Make the problem of the last state alone, in components; it can be simulated and has no density."""
    assert problem.simulate is not None
    simulate = problem.simulate

    def simulate_last(key: Key) -> tuple[Float[Array, " dim"], Sites]:
        z, y = simulate(key)
        return process.flatten(z.reshape(-1, *process.shape)[-1]), y

    def no_density(z: Float[Array, " dim"], *_: Any) -> Float[Array, ""]:
        raise ValueError("The last state of a process has no density of its own here.")

    sites = lambda z: {END_STATE: process.unflatten(z)}  # noqa: E731
    return Problem(
        dim=process.dim,
        latents=(Site(END_STATE, process.shape, "float32", "real", process.dim),),
        observed=problem.observed,
        log_prior=no_density,
        log_likelihood=no_density,
        constrain=sites,
        latent_sites=sites,
        unconstrain=lambda values: process.flatten(values[END_STATE]),
        simulate=simulate_last,
        simulate_observation=None,
        encode=problem.encode,
        read=problem.read,
        has_density=False,
    )


def pinned(problem: Problem) -> Problem:
    """Make the problem of paths whose last state is known, from the problem of paths alone.

    Its "likelihood" is one: the density of the path at its known end is all there is, and the evidence is the density
    of the process at that end.
    """
    return dataclasses.replace(problem, observed=(), log_likelihood=lambda z, y: jnp.zeros((), z.dtype))
