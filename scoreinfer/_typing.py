"""Type aliases shared by every room."""

from jaxtyping import Array, Key as _TypedKey, PyTree, UInt32

Key = _TypedKey[Array, ""] | UInt32[Array, "2"]
"""One random key, of either style: ``jax.random.key`` or ``jax.random.PRNGKey``."""

Sites = dict[str, Array]
"""Values by site name."""

Values = dict[str, PyTree[Array]]
"""Values by site name, where deterministic sites may be trees of arrays."""
