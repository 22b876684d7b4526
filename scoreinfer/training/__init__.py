"""Training: simulations, losses, and the loop that minimises a loss."""
