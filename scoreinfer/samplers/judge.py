"""How good a trained proposal is: the effective share of its exact weights on held-out observations.

Training asks this judge when to stop, and it chooses the number of sampler steps.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._memory import each
from scoreinfer._typing import Key, Sites
from scoreinfer.montecarlo.weights import log_effective_share
from scoreinfer.problem import Problem
from scoreinfer.samplers.amortised import AmortisedProposal, Context
from scoreinfer.samplers.base import bounded_target
from scoreinfer.samplers.diffusion import ProbabilityFlow

NUM_OBSERVATIONS, NUM_DRAWS = 32, 64
"""Held-out observations, and draws for each. Chosen by judgement: the share varies by a few percent."""
TOGETHER = 8
"""Observations that are judged at once; bounds the memory. Chosen by judgement."""
FEWER_STEPS = (16, 8, 4, 2, 1)
"""Numbers of flow steps to choose from."""
KEPT = 0.95
"""Share of the best effective share that fewer steps must keep. Chosen by judgement."""


class Judge(NamedTuple):
    """The judge of one training: it always uses the same observations and the same random numbers.

    Args:
        key: random key of the draws.
        problem: the problem; it must have a density.
        y: held-out observations, drawn from the model.
        num: number of these observations.
    """

    key: Key
    problem: Problem
    y: Sites
    num: int

    def share(self, proposal: AmortisedProposal) -> float:
        """Estimate the effective share of exact weights of a typical observation: the geometric mean of all shares."""
        flow, num_steps = proposal.sampler, None
        if isinstance(flow, ProbabilityFlow) and flow.num_steps <= FEWER_STEPS[0]:  # all such flows share one program
            num_steps = np.array(flow.num_steps)
            proposal = dataclasses.replace(proposal, sampler=dataclasses.replace(flow, num_steps=FEWER_STEPS[0]))
        return float(_typical_share(self, proposal, num_steps))

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


@eqx.filter_jit
def _typical_share(
    judge: Judge, proposal: AmortisedProposal, num_steps: Int[Array | np.ndarray, ""] | None
) -> Float[Array, ""]:
    def log_share(given: tuple[Key, Sites]) -> Float[Array, ""]:
        key, y = given
        target = bounded_target(judge.problem, y)
        context = proposal.context(target)

        def log_weight(key: Key) -> Float[Array, ""]:
            if num_steps is None:
                z, log_q = proposal.propose(key, context)
            else:
                z, log_q = _propose_in(num_steps, key, proposal, context)
            value = target(z) - log_q
            return jnp.where(jnp.isnan(value), -jnp.inf, value)

        value = log_effective_share(each(log_weight, target)(jax.random.split(key, NUM_DRAWS)))
        return jnp.where(jnp.isfinite(value), value, -jnp.log(NUM_DRAWS))

    keys = jax.random.split(judge.key, judge.num)
    return jnp.exp(jax.lax.map(log_share, (keys, judge.y), batch_size=min(TOGETHER, judge.num)).mean())


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
