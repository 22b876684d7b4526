"""Recording existing simulations: parameters and outputs that were made elsewhere become a store."""

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
"""The simulator's name in the manifest of a recorded store."""
BATCH = 4096
"""Rows that are mapped to the unconstrained space in one compiled call. It limits the memory. Chosen by judgement."""
NUM_PRIOR = 10_000
"""Number of prior draws with which the recorded parameters are compared. Chosen by judgement."""
MIN_P = 1e-6
"""Smallest accepted p-value (Bonferroni) of the test that parameters are prior draws. Chosen by judgement."""


def record(
    prior: Callable | Problem | Draws,
    parameters: Mapping[str, Any],
    outputs: Any,
    *,
    store: str | os.PathLike[str],
) -> Store:
    """Make a store from existing simulations, for example from a cluster.

    A second call with the same arrays changes nothing. After an interruption, it completes the store.

    Args:
        prior: the prior from which the parameters were drawn: a NumPyro model without arguments, or a `Problem`
            (``from_numpyro(model, *args)``). Or the `Draws` at which the simulator was run (see `Conditioned.weigh`).
        parameters: constrained parameters by site. The first axis is the row.
        outputs: outputs of the simulator: an array (which gets the name ``y``), or arrays by name. The first axis is
            the row. A row fails if it has masked entries or numbers that are not finite.
        store: folder of the store. It is created if it does not exist.

    Returns:
        The `Store`. ``NPSE(prior, simulations=store).fit(key)`` learns from it.

    Raises:
        UnsupportedModel: if the prior has no simulator.
        ValueError: if outputs or parameters are no real numbers; if sites, shapes or numbers of rows do not match; if
            parameters lie outside the prior's support or are not distributed as the prior's draws; or if the folder
            holds other simulations.
        RuntimeError: if another process writes to the store.
        UnreadableFile: if the store is damaged.

    Exactness: posteriors learned from the store are right if the parameters are independent draws of the prior (a
        space-filling design of the prior works, too). Parameters are refused if a two-sample Kolmogorov-Smirnov test
        against prior draws gives a p-value below 1e-6 (smallest of all coordinates, times their number).

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
            raise ValueError(
                "The parameters must be those of the draws, in the same order, got other values. Pass the first rows "
                "of `draws.sites`, one for each row of the outputs."
            )
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
    """Return the outputs by name (first axis the row), and the masks of the outputs that have masked entries."""
    named = named_outputs(outputs)
    columns = {name: output.values for name, output in named.items()}
    lengths = {len(value) if value.ndim else 0 for value in columns.values()}
    if len(lengths) != 1 or 0 in lengths:
        got = {name: value.shape for name, value in columns.items()}
        raise ValueError(
            f"Expected outputs with the same number of rows, at least one; got shapes {got}. The first axis of each "
            "output must be the row."
        )
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
        raise ValueError(
            f"Expected parameters of shapes {expected}, got {got}. Pass every latent site of the prior, with one row "
            "for each row of the outputs."
        )
    return values


def _unconstrain(problem: Problem, values: dict[str, np.ndarray]) -> Float[Array, "num dim"]:
    """Map the parameters to the unconstrained space, and back, to check that they lie inside the prior's support."""
    sites = {name: jnp.asarray(value, float) for name, value in values.items()}
    there = jax.jit(jax.vmap(problem.unconstrain))
    z = in_batches(
        lambda rows: there({name: value[rows] for name, value in sites.items()}), len(next(iter(sites.values()))), BATCH
    )
    for name, back in jax.jit(jax.vmap(problem.latent_sites))(z).items():
        same = np.isclose(back, sites[name], rtol=1e-3, atol=1e-6).reshape(len(z), -1).all(-1)
        if not same.all():
            row = int(np.argmin(same))
            raise ValueError(
                f"Row {row} has {name} = {values[name][row]}, where the prior has no density. Expected values inside "
                "its support: leave this row out, or pass the prior from which it was drawn."
            )
    if not np.isfinite(z).all():
        row = int(np.argmin(np.isfinite(z).all(-1)))
        raise ValueError(
            f"Row {row} lies on the edge of the prior's support, expected values inside. Leave this row out."
        )
    return z


def _check_spread(problem: Problem, z: Float[np.ndarray, "num dim"]) -> None:
    keys = jax.random.split(jax.random.key(0), NUM_PRIOR)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: problem.simulate(key)[0]))(keys))  # type: ignore[misc]
    p_values = [ks_2samp(z[:, i], drawn[:, i]).pvalue for i in range(problem.dim)]
    if min(p_values) * problem.dim < MIN_P:
        worst = int(np.argmin(p_values))
        raise ValueError(
            "Expected parameters that are distributed as draws of this prior, but they are not: unconstrained "
            f"coordinate {worst} of {problem.dim} has mean {z[:, worst].mean():.3g} and standard deviation "
            f"{z[:, worst].std():.3g}; the prior has {drawn[:, worst].mean():.3g} and {drawn[:, worst].std():.3g}. "
            "Pass the prior from which they were drawn."
        )
