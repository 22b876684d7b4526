"""How good a trained proposal is: the effective share of its exact weights on held-out observations.

Training asks this judge when to stop, and it chooses the number of sampler steps. Tuned proposals fit themselves to
their own draws, so that their shares may be large although they miss a mode. They are also judged by the parameters
that the observations were simulated with, which are draws of the posteriors.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._memory import each
from scoreinfer._program import over_devices
from scoreinfer._typing import Key, Sites
from scoreinfer.montecarlo.weights import log_effective_share, log_mean_weight
from scoreinfer.problem import Problem
from scoreinfer.samplers.amortised import AbstractAmortised, AmortisedProposal, Context
from scoreinfer.samplers.base import bounded_target
from scoreinfer.samplers.diffusion import ProbabilityFlow
from scoreinfer.samplers.tuned import TunedProposal

NUM_OBSERVATIONS, NUM_DRAWS = 32, 64
"""Held-out observations, and draws for each. Chosen by judgement: the share varies by a few percent."""
TOGETHER = 8
"""Observations that are judged at once; bounds the memory. Chosen by judgement."""
FEWER_STEPS = (16, 8, 4, 2, 1)
"""Numbers of flow steps to choose from."""
FAR, MAX_MISSED = 20.0, 0.1
"""A truth is missed if its relative weight is more than `FAR` times the inverse share; largest share of missed truths.
The mean relative weight of truths is the inverse share, so that at most 1 / `FAR` of them look missed by chance
(Markov's inequality)."""
KEPT = 0.95
"""Share of the best effective share that fewer steps must keep. Chosen by judgement."""


class Judge(NamedTuple):
    """The judge of one training: it always uses the same observations and the same random numbers.

    Args:
        key: random key of the draws.
        problem: the problem; it must have a density.
        y: held-out observations, drawn from the model.
        num: number of these observations.
        z: the parameters that they were simulated with.
    """

    key: Key
    problem: Problem
    y: Sites
    num: int
    z: Float[Array, "num dim"]

    def tuned_share(self, proposal: TunedProposal) -> float:
        """Estimate the share as `share` does; zero if the proposal misses more than a tenth of the true parameters."""
        share, missed = _typical_share(self, proposal, None, True)
        return float(share) if missed <= MAX_MISSED else 0.0

    def share(self, proposal: AmortisedProposal) -> float:
        """Estimate the effective share of exact weights of a typical observation: the geometric mean of all shares."""
        flow, num_steps = proposal.sampler, None
        if isinstance(flow, ProbabilityFlow) and flow.num_steps <= FEWER_STEPS[0]:  # all such flows share one program
            num_steps = np.array(flow.num_steps)
            proposal = dataclasses.replace(proposal, sampler=dataclasses.replace(flow, num_steps=FEWER_STEPS[0]))
        return float(_typical_share(self, proposal, num_steps, False)[0])

    def fewest_steps(self, proposal: AmortisedProposal) -> AmortisedProposal:
        """Choose the fewest steps of a probability flow that keep 95 % of the largest share.

        Exactness: as for the proposal. The choice depends on other observations than those that are drawn for.
        """
        flow = proposal.sampler
        if not isinstance(flow, ProbabilityFlow):
            return proposal
        chosen, best = flow, 0.0
        for number in FEWER_STEPS:
            fewer = dataclasses.replace(flow, num_steps=number)
            share = self.share(dataclasses.replace(proposal, sampler=fewer))
            if share < KEPT * best:
                break
            chosen, best = fewer, max(best, share)
        return dataclasses.replace(proposal, sampler=chosen)


@over_devices
def _typical_share(
    judge: Judge, proposal: AbstractAmortised, num_steps: Int[Array | np.ndarray, ""] | None, with_truths: bool
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    def log_share(given: tuple[Key, Sites, Float[Array, " dim"]]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        key, y, truth = given
        target = bounded_target(judge.problem, y)
        context = proposal.context(target)

        def log_weight(key: Key) -> Float[Array, ""]:
            if num_steps is None:
                z, log_q = proposal.propose(key, context)
            else:
                assert isinstance(proposal, AmortisedProposal)
                z, log_q = _propose_in(num_steps, key, proposal, context)
            value = target(z) - log_q
            return jnp.where(jnp.isnan(value), -jnp.inf, value)

        log_weights = each(log_weight, target)(jax.random.split(key, NUM_DRAWS))
        value = log_effective_share(log_weights)
        value = jnp.where(jnp.isfinite(value), value, -jnp.log(NUM_DRAWS))
        if not with_truths:
            return value, jnp.zeros_like(value)
        excess = target(truth) - proposal.log_q(key, context, truth) - log_mean_weight(log_weights)
        return value, jnp.where(excess + value < jnp.log(FAR), 0.0, 1.0)

    given = (jax.random.split(judge.key, judge.num), judge.y, judge.z)
    values, missed = jax.lax.map(log_share, given, batch_size=min(TOGETHER, judge.num))
    return jnp.exp(values.mean()), missed.mean()


def _propose_in(
    num_steps: Int[Array | np.ndarray, ""], key: Key, proposal: AmortisedProposal, context: Context
) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
    """Draw z in a number of flow steps that the compiled program does not fix, and compute its ``log_q``."""
    flow, (affine, features) = proposal.sampler, context
    assert isinstance(flow, ProbabilityFlow)
    times = jnp.maximum(1.0 - jnp.arange(flow.num_steps + 1) / num_steps, 0.0)
    angles = jnp.arctan(jax.vmap(flow.process.schedule.level)(times)).astype(jnp.float32)
    u, log_q = flow.sample_along(key, proposal.score, affine.mean.size, features, angles)
    return affine.forward(u), log_q - affine.log_det(u)
