"""Twisted particles: draws of prior times likelihood from a guided reverse SDE, resampled on the way, exactly weighted.

With p_k the kernels of the prior's reverse SDE, q_k those of a guided score and psi_k its twist, the particles have the
potentials

    p_k(x_(k-1) | x_k) psi_(k-1)(x_(k-1)) / (q_k(x_(k-1) | x_k) psi_k(x_k)),        psi_0 = p(y | x_0).

The twists cancel over a whole path. One particle alone therefore has the *path weight* p(y | x_0) prod_k p_k / q_k:
this is importance sampling along the path. Resampling helps where those weights are uneven.

Two targets can be met exactly, whatever the score, trained or untrained:

- the *discretised* learned prior times the likelihood (`TwistedNoise`): draws are the noise of the prior's kernels;
- a density p(x_0, y) that can be computed (`Twisted`): the path is extended by forward noising F_k, and the last
  weights are multiplied by p(x_0, y) prod_k F_k / (p(y | x_0) prod_k p_k), near one for a good score and enough steps.

References: Wu et al. 2023, arXiv 2306.17775 (the twisted diffusion sampler); Sohl-Dickstein et al. 2015, arXiv
1503.03585, section 2.5 (the product with any r(x)); Andrieu, Doucet and Holenstein 2010, JRSS B 72(3), section 4.5.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.bijections.affine import Affine
from scoreinfer.montecarlo.feynman_kac import AbstractFeynmanKac, run, trace_back
from scoreinfer.montecarlo.population import Population
from scoreinfer.process import Noising
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted
from scoreinfer.samplers.diffusion import log_normal
from scoreinfer.samplers.reverse import DiscretisedPrior, StepKernel, levels_of, start_kernel, step_kernel
from scoreinfer.score.guidance import AbstractGuidance, Guided

State = Float[Array, " dim"]
Scalar = Float[Array, ""]


class NoisyState(NamedTuple):
    """A state on the way down.

    Args:
        x: the state.
        guided: moments of x_0, before and after the observation, and the twist.
        log_p: log density of the prior's kernel that leads here.
        log_q: log density of the guided kernel.
        noise: the noise with which the prior's kernel leads here.
    """

    x: State
    guided: Guided
    log_p: Scalar
    log_q: Scalar
    noise: State


class Downwards(AbstractFeynmanKac[NoisyState]):
    """The guided reverse SDE as a Feynman-Kac model, whose time k is the k-th level from above.

    Args:
        num_steps: number of steps.
        guidance: the guided score.
        levels: noise levels, from the highest to zero.
        dim: number of components of x.
    """

    num_steps: int = eqx.field(static=True)
    guidance: AbstractGuidance
    levels: Float[Array, " levels"]
    dim: int = eqx.field(static=True)

    def initial(self, key):
        """Draw the state at the highest level."""
        p, q = self._start()
        return self._state(jnp.array(0), q.draw(key), p, q)

    def log_initial(self, first):
        """Compute log p psi / q."""
        return first.log_p - first.log_q + first.guided.log_twist

    def propagate(self, key, k, old):
        """Draw the state at the next lower level."""
        p, q = self._kernels(k, old)
        return self._state(k, q.draw(key), p, q)

    def log_potential(self, k, old, new):
        """Compute log p psi' / (q psi)."""
        return new.log_p - new.log_q + new.guided.log_twist - old.guided.log_twist

    def states_of(self, path: Float[Array, "levels dim"]) -> NoisyState:
        """Compute the states of a given path, the highest level first."""
        first = self._state(jnp.array(0), path[0], *self._start())

        def step(old: NoisyState, inputs: tuple[Int[Array, ""], State]) -> tuple[NoisyState, NoisyState]:
            k, x = inputs
            new = self._state(k, x, *self._kernels(k, old))
            return new, new

        rest = jax.lax.scan(step, first, (jnp.arange(1, self.num_steps + 1), path[1:]))[1]
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

    def _start(self) -> tuple[StepKernel, StepKernel]:
        level = self.levels[0]
        guided = self.guidance.guide(level, jnp.zeros(self.dim, level.dtype))
        return start_kernel(guided.prior, level), start_kernel(guided.posterior, level)

    def _kernels(self, k: Int[Array, ""], old: NoisyState) -> tuple[StepKernel, StepKernel]:
        level, target = self.levels[k - 1], self.levels[k]
        p, q = (step_kernel(part, old.x, level, target) for part in (old.guided.prior, old.guided.posterior))
        return p, q

    def _state(self, k: Int[Array, ""], x: State, p: StepKernel, q: StepKernel) -> NoisyState:
        guided = self.guidance.guide(jnp.maximum(self.levels[k], self.levels[-2]), x)  # at zero only psi_0 is used
        exact = self.guidance.likelihood.log_density(x)
        log_twist = jnp.where(k == self.num_steps, exact, guided.log_twist)
        return NoisyState(x, guided._replace(log_twist=log_twist), p.log_density(x), q.log_density(x), p.noise(x))


