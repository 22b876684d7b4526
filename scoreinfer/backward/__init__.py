"""Physics in reverse: kernels from a score, learned kernels, and walks backwards in time."""

from scoreinfer.backward.kernels import (
    AbstractBackward,
    Kernel,
    ReverseEuler,
    ThroughPhysics,
    draw_path,
    log_path,
    probability_flow,
)
from scoreinfer.backward.learned import (
    Frame,
    LearnedBackward,
    LearnedScore,
    OnWaves,
    corrected_path,
    elapsed,
    heads,
    linear_frame,
    through_time,
)

__all__ = [
    "AbstractBackward",
    "Frame",
    "Kernel",
    "LearnedBackward",
    "LearnedScore",
    "OnWaves",
    "ReverseEuler",
    "ThroughPhysics",
    "corrected_path",
    "draw_path",
    "elapsed",
    "heads",
    "linear_frame",
    "log_path",
    "probability_flow",
    "through_time",
]
