"""An embedding of groups of rows, of which groups and rows may be missing."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scoreinfer._typing import PRESENT, Key, Sites
from scoreinfer.nets.rows import MaskedRows


class MaskedGroups(eqx.Module):
    """An embedding of a set of groups, each a set of rows: one `MaskedRows` in every group, another one over groups.

    The groups lie along the first axis of a site, their rows along the second. The result holds the context of all
    groups, and the token of every group, which is zero if none of its rows is there.

    Args:
        key: random key of the weights.
        num_groups: number of groups, with those that are missing.
        num_rows: number of rows of each, with those that are missing.
        num_entry: numbers per row, over all sites.
        num_covariates: numbers per group that belong to no row.
        num_other: numbers that belong to no group.
        width: width of the networks within groups, and length of what they add to a token.
    """

    within: MaskedRows
    over: MaskedRows
    num_groups: int = eqx.field(static=True)

    def __init__(
        self,
        key: Key,
        num_groups: int,
        num_rows: int,
        num_entry: int,
        num_covariates: int,
        num_other: int,
        *,
        width: int = 16,
    ):
        for_within, for_over = jax.random.split(key)
        self.num_groups = num_groups
        self.within = MaskedRows(for_within, num_rows, num_entry, num_covariates, 1, width=width, num_out=width)
        self.over = MaskedRows(for_over, num_groups, self.num_token + 1, num_other, 1)

    @property
    def num_token(self) -> int:
        """Length of the token of a group."""
        return int(self.within.outer.out_features) + self.within.num_summary

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return the arguments that make such an embedding, except the key."""
        within = self.within
        sizes = {"num_groups": self.num_groups, "num_rows": within.num_rows, "num_entry": within.num_entry}
        others = {"num_covariates": within.num_other, "num_other": self.over.num_other}
        return sizes | others | {"width": within.outer.out_features}

    def __call__(self, sites: Sites) -> Float[Array, " features"]:
        """Embed the groups."""
        context, tokens, present = self.parts(sites)
        return jnp.concatenate([context, tokens.ravel(), present.astype(jnp.float32)])

    def parts(
        self, sites: Sites
    ) -> tuple[Float[Array, " context"], Float[Array, "groups token"], Bool[Array, " groups"]]:
        """Compute the context of all groups, their tokens, and which of them are there."""
        tokens, present, other = self._tokens(sites)
        return self.over(other), tokens, present

    def summary(self, sites: Sites) -> Float[Array, " summary"]:
        """Compute means over groups (see `MaskedRows`)."""
        return self.over.summary(self._tokens(sites)[2])

    def _tokens(self, sites: Sites) -> tuple[Array, Array, Sites]:
        grouped = {name: value for name, value in sites.items() if jnp.shape(value)[:1] == (self.num_groups,)}
        masks = [jnp.reshape(value, (self.num_groups, -1)) for name, value in grouped.items() if name.endswith(PRESENT)]
        present = jnp.ones(self.num_groups, bool)
        if masks:
            present = jnp.concatenate(masks, axis=1).max(axis=1) > 0
        tokens = jnp.where(present[:, None], jax.vmap(self.within)(grouped), 0.0)
        other = {name: value for name, value in sites.items() if name not in grouped}
        return tokens, present, other | {"tokens": tokens, "tokens" + PRESENT: present[:, None].astype(jnp.float32)}
