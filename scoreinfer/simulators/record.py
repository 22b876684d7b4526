"""Simulations made elsewhere: parameters and outputs that exist already, as a store to learn from."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import ks_2samp

from scoreinfer._tree import in_batches, named_leaves
from scoreinfer.draws import Draws
from scoreinfer.files import digest
from scoreinfer.model import problem_of
from scoreinfer.problem import Problem
from scoreinfer.simulators.outputs import named_outputs, real_numbers, say_masked
from scoreinfer.simulators.run import first_rows, most_rows, told_of_draws, told_of_prior
from scoreinfer.simulators.store import Row, Store, only_writer, open_store, status_of, write_shard

ELSEWHERE = "recorded elsewhere"
BATCH = 4096
NUM_PRIOR = 10_000
"""Draws of the prior that the parameters are held against."""
MIN_P = 1e-6
"""Probability under the prior below which parameters are not taken for its draws, for all coordinates together."""


def record(
    prior: Callable | Problem | Draws,
    parameters: Mapping[str, Any],
    outputs: Any,
    *,
    store: str | os.PathLike[str],
) -> Store:
    """Keep simulations that were made elsewhere, on a cluster or long ago, as a store.

    Called again with the same arrays it changes nothing; after an interruption it goes on.

    Args:
        prior: the NumPyro model without arguments, or `Problem` (``from_numpyro(model, *args)``), whose latent sites
            the parameters were drawn from. Or `Draws`, at which the simulator was run (see `Conditioned.weigh`).
        parameters: constrained parameters by site, rows first.
        outputs: what the simulator returned, rows first: an array (then called ``y``) or a dictionary of arrays by
            name. Rows with numbers that are not finite, or with masked entries, count as failed.
        store: folder of the rows; made where there is none.

    Returns:
        The `Store`; ``NPSE(prior, simulations=store).fit(key)`` learns from it.

    Raises:
        UnsupportedModel: where the prior cannot be drawn from.
        ValueError: for outputs or parameters that are no real numbers, sites or rows that do not match, parameters
            outside the prior's support or not spread as the prior's draws are, or a store of other simulations.

    Exactness: what is learned from the store is right as far as the parameters are independent draws of the prior
        (a space-filling design will do). They are refused where a Kolmogorov-Smirnov test against the prior gives some
        coordinate a probability below 1e-6.

    >>> import tempfile, numpy as np, numpyro, numpyro.distributions as dist, scoreinfer as si
    >>> def prior():
    ...     numpyro.sample("a", dist.Normal(0.0, 1.0))
    >>> a = np.random.default_rng(0).normal(size=100)
    >>> print(si.simulators.record(prior, {"a": a}, a**2, store=tempfile.mkdtemp()))
    100 of 100 simulations (100 ok, 0 invalid, 0 failed, 0 timeout)
    """
    columns, masks = _columns(outputs)
    num = len(next(iter(columns.values())))
    if isinstance(prior, Draws):
        sites, z, told = named_leaves(prior.sites), np.asarray(prior.unconstrained[:num]), told_of_draws(prior, num)
        values = _check_rows({name: leaf.shape[1:] for name, leaf in sites.items()}, parameters, num)
        if any(not np.allclose(values[name], sites[name][:num], rtol=1e-3, atol=1e-6) for name in values):
            raise ValueError("The parameters must be those of the draws, in their order; got others.")
    else:
        problem = problem_of(prior, (), {})
        told = told_of_prior(problem)
        values = _check_rows({site.name: site.shape for site in problem.latents}, parameters, num)
        z = np.asarray(_unconstrain(problem, values))
        _check_spread(problem, z)
    chosen = {name: jnp.asarray(value) for name, value in values.items()}
    described = first_rows(lambda rows: (z[rows], jax.tree.map(lambda leaf: leaf[rows], chosen), 0 * rows), num)
    path, content = Path(store), digest({f"parameter {name}": value for name, value in values.items()} | columns)
    opened = open_store(path, {"num": num, "key": content, "simulator": ELSEWHERE} | told | described)
    with only_writer(path):
        missing = np.setdiff1d(np.arange(num), opened.index().number)
        size = most_rows({name: value.shape[1:] for name, value in columns.items()})
        for some in np.split(missing, range(size, len(missing), size)):
            write_shard(path, [_row(int(i), z[i], columns, masks) for i in some])
    return opened


def _columns(outputs: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Take outputs by name, rows first, and which of their entries were masked, where any was."""
    named = named_outputs(outputs)
    columns = {name: output.values for name, output in named.items()}
    lengths = {len(value) if value.ndim else 0 for value in columns.values()}
    if len(lengths) != 1 or 0 in lengths:
        got = {name: value.shape for name, value in columns.items()}
        raise ValueError(f"Expected outputs of as many rows each, and one at least; got shapes {got}.")
    return columns, {name: output.masked for name, output in named.items() if output.masked is not None}


