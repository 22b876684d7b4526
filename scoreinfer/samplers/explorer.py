"""The explorer: tempered particles that move from a reference density to one posterior."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from scoreinfer._keys import keys_of
from scoreinfer._typing import Key
from scoreinfer.montecarlo.first_draws import NUM_FIRST, draw_first, first_power, resample_first
from scoreinfer.montecarlo.langevin import LogDensity
from scoreinfer.montecarlo.moves import LangevinMoves
from scoreinfer.montecarlo.reference import AbstractReference
from scoreinfer.montecarlo.tempering import KEPT_SHARE, Tempered, advance, begin

MAX_TEMPERATURES = 1000
"""Number of temperatures after which the explorer fails. Chosen by judgement."""


class Effort(NamedTuple):
    """The amount of work for exploring and learning one posterior.

    Args:
        num_particles: number of particles of the explorer, a multiple of eight.
        max_moves: largest number of Langevin steps of a chain at every temperature (`LangevinMoves`).
        num_steps: largest number of optimiser steps.
        kept_share: share of the effective sample size that each change of temperature keeps.
        num_first: number of first draws, from which the particles are resampled.
    """

    num_particles: int = 8192
    max_moves: int = 40
    num_steps: int = 20_000
    kept_share: float = KEPT_SHARE
    num_first: int = NUM_FIRST


def moves_between(reference: AbstractReference, target: LogDensity, effort: Effort) -> LangevinMoves:
    """Make the explorer's moves."""
    return LangevinMoves(reference, target, np.array(effort.max_moves), short=not getattr(target, "is_dear", False))


def explore(
    key: Key, reference: AbstractReference, target: LogDensity, effort: Effort, *, progress_bar: bool = True
) -> Tempered:
    """Move particles from the reference to the target.

    The particles are resampled from weighted first draws of the reference. Many first draws also reach modes of small
    reference mass.

    Raises:
        FloatingPointError: if the target or its gradient is finite at no particle, or the target is not reached.

    Exactness: consistent as the number of particles grows (see `scoreinfer.montecarlo.tempering.advance`).
    """
    for_first, for_rows, key, *_ = keys_of(key)
    first = draw_first(for_first, reference, target, effort.num_first)
    if not np.isfinite(first.log_ratio).any():
        where = "the prior" if reference.is_prior else "a t distribution of scale `start_scale` around zero"
        raise FloatingPointError(
            f"The density must be finite somewhere, but it is finite at none of {first.num} draws of {where}. Check "
            "the data and the model, or change `start_scale`."
        )
    power = first_power(first, effort.num_particles)
    moves = moves_between(reference, target, effort)
    particles = begin(moves, resample_first(for_rows, first, power, effort.num_particles), power)
    with tqdm(total=1.0, desc="exploring", disable=None if progress_bar else True, leave=False) as bar:
        for _ in range(MAX_TEMPERATURES):
            key, for_pass, *_ = keys_of(key)
            before = float(particles.power)
            particles = advance(for_pass, moves, particles, np.array(effort.kept_share))
            bar.update(float(particles.power) - before)
            _check_gradient(particles.seen.target_gradient)
            if float(particles.power) == 1.0:
                return particles
    raise FloatingPointError(
        f"The explorer must reach power 1 of the density, but reached only {float(particles.power):.2g} in "
        f"{MAX_TEMPERATURES} temperatures. The density changes too fast for the particles' start. Give more "
        "informative priors or another `start_scale`."
    )


def _check_gradient(gradient: Float[Array, "num dim"]) -> None:
    if not np.isfinite(gradient).all(1).any():
        raise FloatingPointError(
            "The gradient of the density must be finite somewhere, but it is finite at none of the explorer's "
            "particles. Check the model."
        )
