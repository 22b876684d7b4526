"""Type aliases shared by every room."""

from jaxtyping import Array, Key as _TypedKey, UInt32

Key = _TypedKey[Array, ""] | UInt32[Array, "2"]
"""One random key, of either style: ``jax.random.key`` or ``jax.random.PRNGKey``."""

Sites = dict[str, Array]
"""Values by site name."""
