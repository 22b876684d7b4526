"""NumPyro kernels: what `numpyro.infer.MCMC` can drive."""

from scoreinfer.kernels.score_sde import ScoreSDE, ScoreSDEState

__all__ = ["ScoreSDE", "ScoreSDEState"]
