"""Bijections: invertible maps between the space of the posterior and one in which it looks like a normal density."""
