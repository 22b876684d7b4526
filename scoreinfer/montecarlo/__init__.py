"""Monte Carlo on densities alone: weights, resampling, particle loops, moves, tempering. Nothing here knows a score."""
