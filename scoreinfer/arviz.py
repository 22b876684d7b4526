"""Conversion to ArviZ: draws, weights, predictions and certificate as ArviZ groups.

ArviZ 0.22 and 0.23 use an `InferenceData`, ArviZ 1.x uses an xarray `DataTree`. Both results are read in the same way:
``"posterior" in data``, ``data["posterior"]["a"]``, ``data.to_netcdf(path)``.

netCDF files allow no slash in a name, but NumPyro's scopes put slashes into site names. So ``left/a`` becomes
``left.a``. If a deterministic site is a tree of arrays, each array becomes one variable, such as ``net.w``.

ArviZ does not store weights of draws. By default the draws are resampled, and every ArviZ function is valid. Without
resampling, the group holds the proposal's draws, and ``sample_stats`` holds ``log_weight``, ``log_q`` and ``lp``.
Functions that take weights can use them (`arviz.loo_approximate_posterior` of ArviZ 1.x).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Integer
from numpy.typing import ArrayLike

from scoreinfer._tree import named_leaves
from scoreinfer._typing import Key, Sites, Values
from scoreinfer.identity import versions
from scoreinfer.montecarlo.resampling import resample_indices
from scoreinfer.montecarlo.weights import pareto_smooth
from scoreinfer.problem import NO_PROBLEM, Problem

_BLOCK = 256
"""Draws that are processed at once. It limits the memory if every draw solves an ODE. Chosen by judgement."""
_NOTE = (
    "Draws are independent: R-hat and effective sample size look perfect and prove nothing. "
    "Read the certificate_* attributes instead."
)
"""A warning for readers of the posterior group."""


Draws = Any
"""A `scoreinfer.Draws` or a `scoreinfer.filters.FilterRun`. This module cannot import them: their modules import it."""


def to_arviz(
    key: Key,
    draws: Draws,
    *,
    num_chains: int = 1,
    resample: bool = True,
    log_likelihood: bool | Mapping[str, ArrayLike] = False,
    log_prior: bool = False,
    predictive: bool = False,
    prior: int = 0,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    r"""Convert draws to an ArviZ `InferenceData` (ArviZ 0.x) or `DataTree` (ArviZ 1.x).

    Groups: ``posterior`` (latent and deterministic sites), ``sample_stats`` (``log_weight``, ``log_q``, ``lp``) and
    ``observed_data``. ``log_q`` is NaN where ``lp`` is minus infinity. On request: ``log_likelihood``, ``log_prior``,
    ``posterior_predictive``, ``prior`` and ``prior_predictive``. The attributes of ``posterior`` hold the versions, the
    `DrawInfo`, the certificate (``certificate_*``), and the ``renamed`` sites.

    Args:
        key: random key. Resampling, predictions and prior draws use independent random numbers. The same key gives
            the same groups.
        draws: the draws of a sampler; or the run of a filter, which takes ``resample``, ``coords`` and ``dims`` alone
            (`scoreinfer.filters.to_arviz` says which groups it makes).
        num_chains: number of equal pieces that the draws are cut into. Independent draws form one chain, but some
            ArviZ plots need several. Draws that do not fill the last piece are left out.
        resample: draw with replacement by the weights, so that the posterior group has equal weights. Copies of one
            draw are neighbours. So the effective sample size that ArviZ reports takes account of the weights: it is
            about :math:`N^2 / \sum n_i^2` for :math:`n_i` copies of draw i. With False, the posterior group holds the
            proposal's draws; they represent the posterior only together with ``log_weight``. Draws without weights
            are never resampled.
        log_likelihood: True adds the pointwise log likelihood of every observed site. A dictionary, as
            `numpyro.infer.log_likelihood(model, draws.sites, ...)` returns it (draw axis first), is added.
        log_prior: add the log prior density of every latent site, as ``arviz.psense`` of ArviZ 1.x needs it.
        predictive: simulate one observation for every draw of the posterior group.
        prior: number of prior draws, each with one simulated observation. 0 means none.
        coords: coordinate values by dimension name, as in ArviZ.
        dims: dimension names by site, without chain and draw, as in ArviZ.

    Returns:
        The groups. Saving them needs a netCDF library: ``pip install 'scoreinfer[plot]'``.

    Raises:
        ValueError: if there are fewer draws than chains, or the problem cannot be simulated or has no pointwise
            likelihood or prior and the options need it; if no draw has a positive weight; or if the run of a filter is
            given other options than it takes.

    Exactness: consistent as the number of draws grows. Resampling adds Monte Carlo noise to the weighted batch.

    Example:
        >>> import jax.numpy as jnp
        >>> from scoreinfer import Draws
        >>> z = jnp.arange(8.0)
        >>> draws = Draws({"a": z}, z[:, None], None, jnp.zeros(8), None, {"y": jnp.zeros(3)})
        >>> data = to_arviz(jax.random.key(0), draws)
        >>> data["posterior"]["a"].shape
        (1, 8)
    """
    if not hasattr(draws, "log_joint"):
        if num_chains != 1 or log_likelihood is not False or log_prior or predictive or prior:
            raise ValueError("The run of a filter takes `resample=`, `coords=` and `dims=` only: leave out the others.")
        return draws.to_arviz(key, resample=resample, coords=coords, dims=dims)
    if not 1 <= num_chains <= draws.num:
        raise ValueError(f"`num_chains` must be between 1 and the number of draws, {draws.num}, got {num_chains}.")
    weighted = draws.log_weight is not None
    resample = resample and weighted
    for_rows, for_data, for_prior = jax.random.split(key, 3)
    num = draws.num - draws.num % num_chains
    rows = _resampled_rows(for_rows, draws, num) if resample else np.arange(num)
    groups = _of_draws(draws, rows, num_chains)
    if log_likelihood is not False:
        groups["log_likelihood"] = _of_likelihood(draws, rows, num_chains, log_likelihood)
    if log_prior:
        groups["log_prior"] = _of_prior(draws, rows, num_chains)
    if predictive:
        problem = _simulable(draws, "predictive=True")
        simulated = _predict(problem, jax.random.split(for_data, num), draws.unconstrained[rows], _design(draws))
        groups["posterior_predictive"] = _chains(simulated, np.arange(num), num_chains)
    if prior:
        problem = _simulable(draws, f"prior={prior}")
        sites, simulated = _prior(problem, jax.random.split(for_prior, prior), _design(draws))
        groups["prior"] = _chains(named_leaves(sites), np.arange(prior), 1)
        groups["prior_predictive"] = _chains(simulated, np.arange(prior), 1)
    named = {group: in_file_names(values) for group, values in groups.items() if values}
    pairs = [pair for group, values in named.items() for pair in zip(groups[group], values, strict=True)]
    renamed = {old: new for old, new in pairs if old != new}
    data = from_groups(named, coords, dims and {renamed.get(site, site): names for site, names in dims.items()})
    data["posterior"].attrs.update(
        version_attributes()
        | {"num_draws": draws.num, "resampled": int(resample), "weighted": int(weighted and not resample)}
        | flatten(_fields(draws.info))
        | flatten(_fields(draws.certificate), "certificate_")
        | ({"renamed": "; ".join(f"{old} is {new}" for old, new in renamed.items())} if renamed else {})
        | {"note": _NOTE}
    )
    return data


Group = dict[str, np.ndarray]
"""Arrays of one ArviZ group, by name."""


def _chains(sites: Mapping[str, Any], rows: np.ndarray, num_chains: int) -> Group:
    """Take rows of every site and split the draw axis into (chain, draw)."""
    taken = {name: np.asarray(value)[rows] for name, value in sites.items()}
    return {name: value.reshape(num_chains, -1, *value.shape[1:]) for name, value in taken.items()}


def _of_draws(draws: Draws, rows: np.ndarray, num_chains: int) -> dict[str, Group]:
    """Make the groups that every batch of draws has."""
    densities = {"log_weight": draws.log_weight, "log_q": draws.log_q, "lp": draws.log_joint}
    known = {name: value for name, value in densities.items() if value is not None}
    return {
        "posterior": _chains(named_leaves(draws.sites), rows, num_chains),
        "sample_stats": _chains(known, rows, num_chains),
        **_of_observation(draws),
    }


def _design(draws: Draws) -> Sites:
    designs = () if draws.problem is None else draws.problem.designs
    return {name: draws.observed[name] for name in designs}


def _of_observation(draws: Draws) -> dict[str, Group]:
    """Split the observation into data and design."""
    design = jax.tree.map(np.asarray, _design(draws))
    data = {name: np.asarray(value) for name, value in draws.observed.items() if name not in design}
    return {"observed_data": data} | ({"constant_data": design} if design else {})


def _of_likelihood(
    draws: Draws, rows: np.ndarray, num_chains: int, log_likelihood: bool | Mapping[str, ArrayLike]
) -> Group:
    """Compute the pointwise log likelihoods, or use those that the user gave."""
    if isinstance(log_likelihood, Mapping):
        return _chains(log_likelihood, rows, num_chains)
    problem = draws.problem
    if problem is None or problem.pointwise_log_likelihood is None:
        why = NO_PROBLEM if problem is None else "this problem has none"
        raise ValueError(
            f"`log_likelihood=True` needs a pointwise likelihood: {why}. "
            "Pass a dictionary of arrays with the draw axis first, such as "
            "`log_likelihood=numpyro.infer.log_likelihood(model, draws.sites, *args)`."
        )
    pointwise = _pointwise(problem, draws.unconstrained[rows], draws.observed)
    return _chains(pointwise, np.arange(len(rows)), num_chains)


def _of_prior(draws: Draws, rows: np.ndarray, num_chains: int) -> Group:
    """Compute the log prior density of every latent site."""
    problem = draws.problem
    if problem is None or problem.site_log_prior is None:
        why = NO_PROBLEM if problem is None else "this problem has none"
        raise ValueError(f"`log_prior=True` needs the prior densities of the sites: {why}.")
    return _chains(_site_log_prior(problem, draws.unconstrained[rows]), np.arange(len(rows)), num_chains)


def plot_sites(values: Values, pairs: bool) -> Any:
    """Plot equally weighted draws by ArviZ.

    Args:
        values: values by site, with the draw axis first.
        pairs: scatter plots of all pairs instead of one marginal for each component.

    Returns:
        An array of matplotlib axes: one for each component, or a matrix for pairs.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    import arviz as az

    group = _chains(named_leaves(values), np.arange(len(jax.tree.leaves(values)[0])), 1)
    data = from_groups({"posterior": in_file_names(group)}, None, None)
    if int(az.__version__.split(".")[0]) < 1:
        return az.plot_pair(data, marginals=True) if pairs else np.ravel(az.plot_posterior(data))
    plot = az.plot_pair if pairs else az.plot_dist
    axes = np.array(plot(data, backend="matplotlib").viz["figure"].item().axes)
    size = math.isqrt(axes.size)
    return axes.reshape(size, size) if pairs else axes


