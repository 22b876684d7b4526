"""Draws: what a sampler returns, on its way to the analysis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key, Sites, Values
from scoreinfer.arviz import to_arviz
from scoreinfer.montecarlo.resampling import resample_indices, stratified_indices
from scoreinfer.montecarlo.weights import pareto_smooth
from scoreinfer.problem import Problem


class DrawInfo(NamedTuple):
    """How a batch of draws was made.

    Args:
        num_proposals: proposals drawn, those of rejected batches included.
        num_score_evaluations: evaluations of the score network.
        num_simulations: simulations that the proposal was trained on; None where that is not known.
        num_particles: particles of each draw; 1: plain weights.
        witnessed: share of the draws that come from a density fitted to witnesses.
        num_failed: draws at which a foreign simulator failed; None where none was run.
        move_accept_prob: mean acceptance probability of the moves after resampling; None without any.
        move_step_size: their step size; None without any.
        seconds: wall time.
    """

    num_proposals: int
    num_score_evaluations: int | None = None
    num_simulations: int | None = None
    num_particles: int = 1
    witnessed: float = 0.0
    num_failed: int | None = None
    move_accept_prob: float | None = None
    move_step_size: float | None = None
    seconds: float = np.nan


class Draws(NamedTuple):
    """Weighted draws from a posterior; the draw axis comes first everywhere.

    Args:
        sites: constrained values of latent and deterministic sites, each ``(num, *site shape)``; a deterministic site
            that is a tree of arrays stays one, as in NumPyro.
        unconstrained: flat unconstrained vectors.
        log_weight: log p(z, y) - log q(z); None where the model has no density.
        log_q: log density of the proposal (of a path, where weights are over paths); NaN where p(z, y) is zero.
        log_joint: log p(z, y) in the unconstrained space; None where the model has no density.
        observed: the observation that the draws answer for.
        certificate: the verdict on this batch (`scoreinfer.Certificate`).
        info: how the batch was made.
        problem: the problem that was solved; None where it is not known.
    """

    sites: Values
    unconstrained: Float[Array, "num dim"]
    log_weight: Float[Array, " num"] | None
    log_q: Float[Array, " num"]
    log_joint: Float[Array, " num"] | None
    observed: Sites
    certificate: Any = None
    info: DrawInfo | None = None
    problem: Problem | None = None

    @property
    def num(self) -> int:
        """Number of draws."""
        return self.unconstrained.shape[0]

    def get_samples(self) -> Values:
        """Return equally weighted values of every site, as `numpyro.infer.MCMC.get_samples` does.

        Weighted draws are resampled: draw i stands there about ``num`` times its normalised weight, copies side by
        side. No random number is used.

        Raises:
            ValueError: where no draw has a positive weight.

        Exactness: consistent as the number of weighted draws grows; without a density, the raw learned draws.
        """
        return self._rows(stratified_indices(self._smoothed(), self.num))

    def resample(self, key: Key, num: int) -> Values:
        """Draw ``num`` equally weighted values of every site, by Pareto-smoothed importance resampling.

        Raises:
            ValueError: where no draw has a positive weight.

        Exactness: consistent as the number of weighted draws grows; without a density, the raw learned draws.
        """
        return self._rows(resample_indices(key, self._smoothed(), num))

    def to_arviz(self, key: Key, **options: Any) -> Any:
        """Present the draws to ArviZ; see `scoreinfer.to_arviz` for the options."""
        return to_arviz(key, self, **options)

    def _smoothed(self) -> Float[np.ndarray, " num"]:
        return np.zeros(self.num) if self.log_weight is None else pareto_smooth(self.log_weight)[0]

    def _rows(self, rows: Int[Array | np.ndarray, " rows"]) -> Values:
        rows = jnp.asarray(rows)
        return jax.tree.map(lambda leaf: leaf[rows], self.sites)
