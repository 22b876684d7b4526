"""Draws: the parcel carried from the sampler to the analysis."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._typing import Key, Sites, Values
from scoreinfer.montecarlo.resampling import resample_indices
from scoreinfer.montecarlo.weights import pareto_smooth


class Draws(NamedTuple):
    """Weighted draws from a posterior; the draw axis comes first everywhere.

    Args:
        sites: constrained values of latent and deterministic sites, each ``(num, *site shape)``; a deterministic site
            that is a tree of arrays stays one, as in NumPyro.
        values: flat unconstrained vectors.
        log_weight: log p(z, y) - log q(z); None where the model has no density.
        log_q: log density of the proposal (for path weights: of the draw's own extended path).
        log_joint: log p(z, y) in the unconstrained space.
        observed: the observation the draws answer for.
        certificate: the verdict on this batch (`scoreinfer.Certificate`).
        info: what the sampler says of itself (counts, times, flags).
    """

    sites: Values
    values: Float[Array, "num dim"]
    log_weight: Float[Array, " num"] | None
    log_q: Float[Array, " num"]
    log_joint: Float[Array, " num"] | None
    observed: Sites
    certificate: Any = None
    info: dict[str, Any] = {}  # noqa: RUF012  (never mutated)

    @property
    def num(self) -> int:
        """Number of draws."""
        return self.values.shape[0]

    def resample(self, key: Key, num: int) -> Values:
        """Draw ``num`` equally weighted values of every site, by Pareto-smoothed importance resampling.

        Raises:
            ValueError: where no draw has a positive weight.

        Exactness: consistent as the number of weighted draws grows; without a density, the raw learned draws.
        """
        log_weight = np.zeros(self.num) if self.log_weight is None else pareto_smooth(self.log_weight)[0]
        rows = resample_indices(key, log_weight, num)
        return jax.tree.map(lambda leaf: leaf[rows], self.sites)
