"""Bijections: invertible maps from a space in which the posterior is nearly normal to the space of the posterior."""
