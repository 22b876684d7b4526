"""What every learned posterior offers: read data, draw, judge, constrain, present."""

import abc
import os
import warnings
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, Float

from scoreinfer._tree import in_batches, own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.draws import DrawInfo, Draws
from scoreinfer.errors import MisspecificationWarning, UnsupportedModel
from scoreinfer.evidence.certificate import MAX_OUTLYING, Certificate
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted
from scoreinfer.samplers.batches import constrain

PREDICTED = 256
"""Data sets simulated at once."""
C = TypeVar("C", bound="AbstractConditioned")


class AbstractConditioned(eqx.Module):
    """The posterior of one observation: a proposal and its target."""

    proposal: eqx.AbstractVar[AbstractProposal]
    target: eqx.AbstractVar[Target]

    @abc.abstractmethod
    def sample(self, key: Key, num: int) -> Draws:
        """Draw, weigh every draw, and certify the batch."""

    def predict(self, key: Key, num: int, *, draws: Draws | None = None) -> Sites:
        """Simulate data sets from the posterior predictive distribution.

        Args:
            key: random key.
            num: number of data sets.
            draws: draws of this posterior, which are resampled; None: ``num`` are drawn.

        Returns:
            Observed sites, data sets first.

        Raises:
            UnsupportedModel: where data cannot be simulated from given parameters.

        Exactness: consistent as the draws grow in number.
        """
        problem = self.target.problem
        if problem.simulate_observation is None:
            why = problem.not_simulable or "this model draws latent sites after its data."
            raise UnsupportedModel(f"`predict` simulates data from parameters: {why}")
        for_draws, for_rows, for_data = jax.random.split(key, 3)
        draws = self.sample(for_draws, num) if draws is None else draws
        numbered = draws._replace(sites={"z": draws.unconstrained}).resample(for_rows, num)
        return in_batches(lambda i: _simulated(for_data, problem, i, numbered["z"][i]), num, PREDICTED)

    def to_arviz(self, key: Key, num: int, **options: Any) -> Any:
        """Draw ``num`` draws and present them to ArviZ; see `scoreinfer.to_arviz` for the options."""
        for_draws, for_groups = jax.random.split(key)
        return self.sample(for_draws, num).to_arviz(for_groups, **options)

    def _draws(self, drawn: Weighted, certificate: Certificate, info: DrawInfo, batch_size: int) -> Draws:
        """Constrain weighted draws."""
        sites = constrain(self.target.problem, drawn.z, batch_size)
        return Draws(
            sites, drawn.z, drawn.log_weight, drawn.log_q, drawn.log_target, self.target.y, certificate, info,
            self.target.problem,
        )  # fmt: skip


class AbstractPosterior(eqx.Module):
    """A learned posterior for any observation of its design."""

    problem: eqx.AbstractVar[Problem]

    @abc.abstractmethod
    def condition(self, *args: Any, **kwargs: Any) -> AbstractConditioned:
        """Return the posterior of the data in these model arguments.

        Args:
            *args: the model's own arguments, with the data.
            **kwargs: the model's own keyword arguments.

        Raises:
            ValueError: where the data are missing, not finite, of another shape or another design.
        """

    @abc.abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a folder of plain data, to be loaded with the same model."""

    @own_broadcasting
    def sample(self, key: Key, num: int, *args: Any, **kwargs: Any) -> Draws:
        """Draw from the posterior of these model arguments: ``condition(*args, **kwargs).sample(key, num)``."""
        return self.condition(*args, **kwargs).sample(key, num)


@eqx.filter_jit
def _simulated(key: Key, problem: Problem, rows: Array, z: Float[Array, "num dim"]) -> Sites:
    simulate: Any = problem.simulate_observation
    return jax.vmap(lambda row, z: simulate(jax.random.fold_in(key, row), z))(rows, z)


def warn_of_outlier(distance_rank: float, stacklevel: int = 5) -> None:
    """Warn where an observation lies far from the simulations."""
    if distance_rank <= MAX_OUTLYING:
        message = (
            f"The observation lies further from the model's simulations than {1 - distance_rank:.1%} of them from each "
            f"other (distance rank {distance_rank:.3f}; this warning is given to {MAX_OUTLYING:.0%} of the model's own "
            "data). The model may be misspecified, and what was learned there is extrapolation: compare the data with "
            "simulations before trusting any posterior."
        )
        warnings.warn(message, MisspecificationWarning, stacklevel=stacklevel)
