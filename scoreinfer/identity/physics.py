"""Identity of physics: two processes are compared by their times, their noise, and their forward and reverse steps."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer.process import PhysicsProcess


@eqx.filter_jit
def probe_physics(process: PhysicsProcess, states: Float[Array, "steps dim"]) -> dict[str, Any]:
    """Compute the times, the noise, and the forward and reverse steps of a process.

    Args:
        process: the process.
        states: the states that the steps start from, one for each step.
    """
    steps = jnp.arange(process.num_steps)
    return {
        "times": process.ts,
        "noise": process.scale,
        "step": jax.vmap(process.forward)(steps, states),
        "reverse": jax.vmap(process.reverse)(steps, states),
    }


def check_physics(
    stored: Mapping[str, Any],
    process: PhysicsProcess,
    states: Float[Array, "steps dim"],
    spread: Float[Array, "steps dim"],
) -> None:
    """Check that a process has the stored times, noise and steps.

    Args:
        stored: the result of `probe_physics`.
        process: the process to check.
        states: the states that the steps start from.
        spread: standard deviations of the states. Steps are compared in these units.

    Raises:
        ValueError: if something differs. The message names it.
    """
    own = probe_physics(process, states)
    for name, value in stored.items():
        unit = 1.0 if name in ("times", "noise") else np.asarray(spread)
        if not np.allclose(np.asarray(own[name]) / unit, np.asarray(value) / unit, 1e-3, 1e-4, equal_nan=True):
            raise ValueError(
                f"This posterior was learned for another model: the `{name}` of its physics differs. Pass the model, "
                "its arguments and the `reverse`, `waves` and `separate` that it was fitted with."
            )
