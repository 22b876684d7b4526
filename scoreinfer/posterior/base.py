"""Base classes of learned posteriors: condition on data, draw, weigh, certify, predict, convert to ArviZ."""

import abc
import os
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices
from scoreinfer._tree import in_batches, own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.draws import DrawInfo, Draws
from scoreinfer.errors import MisspecificationWarning, UnsupportedModel, warn
from scoreinfer.evidence.certificate import MAX_OUTLYING, Certificate
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted
from scoreinfer.samplers.batches import constrain

PREDICTED = 256
"""Data sets that `AbstractConditioned.predict` simulates at once. Chosen by judgement."""
C = TypeVar("C", bound="AbstractConditioned")
"""Type of a posterior of one observation."""


class AbstractConditioned(eqx.Module):
    """The posterior of one observation: a proposal and its target density."""

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
            draws: draws of this posterior, which are resampled. None means that ``num`` draws are made.

        Returns:
            Observed sites by name, with the data sets on the first axis.

        Raises:
            UnsupportedModel: if data cannot be simulated from given parameters.
            ValueError: if ``draws`` are draws of other data, or no draw has a positive weight.

        Exactness: consistent as the number of draws grows.
        """
        problem = self.target.problem
        if problem.simulate_observation is None:
            why = problem.no_observation
            raise UnsupportedModel(f"`predict` simulates data from given parameters, which this model cannot do: {why}")
        if draws is not None:
            self._check_data(draws)
        for_draws, for_rows, for_data = jax.random.split(key, 3)
        draws = self.sample(for_draws, num) if draws is None else draws
        numbered = draws._replace(sites={"z": draws.unconstrained}).resample(for_rows, num)
        y = {name: self.target.y[name] for name in problem.designs}
        return in_batches(lambda i: _simulated(for_data, problem, y, i, numbered["z"][i]), num, PREDICTED)

    def _check_data(self, draws: Draws) -> None:
        """Refuse draws of other data; missing values (NaN) are equal."""
        ours, theirs = self.target.y, draws.observed
        differ = [
            name for name in sorted(ours.keys() | theirs.keys())
            if name not in ours or name not in theirs or not np.array_equal(ours[name], theirs[name], equal_nan=True)
        ]  # fmt: skip
        if differ:
            raise ValueError(
                f"`draws` must be draws of this posterior, got draws of other data: {', '.join(differ)} of "
                "`draws.observed` differ. Condition on the data of the draws, or draw again."
            )

    def to_arviz(self, key: Key, num: int, **options: Any) -> Any:
        """Make ``num`` draws and convert them for ArviZ; `scoreinfer.to_arviz` lists the options and errors."""
        for_draws, for_groups = jax.random.split(key)
        return self.sample(for_draws, num).to_arviz(for_groups, **options)

    def _draws(self, drawn: Weighted, certificate: Certificate, info: DrawInfo, batch_size: int) -> Draws:
        """Make `Draws` with constrained sites from weighted draws."""
        sites = constrain(self.target.problem, drawn.z, self.target.y, batch_size)
        return Draws(
            sites, drawn.z, drawn.log_weight, drawn.log_q, drawn.log_target, self.target.y, certificate, info,
            self.target.problem,
        )  # fmt: skip


class AbstractPosterior(eqx.Module):
    """A learned posterior, for any observation with the same design (covariates, shapes)."""

    problem: eqx.AbstractVar[Problem]

    @abc.abstractmethod
    def condition(self, *args: Any, **kwargs: Any) -> AbstractConditioned:
        """Return the posterior of the data in these model arguments.

        Args:
            *args: the model's own arguments, with the data.
            **kwargs: the model's own keyword arguments.

        Raises:
            ValueError: if the data are missing, not finite, or have another shape or another design.
        """

    @abc.abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a folder of plain data, which can be loaded with the same model."""

    @own_broadcasting
    def sample(self, key: Key, num: int, *args: Any, **kwargs: Any) -> Draws:
        """Draw from the posterior of the data: ``condition(*args, **kwargs).sample(key, num)``.

        Raises what `condition` raises.

        Exactness: as the ``sample`` of what `condition` returns.
        """
        return self.condition(*args, **kwargs).sample(key, num)


@over_devices
def _simulated(key: Key, problem: Problem, y: Sites, rows: Array, z: Float[Array, "num dim"]) -> Sites:
    return map_rows(lambda row, z: problem.simulate_like(jax.random.fold_in(key, row), z, y), None)(rows, z)


def warn_of_outlier(distance_rank: float) -> None:
    """Issue a `MisspecificationWarning` if the distance rank of an observation is at most `MAX_OUTLYING`."""
    if distance_rank <= MAX_OUTLYING:
        message = (
            f"The observation is further from the model's simulations than {1 - distance_rank:.1%} of them are from "
            f"each other (distance rank {distance_rank:.3f}; {MAX_OUTLYING:.0%} of data simulated from the model get "
            "this warning). The model may be misspecified, and the learned posterior is an extrapolation. Compare the "
            "data with simulations before you use the posterior."
        )
        warn(message, MisspecificationWarning)
