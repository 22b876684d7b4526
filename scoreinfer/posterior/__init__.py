"""Posteriors: what a training leaves, to draw from, certify and save."""
