"""Type aliases that all modules share."""

from jaxtyping import Array, Key as _TypedKey, PyTree, UInt32

Key = _TypedKey[Array, ""] | UInt32[Array, "2"]
"""One random key, made by ``jax.random.key`` or by ``jax.random.PRNGKey``."""

Sites = dict[str, Array]
"""Values by site name."""

Values = dict[str, PyTree[Array]]
"""Values by site name. The value of a deterministic site may be a tree of arrays."""

PRESENT = " present"
"""Suffix of encoded masks: 1 for the entries of an observed site that are there, 0 for those that are missing."""
