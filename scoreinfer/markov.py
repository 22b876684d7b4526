r"""A state-space model on flat vectors: what filters see of a NumPyro model.

    x_0 ~ p_0,        x_k ~ f(x_k | x_(k-1)),        y_k ~ g(y_k | x_k).

The entries of an observation are independent given the state. Entry i sees one number of the state, u_i: a component, a
linear functional, or a parameter of the entry's law. A filter that knows p(y_i | u_i) needs no linearisation.
"""

import abc
import enum
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from scoreinfer._typing import Key
from scoreinfer.process.base import Gaussian

Time = Float[Array, ""]
State = Float[Array, " dim"]
Entries = Float[Array, " entries"]


class Sees(enum.Enum):
    """What one entry of an observation sees of the state.

    ``COMPONENT``: one component; u is that component. ``LINEAR``: several; u is a linear function of the state.
    ``NONLINEAR``: several; u is another function of the state. ``WHOLE``: more than one number. Then u is the entry's
    mean, the law given u is unknown, and only particle methods can use the entry.
    """

    COMPONENT = "component"
    LINEAR = "linear"
    NONLINEAR = "non-linear"
    WHOLE = "whole"


class Observed(eqx.Module):
    """The law of one observation given the state, entry by entry. A missing entry is NaN in ``y``."""

    kinds: eqx.AbstractVar[tuple[Sees, ...]]
    """What each entry sees."""
    component: eqx.AbstractVar[tuple[int, ...]]
    """The component that each entry sees; -1 where it sees no single one."""

    @property
    def num(self) -> int:
        """Number of entries."""
        return len(self.kinds)

    @abc.abstractmethod
    def present(self, t: Time) -> Bool[Array, " entries"]:
        """Say which entries exist at time ``t``; the model may mask the others."""

    def discrete(self, t: Time) -> Bool[Array, " entries"]:
        """Say which entries have a discrete law; none by default."""
        return jnp.zeros(self.num, bool)

    @abc.abstractmethod
    def predict(self, t: Time, x: State) -> Entries:
        """Compute u, the number that each entry sees."""

    @abc.abstractmethod
    def log_likelihood(self, t: Time, u: Entries, y: Entries) -> Entries:
        """Compute log p(y_i | u_i) of every entry; 0 where y_i is missing."""

    @abc.abstractmethod
    def mean(self, t: Time, u: Entries) -> Entries:
        """Compute E(y_i | u_i)."""

    @abc.abstractmethod
    def variance(self, t: Time, u: Entries) -> Entries:
        """Compute var(y_i | u_i)."""

    @abc.abstractmethod
    def cdf(self, t: Time, u: Entries, y: Entries) -> Entries:
        """Compute P(Y_i <= y_i | u_i).

        Raises:
            NotImplementedError: if NumPyro knows no distribution function of this law.
        """

    @abc.abstractmethod
    def sample(self, key: Key, t: Time, u: Entries) -> Entries:
        """Draw an observation given u."""

    @abc.abstractmethod
    def simulate(self, key: Key, t: Time, x: State) -> Entries:
        """Draw an observation given the state, whatever its entries see."""

    @abc.abstractmethod
    def log_density(self, t: Time, x: State, y: Entries) -> Float[Array, ""]:
        """Compute log g(y | x) by the model's own density, without the entries that are missing."""


class MarkovModel(eqx.Module):
    """A state-space model on flat vectors.

    Args:
        dim: number of components of a state.
        shape: shape of a state as the user writes it.
        initial: draws x_0.
        transition: draws x at ``t1`` given x at ``t0``, ``(key, t0, t1, x)``.
        observed: the law of the observation.
        log_transition: log f(x' | x) as ``(t0, t1, x, x')``. None: the transition has no density.
        moments: mean and diagonal factor of the transition, ``(t0, t1, x)``, where it is Gaussian with independent
            noise. None: it is not.
        log_initial: log p_0(x). None: it is not known.
    """

    dim: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    initial: Callable[[Key], State] = eqx.field(static=True)
    transition: Callable[[Key, Time, Time, State], State] = eqx.field(static=True)
    observed: Observed
    log_transition: Callable[[Time, Time, State, State], Float[Array, ""]] | None = eqx.field(static=True, default=None)
    moments: Callable[[Time, Time, State], Gaussian] | None = eqx.field(static=True, default=None)
    log_initial: Callable[[State], Float[Array, ""]] | None = eqx.field(static=True, default=None)


def is_missing(y: Entries) -> Bool[Array, " entries"]:
    """Say which entries are missing.

    >>> is_missing(jnp.array([1.0, jnp.nan])).tolist()
    [False, True]
    """
    return jnp.isnan(y)