def to_prior_sbc(ranks: Mapping[str, np.ndarray]) -> Any:
    """Convert ranks of simulation-based calibration to the ArviZ group ``prior_sbc``.

    Args:
        ranks: ranks by site. The first axis is the simulation.
    """
    import arviz as az

    group = {name: np.asarray(values)[None] for name, values in in_file_names(ranks).items()}
    if int(az.__version__.split(".")[0]) >= 1:
        return az.from_dict({"prior_sbc": group})
    return az.InferenceData(prior_sbc=az.dict_to_dataset(group), warn_on_custom_groups=False)


def file_name(name: str) -> str:
    """Rename a site for netCDF files, which reserve slashes for groups."""
    return name.replace("/", ".")


def in_file_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename sites for netCDF files, so that all names differ."""
    named: dict[str, Any] = {}
    for name, value in values.items():
        own = file_name(name)
        while own in named or (own != name and own in values):
            own += "_"
        named[own] = value
    return named


def _resampled_rows(key: Key, draws: Draws, num: int) -> Integer[np.ndarray, " num"]:
    """Draw row numbers by weight, and sort them, so that copies of one draw are neighbours."""
    return np.sort(np.asarray(resample_indices(key, pareto_smooth(draws.log_weight)[0], num)))


def _simulable(draws: Draws, asked: str) -> Problem:
    problem = draws.problem
    if problem is None or problem.simulate is None or problem.simulate_observation is None:
        why = NO_PROBLEM if problem is None else problem.no_observation
        raise ValueError(f"`{asked}` needs a model that can be simulated: {why}")
    return problem


@partial(jax.jit, static_argnums=0)
def _pointwise(problem: Problem, values: Float[Array, "num dim"], observed: Sites) -> Sites:
    """Compute the log likelihood of every observed value under every draw."""
    assert problem.pointwise_log_likelihood is not None
    pointwise = problem.pointwise_log_likelihood
    return jax.lax.map(lambda z: pointwise(z, observed), values, batch_size=_BLOCK)


@partial(jax.jit, static_argnums=0)
def _site_log_prior(problem: Problem, values: Float[Array, "num dim"]) -> Sites:
    """Compute the log prior density of every latent site at every draw."""
    assert problem.site_log_prior is not None
    return jax.lax.map(problem.site_log_prior, values, batch_size=_BLOCK)


@partial(jax.jit, static_argnums=0)
def _predict(problem: Problem, keys: Array, values: Float[Array, "num dim"], design: Sites) -> Sites:
    """Simulate one observation for every draw."""
    return jax.lax.map(
        lambda row: _data(problem, problem.simulate_like(row[0], row[1], design)), (keys, values), batch_size=_BLOCK
    )


def _data(problem: Problem, y: Sites) -> Sites:
    return {name: value for name, value in y.items() if name not in problem.designs}


@partial(jax.jit, static_argnums=0)
def _prior(problem: Problem, keys: Array, design: Sites) -> tuple[Values, Sites]:
    """Draw latent and deterministic sites from the prior, with one observation each."""

    def one(key: Key) -> tuple[Values, Sites]:
        assert problem.simulate is not None
        z, y = problem.simulate(key)
        y = problem.simulate_like(jax.random.fold_in(key, 1), z, design) if problem.designs else y
        return problem.sites(z, y), _data(problem, y)

    return jax.lax.map(one, keys, batch_size=_BLOCK)


def from_groups(groups: dict[str, dict[str, np.ndarray]], coords: Any, dims: Any) -> Any:
    """Build the container of the installed version of ArviZ."""
    import arviz as az

    names = {
        "coords": None if coords is None else dict(coords),
        "dims": None if dims is None else {site: list(of) for site, of in dims.items()},
    }
    if int(az.__version__.split(".")[0]) >= 1:
        return az.from_dict(groups, **names)
    return az.from_dict(**groups, **names)


def _fields(record: Any) -> dict[str, Any]:
    """Convert a NamedTuple or a dataclass to a dictionary. None gives an empty one."""
    if record is None:
        return {}
    if dataclasses.is_dataclass(record):
        return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return record._asdict()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten to attributes that netCDF can store: text, numbers, vectors of numbers. None and tuples are left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or isinstance(value, tuple):  # a record within a record, such as `Certificate.basis`
            continue
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}_")
            continue
        numeric = isinstance(value, bool | int | float | np.generic | np.ndarray | jax.Array) and np.ndim(value) <= 1
        if numeric and np.asarray(value).dtype.kind in "biuf":
            array = np.asarray(value)
            array = array.astype(int) if array.dtype.kind == "b" else array  # netCDF has no booleans
            flat[prefix + name] = array.item() if array.ndim == 0 else array
        else:
            flat[prefix + name] = str(value)
    return flat


def version_attributes() -> dict[str, str]:
    """Return the versions of the packages under ArviZ's attribute names."""
    found = versions()
    return {
        "inference_library": "scoreinfer",
        "inference_library_version": found["scoreinfer"],
        "numpyro_version": found["numpyro"],
        "jax_version": found["jax"],
        "python_version": found["python"],
    }
