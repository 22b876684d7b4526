"""Scores: analytic and learned estimates of grad log p at every noise level."""

from scoreinfer.score.analytic import EnsembleScore, GaussianScore, MixtureScore
from scoreinfer.score.base import AbstractScore
from scoreinfer.score.network import NeuralScore

__all__ = ["AbstractScore", "EnsembleScore", "GaussianScore", "MixtureScore", "NeuralScore"]
