"""Learned posteriors: their training, and the trained objects, which draw, weigh, certify and save."""

from scoreinfer.posterior.amortised import Conditioned, Posterior
from scoreinfer.posterior.base import AbstractConditioned, AbstractPosterior
from scoreinfer.posterior.guided import Guided, GuidedPosterior
from scoreinfer.posterior.local_fit import fit_local
from scoreinfer.posterior.npse import NPSE, fit, load
from scoreinfer.posterior.paths import ConditionedPaths, PathPosterior
from scoreinfer.posterior.score_files import load_score, save_score
from scoreinfer.posterior.score_fit import fit_score
from scoreinfer.posterior.sda import SDA, SDAPosterior
from scoreinfer.posterior.smdp import SMDP

__all__ = [
    "NPSE",
    "SDA",
    "SMDP",
    "AbstractConditioned",
    "AbstractPosterior",
    "Conditioned",
    "ConditionedPaths",
    "Guided",
    "GuidedPosterior",
    "PathPosterior",
    "Posterior",
    "SDAPosterior",
    "fit",
    "fit_local",
    "fit_score",
    "load",
    "load_score",
    "save_score",
]