class AbstractTwisted(AbstractProposal):
    """Runs of twisted particles, one for each draw.

    The weight of a draw is the evidence estimate of its run; one particle is picked by weight.
    """

    guidance: eqx.AbstractVar[AbstractGuidance]
    process: eqx.AbstractVar[Noising]
    dim: eqx.AbstractVar[int]
    num_steps: eqx.AbstractVar[int]
    num_particles: eqx.AbstractVar[int]

    def context(self, target: Target) -> None:
        """Return nothing: the likelihood holds the observation."""

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the score per draw."""
        return self.num_particles * (self.num_steps + 1)

    def _run(self, key: Key, path: Float[Array, "levels dim"] | None) -> tuple[NoisyState, Population]:
        """Draw a run, around a given path or none; return whole paths and the last particles."""
        model = Downwards(self.num_steps, self.guidance, levels_of(self.process, self.num_steps), self.dim)
        reference = None if path is None else model.states_of(path)
        found = run(key, model, self.num_particles, reference)
        return trace_back(found), found.last


class Twisted(AbstractTwisted):
    """Twisted particles for a target density that can be computed: p(x, y), x the unknowns.

    Args:
        guidance: the guided score, of v, where x = change(v).
        process: the noising process, for its levels.
        change: from the units of the score to those of the target.
        dim: number of components of x.
        num_steps: number of steps.
        num_particles: particles in the run of one draw; 1 means path weights without resampling.

    Exactness: exact for any score: the weights are proper for the target, and their mean is an unbiased estimate of the
        evidence. The weight of a given x uses a path of forward noising and a conditional run, a Gibbs step.

    Good values: 64 steps. One particle for up to about 20 observed directions; more where ESS/N of the draws is poor.
    """

    guidance: AbstractGuidance
    process: Noising
    change: Affine
    dim: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_particles: int = eqx.field(static=True)

    def sample(self, key, target, context):
        """Draw a run and one particle of it, weighted by the evidence estimate."""
        for_run, for_pick = jax.random.split(key)
        return self._weighted(for_pick, target, *self._run(for_run, None))

    def weigh(self, key, target, context, z):
        """Noise a given z up to the highest level, and run around this path."""
        for_path, for_run = jax.random.split(key)
        levels = levels_of(self.process, self.num_steps)
        start = self.change.inverse(z)
        rises = jnp.sqrt(levels[:-1] ** 2 - levels[1:] ** 2)[::-1]
        noise = rises[:, None] * jax.random.normal(for_path, (self.num_steps, self.dim), start.dtype)
        path = jnp.concatenate([start[None], start + jnp.cumsum(noise, axis=0)])[::-1]
        found = self._weighted(for_run, target, *self._run(for_run, path))
        return Weighted(z, found.log_weight, target(z))

    def _weighted(self, key: Key, target: Target, paths: NoisyState, last: Population) -> Weighted:
        levels = levels_of(self.process, self.num_steps)

        def correction(path: NoisyState) -> tuple[State, Scalar, Scalar]:
            v = path.x[-1]
            z, rises = self.change.forward(v), levels[:-1] ** 2 - levels[1:] ** 2
            log_target = target(z)
            log_forward = jax.vmap(log_normal)(path.x[:-1], path.x[1:], rises).sum()
            log_prior_path = path.log_p.sum() + path.guided.log_twist[-1]
            return z, log_target, log_target + self.change.log_det(v) + log_forward - log_prior_path

        z, log_target, log_ratio = jax.vmap(correction)(paths)
        last = last.weighed(log_ratio)
        pick = jax.random.categorical(key, last.log_weight)
        return Weighted(z[pick], last.log_evidence, log_target[pick])


class TwistedNoise(AbstractTwisted):
    """Twisted particles for the discretised learned prior times the likelihood.

    The unknowns are the noise of the prior's kernels, ``(num_steps + 1) dim`` standard normal numbers: the problem
    `scoreinfer.posterior.guided.discretised_problem`. `DiscretisedPrior.path` computes x from them.

    Args:
        guidance: the guided score.
        process: the noising process, for its levels.
        dim: number of components of x.
        num_steps: number of steps.
        num_particles: particles in the run of one draw; 1 means path weights without resampling.

    Exactness: exact for any score, with respect to the discretised prior of that score: the weights are proper, and
        their mean is an unbiased estimate of its evidence. It is not exact for the distribution that the score was
        learned from.
    """

    guidance: AbstractGuidance
    process: Noising
    dim: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_particles: int = eqx.field(static=True)

    @property
    def prior(self) -> DiscretisedPrior:
        """The discretised prior."""
        return DiscretisedPrior(self.guidance.prior, self.process, self.num_steps, self.dim)

    def sample(self, key, target, context):
        """Draw a run and one particle of it, weighted by the evidence estimate."""
        for_run, for_pick = jax.random.split(key)
        paths, last = self._run(for_run, None)
        pick = jax.random.categorical(for_pick, last.log_weight)
        z = paths.noise[pick].reshape(-1)
        return Weighted(z, last.log_evidence, target(z))

    def weigh(self, key, target, context, z):
        """Run around the path of a given noise."""
        path = self.prior.path(z.reshape(self.num_steps + 1, self.dim))
        return Weighted(z, self._run(key, path)[1].log_evidence, target(z))
