"""Residual multilayer perceptrons, plain and modulated by a condition. All weights are float32."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._typing import Key


def linear(key: Key, num_in: int, num_out: int, gain: float = 1.0) -> eqx.nn.Linear:
    """Make a float32 linear layer with weights of variance gain^2 / num_in and zero bias."""
    return linears(key, (num_in, num_out, gain))[0]


def linears(key: Key, *sizes: tuple[int, int, float]) -> list[eqx.nn.Linear]:
    """Make linear layers, given (num_in, num_out, gain) of each (see `linear`).

    All weights are cut from one draw, because every draw takes a third of a second to compile.
    """
    ends = np.cumsum([num_in * num_out for num_in, num_out, _ in sizes])
    parts = jnp.split(jax.random.normal(key, (int(ends[-1]),), jnp.float32), ends[:-1])
    layers = []
    for (num_in, num_out, gain), part in zip(sizes, parts, strict=True):
        layer = eqx.filter_eval_shape(eqx.nn.Linear, num_in, num_out, dtype=jnp.float32, key=key)
        weight, bias = gain / num_in**0.5 * part.reshape(num_out, num_in), jnp.zeros(num_out, jnp.float32)
        layers.append(eqx.tree_at(lambda tree: (tree.weight, tree.bias), layer, (weight, bias)))
    return layers


def _normalise(x: Float[Array, " width"]) -> Float[Array, " width"]:
    return (x - x.mean()) * jax.lax.rsqrt(x.var() + 1e-5)


class ResidualMLP(eqx.Module):
    """A residual multilayer perceptron whose last layer is zero at the start, so that its first output is zero.

    Args:
        key: random key of the weights.
        num_in: length of the input.
        num_out: length of the output.
        width: width of the hidden layers.
        depth: number of residual blocks.
    """

    first: eqx.nn.Linear
    blocks: tuple[tuple[eqx.nn.Linear, eqx.nn.Linear], ...]
    last: eqx.nn.Linear

    def __init__(self, key: Key, num_in: int, num_out: int, *, width: int = 128, depth: int = 2):
        inner = depth * [(width, width, 1.4), (width, width, 0.5)]
        self.first, *layers, self.last = linears(key, (num_in, width, 1.0), *inner, (width, num_out, 0.0))
        self.blocks = tuple(zip(layers[::2], layers[1::2], strict=True))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return the arguments that make such a network, except the key and the lengths of inputs and outputs."""
        return {"width": self.first.out_features, "depth": len(self.blocks)}

    def __call__(self, x: Float[Array, " num_in"]) -> Float[Array, " num_out"]:
        """Compute the output of the network at ``x``."""
        h = self.first(x)
        for up, down in self.blocks:
            h = h + down(jax.nn.silu(up(_normalise(h))))
        return self.last(_normalise(h))


class ConditionalMLP(eqx.Module):
    """A residual multilayer perceptron, modulated by the noise level and a context vector (adaptive layer norm).

    The modulation depends only on level and context. It is therefore computed once for many draws of one observation,
    not once per draw.

    With ``octaves`` the network also sees, for every input x_i,

        a(w) sin(w x_i) and a(w) cos(w x_i),   w = 2, 4, ..., 2^octaves_i,   a(w) = exp(-w^2 s^2 / (2 (1 + s^2))).

    These features help with densities that have details far narrower than the whole. The factor a(w) = E cos(w e) fades
    what the noise hides: e has variance s^2 / (1 + s^2), the noise variance of an input c_in (x_0 + s e).

    Args:
        key: random key of the weights.
        num_in: length of the input.
        num_context: length of the context vector.
        num_out: length of the output.
        width: width of the hidden layers.
        depth: number of residual blocks.
        octaves: number of octaves of sine features for every input. Empty means no sine features.

    References: Peebles and Xie 2023, arXiv 2212.09748, section 3.2 (adaptive layer norm, zero initialised); Barron et
    al. 2021, arXiv 2103.13415, equation 14 (faded features).
    """

    frequencies: Float[Array, " half"]
    condition: eqx.nn.Linear
    mix: eqx.nn.Linear
    first: eqx.nn.Linear
    waves: eqx.nn.Linear | None
    modulations: eqx.nn.Linear
    blocks: tuple[tuple[eqx.nn.Linear, eqx.nn.Linear], ...]
    last: eqx.nn.Linear
    width: int = eqx.field(static=True)
    octaves: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        key: Key,
        num_in: int,
        num_context: int,
        num_out: int,
        *,
        width: int = 128,
        depth: int = 4,
        octaves: tuple[int, ...] = (),
    ):
        half, num_waves = 16, 2 * sum(octaves)
        self.width, self.octaves = width, octaves
        self.frequencies = jnp.exp(jnp.linspace(-1.5, 1.5, half)).astype(jnp.float32)
        self.condition, self.mix, self.first, waves, self.modulations, *layers, self.last = linears(
            key, (2 * half + num_context, width, 1.0), (width, width, 1.4), (num_in, width, 1.0),
            (max(num_waves, 1), width, 0.3), (width, 2 * depth * width, 0.1),
            *depth * [(width, width, 1.4), (width, width, 0.5)], (width, num_out, 0.0),
        )  # fmt: skip
        self.waves = waves if num_waves else None
        self.blocks = tuple(zip(layers[::2], layers[1::2], strict=True))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return the arguments that make such a network, except the key and the lengths of inputs and outputs."""
        return {"width": self.width, "depth": len(self.blocks), "octaves": list(self.octaves)}

    def __call__(
        self, x: Float[Array, " num_in"], log_level: Float[Array, ""], context: Float[Array, " num_context"]
    ) -> Float[Array, " num_out"]:
        """Compute the output at ``x`` for one log noise level and context."""
        phase = log_level * jax.lax.stop_gradient(self.frequencies)
        features = jnp.concatenate([jnp.sin(phase), jnp.cos(phase), context.astype(jnp.float32)])
        condition = self.mix(jax.nn.silu(self.condition(features)))
        modulations = self.modulations(jax.nn.silu(condition)).reshape(len(self.blocks), 2, self.width)
        h = self.first(x) + condition
        if self.waves is not None:
            h = h + self.waves(self._faded_waves(x, log_level))
        for (up, down), (shift, scale) in zip(self.blocks, modulations, strict=True):
            h = h + down(jax.nn.silu(up(_normalise(h) * (1 + scale) + shift)))
        return self.last(_normalise(h))

    def _faded_waves(self, x: Float[Array, " num_in"], log_level: Float[Array, ""]) -> Float[Array, " waves"]:
        """Compute the sine and cosine features of ``x``, faded by the noise level."""
        which = np.repeat(np.arange(len(self.octaves)), self.octaves)
        frequency = np.concatenate([2.0 ** np.arange(1, num + 1, dtype=np.float32) for num in self.octaves])
        fade = jnp.exp(-0.5 * frequency**2 * jax.nn.sigmoid(2 * log_level))
        phase = frequency * x[which]
        return jnp.concatenate([fade * jnp.sin(phase), fade * jnp.cos(phase)])
