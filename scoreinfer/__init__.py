"""scoreinfer: learned score-SDE samplers for NumPyro models, corrected by the model's own density and certified."""

from importlib.metadata import PackageNotFoundError, version

from scoreinfer._errors import MisspecificationWarning, TrainingWarning, UnreadableFile, UnsupportedModel
from scoreinfer.arviz import to_arviz
from scoreinfer.calibration import SBC, CalibrationReport, c2st, calibrate, predictive_check, sbc
from scoreinfer.comparison import Comparison, compare
from scoreinfer.draws import Draws
from scoreinfer.evidence.certificate import Certificate
from scoreinfer.mcmc import MALA, ULA, AnnealedLangevin, ChainCertificate, ScoreSDE, UnderdampedLangevin, certify
from scoreinfer.model import PhysicsPath, check, from_numpyro
from scoreinfer.nets import ConvNet, DeepSet, Series
from scoreinfer.paths.losses import Windows
from scoreinfer.posterior.amortised import Posterior
from scoreinfer.posterior.fit import fit, load
from scoreinfer.posterior.paths import PathPosterior
from scoreinfer.problem import Problem
from scoreinfer.process import Physics
from scoreinfer.samplers.diffusion import ProbabilityFlow, ReverseSDE
from scoreinfer.simulators.record import record
from scoreinfer.simulators.run import simulate
from scoreinfer.simulators.store import Store

try:
    __version__ = version("scoreinfer")
except PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "MALA",
    "SBC",
    "ULA",
    "AnnealedLangevin",
    "CalibrationReport",
    "Certificate",
    "ChainCertificate",
    "Comparison",
    "ConvNet",
    "DeepSet",
    "Draws",
    "MisspecificationWarning",
    "PathPosterior",
    "Physics",
    "PhysicsPath",
    "Posterior",
    "ProbabilityFlow",
    "Problem",
    "ReverseSDE",
    "ScoreSDE",
    "Series",
    "Store",
    "TrainingWarning",
    "UnderdampedLangevin",
    "UnreadableFile",
    "UnsupportedModel",
    "Windows",
    "c2st",
    "calibrate",
    "certify",
    "check",
    "compare",
    "fit",
    "from_numpyro",
    "load",
    "predictive_check",
    "record",
    "sbc",
    "simulate",
    "to_arviz",
]
