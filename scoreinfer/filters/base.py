"""The protocol of a filter: forecast the members, then analyse them with one observation.

A filter holds N members of the state, with weights or without. From one time to the next it moves every member by the
model's own transition (`AbstractFilter.forecast`). Then it changes the members, or their weights, so that they
represent the state given the observation too (`AbstractFilter.analyse`). What it learns on the way, such as an
inflation, is its *memory*: a tree of arrays of fixed shapes.
"""

import abc
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._memory import map_rows
from scoreinfer._typing import Key
from scoreinfer.markov import Entries, MarkovModel, Observed, Sees, Time
from scoreinfer.montecarlo.weights import log_mean_weight

Memory = Any
"""A tree of arrays."""
EvidenceKind = Literal["unbiased", "approximate", "none"]
LEAST_MEMBERS = 3
"""Two members span one direction, and their variance has one degree of freedom."""


class Members(NamedTuple):
    """Members of an ensemble, or particles.

    Args:
        x: the states.
        log_weight: their log weights; the mean weight is one, so that zeros are equal weights.
    """

    x: Float[Array, "*times num dim"]
    log_weight: Float[Array, "*times num"]


class Predictive(NamedTuple):
    """The one-step forecast of every entry of an observation: a mixture of its laws given u_j + sqrt(added_k) e.

    Args:
        u: the number that each entry sees, of every forecast member.
        log_weight: log weights of the forecast members.
        added: variances that the method adds to u by itself (inflation, jumps of scale k), beyond that of the members.
        log_share: log probabilities of the scales k; one scale where the method has no jumps.
    """

    u: Float[Array, "*times num entries"]
    log_weight: Float[Array, "*times num"]
    added: Float[Array, "*times scales entries"]
    log_share: Float[Array, "*times scales"]


class Analysis(NamedTuple):
    """What an analysis returns.

    Args:
        members: the members given the observation.
        log_evidence: log p(y_k | y_1, ..., y_(k-1)), as the method estimates it.
        predictive: the forecast of the observation, made before it was used.
    """

    members: Members
    log_evidence: Float[Array, "*times"]
    predictive: Predictive


class AbstractFilter(eqx.Module):
    """A filtering method. It is frozen: what it learns stands in its memory."""

    log_evidence_kind: eqx.AbstractClassVar[EvidenceKind]
    """Whether the product of the evidences is an unbiased estimate of the model's, an approximation, or none (NaN)."""
    looks_ahead: ClassVar[bool] = False
    """Whether `forecast` looks at the observation. Then the predictive is made by other, plain transitions."""

    def check(self, model: MarkovModel) -> None:
        """Refuse a model that the method cannot filter.

        Raises:
            ValueError: if an entry of the observation sees more than one number of the state.
        """
        if Sees.WHOLE in model.observed.kinds:
            raise ValueError(
                f"`{type(self).__name__}` needs observations whose entries each see one number of the state, but entry "
                f"{model.observed.kinds.index(Sees.WHOLE)} sees more (a location and a scale, or correlated noise). "
                "Use `BootstrapFilter`, which needs the density only, or transform the data until entries are apart."
            )

    def init(self, key: Key, members: Members) -> Memory:
        """Make the memory before the first analysis; none by default."""
        return ()

    def forecast(
        self, key: Key, memory: Memory, model: MarkovModel, t0: Time, t1: Time, members: Members, y: Entries
    ) -> Members:
        """Move the members from ``t0`` to ``t1`` by the model's transition.

        A guided filter looks at the observation ``y`` at ``t1``; by default it is not used.
        """
        return simulated(key, model, t0, t1, members)

    def foresee(self, memory: Memory, t: Time, members: Members, observed: Observed) -> Predictive:
        """Forecast the observation from the forecast members, before it is used."""
        return predict(observed, t, members)

    @abc.abstractmethod
    def analyse(
        self, key: Key, memory: Memory, t: Time, members: Members, observed: Observed, y: Entries
    ) -> tuple[Memory, Analysis]:
        """Put the observation ``y`` at time ``t`` into the forecast members. One entry at least is not missing."""


def simulated(key: Key, model: MarkovModel, t0: Time, t1: Time, members: Members) -> Members:
    """Draw the members' next states from the model's transition."""
    keys = jax.random.split(key, members.log_weight.size)
    return members._replace(x=map_rows(lambda key, x: model.transition(key, t0, t1, x), None)(keys, members.x))


def predict(observed: Observed, t: Time, members: Members, added: Any = 0.0) -> Predictive:
    """Make the forecast of the observation from the forecast members."""
    u = jax.vmap(observed.predict, (None, 0))(t, members.x)
    scale = jnp.broadcast_to(jnp.asarray(added, u.dtype), (1, observed.num))
    return Predictive(u, members.log_weight, scale, jnp.zeros(1, u.dtype))


def weighed(members: Members, log_factor: Float[Array, " num"] | Float[Array, ""]) -> tuple[Members, Float[Array, ""]]:
    """Multiply the weights by factors; return the members, and the log mean weight.

    A factor that is NaN counts as zero. Where all are zero, the members become equally weighted and the log mean weight
    is minus infinity.

    >>> members, log_evidence = weighed(Members(jnp.zeros((2, 1)), jnp.zeros(2)), jnp.log(jnp.array([1.0, 3.0])))
    >>> float(jnp.exp(log_evidence)), jnp.exp(members.log_weight).tolist()
    (2.0, [0.5, 1.5])
    """
    log_weight = members.log_weight + log_factor
    log_weight = jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)
    alive = jnp.isfinite(log_weight).any()
    total = jnp.where(alive, log_mean_weight(jnp.where(alive, log_weight, 0.0)), -jnp.inf)
    return members._replace(log_weight=jnp.where(alive, log_weight - jnp.where(alive, total, 0.0), 0.0)), total
