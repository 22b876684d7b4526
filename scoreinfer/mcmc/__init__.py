"""Kernels for `numpyro.infer.MCMC`."""

from scoreinfer.mcmc.annealed import AnnealedLangevin
from scoreinfer.mcmc.chain_certificate import ChainCertificate, certify, certify_chains
from scoreinfer.mcmc.langevin import MALA, ULA, LangevinState, UnderdampedLangevin
from scoreinfer.mcmc.particle_marginal import ParticleMarginal, ParticleMarginalState
from scoreinfer.mcmc.score_sde import ScoreSDE
from scoreinfer.mcmc.transition import ScoreSDEState

__all__ = [
    "MALA",
    "ULA",
    "AnnealedLangevin",
    "ChainCertificate",
    "LangevinState",
    "ParticleMarginal",
    "ParticleMarginalState",
    "ScoreSDE",
    "ScoreSDEState",
    "UnderdampedLangevin",
    "certify",
    "certify_chains",
]
