"""Certificates of filters: three statements that are never mixed.

*Algorithm*: on worlds that the model itself simulates, the members represent the state (`twin`). *Data*: the
observations scatter as they were forecast (`monitor`), a test that may be read at any time. *Skill*: the forecasts are
nearer to the observations than climatology. Where the first holds and the second alarms, the model is wrong, not the
filter; where the first fails, nothing is said of the model. A calibrated filter without skill is not certified.

What no certificate says: that the members are draws from the posterior, in many dimensions with few members; and
anything of components that no observation sees, beyond the twins, which take the model for granted.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scoreinfer._typing import Key
from scoreinfer.filters.monitoring import Monitor, monitor, probits
from scoreinfer.filters.run import FilterRun
from scoreinfer.filters.skill import (
    CLIMATE,
    forecast_log_score,
    forecast_score,
    reference_log_scores,
    reference_scores,
)
from scoreinfer.filters.twins import CERTIFIED, REFUSED, UNDECIDED, Twins, Verdict
from scoreinfer.markov import Sees

FEW = 20
"""A posterior in more dimensions than one for every twenty members is out of reach. Chosen by judgement."""


class FilterCertificate(NamedTuple):
    """Whether a filter's run can be trusted, and why.

    Args:
        twins: the algorithm on worlds of its own model; None: not run.
        data: the test of the forecasts on these data.
        skill: mean score (CRPS) of the forecasts of observations, and of others; the run itself comes first.
        ts: times of the observations.
        dim: number of components of the state.
        num_members: number of members.
        log_score: mean log density of the observations under the same forecasts: of two, the higher is better.
    """

    twins: Twins | None
    data: Monitor
    skill: dict[str, float]
    ts: Float[np.ndarray, " times"]
    dim: int
    num_members: int
    log_score: dict[str, float]

    @property
    def skilled(self) -> bool:
        """Whether the forecasts beat climatology."""
        return next(iter(self.skill.values())) < self.skill[CLIMATE]

    @property
    def verdict(self) -> Verdict:
        """Say whether one of the three statements fails, none does, or twins are too few to tell."""
        algorithm = CERTIFIED if self.twins is None else self.twins.verdict
        return algorithm if self.data.alarm is None and self.skilled else REFUSED

    @property
    def certified(self) -> bool:
        """Whether none of the three statements fails."""
        return self.verdict == CERTIFIED

    @property
    def reason(self) -> str:
        """Say what holds and what does not, in words."""
        failed = [*self._data_words(), *self._algorithm_words(), *self._skill_words()]
        if failed:
            return "; ".join(failed)
        where = "on these data" if self.twins is None else "on twins and on these data"
        return f"{where} up to t={self.ts[-1]:g}"

    @property
    def limits(self) -> str:
        """Say what is not certified."""
        said = ["components that no observation sees are judged by twins alone, that is, if the model is right"]
        if self.dim * FEW > self.num_members:
            said.insert(
                0,
                f"{self.num_members} members cannot show that they are draws from a posterior in {self.dim} dimensions",
            )
        if self.twins is None:
            said.insert(0, "the algorithm was not tried on twins (`twin`)")
        return "; ".join(said)

    def __str__(self) -> str:
        best = min(self.skill, key=lambda name: self.skill[name])
        crps, log_scores = (
            ", ".join(f"{name} {value:.3g}" for name, value in found.items()) for found in (self.skill, self.log_score)
        )
        verdict = "certified" if self.certified else f"{self.verdict}:"
        scores = f"CRPS of forecasts: {crps}; best: {best}. Log scores: {log_scores}"
        return f"{verdict} {self.reason}. {scores}. Not certified: {self.limits}."

    def _data_words(self) -> list[str]:
        alarm = self.data.alarm
        if alarm is None:
            return []
        blame = "twins were not run, so the filter or the model may be at fault"
        if self.twins is not None:
            blame = "twins are fine, so the model, not the filter, is at fault"
            if self.twins.verdict == REFUSED:
                blame = "twins fail too, so nothing is said of the model"
            if self.twins.verdict == UNDECIDED:
                blame = "twins are too few to tell whether the filter or the model is at fault"
        what = f"forecast {self.data.kind}"
        if self.data.kind in ("too narrowly", "too widely"):
            what = f"scatter {self.data.scatter:.1f} times as widely as forecast"
        return [f"observations {what if 'scatter' in what else 'are ' + what} (alarm at t={self.ts[alarm]:g}); {blame}"]

    def _algorithm_words(self) -> list[str]:
        return [] if self.twins is None or self.twins.certified else [self.twins.reason]

    def _skill_words(self) -> list[str]:
        return [] if self.skilled else ["the forecasts are no nearer to the observations than climatology"]


def certify(
    key: Key,
    run: FilterRun,
    *,
    twins: Twins | None = None,
    rivals: Mapping[str, FilterRun] | None = None,
    spin_up: int = 0,
) -> FilterCertificate:
    """Judge a filter's run.

    Args:
        key: random key, for discrete observations and for scores.
        run: the run.
        twins: what `twin` found for the same method and state space.
        rivals: runs of other methods on the same observations, by name, such as a tuned LETKF.
        spin_up: observations that do not count.

    Returns:
        The certificate.

    Raises:
        ValueError: if a rival has filtered other observations, none counts, or an entry sees more than one number.

    Exactness: the data test is valid at all times for forecasts within its tolerances; the bounds on twins and on skill
        are chosen by judgement.
    """
    series = run.series
    for name, rival in (rivals or {}).items():
        if rival.series.y.shape != series.y.shape or not np.array_equal(rival.series.y, series.y, equal_nan=True):
            raise ValueError(f"The rival {name!r} has filtered other observations. Filter the same `y` with it.")
    if spin_up >= series.ts.size:
        raise ValueError(f"`spin_up` must be below the number of times, {series.ts.size}, got {spin_up}.")
    for_probits, for_scores = jax.random.split(key)
    observed = series.model.observed
    if Sees.WHOLE in observed.kinds:
        raise ValueError(
            "`certify` needs observations whose entries each see one number of the state, but entry "
            f"{observed.kinds.index(Sees.WHOLE)} sees more (a location and a scale, or correlated noise): its forecast "
            "is not known. Judge the method by `twin` alone, or transform the data until entries are apart."
        )
    found = monitor(probits(for_probits, observed, series.ts, run.predictive, series.y), spin_up)
    scores, log_scores = {}, {}
    for name, other in {type(run.method).__name__: run, **(rivals or {})}.items():
        scores[name] = forecast_score(for_scores, observed, series.ts, other.predictive, series.y)
        log_scores[name] = forecast_log_score(observed, series.ts, other.predictive, series.y)
    scores |= reference_scores(series.y)
    log_scores |= reference_log_scores(series.y, observed.discrete(series.ts[0]))
    skill, log_score = (
        {name: float(jnp.nanmean(score[max(spin_up, 1) :])) for name, score in found.items()}
        for found in (scores, log_scores)
    )
    num = run.now.members.x.shape[0]
    return FilterCertificate(twins, found, skill, np.asarray(series.ts), series.model.dim, num, log_score)
