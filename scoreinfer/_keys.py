"""Random keys for code that runs step by step, outside of compiled programs."""

import jax

from scoreinfer._typing import Key

NUM_KEYS = 8
"""Keys that `keys_of` makes: more than any caller needs."""


@jax.jit
def keys_of(key: Key) -> tuple[Key, ...]:
    """Split a key into eight, by one compiled program for all callers.

    JAX's own `split`, called outside of compiled programs, makes two programs for every number of keys.
    """
    return tuple(jax.random.split(key, NUM_KEYS))
