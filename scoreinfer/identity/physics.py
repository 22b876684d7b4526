"""Physics: two processes are told apart by their times, their noise, and their steps forward and back."""

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
    """Compute the times and the noise of a process, and its steps forward and back from one state for each step."""
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
    """Check that a process is the one that was probed.

    Args:
        stored: what `probe_physics` computed.
        process: the process at hand.
        states: the states that steps are taken from.
        spread: their standard deviations, in units of which steps are compared.

    Raises:
        ValueError: the message names what differs.
    """
    own = probe_physics(process, states)
    for name, value in stored.items():
        unit = 1.0 if name in ("times", "noise") else np.asarray(spread)
        if not np.allclose(np.asarray(own[name]) / unit, np.asarray(value) / unit, 1e-3, 1e-4, equal_nan=True):
            raise ValueError(
                f"This posterior was learned for another model: the `{name}` of its physics differs. Pass the model, "
                "its arguments and the `reverse`, `waves` and `separate` it was fitted with."
            )
