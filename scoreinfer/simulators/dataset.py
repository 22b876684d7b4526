"""Training data from a store of simulations. The data are the outputs, or draws from a likelihood given the outputs."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices
from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites
from scoreinfer.errors import UnreadableFile, UnsupportedModel
from scoreinfer.identity import describe_sites, same_parameters
from scoreinfer.model import read_likelihood
from scoreinfer.problem import Problem, Site
from scoreinfer.simulators.outputs import real_numbers
from scoreinfer.simulators.store import Rows, Store, select

BATCH = 4096
"""Largest number of rows in one compiled call. It limits the memory. Chosen by judgement."""
NUM_EXAMPLES = 64
"""Rows of the store that serve as examples when a likelihood is read. Chosen by judgement."""


def with_outputs(problem: Problem, shapes: dict[str, tuple[int, ...]]) -> Problem:
    """Make the problem of a prior and a foreign simulator, whose outputs are the data.

    Its ``read`` takes the data by name: ``posterior.sample(key, num, y=data)``. It raises a ValueError for data with
    other names or shapes, or that are no finite real numbers.

    Args:
        problem: the problem of the prior.
        shapes: shape of each output, by name.
    """

    def read(args: tuple, kwargs: dict[str, Any]) -> Sites:
        if args or kwargs.keys() != shapes.keys():
            raise ValueError(
                f"Expected data for {', '.join(shapes)} by name, as the simulator returns them; got "
                f"{', '.join(kwargs) or 'none'}{f' and {len(args)} without a name' if args else ''}. Write "
                f"`{', '.join(f'{name}=...' for name in shapes)}`."
            )
        values = {name: real_numbers(f"Data {name!r}", kwargs[name]).values for name in shapes}
        for name, value in values.items():
            if value.shape != shapes[name]:
                raise ValueError(
                    f"Data {name!r} must have shape {shapes[name]}, got {value.shape}. Pass data of the shape that the "
                    "simulator returns."
                )
            if not np.isfinite(value).all():
                raise ValueError(
                    f"Data {name!r} must be finite, but {np.sum(~np.isfinite(value))} of its {value.size} numbers are "
                    "not (masked entries count as NaN). Fit a posterior whose simulator returns the known entries only."
                )
        with jax.ensure_compile_time_eval():
            return {name: jnp.asarray(value, jnp.result_type(float)) for name, value in values.items()}

    sites = tuple(Site(name, shape, str(jnp.result_type(float)), "real") for name, shape in shapes.items())
    recipe = partial(with_outputs, problem, shapes)
    return _foreign(problem, observed=sites, encode=lambda y: y, read=read, recipe=recipe)


def with_likelihood(problem: Problem, likelihood: Callable[..., Any], z: Array, outputs: Sites) -> Problem:
    """Make the problem of a prior, a foreign simulator, and a likelihood of the data given the simulator's outputs.

    Args:
        problem: the problem of the prior.
        likelihood: ``likelihood(parameters, outputs, ...data)``, a NumPyro model.
        z: unconstrained parameters of some runs of the simulator.
        outputs: the outputs of these runs, by name.

    Raises:
        UnsupportedModel: if the likelihood has no sample site, cannot be read, or cannot be simulated.
    """
    few = slice(None, NUM_EXAMPLES)
    z, outputs = z[few], {name: value[few] for name, value in outputs.items()}
    observation = read_likelihood(likelihood, jax.jit(jax.vmap(problem.latent_sites))(z), outputs)
    if observation.simulate_observation is None:
        raise UnsupportedModel(
            "Learning draws data from the likelihood, so it expects one that can be simulated. Write the data as "
            f"sample sites. This likelihood cannot be simulated: {observation.not_simulable}"
        )
    return _foreign(
        problem, observed=observation.observed, encode=observation.encode, read=observation.read,
        observation=observation, recipe=partial(with_likelihood, problem, likelihood, z, outputs),
    )  # fmt: skip


def _foreign(problem: Problem, **observed: Any) -> Problem:
    """Make a problem whose data come from a simulator outside JAX."""

    def log_likelihood(z: Array, y: Sites) -> Array:
        raise ValueError(
            "Expected a problem with a density, but a foreign simulator has none (`Problem.has_density` is False). If "
            "the density of the data given its outputs is known, pass `likelihood=` when fitting."
        )

    return dataclasses.replace(
        problem, log_likelihood=log_likelihood, constrain=problem.latent_sites, simulate=None,
        simulate_observation=None, has_density=False, is_foreign=True,
        not_simulable="its simulator is foreign", pointwise_log_likelihood=None, **observed,
    )  # fmt: skip


def _row(problem: Problem, z: Float[Array, " dim"], outputs: Sites) -> Float[Array, " size"]:
    return ravel_pytree((problem.latent_sites(z), outputs))[0]


def explained(problem: Problem, store: Store, y: Sites) -> tuple[Float[Array, "num dim"], Float[Array, " num"]]:
    """Compute log p(y | parameters, outputs) for each row of a store.

    Args:
        problem: a problem with a known likelihood (see `with_likelihood`).
        store: the simulations.
        y: the data.

    Returns:
        The unconstrained parameters of all rows, in the order of their numbers, and the log densities. The log density
        is minus infinity for a row without valid outputs.

    Raises:
        UnreadableFile: if the store is damaged.
    """
    parts = []
    for part in store.parts():
        told = np.full(len(part.number), -np.inf)
        if part.valid.any():
            pair = _on_device(select(part, part.valid))
            size = 1 << (len(pair[0]) - 1).bit_length()  # powers of two: few shapes are compiled
            told[part.valid] = _in_batches_of(pair, size, partial(_log_likelihoods, problem, y))
        parts.append((part.number, part.z, told))
    if not parts:
        return jnp.zeros((0, problem.dim)), jnp.zeros(0)
    numbers, z, log_likelihood = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(numbers)
    return jnp.asarray(z[order], float), jnp.asarray(log_likelihood[order], float)


@over_devices
def _log_likelihoods(
    problem: Problem, y: Sites, rows: Array, z: Float[Array, "num dim"], outputs: Sites
) -> Float[Array, " num"]:
    del rows
    observation = problem.observation
    assert observation is not None
    return map_rows(lambda z, outputs: observation.log_likelihood(_row(problem, z, outputs), y), None)(z, outputs)


@over_devices
def _simulate_data(key: Key, problem: Problem, rows: Array, z: Float[Array, "num dim"], outputs: Sites) -> Sites:
    simulate: Any = problem.observation.simulate_observation  # type: ignore[union-attr]
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    return map_rows(lambda key, z, outputs: simulate(key, _row(problem, z, outputs)), None)(keys, z, outputs)


def _data(key: Key, problem: Problem, z: Array, outputs: Sites) -> Sites:
    """Return the outputs as data, or draw data from the likelihood given the outputs."""
    if problem.observation is None:
        return outputs
    return _in_batches_of((z, outputs), len(z), partial(_simulate_data, key, problem))


def _in_batches_of(pair: tuple[Array, Sites], size: int, function: Callable[..., Any]) -> Any:
    """Call a function on (row indices, z, outputs) in batches of at most ``size`` rows."""
    return in_batches(
        lambda rows: function(rows, *jax.tree.map(lambda leaf: leaf[rows], pair)), len(pair[0]), min(size, BATCH)
    )


class StoredSimulations(NamedTuple):
    """Training data from a store.

    Args:
        problem: the problem of the prior and the foreign simulator.
        z: unconstrained parameters of the valid rows, limited by the store's ``memory``.
        y: the data of these rows.
        all_z: unconstrained parameters of all rows, valid or not.
        valid: True for each valid row of ``all_z``.
        renew: draws ``(z, y)`` for one more epoch of training, given a random key. The held-out rows are not among
            them. None means every epoch has the same rows.
    """

    problem: Problem
    z: Array
    y: Sites
    all_z: Array
    valid: np.ndarray
    renew: Callable[[Key], tuple[Array, Sites]] | None = None

    @property
    def num_held_out(self) -> int:
        """Number of held-out rows: the first tenth of ``z``, which is never used for training."""
        return max(len(self.z) // 10, 1)


def stored_simulations(
    key: Key, prior: Problem, store: Store | str | os.PathLike[str], likelihood: Callable[..., Any] | None = None
) -> StoredSimulations:
    """Read training data from a store.

    Args:
        key: random key of the data that are drawn from a likelihood.
        prior: the problem of the prior from which the store's parameters were drawn, or a problem that this function
            has returned.
        store: the store, or its folder.
        likelihood: NumPyro model of the data given parameters and outputs. None means the outputs are the data, or
            the likelihood of ``prior`` is used if it has one.

    Raises:
        ValueError: if no row is valid, or the prior differs from the store's prior in its sites or bounds.
        UnsupportedModel: if the likelihood cannot be read or simulated.
        UnreadableFile: if the store is damaged.

    Exactness: data drawn from a likelihood are exact draws given the stored outputs. Failed rows are left out.
    """
    store = store if isinstance(store, Store) else Store(store)
    own = describe_sites(prior.latents)
    if own != store.manifest["latents"]:
        raise ValueError(
            f"The store's parameters are {', '.join(store.manifest['latents'])}, this prior's are {', '.join(own)}. "
            "Pass the prior with which the simulations were made."
        )
    _check_bounds(prior, store)
    index = store.index()
    if not index.valid.any():
        raise ValueError(
            f"Expected at least one valid simulation in `{store.path}`, got none: {store}. Correct the simulator, and "
            "simulate again into a new store."
        )
    numbers = index.number[index.valid]
    z, outputs = _on_device(store.take(numbers[: store.capacity(index)]))
    problem = prior
    if likelihood is not None:
        problem = with_likelihood(prior, likelihood, z, outputs)
    elif prior.observation is None:
        problem = with_outputs(prior, {name: value.shape[1:] for name, value in outputs.items()})
    simulations = StoredSimulations(
        problem, z, _data(key, problem, z, outputs), jnp.asarray(index.z, float), index.valid
    )
    kept = simulations.num_held_out

    def renew(key: Key) -> tuple[Array, Sites]:
        for_rows, for_data = jax.random.split(key)
        new_z, new_outputs = z[kept:], {name: value[kept:] for name, value in outputs.items()}
        if len(numbers) > len(z):
            seed = np.asarray(jax.random.bits(for_rows, (4,)))
            new_z, new_outputs = _on_device(store.pool(seed, numbers[kept:], len(z) - kept))
        return new_z, _data(for_data, problem, new_z, new_outputs)

    changes = problem.observation is not None or len(numbers) > len(z)
    return simulations._replace(renew=renew if changes else None)


def _on_device(rows: Rows) -> tuple[Array, Sites]:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), (rows.z, rows.outputs))


def _check_bounds(prior: Problem, store: Store) -> None:
    """Refuse a prior with other bounds: its parameters differ from the store's at the same unconstrained values."""
    try:
        places = np.asarray(store.manifest["first"][0], float).reshape(-1, prior.dim)
        told = {site.name: np.asarray(store.manifest["parameters"][site.name], float) for site in prior.latents}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UnreadableFile(
            store.path, f"its manifest does not say what the first parameters are ({error!r})"
        ) from error
    differs = same_parameters(prior, jnp.asarray(places, float), told)
    if differs:
        raise ValueError(
            f"The store's first parameters are {differs}: its bounds are others. Pass the prior with which the "
            "simulations were made."
        )
