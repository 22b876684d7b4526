"""Convolutional networks for fields on one- and two-dimensional grids. All weights are float32."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.nets.mlp import linear

PADDING_MODES = {"periodic": "wrap", "dirichlet": "constant", "neumann": "edge"}
"""Boundary conditions, and the modes of `jax.numpy.pad` that implement them."""


class ConvNet(eqx.Module):
    """A dilated residual convolutional network for a field, modulated by a level and a context vector.

    Inputs and outputs are flat vectors, as for `ConditionalMLP`: one or more fields of ``shape``, concatenated. Every
    block normalises each grid point separately. The last layer is linear in the sum of the blocks, so the network can
    represent linear maps within its receptive field. With periodic padding it commutes with shifts.

    With ``levels`` above 1 it is a U-Net. Each grid but the coarsest has two groups of blocks. Between them, the field
    is averaged to a grid half as fine, the same is done there, and the change is added back. With periodic padding it
    then commutes with shifts by multiples of 2^(levels - 1).

    Use it as ``SMDP(model, site, net=ConvNet(key, shape))``.

    Args:
        key: random key of the weights.
        shape: shape of one state: first the channels (the axes before the last ``num_space``), then the grid.
        num_space: number of grid axes, 1 or 2. None means all axes of ``shape``.
        padding: boundary condition: ``periodic``, ``dirichlet`` (zero beyond the grid) or ``neumann`` (the value at
            the edge).
        num_context: length of the context vector.
        num_outputs: number of fields in the output. `SMDP` needs two: means and log scales.
        physics: whether the input also holds the raw state and the physics' increment Phi(x) - x, in units of its
            noise, beside the standardised state.
        width: number of hidden channels.
        dilations: spacing of the kernel in every block; there is one block for each entry.
        kernel_size: number of kernel points along every axis; it must be odd.
        levels: number of grids. Every grid axis must be divisible by 2^(levels - 1).

    Raises:
        ValueError: if ``shape``, ``num_space`` and ``levels`` do not fit together, if ``padding`` is not one of the
            three, or if ``kernel_size`` is not odd and positive.

    Good values: dilations that double (1, 2, 4, 8) reach about 16 (kernel_size - 1) points for the cost of four blocks.
    On grids of 64 points or more, three levels reach further, for less than four times the cost of the blocks.

    References: Yu and Koltun 2016, arXiv 1511.07122 (dilated convolutions); Perez et al. 2018, arXiv 1709.07871
    (modulation); Stachenfeld et al. 2022, arXiv 2112.15275 (dilated residual networks of physics); Ronneberger et al.
    2015, arXiv 1505.04597 (U-Net).

    >>> net = ConvNet(jax.random.key(0), (16,), physics=False)
    >>> net(jnp.ones(16), jnp.float32(0.0), jnp.zeros(1)).shape
    (32,)
    """

    frequencies: Float[Array, " half"]
    condition: eqx.nn.Linear
    mix: eqx.nn.Linear
    modulations: eqx.nn.Linear
    first: eqx.nn.Linear
    blocks: tuple[tuple[eqx.nn.Linear, eqx.nn.Linear], ...]
    last: eqx.nn.Linear
    shape: tuple[int, ...] = eqx.field(static=True)
    num_space: int = eqx.field(static=True)
    padding: str = eqx.field(static=True)
    dilations: tuple[int, ...] = eqx.field(static=True)
    kernel_size: int = eqx.field(static=True)
    physics: bool = eqx.field(static=True)
    levels: int = eqx.field(static=True)

    def __init__(
        self,
        key: Key,
        shape: tuple[int, ...],
        *,
        num_space: int | None = None,
        padding: str = "periodic",
        num_context: int = 1,
        num_outputs: int = 2,
        physics: bool = True,
        width: int = 32,
        dilations: tuple[int, ...] = (1, 2, 4, 1),
        kernel_size: int = 5,
        levels: int = 1,
    ):
        num_space = len(shape) if num_space is None else num_space
        if num_space not in (1, 2) or num_space > len(shape):
            raise ValueError(
                f"`num_space` must be 1 or 2 and at most the number of axes of `shape`, got {num_space} for {shape}. "
                "Give the number of grid axes at the end of `shape`."
            )
        if padding not in PADDING_MODES:
            raise ValueError(f"`padding` must be one of {', '.join(PADDING_MODES)}, got {padding!r}.")
        if kernel_size % 2 != 1 or kernel_size < 1:
            raise ValueError(f"`kernel_size` must be odd and positive, got {kernel_size}. Use 3 or 5, for example.")
        coarsest = 2 ** (levels - 1) if levels > 0 else 0
        if coarsest == 0 or any(size % coarsest for size in shape[len(shape) - num_space :]):
            raise ValueError(
                "`levels` must be at least 1, and every grid axis must be divisible by 2^(levels - 1), got "
                f"`levels` {levels} for shape {shape}. Use fewer levels or another grid."
            )
        num_blocks = (2 * levels - 1) * len(dilations)
        keys = jax.random.split(key, 2 * num_blocks + 5)
        half, num_channels, points = 16, math.prod(shape[: len(shape) - num_space]), kernel_size**num_space
        self.shape, self.num_space, self.physics, self.levels = tuple(shape), num_space, physics, levels
        self.padding, self.dilations, self.kernel_size = padding, tuple(dilations), kernel_size
        self.frequencies = jnp.exp(jnp.linspace(-1.5, 1.5, half)).astype(jnp.float32)
        self.condition = linear(keys[0], 2 * half + num_context, width)
        self.mix = linear(keys[1], width, width, 1.4)
        self.modulations = linear(keys[2], width, (2 * num_blocks + 1) * width, 0.1)
        self.first = linear(keys[3], points * NUM_SEEN[physics] * num_channels, width)
        self.blocks = tuple(
            (linear(keys[2 * i + 4], points * width, width, 1.4), linear(keys[2 * i + 5], width, width, 0.5))
            for i in range(num_blocks)
        )
        self.last = linear(keys[-1], points * width, num_outputs * num_channels, 0.0)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return the arguments that make such a network, except the shape of the state and the context."""
        return {
            "num_space": self.num_space, "padding": self.padding, "physics": self.physics,
            "width": self.first.out_features, "dilations": list(self.dilations), "kernel_size": self.kernel_size,
            "levels": self.levels,
        }  # fmt: skip

    def __call__(
        self, x: Float[Array, " num_in"], log_level: Float[Array, ""], context: Float[Array, " num_context"]
    ) -> Float[Array, " num_out"]:
        """Compute the output at ``x`` for one level (the logarithm of a noise level, or a time) and context."""
        grid = self.shape[len(self.shape) - self.num_space :]
        phase = log_level * jax.lax.stop_gradient(self.frequencies)
        features = jnp.concatenate([jnp.sin(phase), jnp.cos(phase), context.astype(jnp.float32)])
        condition = self.mix(jax.nn.silu(self.condition(features)))
        rows = self.modulations(jax.nn.silu(condition)).reshape(2 * len(self.blocks) + 1, -1)
        h = jnp.moveaxis(x.astype(jnp.float32).reshape(-1, *grid), 0, -1)
        h = _apply(self.first, self._neighbours(h)) * (1 + rows[-1])
        h = self._on_grids(h, rows)
        return jnp.moveaxis(_apply(self.last, self._neighbours(h)), -1, 0).ravel()

    def _on_grids(
        self, h: Float[Array, "*grid width"], rows: Float[Array, "rows width"], level: int = 0
    ) -> Float[Array, "*grid width"]:
        """Apply the blocks of one grid, then those of coarser grids, then the second group of blocks of this grid."""
        h = self._run(h, rows, level)
        if level + 1 < self.levels:
            coarse = _coarsen(h, self.num_space)
            h = h + _refine(self._on_grids(coarse, rows, level + 1) - coarse, self.num_space)
            h = self._run(h, rows, 2 * self.levels - 2 - level)
        return h

    def _run(
        self, h: Float[Array, "*grid width"], rows: Float[Array, "rows width"], group: int
    ) -> Float[Array, "*grid width"]:
        """Apply one group of blocks, one block for each dilation."""
        for i, dilation in enumerate(self.dilations, group * len(self.dilations)):
            across, down = self.blocks[i]
            near = _apply(across, self._neighbours(_normalise(h), dilation))
            h = h + _apply(down, jax.nn.silu(near * (1 + rows[2 * i]) + rows[2 * i + 1]))
        return h

    def _neighbours(self, h: Float[Array, "*grid channels"], dilation: int = 1) -> Float[Array, "*grid points"]:
        """Concatenate the channels of all points under the kernel.

        The convolution is then one matrix product. XLA's own convolution is several times slower on CPUs inside a scan.
        """
        reach = dilation * (self.kernel_size // 2)
        for axis in range(self.num_space):
            width = [(0, 0)] * h.ndim
            width[axis] = (reach, reach)
            padded, size = jnp.pad(h, width, mode=PADDING_MODES[self.padding]), h.shape[axis]
            starts = range(0, 2 * reach + 1, dilation)
            h = jnp.concatenate([jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in starts], axis=-1)
        return h


NUM_SEEN = {False: 1, True: 3}
"""Number of input fields, by ``physics``: the standardised state; with physics also the raw state and the increment."""


def _apply(layer: eqx.nn.Linear, h: Float[Array, "*grid num_in"]) -> Float[Array, "*grid num_out"]:
    assert layer.bias is not None
    return h @ layer.weight.T + layer.bias


def _normalise(h: Float[Array, "*grid width"]) -> Float[Array, "*grid width"]:
    return (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)


def _coarsen(h: Float[Array, "..."], num_space: int) -> Float[Array, "..."]:
    """Average pairs of neighbours along every grid axis."""
    for axis in range(num_space):
        h = h.reshape(*h.shape[:axis], -1, 2, *h.shape[axis + 1 :]).mean(axis + 1)
    return h


def _refine(h: Float[Array, "..."], num_space: int) -> Float[Array, "..."]:
    """Repeat every point twice along every grid axis."""
    for axis in range(num_space):
        h = jnp.repeat(h, 2, axis=axis)
    return h
