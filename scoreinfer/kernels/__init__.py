"""NumPyro kernels: what `numpyro.infer.MCMC` can drive."""

from scoreinfer.kernels.annealed import AnnealedLangevin
from scoreinfer.kernels.langevin import MALA, ULA, LangevinState, UnderdampedLangevin
from scoreinfer.kernels.score_sde import ScoreSDE
from scoreinfer.kernels.transition import ScoreSDEState
from scoreinfer.kernels.verdict import ChainCertificate, certify

__all__ = [
    "MALA",
    "ULA",
    "AnnealedLangevin",
    "ChainCertificate",
    "LangevinState",
    "ScoreSDE",
    "ScoreSDEState",
    "UnderdampedLangevin",
    "certify",
]
