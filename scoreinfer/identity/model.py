"""Identity of models: two problems are compared by their sites, and by densities and parameters at a few points."""

from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer.problem import Problem, Site

NUM_PLACES = 3
"""Number of points at which densities are compared. Chosen by judgement."""
TOLERANCE = 1e-2
"""Allowed relative and absolute difference of densities. Chosen by judgement.

Rounding, another device or another precision may cause such differences.
"""


def describe_sites(sites: Iterable[Site]) -> list[str]:
    """Describe each site in one line: name, shape, support.

    >>> describe_sites([Site("a", (2,), "float32", "positive", 2)])
    ['a (2,) positive']
    """
    return [f"{site.name} {site.shape} {site.support}" for site in sites]


def describe_model(problem: Problem) -> dict[str, Any]:
    """Describe a problem as plain data."""
    return {
        "name": getattr(problem.model, "__qualname__", type(problem.model).__name__),
        "latents": [_site(site) for site in problem.latents],
        "observed": [_site(site) for site in problem.observed],
        "dim": problem.dim,
        "has_density": problem.has_density,
        "foreign": problem.is_foreign,
        "likelihood": problem.observation is not None,
    }


def _site(site: Site) -> dict[str, Any]:
    return site._asdict() | {"shape": list(site.shape)}


def check_sites(stored: Mapping[str, Any], problem: Problem) -> None:
    """Check that a problem has the same sites as the stored description.

    Args:
        stored: the description, made by `describe_model`.
        problem: the problem to check.

    Raises:
        ValueError: if sites differ. The message names every difference.
    """
    differences = []
    for kind, sites in (("latent", problem.latents), ("observed", problem.observed)):
        theirs = {site["name"]: site for site in stored["latents" if kind == "latent" else "observed"]}
        ours = {site.name: _site(site) for site in sites}
        differences += [f"{kind} site {name!r} is missing" for name in sorted(theirs.keys() - ours.keys())]
        differences += [f"{kind} site {name!r} is new" for name in sorted(ours.keys() - theirs.keys())]
        for name in sorted(ours.keys() & theirs.keys()):
            differences += [
                f"{kind} site {name!r} has {field} {ours[name][field]}, was {theirs[name][field]}"
                for field in ("shape", "support", "size", "exchangeable")  # not the dtype: it changes with 64-bit mode
                if ours[name][field] != theirs[name][field]
            ]
        if not differences and list(theirs) != list(ours):
            differences.append(f"the order of the {kind} sites is {', '.join(ours)}, was {', '.join(theirs)}")
    differences += [
        f"`{name}` is {own}, was {stored[name]}"
        for name, own in (("dim", problem.dim), ("has_density", problem.has_density))
        if stored[name] != own
    ]
    if differences:
        raise ValueError(
            f"This posterior was learned for another model ({stored['name']}): {'; '.join(differences)}. "
            "Pass the model and the arguments that it was fitted with (and the same `observed=`, if any)."
        )


def probe_model(problem: Problem) -> dict[str, Any]:
    """Compute densities and parameters at `NUM_PLACES` points.

    They differ between two designs that have the same sites.
    """
    source = problem.observation or problem
    probe: dict[str, Any] = {"z": 0.5 * jnp.sin(jnp.arange(float(NUM_PLACES))[:, None] + jnp.arange(problem.dim))}
    probe["y"] = {}
    if source.simulate is not None and source.has_density:
        rows, y = jax.vmap(source.simulate)(jax.vmap(jax.random.key)(jnp.arange(NUM_PLACES)))
        probe |= {"z" if source is problem else "outputs": rows, "y": y}
    return probe | _densities(problem, probe)


@eqx.filter_jit
def _densities(problem: Problem, probe: dict[str, Any]) -> dict[str, Any]:
    source, z, y = problem.observation or problem, probe["z"], probe["y"]
    densities = {"log_prior": jax.vmap(problem.log_prior)(z)}
    densities |= {f"site {name}": value for name, value in jax.vmap(problem.latent_sites)(z).items()}
    return densities | ({"log_likelihood": jax.vmap(source.log_likelihood)(probe.get("outputs", z), y)} if y else {})


def check_probe(stored: Mapping[str, Any], problem: Problem) -> None:
    """Check that a problem has the stored densities at the stored points.

    Args:
        stored: the result of `probe_model`. The names of nested arrays are joined by dots.
        problem: the problem to check.

    Raises:
        ValueError: if a density differs. The message shows both values of the first one.
    """
    places = {name: jnp.asarray(stored[name]) for name in ("z", "outputs") if name in stored}
    y = {name: jnp.asarray(stored[f"y.{name}"]) for name in sorted(site.name for site in problem.observed)
         if f"y.{name}" in stored}  # fmt: skip
    for name, value in _densities(problem, {**places, "y": y}).items():
        if not np.allclose(value, stored[name], rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            raise ValueError(
                f"This posterior was learned for a model with other densities or bounds: expected {name} "
                f"{stored[name]} at the stored points, got {np.asarray(value)}. Covariates or constants differ: pass "
                "the arguments that it was fitted with, or fit again."
            )


def same_parameters(
    problem: Problem, z: Float[Array, "num dim"], stored: Mapping[str, Float[np.ndarray, "num ..."]]
) -> str:
    """Compare constrained parameters with stored ones at the same unconstrained points.

    Returns:
        The name of the first site that differs, with its values. The empty string if no site differs.
    """
    for name, values in jax.vmap(problem.latent_sites)(z).items():
        if values.shape != stored[name].shape or not np.allclose(values, stored[name], rtol=1e-2, atol=1e-3):
            return f"{name} = {stored[name]}, under this prior they would be {np.asarray(values).tolist()}"
    return ""
