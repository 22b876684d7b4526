"""Runs: what a training depends on besides its settings, and the versions at work."""

import platform
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from scoreinfer._tree import arrays_by_name
from scoreinfer._typing import Key
from scoreinfer.files import digest
from scoreinfer.identity.model import describe_sites
from scoreinfer.problem import Problem

PACKAGES = ("scoreinfer", "jax", "numpyro", "equinox", "numpy")


def key_bits(key: Key) -> list[int]:
    """Write a random key, of either style, as plain numbers."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return np.asarray(data).tolist()


def describe_run(problem: Problem, embedding: Any, start: PyTree) -> dict[str, Any]:
    """Describe what a training starts from: the sites, the embedding, and a digest of the simulations.

    Args:
        problem: the problem.
        embedding: the module that embeds observations.
        start: the simulations, and whatever else with arrays the training depends on.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in arrays_by_name(start).items()}
    sites = describe_sites((*problem.latents, *problem.observed))
    return {"sites": sites, "embedding": type(embedding).__qualname__, "simulations": digest(arrays)}


def versions() -> dict[str, str]:
    """Name the versions at work; 0.0.0 for a source tree that is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "0.0.0"
    return found
