"""Draws: the weighted draws that a sampler returns."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scoreinfer._pickling import can_be_pickled
from scoreinfer._typing import Key, Sites, Values
from scoreinfer.arviz import plot_sites, to_arviz
from scoreinfer.montecarlo.resampling import resample_indices, stratified_indices
from scoreinfer.montecarlo.weights import pareto_smooth
from scoreinfer.problem import Problem


class DrawInfo(NamedTuple):
    """How a batch of draws was made.

    Args:
        num_proposals: number of proposals drawn, including those of rejected batches.
        num_score_evaluations: evaluations of the score network. None means that the number is not known.
        num_simulations: simulations that the proposal was trained on. None means that the number is not known.
        num_particles: particles of each draw. 1 means ordinary importance weights.
        witnessed: share of the draws that come from a density fitted to witnesses (`scoreinfer.evidence.witnesses`).
        num_failed: draws at which a foreign simulator failed. None means that no foreign simulator was run.
        move_accept_prob: mean acceptance probability of the moves after resampling. None means that there were none.
        move_step_size: step size of these moves. None means that there were none.
        seconds: wall time in seconds.
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
    """Weighted draws from a posterior. The draw axis is the first axis of every array.

    Args:
        sites: constrained values of latent and deterministic sites, each ``(num, *site shape)``. The value of a
            deterministic site may be a tree of arrays, as in NumPyro.
        unconstrained: flat unconstrained vectors.
        log_weight: log p(z, y) - log q(z). None means that the model has no density.
        log_q: log density of the proposal (the density of a path, if the weights are over paths), as log_joint -
            log_weight. NaN where p(z, y) is zero.
        log_joint: log p(z, y) in the unconstrained space. None means that the model has no density.
        observed: the observation that the posterior is conditioned on.
        certificate: the verdict on this batch (`scoreinfer.Certificate`).
        info: how the batch was made.
        problem: the problem of the model. None means that it is not known. Pickled draws leave it out where it cannot
            be pickled (a model in a function, a lambda, a problem made by hand).

    Exactness: the weighted draws are consistent as their number grows. Without a density they are the raw learned
        draws, and biased.
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

    def __reduce__(self) -> Any:
        problem = self.problem if can_be_pickled(self.problem) else None
        return Draws, (*self[:-1], problem)

    def __copy__(self) -> "Draws":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Draws":
        return Draws._make(copy.deepcopy(part, memo) for part in self)

    @property
    def num(self) -> int:
        """Number of draws."""
        return self.unconstrained.shape[0]

    def get_samples(self) -> Values:
        """Return equally weighted values of every site, as `numpyro.infer.MCMC.get_samples` does.

        Weighted draws are resampled without random numbers: draw i appears about ``num`` times its normalised weight.
        Copies of one draw are neighbours.

        Raises:
            ValueError: if no draw has a positive weight.

        Exactness: consistent as the number of weighted draws grows. Without a density they are the raw learned draws,
            and biased.
        """
        return self._rows(stratified_indices(self._smoothed(), self.num))

    def resample(self, key: Key, num: int) -> Values:
        """Draw ``num`` equally weighted values of every site by Pareto-smoothed importance resampling.

        Raises:
            ValueError: if no draw has a positive weight.

        Exactness: consistent as the number of weighted draws grows. Without a density they are the raw learned draws,
            and biased.
        """
        return self._rows(resample_indices(key, self._smoothed(), num))

    def to_arviz(self, key: Key, **options: Any) -> Any:
        """Convert the draws to ArviZ groups. `scoreinfer.to_arviz` lists the options and what it raises."""
        return to_arviz(key, self, **options)

    def plot(self, *, sites: Sequence[str] = (), pairs: bool = False) -> Any:
        """Plot the posterior by ArviZ, from equally weighted draws (`get_samples`).

        Args:
            sites: names of the sites. Empty means all of them, deterministic ones too.
            pairs: scatter plots of all pairs instead of one marginal for each component.

        Returns:
            An array of matplotlib axes.

        Raises:
            ValueError: if a site is unknown, or no draw has a positive weight.
            ImportError: if matplotlib is not installed.
        """
        if unknown := set(sites) - self.sites.keys():
            raise ValueError(f"`sites` must be among {', '.join(self.sites)}, got {', '.join(sorted(unknown))}.")
        values = self.get_samples()
        return plot_sites({name: values[name] for name in sites or values}, pairs)

    def _smoothed(self) -> Float[np.ndarray, " num"]:
        return np.zeros(self.num) if self.log_weight is None else pareto_smooth(self.log_weight)[0]

    def _rows(self, rows: Int[Array | np.ndarray, " rows"]) -> Values:
        rows = jnp.asarray(rows)
        return jax.tree.map(lambda leaf: leaf[rows], self.sites)
