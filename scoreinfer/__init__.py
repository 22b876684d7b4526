"""scoreinfer: learned score-SDE samplers for NumPyro models.

The model's own density corrects the draws, and a certificate says whether they can be trusted.
"""

from importlib.metadata import PackageNotFoundError, version

from scoreinfer import calibration, errors, filters, mcmc, nets, paths, process, samplers, simulators
from scoreinfer.arviz import to_arviz
from scoreinfer.calibration import calibrate
from scoreinfer.comparison import Comparison, compare
from scoreinfer.draws import Draws
from scoreinfer.evidence.certificate import Certificate
from scoreinfer.filters import FilterRun, extend, filter  # noqa: A004
from scoreinfer.mcmc import ScoreSDE, certify
from scoreinfer.model import PhysicsPath, StateSpace, check, from_numpyro
from scoreinfer.posterior import NPSE, SMDP, PathPosterior, Posterior, fit, load
from scoreinfer.problem import Problem

try:
    __version__ = version("scoreinfer")
except PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "NPSE",
    "SMDP",
    "Certificate",
    "Comparison",
    "Draws",
    "FilterRun",
    "PathPosterior",
    "PhysicsPath",
    "Posterior",
    "Problem",
    "ScoreSDE",
    "StateSpace",
    "calibrate",
    "calibration",
    "certify",
    "check",
    "compare",
    "errors",
    "extend",
    "filter",
    "filters",
    "fit",
    "from_numpyro",
    "load",
    "mcmc",
    "nets",
    "paths",
    "process",
    "samplers",
    "simulators",
    "to_arviz",
]
