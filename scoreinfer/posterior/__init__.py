"""Learned posteriors: their training, and the trained objects, which draw, weigh, certify and save."""

from scoreinfer.posterior.amortised import Conditioned, Posterior
from scoreinfer.posterior.base import AbstractConditioned, AbstractPosterior
from scoreinfer.posterior.npse import NPSE, fit, load
from scoreinfer.posterior.paths import ConditionedPaths, PathPosterior
from scoreinfer.posterior.smdp import SMDP

__all__ = [
    "NPSE",
    "SMDP",
    "AbstractConditioned",
    "AbstractPosterior",
    "Conditioned",
    "ConditionedPaths",
    "PathPosterior",
    "Posterior",
    "fit",
    "load",
]
