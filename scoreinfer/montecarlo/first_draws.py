"""First draws: many draws of a reference, weighed by a target; populations of particles are resampled from them."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._tree import in_batches
from scoreinfer._typing import Key
from scoreinfer.montecarlo.langevin import LogDensity
from scoreinfer.montecarlo.reference import AbstractReference, reference_rows
from scoreinfer.montecarlo.resampling import next_power, resample
from scoreinfer.montecarlo.weights import effective_sample_size

NUM_FIRST, THOROUGH = 65_536, 16
"""Draws of the reference, and how many times as many a thorough search takes."""
BATCH = 4096
MAX_NUMBERS = 1 << 24
"""Numbers in all the first draws together: fewer draws of long vectors."""
NUM_WITNESSES = 2048


class FirstDraws(NamedTuple):
    """Many draws of a reference, kept as their weights alone: draw i is made again from ``key`` and i.

    Args:
        key: random key.
        log_ratio: log density of the target at each, less that of the reference.
    """

    key: Key
    log_ratio: Float[Array, " num"]

    @property
    def num(self) -> int:
        """Number of draws."""
        return self.log_ratio.size


class Tempered(NamedTuple):
    """Draws of reference^(1 - power) target^power.

    Args:
        values: the draws.
        ancestors: numbers of the first draws that they descend from.
        power: the power.
        log_evidence: log of the ratio of normalising constants so far.
    """

    values: Float[Array, "num dim"]
    ancestors: Int[Array, " num"]
    power: Float[Array, ""]
    log_evidence: Float[Array, ""]


def draw_first(key: Key, reference: AbstractReference, target: LogDensity, times: int = 1) -> FirstDraws:
    """Draw from the reference, 65,536 times and fewer only of long vectors, and weigh each draw by the target."""
    num = max(min(NUM_FIRST * times, MAX_NUMBERS // dim_of(reference)), 4 * NUM_WITNESSES)
    return FirstDraws(key, in_batches(lambda rows: _log_ratios(key, reference, target, rows), num, BATCH))


def dim_of(reference: AbstractReference) -> int:
    """Compute the number of dimensions of a reference's draws."""
    return jax.eval_shape(reference.sample, jax.random.key(0)).size


def resample_first(
    key: Key, reference: AbstractReference, first: FirstDraws, power: Float[Array, ""], num: int
) -> Tempered:
    """Resample ``num`` of the first draws by a power of their weights."""
    log_weight = power * first.log_ratio
    rows = resample(key, log_weight)[(np.arange(num) * first.num) // num]
    values = reference_rows(first.key, reference, rows)
    return Tempered(values, rows, power, jax.nn.logsumexp(log_weight) - math.log(first.num))


def first_power(first: FirstDraws, num: int) -> Float[Array, ""]:
    """Find the largest power of the weights, at most 1, with an effective sample size of ``num``."""
    return next_power(jnp.zeros_like(first.log_ratio[0]), first.log_ratio, num / first.num)


def num_ancestors(ancestors: Int[Array, " num"]) -> float:
    """Compute 1 / sum of squared shares by ancestor, the number of independent ones."""
    return effective_sample_size(np.log(np.unique(np.asarray(ancestors), return_counts=True)[1]))


@eqx.filter_jit
def _log_ratios(
    key: Key, reference: AbstractReference, target: LogDensity, rows: Int[Array, " num"]
) -> Float[Array, " num"]:
    return jax.vmap(lambda z: densities(reference, target, z)[1])(reference_rows(key, reference, rows))


def densities(
    reference: AbstractReference, target: LogDensity, z: Float[Array, " dim"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the reference's log density, and the log ratio of the target to it; minus infinity where that fails."""
    log_reference = reference.log_density(z)
    log_ratio = target(z) - log_reference
    return log_reference, jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
