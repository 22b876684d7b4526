"""Calibration: tests whether posteriors are right, on simulated data sets whose true parameters are known."""

from scoreinfer.calibration.predictive import Discrepancy, predictive_check
from scoreinfer.calibration.ranks import SBC, sbc
from scoreinfer.calibration.report import CalibrationReport, calibrate
from scoreinfer.calibration.two_sample import c2st
from scoreinfer.calibration.uniformity import RankTest

__all__ = ["SBC", "CalibrationReport", "Discrepancy", "RankTest", "c2st", "calibrate", "predictive_check", "sbc"]
