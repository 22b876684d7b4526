"""Samplers: learned proposals, with the exact weight of every draw."""

from scoreinfer.samplers.base import AbstractProposal, Target, Weighted
from scoreinfer.samplers.diffusion import ProbabilityFlow, ReverseSDE

__all__ = ["AbstractProposal", "ProbabilityFlow", "ReverseSDE", "Target", "Weighted"]
