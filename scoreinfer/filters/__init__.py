"""Filters: the state of a NumPyro model in time, given the observations so far.

A filter moves an ensemble of states by the model's own transition, and puts one observation after the other into it.
"""

from scoreinfer.filters.base import AbstractFilter, Analysis, Members, Predictive
from scoreinfer.filters.certificate import FilterCertificate, certify
from scoreinfer.filters.guided import GuidedFilter
from scoreinfer.filters.jumps import Jumps
from scoreinfer.filters.kalman import LETKF, EnKF
from scoreinfer.filters.particle import BootstrapFilter
from scoreinfer.filters.published import EnSF
from scoreinfer.filters.run import FilterRun, extend, filter  # noqa: A004
from scoreinfer.filters.score import ScoreFilter
from scoreinfer.filters.smooth import smooth
from scoreinfer.filters.taper import Locality, gaspari_cohn, grid, near
from scoreinfer.filters.twins import Twins, twin

__all__ = [
    "LETKF",
    "AbstractFilter",
    "Analysis",
    "BootstrapFilter",
    "EnKF",
    "EnSF",
    "FilterCertificate",
    "FilterRun",
    "GuidedFilter",
    "Jumps",
    "Locality",
    "Members",
    "Predictive",
    "ScoreFilter",
    "Twins",
    "certify",
    "extend",
    "filter",
    "gaspari_cohn",
    "grid",
    "near",
    "smooth",
    "twin",
]
