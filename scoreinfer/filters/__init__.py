"""Filters: the state of a NumPyro model in time, given the observations so far.

A filter moves an ensemble of states by the model's own transition, and puts one observation after the other into it.
"""

from scoreinfer.filters.base import AbstractFilter, Analysis, Members, Predictive

__all__ = ["AbstractFilter", "Analysis", "Members", "Predictive"]
