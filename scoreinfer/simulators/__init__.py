"""Simulators: programs outside JAX that run on prior draws. Their results are stored on disk."""

from scoreinfer.simulators.record import record
from scoreinfer.simulators.run import simulate
from scoreinfer.simulators.store import Store

__all__ = ["Store", "record", "simulate"]
