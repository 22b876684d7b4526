"""Simulators: programs outside JAX that run on prior draws, or move members. Results on prior draws are stored."""

from scoreinfer.simulators.record import record
from scoreinfer.simulators.run import simulate
from scoreinfer.simulators.store import Store
from scoreinfer.simulators.transition import foreign_transition

__all__ = ["Store", "foreign_transition", "record", "simulate"]
