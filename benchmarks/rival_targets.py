"""The eight targets of `rivals.py`, as functions that every sampler can use, and what is known about them.

Bare densities are written as models here: a prior N(0, scale^2), which covers the density, and a factor that takes it
away again. So every target has a prior to start from, a likelihood, and an evidence.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace
from rival_truths import Truth, densities_truth, eight_schools_truth, logistic_truth, slcp_truth, two_moons_truth
from tasks import TASKS
from unimodal import models

import oracles


class Target(NamedTuple):
    """A posterior.

    Args:
        name: its name.
        model: the NumPyro model.
        data: keyword arguments of the model.
        potential_fn: of a bare density, minus its log; None for a model.
        start_scale: of a bare density, what scoreinfer is told.
        shapes: the shapes of the latent sites.
        truth: makes what is known.
    """

    name: str
    model: Callable
    data: dict[str, Any]
    potential_fn: Callable | None
    start_scale: float
    shapes: dict[str, tuple[int, ...]]
    truth: Callable[[], Truth]

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def split(self, flat) -> dict:
        """Cut a flat vector into sites."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        parts = jnp.split(flat, ends[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def join(self, sites: dict) -> np.ndarray:
        """Make rows of flat vectors from draws by site."""
        columns = [np.asarray(sites[name], float) for name in self.shapes]
        return np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)

    def log_densities(self, theta) -> tuple[jax.Array, jax.Array]:
        """Compute log prior and log likelihood of a flat vector of constrained values."""
        sites = _sites(substitute(self.model, self.split(theta)), self.data)
        terms: tuple[list, list] = ([], [])
        for site in sites:
            terms[site["is_observed"]].append(site["fn"].log_prob(site["value"]).sum())
        return sum(terms[0], jnp.zeros(())), sum(terms[1], jnp.zeros(()))

    def log_likelihood(self, theta) -> jax.Array:
        """Compute the log likelihood of constrained values."""
        return self.log_densities(theta)[1]

    def constrain(self, z) -> tuple[jax.Array, jax.Array]:
        """Map an unconstrained vector to a constrained one; also the log Jacobian."""
        transforms = {
            s["name"]: biject_to(s["fn"].support) for s in _sites(self.model, self.data) if not s["is_observed"]
        }
        parts, log_det = [], jnp.zeros(())
        for name, part in self.split(z).items():
            parts.append(transforms[name](part))
            log_det += transforms[name].log_abs_det_jacobian(part, parts[-1]).sum()
        return jnp.concatenate([part.ravel() for part in parts]), log_det

    def unconstrained(self, z) -> tuple[jax.Array, jax.Array]:
        """Compute log prior (with the Jacobian) and log likelihood of an unconstrained vector."""
        theta, log_det = self.constrain(z)
        log_prior, log_likelihood = self.log_densities(theta)
        return log_prior + log_det, log_likelihood

    def from_unit(self, u) -> jax.Array:
        """Map the unit cube to constrained values, so that uniform draws become draws from the prior."""
        quantiles = _Quantiles(self.split(u))
        with quantiles:
            _sites(self.model, self.data)
        return jnp.concatenate([quantiles.values[name].ravel() for name in self.shapes])

    def bounds(self) -> np.ndarray:
        """Collect lower and upper bounds of every constrained value."""
        supports = {site["name"]: site["fn"].support for site in _sites(self.model, self.data)}
        rows = []
        for name, shape in self.shapes.items():
            support = supports[name]
            while hasattr(support, "base_constraint"):
                support = support.base_constraint
            ends = float(getattr(support, "lower_bound", -np.inf)), float(getattr(support, "upper_bound", np.inf))
            rows += int(np.prod(shape)) * [ends]
        return np.array(rows)

    def start(self, key, num: int) -> jax.Array:
        """Draw from the prior, in the unconstrained space."""
        inverses = {s["name"]: biject_to(s["fn"].support).inv for s in _sites(self.model, self.data)
                    if not s["is_observed"]}  # fmt: skip

        def one(u):
            sites = self.split(self.from_unit(u))
            return jnp.concatenate([inverses[name](value).ravel() for name, value in sites.items()])

        return jax.vmap(one)(jax.random.uniform(key, (num, self.dim), minval=1e-6, maxval=1 - 1e-6))


def _sites(model: Callable, data: dict) -> list[dict]:
    tape = trace(seed(model, 0)).get_trace(**data)
    return [site for site in tape.values() if site["type"] == "sample"]


class _Quantiles(numpyro.primitives.Messenger):
    """Gives every latent site the quantile of its prior at a given probability."""

    def __init__(self, probabilities: dict):
        self.probabilities, self.values = probabilities, {}
        super().__init__()

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            base = msg["fn"]
            while hasattr(base, "base_dist"):
                base = base.base_dist
            msg["value"] = self.values[msg["name"]] = base.icdf(self.probabilities[msg["name"]])


def _bare(density: oracles.Density, scales) -> Target:
    scale = density.start_scale if scales is None else jnp.asarray(scales, jnp.float32)

    def model():
        prior = dist.Normal(jnp.zeros(density.dim), scale).to_event(1)
        x = numpyro.sample("x", prior)
        numpyro.factor("density", -density.potential(x) - prior.log_prob(x))

    shapes, truth = {"x": (density.dim,)}, partial(densities_truth, density)
    return Target(density.name, model, {}, density.potential, density.start_scale, shapes, truth)


def _posterior(name: str, model: Callable, data: dict, truth: Callable) -> Target:
    shapes = {site["name"]: np.shape(site["value"]) for site in _sites(model, data) if not site["is_observed"]}
    return Target(name, model, data, None, 0.0, shapes, truth)


SBIBM = {"two_moons": two_moons_truth, "slcp": slcp_truth}
UNIMODAL = {"eight_schools_centred": eight_schools_truth, "logistic_25": logistic_truth}


def target(name: str, scales: list[float] | None = None) -> Target:
    """Make a target; a bare density covered by these standard deviations, or by the one that scoreinfer gets.

    Raises:
        KeyError: if there is none of this name.
    """
    for density in oracles.densities():
        if density.name == name:
            return _bare(density, scales)
    for task in TASKS:
        if task.name == name and name in SBIBM:
            y, make = task.observation(1), SBIBM[name]
            return _posterior(name, task.model, {"y": y}, partial(make, y, task.reference(1)))
    for task in models():
        if task.name in UNIMODAL and name == task.name.removesuffix("_centred"):
            return _posterior(name, task.model, task.data, partial(UNIMODAL[task.name], **task.data))
    raise KeyError(name)
