"""Problem: an inference problem as pure functions on one flat unconstrained vector.

This module does not depend on NumPyro. `scoreinfer.model.from_numpyro` makes a `Problem` from a NumPyro model. Every
function of a problem is pure, works under ``jit``, ``vmap`` and ``grad``, and handles one draw.

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

NO_PROBLEM = (
    "these draws hold no problem (`draws.problem` is None, as after pickling where the problem cannot be pickled; "
    "put it back with `draws._replace(problem=posterior.problem)`)"
)
"""Reason why draws that hold no problem cannot be used."""


class Site(NamedTuple):
    """One site of a model.

    Args:
        name: the site's name in the model.
        shape: shape of one value (batch and event dimensions).
        dtype: NumPy dtype name of one value.
        support: the support in words, such as ``positive`` or ``corr_cholesky``.
        size: number of unconstrained dimensions of the site (0 for an observed site).
        exchangeable: axis of the value along which the entries are exchangeable (a plate). None means no such axis.
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

    Two problems are equal only if they are the same object. A `Problem` is therefore safe as static data of a compiled
    function.

    Args:
        dim: number of unconstrained dimensions.
        latents: the latent sites, in their order in ``z``.
        observed: the observed sites. With no observed site, the posterior is the prior.
        log_prior: log prior density of ``z``, including the log determinants of the bijectors' Jacobians.
        log_likelihood: log density of ``y`` given ``z``.
        constrain: maps ``z`` to a dictionary of the constrained latent sites and those deterministic sites that do not
            depend on ``y``. A deterministic site may be a tree of arrays.
        latent_sites: maps ``z`` to the constrained latent sites only, without running the model.
        unconstrain: maps a dictionary of constrained latent sites to ``z``.
        simulate: draws ``(z, y)`` from prior and simulator. None means the model cannot be simulated.
        simulate_observation: draws ``y`` given ``z``. None means this is not possible.
        encode: maps observed sites to real numbers, site by site, through the sites' bijectors (log of positive
            values, logit of proportions). Shapes may differ from the site's. For sites whose masks belong to a design
            these are added, with the suffix `PRESENT`.
        read: reads the observed values from the model's arguments ``(args, kwargs)``, or from attributes, closures and
            globals of the model, anew at every call. Checks them against this problem.
        has_density: False if the likelihood has no density (the model hides a stochastic simulator).
        not_simulable: the reason why ``simulate`` is None, in words; otherwise the empty string.
        is_foreign: whether the data come from a simulator outside JAX, whose runs are stored.
        pointwise_log_likelihood: log density of every observed value given ``z``, one array per observed site, in
            ArviZ's form for leave-one-out cross-validation. None means it is not known.
        site_log_prior: log prior density of every latent site given ``z``, in the constrained space: without the log
            determinants of the bijectors. None means it is not known.
        model: the NumPyro model that the problem was read from. None means there is none.
        observation: the known likelihood of the data given a foreign simulator's outputs, as a problem whose flat
            vector is the parameters followed by the outputs. None means there is no such likelihood.
        designs: the observed sites that have no density, because they are drawn with every simulation: masks, times,
            covariates. `simulate_observation` then takes the observation whose design it keeps as a third argument.
        after_data: maps ``z`` and ``y`` to the deterministic sites that depend on ``y``, of which a design is a part.
            None means there are no such sites.
        recipe: makes the problem again from the model and its arguments; it is pickled in place of the problem. None
            means the problem was made by hand.
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
    simulate_observation: Callable[..., Sites] | None
    encode: Callable[[Sites], Sites]
    read: Callable[[tuple, dict[str, Any]], Sites]
    has_density: bool = True
    not_simulable: str = ""
    is_foreign: bool = False
    pointwise_log_likelihood: Callable[[Float[Array, " dim"], Sites], Sites] | None = None
    site_log_prior: Callable[[Float[Array, " dim"]], Sites] | None = None
    model: Callable | None = None
    observation: "Problem | None" = None
    designs: tuple[str, ...] = ()
    after_data: Callable[[Float[Array, " dim"], Sites], Values] | None = None
    recipe: "Callable[[], Problem] | None" = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self.recipe is None else by_recipe(self.recipe)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Problem":
        return self

    def __copy__(self) -> "Problem":
        return self

    @property
    def no_observation(self) -> str:
        """Say why ``simulate_observation`` is None."""
        return self.not_simulable or "this model draws latent sites after its data"

    @property
    def data(self) -> tuple[Site, ...]:
        """The observed sites that have a density: all but those of the design."""
        return tuple(site for site in self.observed if site.name not in self.designs)

    def simulate_like(self, key: Key, z: Float[Array, " dim"], y: Sites) -> Sites:
        """Draw an observation given ``z``, with the design of ``y``."""
        assert self.simulate_observation is not None
        return self.simulate_observation(key, z, y) if self.designs else self.simulate_observation(key, z)

    def sites(self, z: Float[Array, " dim"], y: Sites) -> Values:
        """Compute the constrained latent sites and all deterministic sites."""
        return self.constrain(z) if self.after_data is None else self.constrain(z) | self.after_data(z, y)

    def log_joint(self, z: Float[Array, " dim"], y: Sites) -> Float[Array, ""]:
        """Compute log p(z, y), the unnormalised log posterior density in the unconstrained space."""
        return self.log_prior(z) + self.log_likelihood(z, y)


def from_potential(potential_fn: Callable[[PyTree], Float[Array, ""]], example: PyTree) -> Problem:
    """Make a problem without observations from a potential energy.

    Args:
        potential_fn: minus the log density, up to a constant, of a pytree like ``example``.
        example: a pytree with the shapes and types of the unknowns.
    """
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
        not_simulable="a bare density cannot be simulated",
        recipe=partial(from_potential, potential_fn, example),
    )
