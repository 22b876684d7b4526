"""Samplers: learned proposals that give every draw an exact importance weight."""

from scoreinfer.samplers.base import AbstractProposal, Target, Weighted
from scoreinfer.samplers.diffusion import ProbabilityFlow, ReverseSDE

__all__ = ["AbstractProposal", "ProbabilityFlow", "ReverseSDE", "Target", "Weighted"]
