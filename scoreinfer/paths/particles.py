r"""Particles: draw many paths backwards at the same time, resample them on the way, and keep one of them.

The weights of whole paths are poor if small errors of many kernels accumulate. Resampling replaces unlikely particles
by copies of better ones before the path is complete. Particles are weighed by the bridging densities

    gamma_k = q(theta, x_N) prod_{j >= k} p^_j(x_j | c_j) f_j(x_{j+1} | x_j; theta) / p^_j(x_{j+1} | c_j),
    gamma_0 = p(path, theta, y).

- f_j are the transitions of the process, at the particle's unknown parameters theta.
- p^_j are Gaussians with the moments of simulated states, given c_j: the parameters, and the information of the
  observation on x_j that x_{j+1} does not contain (see `scoreinfer.paths.linear_frame`).

By Bayes' formula the factors approximate p(x_j | x_{j+1}, theta, y). Observations of earlier states therefore need no
likelihood factors on the way. Without such observations all p^ except the first and the last cancel.

Exactness: for any bridging densities, the last target is the model's density. The product Z of the mean weights
between resamplings is therefore an unbiased estimate of the evidence. The kept path (with its parameters) with weight Z
is exact in the same sense as a path with its own weight. For a given path, conditional SMC draws the rest of the run
around it. This is a Gibbs step and gives the weight Z of the given path. Chains may alternate between both.

References: Del Moral, Doucet and Jasra 2006 (bridging densities); Andrieu, Doucet and Holenstein 2010, sections 4.2
(particle independent Metropolis-Hastings) and 4.5 (conditional SMC).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.montecarlo.feynman_kac import AbstractFeynmanKac, run, trace_back
from scoreinfer.paths import Kernel, LearnedBackward
from scoreinfer.paths.proposal import AbstractPaths
from scoreinfer.problem import Problem
from scoreinfer.process import PhysicsProcess
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted

LEAST_SHARE = 0.5
"""ESS/N of the particles below which they are resampled. Chosen by judgement."""


class ResampledPaths(AbstractProposal):
    """Paths of a particle smoother that runs backwards, with an independent run for each draw.

    Args:
        paths: the sampler of single paths.
        num_particles: particles per run.

    Raises:
        ValueError: if the kernels are not learned ones, or their frame has no moments of the states.

    Exactness: the weight of a drawn path is the evidence estimate Z of its run; the weight of a given path is that of a
        conditional run. For any kernels and bridging densities these weights are proper, and their mean is an unbiased
        estimate of the evidence.

    Good values: increase the number of particles until ESS/N of the draws is a half; a draw costs this number of paths.
        Bridging densities contain the conditions of the kernels only if there are at least
        `scoreinfer.paths.frame.ENOUGH_PATHS` simulations and at most `scoreinfer.paths.frame.MAX_CONTEXT` conditions.
        Otherwise resampling does not help kernels that are conditioned on observations of earlier states.
    """

    paths: AbstractPaths
    num_particles: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Check that the frame has the moments for the bridging densities."""
        backward = self.paths.backward
        if not isinstance(backward, LearnedBackward) or backward.frame.before is None:
            raise ValueError(
                "Resampling along the path needs learned kernels whose frame has the moments of every state (see "
                f"`linear_frame`), got a `{type(backward).__name__}` without them. Use the weights of single paths."
            )

    def context(self, target: Target) -> Any:
        """Compute the context of the single paths for one observation."""
        return self.paths.context(target)

    def sample(self, key, target, context):
        """Draw a run and one path of it. Its weight is the evidence estimate Z of the run."""
        for_run, for_pick = jax.random.split(key)
        z, log_weight, log_evidence = self._run(for_run, target, context, None)
        pick = jax.random.categorical(for_pick, log_weight)
        return Weighted(z[pick], log_evidence, target(z[pick]))

    def weigh(self, key, target, context, z):
        """Draw a run around a given path; the weight is Z, or infinite if the path misses a known end (q is zero)."""
        log_weight = self._run(key, target, context, z)[2]
        meets = self.paths.meets(context, self.paths.parts(context, z)[0])
        return Weighted(z, jnp.where(meets, log_weight, jnp.inf), target(z))

    def _run(
        self, key: Key, target: Target, known: Any, given: Float[Array, " path"] | None
    ) -> tuple[Float[Array, "particles path"], Float[Array, " particles"], Float[Array, ""]]:
        """Draw the paths of all particles, their weights since the last resampling, and log Z.

        If ``given`` is not None, it is the path of the first particle.
        """
        for_given, for_run = jax.random.split(key)
        model = Backwards(self.paths.num_steps, self.paths, target.problem, known)
        reference = None if given is None else model.states_of(for_given, given)
        found = run(for_run, model, self.num_particles, reference, least_share=LEAST_SHARE)
        traced = trace_back(found)
        z = jax.vmap(self.paths.join)(traced.parameters[:, -1], traced.x[:, ::-1])
        last = found.last.weighed(jax.vmap(target)(z) - traced.log_target.sum(axis=1))
        return z, last.log_weight, last.log_evidence


