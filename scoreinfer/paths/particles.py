r"""Particles: many paths drawn backwards at a time, resampled on the way, one of them kept.

Where the weights of whole paths are poor, because small errors of many kernels add up, particles that drift from what
is likely are replaced by copies of better ones before the path is complete. They are steered by the bridging densities

    gamma_k = q(theta, x_N) prod_{j >= k} p^_j(x_j | c_j) f_j(x_{j+1} | x_j; theta) / p^_j(x_{j+1} | c_j),
    gamma_0 = p(path, theta, y),

f_j the transitions of the process at the particle's own unknown parameters theta, and p^_j Gaussians with the moments
of simulated states, given the parameters and what the observation says of x_j beyond x_{j+1} (c_j, see
`scoreinfer.paths.linear_frame`). By Bayes' formula the factors stand for p(x_j | x_{j+1}, theta, y), so that
observations of earlier states need no likelihood on the way; without such, all p^ but the first and last cancel.
Whatever they are, the last target is the model's own density, so that the product Z of the mean weights between
resamplings is an unbiased estimate of the evidence, and the path kept (with its parameters), with weight Z, is exact in
the same sense as a path with its own weight. Given a path, a run in which that path is one of the particles
(conditional SMC) draws the rest of the run anew: a Gibbs step, with the weight Z that goes with it. So chains alternate
exactly between both.

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
"""Effective share of the particles below which they are resampled."""


class ResampledPaths(AbstractProposal):
    """Paths of a particle smoother that runs backwards; an independent run for each draw.

    Args:
        paths: the sampler of single paths.
        num_particles: particles of each run.

    Raises:
        ValueError: where the kernels are not learned ones, or nobody has asked for the moments of the states.

    Exactness: the weight of a path is the evidence Z of the run that it was drawn in, or (for a given path) of a
        conditional run: weights are proper over runs, their mean an unbiased estimate of the evidence, whatever the
        kernels and bridging densities are.

    Good values: as many particles as make the effective share of the draws a half; it costs as many paths a draw.
        Conditions are in the bridging densities where at least `scoreinfer.paths.frame.ENOUGH_PATHS` simulations,
        and no more conditions than `scoreinfer.paths.frame.MAX_CONTEXT`, make a regression of it; elsewhere
        resampling does not help kernels that are conditioned on earlier observations.
    """

    paths: AbstractPaths
    num_particles: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Check that there are bridging densities."""
        backward = self.paths.backward
        if not isinstance(backward, LearnedBackward) or backward.frame.before is None:
            raise ValueError(
                "Resampling along the path needs learned kernels whose frame has the moments of every state (see "
                f"`linear_frame`), got `{type(backward).__name__}`: use the plain weights."
            )

    def context(self, target: Target) -> Any:
        """Embed one observation."""
        return self.paths.context(target)

    def sample(self, key, target, context):
        """Draw a run and one path of it, with the evidence Z of the run as its weight."""
        for_run, for_pick = jax.random.split(key)
        z, log_weight, log_evidence = self._run(for_run, target, context, None)
        pick = jax.random.categorical(for_pick, log_weight)
        return Weighted(z[pick], log_evidence, target(z[pick]))

    def weigh(self, key, target, context, z):
        """Draw a run around a given path; infinite where the path misses a known end, which no run reaches."""
        log_weight = self._run(key, target, context, z)[2]
        meets = self.paths.meets(context, self.paths.parts(context, z)[0])
        return Weighted(z, jnp.where(meets, log_weight, jnp.inf), target(z))

    def _run(
        self, key: Key, target: Target, known: Any, given: Float[Array, " path"] | None
    ) -> tuple[Float[Array, "particles path"], Float[Array, " particles"], Float[Array, ""]]:
        """Draw all particles' paths with the weights since the last resampling, and log Z; the first may be given."""
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
        log_q: log density by which the state was drawn, given the later one; at the end of the path, the density by
            which it was drawn with the parameters.
        log_target: log of the factor that the state adds to the bridging density; log_q itself at the end of the path,
            and at its beginning, where the model's own density takes over.
    """

    x: Float[Array, " dim"]
    parameters: Float[Array, " parameters"]
    log_q: Float[Array, ""]
    log_target: Float[Array, ""]


class Backwards(AbstractFeynmanKac[BackwardState]):
    """Paths drawn backwards as a Feynman-Kac model: its time k is the step num_steps - k of the process.

    Args:
        num_steps: number of kernels from the end that is known to the beginning.
        paths: the sampler of single paths.
        problem: the problem of paths and parameters.
        known: the observation, as ``paths`` embeds it.

    Exactness: the potentials are bridging density over proposal density, so the loop is exact for gamma_1 b_0, b_0 the
        kernel of the first state. Whoever runs it multiplies by p(path, theta, y) / (gamma_1 b_0).
    """

    num_steps: int = eqx.field(static=True)
    paths: AbstractPaths
    problem: Problem = eqx.field(static=True)
    known: Any

    def initial(self, key):
        """Draw parameters, and the last state where it is not known."""
        begun, log_q = self.paths.begin(key, self.known)
        return BackwardState(begun.end, begun.parameters, log_q, log_q)

    def log_initial(self, first):
        """Return zero: the bridging density begins as what was drawn from."""
        return jnp.zeros_like(first.log_q)

    def propagate(self, key, k, old):
        """Draw the state before."""
        return self._before(k, old, lambda kernel: kernel.draw(key))

    def log_potential(self, k, old, new):
        """Compute the gain of the bridging density over the proposal."""
        return new.log_target - new.log_q

    def states_of(self, key: Key, z: Float[Array, " path"]) -> BackwardState:
        """Compute the states of a given path, times first; ``key`` serves the density of its end."""
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
        """Make the state before an old one from what ``draw`` takes from its kernel, with its log density."""
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
