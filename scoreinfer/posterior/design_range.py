"""The range of designs on which a posterior was trained, and data unlike the simulations of their own design.

A design is described by a few numbers: how many entries are there, and the least, mean and largest value of each
covariate. Designs outside the range of these numbers in training are refused, and so are combinations that are far from
all trained ones. Data are compared with fresh simulations of the very same design.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._tree import in_batches, is_traced
from scoreinfer._typing import PRESENT, Key, Sites
from scoreinfer.evidence.bank import Outliers, neighbour_distance, outliers
from scoreinfer.problem import Problem
from scoreinfer.samplers.amortised import AmortisedProposal
from scoreinfer.training.simulations import encode
from scoreinfer.training.whitening import summary

NUM_DESIGNS = 2048
"""Designs that describe the trained range. Chosen by judgement."""
NUM_ALIKE = 512
"""Simulations of the same design with which data are compared. Chosen by judgement."""
FEW = 8
"""Numbers of one covariate up to which each is described by itself. Chosen by judgement."""
SLACK = 0.05
"""How far outside the trained range a number may lie, as a share of the range's width. Chosen by judgement."""
FARTHEST = 2.0
"""Distance from the trained designs at which a design is refused, in units of the largest such distance between trained
ones (plus twice the slack). Chosen by judgement."""

NUMBER = "the number of entries of"
"""How the logarithm of one plus a number of entries is called."""


def describe_design(problem: Problem, y: Sites) -> dict[str, Float[Array, ""]]:
    """Describe a design by a few numbers, each with words that name it. Of numbers of entries it has logarithms."""
    x = encode(problem, y)
    masks = {name.removesuffix(PRESENT): mask for name, mask in x.items() if name.endswith(PRESENT)}
    told = {f"{NUMBER} `{name}`": jnp.log1p(mask.sum()) for name, mask in masks.items()}
    for site in problem.observed:
        is_mask = site.dtype == "bool" and site.shape in {mask.shape for mask in masks.values()}
        if site.name in problem.designs and not is_mask:
            told |= _describe(site.name, x[site.name], list(masks.values()))
    return told


def _describe(name: str, value: Array, masks: list[Array]) -> dict[str, Float[Array, ""]]:
    """Describe one covariate: by each number, or by the least, mean and largest number in the rows that are there."""
    if value.size <= FEW:
        return {f"`{name}`[{i}]": entry for i, entry in enumerate(jnp.ravel(value))}
    rows = value.reshape(value.shape[0], -1)
    there = [mask.reshape(len(rows), -1).max(1) > 0 for mask in masks if mask.shape[:1] == rows.shape[:1]]
    inside = jnp.stack(there).any(0) if there else jnp.ones(len(rows), bool)
    told = {}
    for i, column in enumerate(rows.T[:FEW]):
        label = f"`{name}`" if rows.shape[1] == 1 else f"`{name}`[:, {i}]"
        for word, number in (
            ("least", jnp.where(inside, column, jnp.inf).min()),
            ("mean", jnp.where(inside, column, 0.0).sum() / inside.sum()),
            ("largest", jnp.where(inside, column, -jnp.inf).max()),
        ):
            told[f"the {word} {label}"] = jnp.where(inside.any(), number, 0.0)
    return told


def trained_designs(key: Key, problem: Problem) -> Outliers:
    """Draw designs, and compute their distances from each other, in units of the width of every number's range."""
    numbers = in_batches(partial(_drawn, key, problem), NUM_DESIGNS, NUM_DESIGNS // 4)
    return outliers(numbers / _width(numbers))._replace(features=numbers)


def _width(numbers: Float[Array, "num numbers"]) -> Float[Array, " numbers"]:
    width = numbers.max(axis=0) - numbers.min(axis=0)
    return jnp.where(width > 0, width, 1.0)


@eqx.filter_jit
def _drawn(key: Key, problem: Problem, rows: Array) -> Float[Array, "num numbers"]:
    def one(row: Array) -> Array:
        y = problem.simulate(jax.random.fold_in(key, row))[1]  # type: ignore[misc]
        return _numbers(describe_design(problem, y))

    return jax.vmap(one)(rows)


def _numbers(described: dict[str, Array]) -> Float[Array, " numbers"]:
    return jnp.stack([described[name] for name in sorted(described)]).astype(jnp.float32)


@eqx.filter_jit
def _described(problem: Problem, y: Sites) -> dict[str, Array]:
    return describe_design(problem, y)


def check_design(problem: Problem, trained: Outliers | None, y: Sites) -> None:
    """Refuse a design that lies outside the trained range.

    Raises:
        ValueError: if a number that describes the design lies outside its range in training, or the design is farther
            from all trained ones than twice the largest distance of these.
    """
    if not problem.designs or trained is None or is_traced(y):
        return
    described = _described(problem, y)
    own, features = np.asarray(_numbers(described)), np.asarray(trained.features)
    low, high = features.min(axis=0), features.max(axis=0)
    slack = SLACK * (high - low) + 1e-6
    outside = (own < low - slack) | (own > high + slack)
    found = [
        "{} is {:.4g}, {:.4g} to {:.4g} in training".format(name, *_in_units(name, own[i], low[i], high[i]))
        for i, name in enumerate(sorted(described))
        if outside[i]
    ]
    if not found and float(_distance(trained, own)) > 2 * SLACK + FARTHEST * float(trained.distance.max()):
        found = ["it is far from all designs in training, although each of its numbers is not"]
    if found:
        raise ValueError(
            f"Expected a design like those that this posterior was trained for (`designs`), got another: "
            f"{'; '.join(found)}. Fit again with `designs` that draw such designs too."
        )


def _in_units(name: str, *numbers: Any) -> list[float]:
    return [float(np.expm1(number)) if name.startswith(NUMBER) else float(number) for number in numbers]


@eqx.filter_jit
def _distance(trained: Outliers, own: Float[Array | np.ndarray, " numbers"]) -> Float[Array, ""]:
    return neighbour_distance(jnp.linalg.norm((trained.features - own) / _width(trained.features), axis=1))


@eqx.filter_jit
def rank_within_design(key: Key, proposal: AmortisedProposal, problem: Problem, y: Sites) -> Float[Array, ""]:
    """Compute the distance rank of data among fresh simulations of the same design (see `Outliers`).

    Exactness: for data of the model the rank is uniform, up to the number of simulations.
    """

    def features(y: Sites) -> Array:
        x = proposal.standardiser(encode(problem, y))
        return summary(proposal.whitening.embedding, x)

    def one(key: Key) -> Array:
        for_z, for_y = jax.random.split(key)
        z = problem.simulate(for_z)[0]  # type: ignore[misc]
        return features(problem.simulate_like(for_y, z, y))

    alike = jax.vmap(one)(jax.random.split(key, NUM_ALIKE))
    spread = alike.std(axis=0)
    spread = jnp.where(spread > 1e-6, spread, 1.0)
    return outliers(alike / spread).rank(features(y) / spread)
