"""Simulators: programs outside JAX, run on prior draws, their outcomes kept on disk."""