class BackwardState(NamedTuple):
    """A state of a path that is drawn backwards.

    Args:
        x: the state.
        parameters: the unknown parameters of the whole path.
        log_q: log proposal density of the state, given the later one; at the end of the path, that of end and
            parameters.
        log_target: log of the state's factor of the bridging density. It equals ``log_q`` for the last state, and for
            the first state, whose target is the model's density.
    """

    x: Float[Array, " dim"]
    parameters: Float[Array, " parameters"]
    log_q: Float[Array, ""]
    log_target: Float[Array, ""]


class Backwards(AbstractFeynmanKac[BackwardState]):
    """Paths drawn backwards as a Feynman-Kac model, whose time k is the step num_steps - k of the process.

    Args:
        num_steps: number of kernels from the start of the kernels to the first state.
        paths: the sampler of single paths.
        problem: the problem of paths and parameters.
        known: the context of ``paths`` for the observation.

    Exactness: a potential is the factor of the bridging density divided by the proposal density. A run is therefore
        exact for gamma_1 b_0, with b_0 the kernel of the first state. The caller must multiply the last weights by
        p(path, theta, y) / (gamma_1 b_0).
    """

    num_steps: int = eqx.field(static=True)
    paths: AbstractPaths
    problem: Problem = eqx.field(static=True)
    known: Any

    def initial(self, key):
        """Draw the parameters, and the last state if it is not known."""
        begun, log_q = self.paths.begin(key, self.known)
        return BackwardState(begun.end, begun.parameters, log_q, log_q)

    def log_initial(self, first):
        """Return zero, because the first bridging density equals the proposal density."""
        return jnp.zeros_like(first.log_q)

    def propagate(self, key, k, old):
        """Draw the state before ``old``."""
        return self._before(k, old, lambda kernel: kernel.draw(key))

    def log_potential(self, k, old, new):
        """Compute the log of the bridging density's factor divided by the proposal density."""
        return new.log_target - new.log_q

    def states_of(self, key: Key, z: Float[Array, " path"]) -> BackwardState:
        """Compute the states of a given path from its end; ``key`` is for the density of the end."""
        begun, path = self.paths.parts(self.known, z)
        log_q = self.paths.log_begin(key, self.known, begun)
        first = BackwardState(begun.end, begun.parameters, log_q, log_q)

        def state(inputs: tuple[Array, Array, Array]) -> BackwardState:
            k, later, x = inputs
            return self._before(k, first._replace(x=later), lambda kernel: (x, kernel.log_density(x)))

        backwards = path[::-1]
        rest = jax.lax.map(state, (jnp.arange(1, self.num_steps + 1), backwards[:-1], backwards[1:]))
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

    def _before(
        self, k: Int[Array, ""], old: BackwardState, draw: Callable[[Kernel], tuple[Array, Array]]
    ) -> BackwardState:
        """Make the state before ``old``; ``draw`` returns it and its log density, given its kernel."""
        backward, j = self.paths.kernels(self.known, old.parameters), self.num_steps - k
        assert isinstance(backward, LearnedBackward)
        x, log_q = draw(backward(j, old.x))
        bridge = _bridge(backward, self.paths.physics_of(self.problem, old.parameters), j, x, old.x)
        return BackwardState(x, old.parameters, log_q, jnp.where(j == 0, log_q, bridge))


def _bridge(
    backward: LearnedBackward,
    physics: PhysicsProcess,
    k: Int[Array, ""],
    x: Float[Array, " dim"],
    later: Float[Array, " dim"],
) -> Float[Array, ""]:
    """Compute log p^_k(x_k | c) + log f_k(x_{k+1} | x_k) - log p^_k(x_{k+1} | c)."""
    transition = Kernel(physics.forward(k, x), physics.scale[k]).log_density(later)
    before, after, context = backward.frame.before, backward.frame.after, backward.context
    assert before is not None
    assert after is not None
    return before.log_density(k, x, context) + transition - after.log_density(k, later, context)
