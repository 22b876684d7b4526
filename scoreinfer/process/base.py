"""The interface of a forward process dx = drift(t, x) dt + diffusion(t) dW with additive noise.

Noise never depends on the state, so Ito and Stratonovich readings agree and every diffrax solver is legitimate.
"""

import abc

import equinox as eqx
from jaxtyping import Array, Float


class AbstractProcess(eqx.Module):
    """A forward SDE with additive noise."""

    @abc.abstractmethod
    def drift(self, t: Float[Array, ""], x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Compute the drift at time ``t`` and state ``x``."""

    @abc.abstractmethod
    def diffusion(self, t: Float[Array, ""]) -> Float[Array, "*dim"]:
        """Compute the noise amplitude g(t), one number or one for each component."""

    @abc.abstractmethod
    def step(
        self, t0: Float[Array, ""], t1: Float[Array, ""], x: Float[Array, " dim"]
    ) -> tuple[Float[Array, " dim"], Float[Array, "*dim"]]:
        """Compute mean and variance (one number, or one each) of the transition from ``x`` at ``t0`` to ``t1``."""
