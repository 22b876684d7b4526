"""The choice of an embedding for data with designs: a set of rows, a series of rows, or all numbers in a row."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from scoreinfer._typing import Key, Sites
from scoreinfer.nets import Concatenate, Embedding, MaskedRows
from scoreinfer.problem import Problem
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
    is_set = problem.has_density and bool(_exchangeable(key, problem, num_rows))
    covariates = [site for site in problem.observed if site.name in problem.designs and site.dtype != "bool"]
    moving = [site for site in covariates if site.shape[:1] == (num_rows,)]
    if not is_set and not moving and num_rows <= MAX_FEW:
        return Concatenate()
    x = jax.eval_shape(lambda key: encode(problem, problem.simulate(key)[1]), key)  # type: ignore[misc]
    sizes = {name: leaf.size for name, leaf in x.items() if leaf.shape[:1] == (num_rows,)}
    num_other = sum(leaf.size for name, leaf in x.items() if name not in sizes)
    return MaskedRows(key, num_rows, sum(sizes.values()) // num_rows, num_other, 1 if is_set else 2)


@eqx.filter_jit
def _exchangeable(key: Key, problem: Problem, num_rows: int) -> Bool[Array, ""]:
    """Say whether the log likelihood stays, if the rows of data and designs change places."""
    order = jax.random.permutation(key, num_rows)

    def moved(y: Sites) -> Sites:
        return {name: value[order] if jnp.shape(value)[:1] == (num_rows,) else value for name, value in y.items()}

    def change(key: Key) -> Array:
        z, y = problem.simulate(key)  # type: ignore[misc]
        stayed = problem.log_likelihood(z, y)
        return jnp.abs(problem.log_likelihood(z, moved(y)) - stayed) / (1 + jnp.abs(stayed))

    changes = jax.vmap(change)(jax.random.split(key, NUM_COMPARED))
    return (changes < LARGEST_CHANGE).all()  # also false where they are not finite
