"""Reweighing: draws of one posterior serve another, with a changed prior, likelihood or data."""

from scoreinfer.reweighing.bridge import bridge
from scoreinfer.reweighing.power_scaling import Sensitivity, sensitivity
from scoreinfer.reweighing.reweigh import reweigh

__all__ = ["Sensitivity", "bridge", "reweigh", "sensitivity"]
