"""Scores: grad log p of a noisy draw at every noise level, in closed form or learned."""

from scoreinfer.score.analytic import EnsembleScore, GaussianScore, MixtureScore
from scoreinfer.score.base import AbstractScore
from scoreinfer.score.ensemble import LocalGaussianScore, PublishedScore, ShrunkenMixtureScore
from scoreinfer.score.network import NeuralScore

__all__ = [
    "AbstractScore",
    "EnsembleScore",
    "GaussianScore",
    "LocalGaussianScore",
    "MixtureScore",
    "NeuralScore",
    "PublishedScore",
    "ShrunkenMixtureScore",
]
