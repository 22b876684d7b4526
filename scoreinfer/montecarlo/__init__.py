"""Monte Carlo on densities alone: weights, resampling, Langevin moves, tempering. Nothing here knows a score."""
