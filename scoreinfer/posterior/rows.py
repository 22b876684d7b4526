"""The choice of an embedding for data with designs: a set or a series of rows, groups of rows, or all numbers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from scoreinfer._typing import Key, Sites
from scoreinfer.nets import Concatenate, Embedding, MaskedGroups, MaskedRows
from scoreinfer.problem import Problem
from scoreinfer.training.grouped import local_latents
from scoreinfer.training.simulations import encode

NUM_COMPARED = 8
"""Joint draws at which the order of rows is tested. Chosen by judgement."""
MAX_FEW = 32
"""Largest number of rows of fixed meaning that are concatenated. Chosen by judgement."""
LARGEST_CHANGE = 1e-3
"""Relative change of the log likelihood up to which rows count as exchangeable. Chosen by judgement."""


def default_embedding(key: Key, problem: Problem) -> Embedding:
    """Choose the embedding of a problem.

    All observed numbers are concatenated if there are no designs, or the observed sites do not share one first axis
    (the rows). If the log likelihood does not depend on the order of the rows, they are a set (`MaskedRows`). Otherwise
    they are a series, or, if there are few of them and no covariates that change from data set to data set,
    concatenated.

    Args:
        key: random key of the weights, and of the draws on which the order of the rows is tested.
        problem: the problem; it must be possible to simulate it.
    """
    if not problem.designs or problem.simulate is None or not problem.data:
        return Concatenate()
    firsts = {site.shape[:1] for site in problem.data}
    if len(firsts) > 1 or firsts == {()}:
        return Concatenate()
    ((num_rows,),) = firsts
    if local := local_latents(problem, num_rows):
        return _groups(key, problem, num_rows, local)
    is_set = problem.has_density and bool(_exchangeable(key, problem, (num_rows,), ()))
    covariates = [site for site in problem.observed if site.name in problem.designs and site.dtype != "bool"]
    moving = [site for site in covariates if site.shape[:1] == (num_rows,)]
    if not is_set and not moving and num_rows <= MAX_FEW:
        return Concatenate()
    x = _encoded(key, problem)
    sizes = {name: leaf.size for name, leaf in x.items() if leaf.shape[:1] == (num_rows,)}
    num_other = sum(leaf.size for name, leaf in x.items() if name not in sizes)
    return MaskedRows(key, num_rows, sum(sizes.values()) // num_rows, num_other, 1 if is_set else 2)


def _groups(key: Key, problem: Problem, num_groups: int, local: tuple[tuple[int, ...], ...]) -> Embedding:
    """Choose the embedding of groups with latents of their own: all numbers, unless groups and rows are sets."""
    seconds = {site.shape[1:2] for site in problem.data}
    if len(seconds) > 1 or seconds == {()} or not problem.has_density:
        return Concatenate()
    ((num_rows,),) = seconds
    both = num_groups, num_rows
    if not (bool(_exchangeable(key, problem, both[:1], local)) and bool(_exchangeable(key, problem, both, local))):
        return Concatenate()
    x = _encoded(key, problem)
    rows = {name: leaf.size for name, leaf in x.items() if leaf.shape[:2] == both}
    groups = {name: leaf.size for name, leaf in x.items() if leaf.shape[:1] == both[:1] and name not in rows}
    num_other = sum(leaf.size for name, leaf in x.items() if name not in rows | groups)
    num_entry, num_covariates = sum(rows.values()) // (num_groups * num_rows), sum(groups.values()) // num_groups
    return MaskedGroups(key, num_groups, num_rows, num_entry, num_covariates, num_other)


def _encoded(key: Key, problem: Problem) -> Any:
    """Compute the shapes of encoded observations."""
    return jax.eval_shape(lambda key: encode(problem, problem.simulate(key)[1]), key)  # type: ignore[misc]


@eqx.filter_jit
def _exchangeable(
    key: Key, problem: Problem, axes: tuple[int, ...], local: tuple[tuple[int, ...], ...]
) -> Bool[Array, ""]:
    """Say whether the log density stays, if entries along the last of the axes change places.

    Args:
        key: random key.
        problem: the problem.
        axes: lengths of the first axes of data and designs.
        local: where the latents of every group stand in z; they move with the groups.
    """
    order = jax.random.permutation(key, axes[-1])

    def moved(y: Sites) -> Sites:
        last = len(axes) - 1
        return {name: jnp.take(value, order, last) if value.shape[: last + 1] == axes else value
                for name, value in y.items()}  # fmt: skip

    def change(key: Key) -> Array:
        z, y = problem.simulate(key)  # type: ignore[misc]
        stayed, own = problem.log_likelihood(z, y), jnp.asarray(local, int)
        other = z.at[own].set(z[own[order]]) if len(axes) == 1 and own.size else z
        return jnp.abs(problem.log_likelihood(other, moved(y)) - stayed) / (1 + jnp.abs(stayed))

    changes = jax.vmap(change)(jax.random.split(key, NUM_COMPARED))
    return (changes < LARGEST_CHANGE).all()  # also false where they are not finite
