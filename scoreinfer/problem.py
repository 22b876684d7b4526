"""Problem: an inference problem as pure functions on one flat unconstrained vector.

Nothing here knows NumPyro. `scoreinfer.model.from_numpyro` makes a `Problem` from a model; tests make one by
hand. Every function is pure, works under ``jit``, ``vmap`` and ``grad``, and handles one draw at a time.

Notation: ``z`` is the flat unconstrained vector of all latent sites, ``y`` the dictionary of observed sites.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from scoreinfer._pickling import by_recipe
from scoreinfer._typing import Key, Sites, Values


class Site(NamedTuple):
    """One row of the table of a model's sites.

    Args:
        name: the site's name in the model.
        shape: shape of one value (batch and event dimensions).
        dtype: NumPy dtype name of one value.
        support: the support in words, such as ``positive`` or ``corr_cholesky``.
        size: number of unconstrained dimensions the site takes (0 for an observed site).
        exchangeable: axis of the value along which the entries are exchangeable (a plate), or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    support: str
    size: int = 0
    exchangeable: int | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """An inference problem on one flat unconstrained vector ``z``.

    Two problems are never equal unless they are the same object, so a `Problem` is safe as static data of a
    compiled function.

    Args:
        dim: number of unconstrained dimensions.
        latents: table of the latent sites, in the order in which they fill ``z``.
        observed: table of the observed sites (empty: the posterior is the prior).
        log_prior: log prior density of ``z``, with the bijectors' Jacobians.
        log_likelihood: log density of ``y`` given ``z``.
        constrain: latent sites (constrained) and deterministic sites, which may be trees of arrays, as a dictionary.
        latent_sites: the latent sites alone (constrained), without replaying the model.
        unconstrain: dictionary of constrained latent sites to ``z``.
        simulate: one joint draw ``(z, y)`` from prior and simulator; None where the model cannot be simulated.
        simulate_observation: ``y`` given ``z``; None where the model cannot be simulated.
        encode: observed sites to real numbers of the same sites through their own bijectors (logs of positive
            values, logits of proportions); shapes may differ from the site's.
        read: observed values from the model's own arguments ``(args, kwargs)``, or wherever else the model takes them
            from, as they are now; checked against this problem.
        has_density: False where the likelihood has no density (a stochastic simulator hidden in the model).
        not_simulable: why ``simulate`` is None, in words, else the empty string.
        is_foreign: whether the data come from a simulator outside JAX, whose runs are stored.
        pointwise_log_likelihood: log density of every observed value given ``z``, one array per observed site, as
            ArviZ wants it for leave-one-out; None where it is not known.
        model: the NumPyro model that the problem was read from, for what has to read it again; None where there is
            none.
        observation: where the data come from a foreign simulator's outputs by a known likelihood: that likelihood, as
            a problem whose flat vector is parameters and outputs side by side.
        recipe: makes the problem again, from the model and the arguments it was read with: what is pickled in its
            place. None for one that was made by hand.
    """

    dim: int
    latents: tuple[Site, ...]
    observed: tuple[Site, ...]
    log_prior: Callable[[Float[Array, " dim"]], Float[Array, ""]]
    log_likelihood: Callable[[Float[Array, " dim"], Sites], Float[Array, ""]]
    constrain: Callable[[Float[Array, " dim"]], Values]
    latent_sites: Callable[[Float[Array, " dim"]], Sites]
    unconstrain: Callable[[Sites], Float[Array, " dim"]]
    simulate: Callable[[Key], tuple[Float[Array, " dim"], Sites]] | None
    simulate_observation: Callable[[Key, Float[Array, " dim"]], Sites] | None
    encode: Callable[[Sites], Sites]
    read: Callable[[tuple, dict[str, Any]], Sites]
    has_density: bool = True
    not_simulable: str = ""
    is_foreign: bool = False
    pointwise_log_likelihood: Callable[[Float[Array, " dim"], Sites], Sites] | None = None
    model: Callable | None = None
    observation: "Problem | None" = None
    recipe: "Callable[[], Problem] | None" = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self.recipe is None else by_recipe(self.recipe)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Problem":
        return self

    def __copy__(self) -> "Problem":
        return self

    def log_joint(self, z: Float[Array, " dim"], y: Sites) -> Float[Array, ""]:
        """Compute log p(z, y), the unnormalised log posterior density in the unconstrained space."""
        return self.log_prior(z) + self.log_likelihood(z, y)


def from_potential(potential_fn: Callable[[PyTree], Float[Array, ""]], example: PyTree) -> Problem:
    """Make a problem without observations from minus the log density of any pytree like ``example``."""
    flat, unravel = ravel_pytree(example)
    return Problem(
        dim=flat.size,
        latents=(),
        observed=(),
        log_prior=lambda z: jnp.zeros((), z.dtype),
        log_likelihood=lambda z, y: -potential_fn(unravel(z)),
        constrain=unravel,
        latent_sites=unravel,
        unconstrain=lambda values: ravel_pytree(values)[0],
        simulate=None,
        simulate_observation=None,
        encode=lambda y: y,
        read=lambda args, kwargs: {},
        not_simulable="a bare density cannot be simulated.",
        recipe=partial(from_potential, potential_fn, example),
    )
