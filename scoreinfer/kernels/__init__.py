"""NumPyro kernels: what `numpyro.infer.MCMC` can drive."""

from scoreinfer.kernels.score_sde import ScoreSDE
from scoreinfer.kernels.transition import ScoreSDEState

__all__ = ["ScoreSDE", "ScoreSDEState"]
