"""Runs of filters as ArviZ groups: members are draws, and time is a dimension."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from scoreinfer._typing import Key
from scoreinfer.arviz import flatten, from_groups, in_file_names, version_attributes
from scoreinfer.filters.base import Members
from scoreinfer.montecarlo.resampling import systematic

FilterRun = Any
"""A `scoreinfer.FilterRun`. This module cannot import the class, because its module imports this one."""
NOTE = (
    "Draw i at one time and draw i at the next belong together only in filters without weights; these are not paths. "
    "`scoreinfer.smooth` draws paths."
)
"""A warning for readers of the posterior group."""


def to_arviz(
    key: Key,
    run: FilterRun,
    *,
    resample: bool = True,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Convert a run to an ArviZ `InferenceData` (ArviZ 0.x) or `DataTree` (ArviZ 1.x).

    Groups: ``posterior``, the members after each observation, and ``prior``, those before it, with dimensions (chain,
    draw, time, ...); ``sample_stats`` with their ``log_weight``; and ``observed_data``, with dimensions (time, entry).

    Args:
        key: random key, for resampling.
        run: the run.
        resample: draw the members of every time by weight, so that the groups have equal weights. Not needed where the
            method has no weights.
        coords: further coordinate values by dimension name, as in ArviZ.
        dims: names of the state's own dimensions by variable, without chain, draw and time.

    Exactness: consistent as the number of members grows. Resampling adds Monte Carlo noise.
    """
    site = run.source[1] or "x"
    for_analysis, for_forecast = jax.random.split(key)
    parts = {"posterior": (for_analysis, run.analysis), "prior": (for_forecast, run.forecast)}
    states = {group: _drawn(*part) if resample else part[1].x for group, part in parts.items()}
    groups = {group: in_file_names({site: np.asarray(x).swapaxes(0, 1)[None]}) for group, x in states.items()}
    name = next(iter(groups["posterior"]))
    groups["sample_stats"] = {"log_weight": np.asarray(run.analysis.log_weight).T[None]}
    groups["observed_data"] = {"y": np.asarray(run.series.y)}
    names = {name: ["time", *(dims or {}).get(site, _own(name, run))], "log_weight": ["time"], "y": ["time", "entry"]}
    data = from_groups(groups, {"time": np.asarray(run.ts), **(coords or {})}, names)
    data["posterior"].attrs.update(
        version_attributes()
        | flatten(
            {
                "method": type(run.method).__name__,
                "log_evidence": np.asarray(run.log_evidence),
                "log_evidence_kind": run.log_evidence_kind,
                "replaced": np.asarray(run.replaced).sum(),
                "resampled": resample,
            }
        )
        | {"note": NOTE}
    )
    return data


def _own(name: str, run: FilterRun) -> list[str]:
    return [f"{name}_dim_{i}" for i in range(len(run.series.model.shape))]


@jax.jit
def _drawn(key: Key, members: Members) -> jax.Array:
    """Draw the members of every time by weight; equal weights keep every member."""
    times, num = members.log_weight.shape

    def at_one_time(key: Key, now: Members) -> jax.Array:
        return now.x[systematic(key, now.log_weight, num)]

    return jax.vmap(at_one_time)(jax.random.split(key, times), members)
