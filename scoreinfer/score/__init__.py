"""Scores: grad log p of a noisy draw at every noise level, in closed form, learned, or guided by a likelihood."""

from scoreinfer.score.analytic import DensityScore, EnsembleScore, GaussianScore, MixtureScore
from scoreinfer.score.base import AbstractScore, Moments
from scoreinfer.score.ensemble import LocalGaussianScore, PublishedScore, ShrunkenMixtureScore
from scoreinfer.score.guidance import AbstractGuidance, MomentMatched, Published, Steered
from scoreinfer.score.likelihood import AbstractLikelihood, DensityLikelihood, GaussianLikelihood, SiteLikelihood
from scoreinfer.score.local import LocalScore
from scoreinfer.score.network import NeuralScore, Unconditional

__all__ = [
    "AbstractGuidance",
    "AbstractLikelihood",
    "AbstractScore",
    "DensityLikelihood",
    "DensityScore",
    "EnsembleScore",
    "GaussianLikelihood",
    "GaussianScore",
    "LocalGaussianScore",
    "LocalScore",
    "MixtureScore",
    "MomentMatched",
    "Moments",
    "NeuralScore",
    "Published",
    "PublishedScore",
    "ShrunkenMixtureScore",
    "SiteLikelihood",
    "Steered",
    "Unconditional",
]
