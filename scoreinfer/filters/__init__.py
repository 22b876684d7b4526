"""Filters: the state of a NumPyro model in time, given the observations so far.

A filter moves an ensemble of states by the model's own transition, and puts one observation after the other into it.
"""

from scoreinfer.filters.base import AbstractFilter, Analysis, Members, Predictive
from scoreinfer.filters.kalman import LETKF, EnKF
from scoreinfer.filters.particle import BootstrapFilter
from scoreinfer.filters.run import FilterRun, extend, filter  # noqa: A004

__all__ = [
    "LETKF",
    "AbstractFilter",
    "Analysis",
    "BootstrapFilter",
    "EnKF",
    "FilterRun",
    "Members",
    "Predictive",
    "extend",
    "filter",
]