def _row(number: int, z: np.ndarray, columns: dict[str, np.ndarray], masks: dict[str, np.ndarray]) -> Row:
    outputs = {name: np.asarray(column[number]) for name, column in columns.items()}
    masked = say_masked({name: np.asarray(mask[number]) for name, mask in masks.items()})
    return Row(number, z, status_of(outputs), masked, 0, np.nan, outputs)


def _check_rows(shapes: dict[str, tuple[int, ...]], parameters: Mapping[str, Any], num: int) -> dict[str, np.ndarray]:
    """Check names, shapes and the number of rows; return the parameters by site."""
    values = {name: real_numbers(f"Parameter {name!r}", value).values for name, value in parameters.items()}
    got = {name: value.shape for name, value in values.items()}
    expected = {name: (num, *shape) for name, shape in shapes.items()}
    if got != expected:
        raise ValueError(f"Expected parameters of shapes {expected}, one row for each of the outputs; got {got}.")
    return values


def _unconstrain(problem: Problem, values: dict[str, np.ndarray]) -> Float[Array, "num dim"]:
    """Map the parameters to the unconstrained space, and back to see that they are possible."""
    sites = {name: jnp.asarray(value, float) for name, value in values.items()}
    there = jax.jit(jax.vmap(problem.unconstrain))
    z = in_batches(
        lambda rows: there({name: value[rows] for name, value in sites.items()}), len(next(iter(sites.values()))), BATCH
    )
    for name, back in jax.jit(jax.vmap(problem.latent_sites))(z).items():
        same = np.isclose(back, sites[name], rtol=1e-3, atol=1e-6).reshape(len(z), -1).all(-1)
        if not same.all():
            row = int(np.argmin(same))
            raise ValueError(f"Row {row} has {name} = {values[name][row]}, where the prior has no density.")
    if not np.isfinite(z).all():
        row = int(np.argmin(np.isfinite(z).all(-1)))
        raise ValueError(f"Row {row} lies on the very edge of the prior's support: leave it out.")
    return z


def _check_spread(problem: Problem, z: Float[np.ndarray, "num dim"]) -> None:
    keys = jax.random.split(jax.random.key(0), NUM_PRIOR)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: problem.simulate(key)[0]))(keys))  # type: ignore[misc]
    p_values = [ks_2samp(z[:, i], drawn[:, i]).pvalue for i in range(problem.dim)]
    if min(p_values) * problem.dim < MIN_P:
        worst = int(np.argmin(p_values))
        raise ValueError(
            f"The parameters are not spread as this prior's draws are (coordinate {worst} of the {problem.dim} "
            f"unconstrained ones: mean {z[:, worst].mean():.3g} and sd {z[:, worst].std():.3g}, the prior's "
            f"{drawn[:, worst].mean():.3g} and {drawn[:, worst].std():.3g}). Pass the prior they were drawn from."
        )
