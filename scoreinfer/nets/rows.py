"""Embeddings of rows of which some are missing: sets, and series at irregular times."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scoreinfer._typing import PRESENT, Key, Sites
from scoreinfer.nets.embedding import flatten
from scoreinfer.nets.mlp import ResidualMLP, linear


class MaskedRows(eqx.Module):
    """An embedding of rows x_i, i in S, where S is the set of rows that are there.

    The result is A [mean f(x_i), log(1 + sum exp f(x_i)), s], with a network f, a linear layer A, and a summary s: the
    means of x_i and of their squares, log(1 + n) of the number n of rows, and all sites that have no rows. A site has
    rows if its first axis has ``num_rows`` entries; a row is there if one of its entries is. A row that is missing
    changes nothing.

    With a ``window`` of two, x_i also holds the row before it that is there, the differences of both, and the position
    i: then the embedding knows the order of the rows, and the gaps between their times.

    Args:
        key: random key of the weights.
        num_rows: number of rows, with those that are missing.
        num_entry: numbers per row, over all sites.
        num_other: numbers without rows.
        window: 1 for a set, 2 if the order of the rows matters.
        width: width of f.
        num_out: length of A's output.

    References: Zaheer et al. 2017, arXiv 1703.06114, theorem 2.

    Example:
        >>> net, there = MaskedRows(jax.random.key(0), 3, 2, 0, 1), jnp.array([1.0, 1.0, 0.0])
        >>> one, other = (net({"y": jnp.array([0.5, 2.0, gone]), "y present": there}) for gone in (0.0, 7.0))
        >>> bool((one == other).all())
        True
    """

    inner: ResidualMLP
    outer: eqx.nn.Linear
    num_rows: int = eqx.field(static=True)
    num_entry: int = eqx.field(static=True)
    num_other: int = eqx.field(static=True)
    window: int = eqx.field(static=True)

    def __init__(
        self,
        key: Key,
        num_rows: int,
        num_entry: int,
        num_other: int,
        window: int,
        *,
        width: int = 32,
        num_out: int = 48,
    ):
        self.num_rows, self.num_entry, self.num_other, self.window = num_rows, num_entry, num_other, window
        first, last, outer = jax.random.split(key, 3)
        num_in = 3 * num_entry + 2 if window > 1 else num_entry
        inner = ResidualMLP(first, num_in, width, width=width, depth=1)
        self.inner = eqx.tree_at(lambda net: net.last, inner, linear(last, width, width))
        self.outer = linear(outer, 2 * width + self.num_summary, num_out)

    @property
    def num_summary(self) -> int:
        """Length of the summary."""
        return (3 if self.window > 1 else 2) * self.num_entry + 1 + self.num_other

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return the arguments that make such an embedding, except the key."""
        sizes = {"num_rows": self.num_rows, "num_entry": self.num_entry, "num_other": self.num_other}
        inner = self.inner.first.out_features
        return sizes | {"window": self.window, "width": inner, "num_out": self.outer.out_features}

    def __call__(self, sites: Sites) -> Float[Array, " features"]:
        """Embed the rows."""
        rows, present, other = self._split(sites)
        values = jax.vmap(self.inner)(self._with_lags(rows, present) if self.window > 1 else rows)
        weight = present[:, None].astype(jnp.float32)
        mean = (weight * values).sum(0) / jnp.maximum(weight.sum(), 1.0)
        soft = jax.nn.logsumexp(jnp.concatenate([jnp.where(weight > 0, values, -jnp.inf), 0 * values[:1]]), axis=0)
        summary = self._summary(rows, present, other)
        return jnp.concatenate([self.outer(jnp.concatenate([mean, soft, summary])), summary])

    def summary(self, sites: Sites) -> Float[Array, " summary"]:
        """Compute the summary s."""
        return self._summary(*self._split(sites))

    def _split(self, sites: Sites) -> tuple[Float[Array, "rows entry"], Bool[Array, " rows"], Float[Array, " other"]]:
        """Split the sites into rows, which of these are there, and the rest."""
        has_rows = {name: jnp.ndim(value) > 0 and jnp.shape(value)[0] == self.num_rows for name, value in sites.items()}
        columns = [jnp.reshape(sites[name], (self.num_rows, -1)) for name in sorted(sites) if has_rows[name]]
        masks = [sites[name] for name in sorted(sites) if has_rows[name] and name.endswith(PRESENT)]
        present = jnp.ones(self.num_rows, bool)
        if masks:
            present = jnp.concatenate([jnp.reshape(mask, (self.num_rows, -1)) for mask in masks], axis=1).max(1) > 0
        rows = jnp.where(present[:, None], jnp.concatenate(columns, axis=1).astype(jnp.float32), 0.0)
        return rows, present, flatten({name: value for name, value in sites.items() if not has_rows[name]})

    def _summary(self, rows: Array, present: Array, other: Array) -> Array:
        num = present.sum().astype(jnp.float32)
        moments = [rows, rows**2] + ([rows * _last(rows, present)[0]] if self.window > 1 else [])
        means = jnp.concatenate(moments, axis=1).sum(0) / jnp.maximum(num, 1.0)
        return jnp.concatenate([means, jnp.log1p(num)[None], other])

    def _with_lags(self, rows: Array, present: Array) -> Array:
        last, exists = _last(rows, present)
        gap = jnp.where(exists, rows - last, 0.0)
        gap = jnp.sign(gap) * jnp.log1p(jnp.abs(gap) * self.num_rows)  # neighbours are near in time
        position = jnp.arange(self.num_rows, dtype=jnp.float32) / self.num_rows
        return jnp.concatenate([rows, last, gap, exists, position[:, None]], axis=1)


def _last(rows: Float[Array, "rows entry"], present: Bool[Array, " rows"]) -> tuple[Array, Bool[Array, "rows 1"]]:
    """Find the row before every row that is there (else zeros), and whether there is one."""
    at = jnp.where(present, jnp.arange(present.size), -1)
    last = jnp.concatenate([jnp.full(1, -1), jax.lax.cummax(at)[:-1]])
    exists = last[:, None] >= 0
    return jnp.where(exists, rows[jnp.maximum(last, 0)], 0.0), exists
