"""Preconditioned Monte Carlo (pocoMC): tempered particles moved through a normalising flow trained by torch."""

from collections.abc import Callable

import jax
import numpy as np
import pocomc

from rival_methods import WIDE_FUNNEL, Outcome

SETTINGS = {"n_effective": 512, "n_active": 256, "n_total": 4096, "n_evidence": 4096}
TUNED = {"funnel_10": {"scales": WIDE_FUNNEL}, "mixture_40_in_10": {"n_effective": 2048, "n_active": 1024}}


class _Prior:
    """The target's prior, as pocoMC asks for one."""

    def __init__(self, target, seed: int):
        self.dim, self.bounds, self._rng = target.dim, target.bounds(), np.random.default_rng(seed)
        self._density = jax.jit(jax.vmap(lambda theta: target.log_densities(theta)[0]))
        self._quantiles = jax.jit(jax.vmap(target.from_unit))

    def logpdf(self, x: np.ndarray) -> np.ndarray:
        """Compute the log density of rows."""
        return np.asarray(self._density(x.astype(np.float32)), float)

    def rvs(self, size: int = 1) -> np.ndarray:
        """Draw rows."""
        u = self._rng.uniform(1e-6, 1 - 1e-6, size=(size, self.dim))
        return np.asarray(self._quantiles(u.astype(np.float32)), float)


def prepare(target) -> Callable[[int], Outcome]:
    """Compile prior and likelihood, of as many rows at once as pocoMC asks for."""
    own = SETTINGS | TUNED.get(target.name, {})
    density, prior = jax.jit(jax.vmap(target.log_likelihood)), _Prior(target, 0)

    def run(seed: int) -> Outcome:
        sampler = pocomc.Sampler(
            prior, lambda x: np.asarray(density(x.astype(np.float32)), float), n_effective=own["n_effective"],
            n_active=own["n_active"], vectorize=True, random_state=seed,
        )  # fmt: skip
        sampler.run(n_total=own["n_total"], n_evidence=own["n_evidence"], progress=False)
        draws, weights, *_ = sampler.posterior()
        return Outcome(draws, weights, float(sampler.evidence()[0]), int(sampler.calls))

    return run
