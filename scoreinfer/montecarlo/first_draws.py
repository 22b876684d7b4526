"""First draws: many draws of a reference, weighed by a target; populations of particles are resampled from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._memory import each
from scoreinfer._program import over_devices, run_once
from scoreinfer._tree import in_batches
from scoreinfer._typing import Key
from scoreinfer.montecarlo.langevin import LogDensity
from scoreinfer.montecarlo.moves import seen_at
from scoreinfer.montecarlo.population import Population
from scoreinfer.montecarlo.reference import AbstractReference, reference_rows
from scoreinfer.montecarlo.resampling import next_power, systematic
from scoreinfer.montecarlo.weights import log_mean_weight

NUM_FIRST = 65_536
"""Draws of the reference. A corner of prior mass 1e-4 escapes them all with probability 0.0014."""
THOROUGH = 16
"""How many times as many draws a thorough search takes: corners of 1e-5 then escape with probability 3e-5."""
BATCH = 4096
"""Draws that are weighed at once: enough to keep a device busy. Results do not depend on it."""
MAX_NUMBERS = 1 << 24
"""Numbers in all the first draws together, 64 MB of them: fewer draws of long vectors."""
NUM_WITNESSES = 2048
"""Witnesses resampled from the first draws. Chosen by judgement: half of them judge, the other half may mend."""


class FirstDraws(NamedTuple):
    """Many draws of a reference, weighed by a target.

    Args:
        values: the draws.
        log_ratio: log density of the target at each draw, less that of the reference.
    """

    values: Float[Array, "num dim"]
    log_ratio: Float[Array, " num"]

    @property
    def num(self) -> int:
        """Number of draws."""
        return self.log_ratio.size


def draw_first(key: Key, reference: AbstractReference, target: LogDensity, most: int = NUM_FIRST) -> FirstDraws:
    """Draw from the reference, ``most`` times and fewer only of long vectors, and weigh each draw by the target.

    Args:
        key: random key.
        reference: what is drawn from.
        target: log density up to a constant.
        most: the number of draws.
    """
    num = num_first(reference, most)
    return in_batches(lambda rows: _draw_and_weigh(key, reference, target, rows), num, BATCH)


def num_first(reference: AbstractReference, most: int = NUM_FIRST) -> int:
    """Return how many first draws `draw_first` makes."""
    return max(min(most, MAX_NUMBERS // dim_of(reference)), 4 * NUM_WITNESSES)


def dim_of(reference: AbstractReference) -> int:
    """Compute the number of dimensions of a reference's draws."""
    return jax.eval_shape(reference.sample, jax.random.key(0)).size


@run_once
def resample_first(key: Key, first: FirstDraws, power: Float[Array | np.ndarray, ""], num: int) -> Population:
    """Resample ``num`` of the first draws by a power of their weights.

    Exactness: draw i is taken in proportion to its weight on average (systematic resampling), and the log evidence is
        the log of the mean weight, which is unbiased.
    """
    log_weight = jnp.asarray(power) * first.log_ratio
    rows = systematic(key, log_weight, num)
    return Population(first.values[rows], jnp.zeros(num, log_weight.dtype), rows, log_mean_weight(log_weight))


@run_once
def first_power(first: FirstDraws, num: int) -> Float[Array, ""]:
    """Find the largest power of the weights, at most 1, with an effective sample size of ``num``."""
    return next_power(first.log_ratio, num / first.num)


@over_devices
def _draw_and_weigh(key: Key, reference: AbstractReference, target: LogDensity, rows: Int[Array, " num"]) -> FirstDraws:
    values = reference_rows(key, reference, rows)
    return FirstDraws(values, each(lambda z: seen_at(reference, target, z).log_ratio, target)(values))
