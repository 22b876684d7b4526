"""scoreinfer: learned score-SDE samplers for NumPyro models, corrected by the model's own density and certified."""

from importlib.metadata import PackageNotFoundError, version

from scoreinfer._errors import MisspecificationWarning, TrainingWarning, UnreadableFile, UnsupportedModel
from scoreinfer.calibration import SBC, CalibrationReport, c2st, calibrate, predictive_check, sbc
from scoreinfer.certificate import Certificate
from scoreinfer.comparison import Comparison, compare
from scoreinfer.draws import Draws
from scoreinfer.export import to_arviz
from scoreinfer.foreign import simulate
from scoreinfer.kernels import MALA, ULA, AnnealedLangevin, ChainCertificate, ScoreSDE, UnderdampedLangevin, certify
from scoreinfer.model import PhysicsPath, check, from_numpyro
from scoreinfer.nets import ConvNet, DeepSet, Series
from scoreinfer.path_losses import Windows
from scoreinfer.paths import PathPosterior
from scoreinfer.posterior import Posterior, fit, load
from scoreinfer.problem import Problem
from scoreinfer.process import Physics
from scoreinfer.recorded import record
from scoreinfer.sampling import ProbabilityFlow, ReverseSDE
from scoreinfer.store import Store

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
