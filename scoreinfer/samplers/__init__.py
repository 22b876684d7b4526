"""Samplers: learned and guided proposals that give every draw an exact importance weight."""

from scoreinfer.samplers.assimilation import CorrectedFlow
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted
from scoreinfer.samplers.corrector import FunctionScore, PredictorCorrector
from scoreinfer.samplers.diffusion import ProbabilityFlow, ReverseSDE
from scoreinfer.samplers.finish import HMC, AbstractFinish, ParticleGibbs
from scoreinfer.samplers.local_prior import LocalPrior
from scoreinfer.samplers.splitting import SymmetricSplitting
from scoreinfer.samplers.terms import LevelScore, flow_terms, reverse_terms
from scoreinfer.samplers.twisted import Twisted, TwistedNoise

__all__ = [
    "HMC",
    "AbstractFinish",
    "AbstractProposal",
    "CorrectedFlow",
    "FunctionScore",
    "LevelScore",
    "LocalPrior",
    "ParticleGibbs",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReverseSDE",
    "SymmetricSplitting",
    "Target",
    "Twisted",
    "TwistedNoise",
    "Weighted",
    "flow_terms",
    "reverse_terms",
]
