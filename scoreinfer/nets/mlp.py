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
    layer = eqx.filter_eval_shape(eqx.nn.Linear, num_in, num_out, dtype=jnp.float32, key=key)
    weight = gain / num_in**0.5 * jax.random.normal(key, (num_out, num_in), jnp.float32)
    return eqx.tree_at(lambda tree: (tree.weight, tree.bias), layer, (weight, jnp.zeros(num_out, jnp.float32)))


def _normalise(x: Float[Array, " width"]) -> Float[Array, " width"]:
    return (x - x.mean()) * jax.lax.rsqrt(x.var() + 1e-5)


class ResidualMLP(eqx.Module):
    """A residual perceptron x -> output whose last layer starts at zero."""

    first: eqx.nn.Linear
    blocks: tuple[tuple[eqx.nn.Linear, eqx.nn.Linear], ...]
    last: eqx.nn.Linear

    def __init__(self, key: Key, num_in: int, num_out: int, *, width: int = 128, depth: int = 2):
        keys = jax.random.split(key, 2 * depth + 2)
        self.first = linear(keys[0], num_in, width)
        self.blocks = tuple(
            (linear(keys[2 * i + 1], width, width, 1.4), linear(keys[2 * i + 2], width, width, 0.5))
            for i in range(depth)
        )
        self.last = linear(keys[-1], width, num_out, 0.0)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What the network was made with, besides its inputs and outputs."""
        return {"width": self.first.out_features, "depth": len(self.blocks)}

    def __call__(self, x: Float[Array, " num_in"]) -> Float[Array, " num_out"]:
        """Compute the output of the network at ``x``."""
        h = self.first(x)
        for up, down in self.blocks:
            h = h + down(jax.nn.silu(up(_normalise(h))))
        return self.last(_normalise(h))


class ConditionalMLP(eqx.Module):
    """A residual perceptron with adaptive layer norm from the noise level and a context vector.

    The modulation depends on level and context alone, so drawing many samples for one observation computes it
    once, not once per draw.

    With ``octaves``, a number for every input, it also sees sines and cosines of w x_i, w = 2, 4, ..., 2^octaves_i, for
    densities with details far narrower than their whole. Each is faded by what is left of it under the noise:
    E cos(w e) for noise e of variance s^2 / (1 + s^2), which is what an input c_in (x_0 + s e) carries.

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
        *keys, for_waves = jax.random.split(key, 2 * depth + 6)
        half = 16
        self.width = width
        self.frequencies = jnp.exp(jnp.linspace(-1.5, 1.5, half)).astype(jnp.float32)
        self.condition = linear(keys[0], 2 * half + num_context, width)
        self.mix = linear(keys[1], width, width, 1.4)
        self.octaves = octaves
        self.first = linear(keys[2], num_in, width)
        self.waves = linear(for_waves, 2 * sum(octaves), width, 0.3) if sum(octaves) else None
        self.modulations = linear(keys[3], width, 2 * depth * width, 0.1)
        self.blocks = tuple(
            (linear(keys[2 * i + 4], width, width, 1.4), linear(keys[2 * i + 5], width, width, 0.5))
            for i in range(depth)
        )
        self.last = linear(keys[-1], width, num_out, 0.0)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What the network was made with, besides its inputs and outputs."""
        return {"width": self.width, "depth": len(self.blocks), "octaves": list(self.octaves)}

    def __call__(
        self, x: Float[Array, " num_in"], log_level: Float[Array, ""], context: Float[Array, " num_context"]
    ) -> Float[Array, " num_out"]:
        """Compute the output at ``x`` for one noise level and context."""
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
        """Compute sines and cosines of ``x``, faded as the noise level says."""
        which = np.repeat(np.arange(len(self.octaves)), self.octaves)
        frequency = np.concatenate([2.0 ** np.arange(1, num + 1, dtype=np.float32) for num in self.octaves])
        fade = jnp.exp(-0.5 * frequency**2 * jax.nn.sigmoid(2 * log_level))
        phase = frequency * x[which]
        return jnp.concatenate([fade * jnp.sin(phase), fade * jnp.cos(phase)])
