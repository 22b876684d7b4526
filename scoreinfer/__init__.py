"""scoreinfer: learned score-SDE samplers for NumPyro models.

The model's own density corrects the draws, and a certificate says whether they can be trusted.
"""

from importlib.metadata import PackageNotFoundError, version

from scoreinfer import calibration, errors, filters, mcmc, nets, paths, process, samplers, score, simulators
from scoreinfer._devices import use_devices
from scoreinfer._threads import provide_threads
from scoreinfer.arviz import to_arviz
from scoreinfer.calibration import calibrate
from scoreinfer.comparison import Comparison, compare
from scoreinfer.draws import Draws
from scoreinfer.evidence.certificate import Certificate
from scoreinfer.filters import FilterCertificate, FilterRun, extend, filter, smooth, twin  # noqa: A004
from scoreinfer.mcmc import ScoreSDE, certify
from scoreinfer.model import PhysicsPath, ScorePrior, StateSpace, check, from_numpyro, score_prior
from scoreinfer.posterior import (
    NPSE,
    SDA,
    SMDP,
    Guided,
    PathPosterior,
    Posterior,
    fit,
    fit_local,
    fit_score,
    load,
    load_score,
    save_score,
)
from scoreinfer.problem import Problem
from scoreinfer.reweighing import bridge, reweigh, sensitivity

provide_threads()
try:
    __version__ = version("scoreinfer")
except PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "NPSE",
    "SDA",
    "SMDP",
    "Certificate",
    "Comparison",
    "Draws",
    "FilterCertificate",
    "FilterRun",
    "Guided",
    "PathPosterior",
    "PhysicsPath",
    "Posterior",
    "Problem",
    "ScorePrior",
    "ScoreSDE",
    "StateSpace",
    "bridge",
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
    "fit_local",
    "fit_score",
    "from_numpyro",
    "load",
    "load_score",
    "mcmc",
    "nets",
    "paths",
    "process",
    "reweigh",
    "samplers",
    "save_score",
    "score",
    "score_prior",
    "sensitivity",
    "simulators",
    "smooth",
    "to_arviz",
    "twin",
    "use_devices",
]
