"""Training: simulations, losses and the one loop that minimises them."""
