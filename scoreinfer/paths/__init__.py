"""Physics in reverse: backward kernels from a score, learned backward kernels, and paths drawn backwards in time."""

from scoreinfer.paths.controls import path_controls
from scoreinfer.paths.frame import Context, Frame, Moments, linear_frame
from scoreinfer.paths.gaussian import (
    AbstractBackward,
    Kernel,
    ReverseEuler,
    ThroughPhysics,
    draw_path,
    log_path,
    probability_flow,
)
from scoreinfer.paths.learned import (
    LearnedBackward,
    LearnedScore,
    OnWaves,
    corrected_path,
    elapsed,
    heads,
    through_time,
)
from scoreinfer.paths.losses import Windows

__all__ = [
    "AbstractBackward",
    "Context",
    "Frame",
    "Kernel",
    "LearnedBackward",
    "LearnedScore",
    "Moments",
    "OnWaves",
    "ReverseEuler",
    "ThroughPhysics",
    "Windows",
    "corrected_path",
    "draw_path",
    "elapsed",
    "heads",
    "linear_frame",
    "log_path",
    "path_controls",
    "probability_flow",
    "through_time",
]
