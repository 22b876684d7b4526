"""Samplers: learned proposals, with the exact weight of every draw."""
