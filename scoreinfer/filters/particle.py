"""Particle filters: weighted members, resampled where the weights have become uneven.

References: Gordon, Salmond and Smith 1993, IEE Proceedings F 140(2) (bootstrap filter); Chopin and Papaspiliopoulos
2020, An Introduction to Sequential Monte Carlo, chapter 10.
"""

from typing import ClassVar

import equinox as eqx
import jax

from scoreinfer._typing import Key
from scoreinfer.filters.base import AbstractFilter, Analysis, EvidenceKind, Members, predict, weighed
from scoreinfer.montecarlo.feynman_kac import LEAST_SHARE
from scoreinfer.montecarlo.population import first_population, resample
from scoreinfer.montecarlo.resampling import Scheme, systematic


class BootstrapFilter(AbstractFilter):
    """Move particles by the model's transition, and weigh them by the likelihood of the observation.

    Args:
        least_share: effective share of the particles below which they are resampled before they move.
        scheme: how rows are drawn. Chains of runs around a reference (particle Gibbs) need `multinomial`.

    Exactness: consistent as the number of particles grows, and the evidence is unbiased for any number. Its gradient is
        not: resampling has none.

    Good values: the number of particles that a given accuracy needs grows exponentially with the number of entries that
        inform at one time; up to about ten dimensions.
    """

    log_evidence_kind: ClassVar[EvidenceKind] = "unbiased"
    least_share: float = eqx.field(static=True, default=LEAST_SHARE)
    scheme: Scheme = eqx.field(static=True, default=systematic)

    def check(self, model):
        """Accept every model: the density of the observation is all that is needed."""

    def forecast(self, key, memory, model, t0, t1, members, y):
        """Resample where the weights are uneven, then move."""
        for_rows, for_moves = jax.random.split(key)
        return super().forecast(
            for_moves, memory, model, t0, t1, resampled(for_rows, members, self.scheme, self.least_share), y
        )

    def analyse(self, key, memory, t, members, observed, y):
        """Multiply the weights by the likelihood."""
        log_likelihood = jax.vmap(observed.log_density, (None, 0, None))(t, members.x, y)
        return memory, Analysis(*weighed(members, log_likelihood), predict(observed, t, members))


def resampled(key: Key, members: Members, scheme: Scheme, least_share: float) -> Members:
    """Resample particles whose weights are uneven; the mean weight stays one."""
    population = first_population(members.x, members.log_weight.size)._replace(log_weight=members.log_weight)
    drawn, _ = resample(key, population, scheme, least_share)
    return Members(drawn.values, drawn.log_weight)
