"""Identity of runs: everything that a training depends on besides its settings, and the versions of the packages."""

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
"""The packages whose versions are recorded. Chosen by judgement."""


def key_bits(key: Key) -> list[int]:
    """Convert a random key, typed or raw, to plain numbers."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return np.asarray(data).tolist()


def describe_run(problem: Problem, embedding: Any, start: PyTree) -> dict[str, Any]:
    """Describe the start of a training: the sites, the embedding, and a digest of the simulations.

    Args:
        problem: the problem.
        embedding: the module that embeds observations.
        start: the simulations, and all other arrays that the training depends on.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in arrays_by_name(start).items()}
    sites = describe_sites((*problem.latents, *problem.observed))
    return {"sites": sites, "embedding": type(embedding).__qualname__, "simulations": digest(arrays)}


def versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES`; 0.0.0 for a package that is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "0.0.0"
    return found
