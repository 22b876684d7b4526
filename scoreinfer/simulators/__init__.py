"""Simulators: programs outside JAX, run on prior draws, their outcomes kept on disk."""

from scoreinfer.simulators.record import record
from scoreinfer.simulators.run import simulate
from scoreinfer.simulators.store import Store

__all__ = ["Store", "record", "simulate"]
