"""Out to ArviZ: draws, weights, predictions and certificate as the groups that ArviZ reads.

ArviZ 0.22 and 0.23 know an `InferenceData`, ArviZ 1.x an xarray `DataTree`. This module owns the difference; the
result can be read the same way in both: ``"posterior" in data``, ``data["posterior"]["a"]``, ``data.to_netcdf(path)``.

netCDF files have no names with slashes, which NumPyro's scopes give to sites: there ``left/a`` is called ``left.a``. Of
deterministic sites that are trees of arrays every array is a variable, ``net.w``.

ArviZ has no place for weights. Either the draws are resampled, and every function of ArviZ is right; or they stay
as the proposal gave them, with ``log_weight``, ``log_q`` and ``lp`` beside them in ``sample_stats``, for functions
that take weights (`arviz.loo_approximate_posterior` of ArviZ 1.x).
"""

import contextlib
import dataclasses
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer
from numpy.typing import ArrayLike

from scoreinfer._tree import named_leaves
from scoreinfer._typing import Key, Sites, Values
from scoreinfer.draws import Draws
from scoreinfer.problem import Problem

_BLOCK = 256  # draws worked on at once: bounds memory where every draw solves an ODE
_NOTE = (
    "Draws are independent: R-hat and effective sample size look perfect and prove nothing. "
    "Read the certificate_* attributes instead."
)


@runtime_checkable
class HasProblem(Protocol):
    """Whatever carries the `Problem` its draws come from, such as a fitted posterior."""

    @property
    def problem(self) -> Problem:
        """The inference problem."""


def to_arviz(
    draws: Draws,
    *,
    posterior: HasProblem | None = None,
    num_chains: int = 4,
    key: Key | None = None,
    resample: bool = True,
    log_likelihood: bool | Mapping[str, ArrayLike] = False,
    predictive: bool = False,
    prior: int = 0,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    r"""Present draws to ArviZ: an `InferenceData` (ArviZ 0.x) or a `DataTree` (ArviZ 1.x).

    Independent draws have no chains; they are cut into ``num_chains`` equal pieces, because most functions of ArviZ
    want dimensions ``(chain, draw)``. Draws that do not fill the last piece are left out.

    Groups: ``posterior`` (latent and deterministic sites), ``sample_stats`` (``log_weight``, ``log_q``, ``lp``, and
    whatever the sampler reports of each draw), ``observed_data``, and on request ``log_likelihood``,
    ``posterior_predictive``, ``prior`` and ``prior_predictive``. The attributes of ``posterior`` carry the versions,
    what the sampler reports of the batch, the certificate as ``certificate_*``, and which sites are ``renamed``.

    Args:
        draws: what a sampler returned.
        posterior: the posterior the draws come from (anything with a ``problem``); needed by ``log_likelihood=True``,
            ``predictive`` and ``prior``.
        num_chains: number of pieces the draws are cut into.
        key: random key; needed to resample, to predict and for prior draws. Same key, same groups.
        resample: draw with replacement by the weights, so that the posterior group has equal weights. Copies of one
            draw stand side by side, so the effective sample size ArviZ reports sees the weights: about
            :math:`N^2 / \sum n_i^2` for :math:`n_i` copies of draw i. With False the posterior group holds the
            proposal's draws and stands for the posterior only together with ``log_weight``. Draws without weights
            are never resampled.
        log_likelihood: True for the pointwise log likelihood of every observed site, or the dictionary that
            `numpyro.infer.log_likelihood(model, draws.sites, ...)` returns, with the draw axis first.
        predictive: simulate one observation for every draw of the posterior group.
        prior: number of prior draws with their simulated observations; 0 for none.
        coords: coordinate values by dimension name, as in ArviZ.
        dims: dimension names by site, without chain and draw, as in ArviZ.

    Returns:
        The groups. Whoever saves them needs a netCDF library: ``pip install 'scoreinfer[plot]'``.

    Raises:
        ValueError: for a key or a posterior that is missing, fewer draws than chains, or a problem that cannot
            be simulated or has no pointwise likelihood.

    Exactness:
        consistent as the number of draws -> infinity (resampling adds Monte Carlo noise to the weighted batch).

    Example:
        >>> import jax.numpy as jnp
        >>> z = jnp.arange(8.0)
        >>> draws = Draws({"a": z}, z[:, None], None, jnp.zeros(8), None, {"y": jnp.zeros(3)})
        >>> data = to_arviz(draws, num_chains=2)
        >>> data["posterior"]["a"].shape
        (2, 4)
    """
    if not 1 <= num_chains <= draws.num:
        raise ValueError(f"`num_chains` must be between 1 and the number of draws, {draws.num}, got {num_chains}.")
    weighted = draws.log_weight is not None
    resample = resample and weighted
    key_rows, key_predictive, key_prior = _split(key, needed=_why_key(resample, predictive, prior))
    num = draws.num - draws.num % num_chains
    rows = _resampled_rows(key_rows, draws, num) if resample else np.arange(num)

    def chains(
        sites: Mapping[str, Any], rows: np.ndarray = rows, num_chains: int = num_chains
    ) -> dict[str, np.ndarray]:
        """Take rows of every site and cut the draw axis into (chain, draw)."""
        taken = {name: np.asarray(value)[rows] for name, value in sites.items()}
        return {name: value.reshape(num_chains, -1, *value.shape[1:]) for name, value in taken.items()}

    per_draw, per_batch = _split_info(draws)
    densities = {"log_weight": draws.log_weight, "log_q": draws.log_q, "lp": draws.log_joint}
    groups: dict[str, dict[str, np.ndarray]] = {
        "posterior": chains(named_leaves(draws.sites)),
        "sample_stats": chains({**per_draw, **{name: value for name, value in densities.items() if value is not None}}),
        "observed_data": {name: np.asarray(value) for name, value in draws.observed.items()},
    }
    everything = np.arange(num)
    if isinstance(log_likelihood, Mapping):
        groups["log_likelihood"] = chains(log_likelihood)
    elif log_likelihood:
        problem = _problem(posterior, "log_likelihood=True")
        if problem.pointwise_log_likelihood is None:
            raise ValueError(
                "`log_likelihood=True` needs a pointwise likelihood, which this problem does not have; "
                "pass a dictionary of arrays with the draw axis first, such as "
                "`log_likelihood=numpyro.infer.log_likelihood(model, draws.sites, *args)`."
            )
        groups["log_likelihood"] = chains(_pointwise(problem, draws.values[rows], draws.observed), everything)
    if predictive:
        problem = _simulable(_problem(posterior, "predictive=True"), "predictive=True")
        simulated = _predict(problem, jax.random.split(key_predictive, num), draws.values[rows])
        groups["posterior_predictive"] = chains(simulated, everything)
    if prior:
        problem = _simulable(_problem(posterior, f"prior={prior}"), f"prior={prior}")
        sites, simulated = _prior(problem, jax.random.split(key_prior, prior))
        groups["prior"] = chains(named_leaves(sites), np.arange(prior), 1)
        groups["prior_predictive"] = chains(simulated, np.arange(prior), 1)

    named = {group: in_file_names(values) for group, values in groups.items() if values}
    pairs = [pair for group, values in named.items() for pair in zip(groups[group], values, strict=True)]
    renamed = {old: new for old, new in pairs if old != new}
    data = _from_groups(named, coords, dims and {renamed.get(site, site): names for site, names in dims.items()})
    data["posterior"].attrs.update(
        _versions()
        | {"num_draws": draws.num, "resampled": int(resample), "weighted": int(weighted and not resample)}
        | _flatten(per_batch)
        | _flatten(_fields(draws.certificate), "certificate_")
        | ({"renamed": "; ".join(f"{old} is {new}" for old, new in renamed.items())} if renamed else {})
        | {"note": _NOTE}
    )
    return data


def to_prior_sbc(ranks: Mapping[str, np.ndarray]) -> Any:
    """Present ranks of simulation-based calibration, simulations first, as the group ``prior_sbc`` of either ArviZ."""
    import arviz as az

    group = {name: np.asarray(values)[None] for name, values in in_file_names(ranks).items()}
    if int(az.__version__.split(".")[0]) >= 1:
        return az.from_dict({"prior_sbc": group})
    return az.InferenceData(prior_sbc=az.dict_to_dataset(group), warn_on_custom_groups=False)


def file_name(name: str) -> str:
    """Name a site as files can: netCDF keeps slashes for groups."""
    return name.replace("/", ".")


def in_file_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Name values as files can, each differently."""
    named: dict[str, Any] = {}
    for name, value in values.items():
        own = file_name(name)
        while own in named or (own != name and own in values):
            own += "_"
        named[own] = value
    return named


def _why_key(resample: bool, predictive: bool, prior: int) -> str:
    """Name the arguments for which a key is needed; empty where none is."""
    reasons = {"resample=True": resample, "predictive=True": predictive, f"prior={prior}": prior}
    return ", ".join(f"`{name}`" for name, needed in reasons.items() if needed)


def _split(key: Key | None, needed: str) -> list[Any]:
    """Split the key into one for each random group, so that no group depends on which others are asked for."""
    if key is not None:
        return list(jax.random.split(key, 3))
    if needed:
        raise ValueError(
            f"`to_arviz` needs a random `key` for {needed}, got None. Pass `key=jax.random.key(0)`"
            + (", or `resample=False` to keep the weighted draws." if "resample" in needed else ".")
        )
    return [None] * 3


def _resampled_rows(key: Key, draws: Draws, num: int) -> Integer[np.ndarray, " num"]:
    """Draw row numbers by weight, sorted so that the copies of one draw stand side by side."""
    numbered = draws._replace(sites={"row": jnp.arange(draws.num)})
    return np.sort(np.asarray(numbered.resample(key, num)["row"]))


def _problem(posterior: HasProblem | None, asked: str) -> Problem:
    if posterior is None:
        raise ValueError(f"`{asked}` needs the posterior the draws come from; pass `posterior=...`.")
    return posterior.problem


def _simulable(problem: Problem, asked: str) -> Problem:
    if problem.simulate is None or problem.simulate_observation is None:
        raise ValueError(f"`{asked}` needs a model that can be simulated: {problem.not_simulable}")
    return problem


@partial(jax.jit, static_argnums=0)
def _pointwise(problem: Problem, values: Float[Array, "num dim"], observed: Sites) -> Sites:
    """Compute the log likelihood of every observed value under every draw."""
    assert problem.pointwise_log_likelihood is not None
    pointwise = problem.pointwise_log_likelihood
    return jax.lax.map(lambda z: pointwise(z, observed), values, batch_size=_BLOCK)


@partial(jax.jit, static_argnums=0)
def _predict(problem: Problem, keys: Array, values: Float[Array, "num dim"]) -> Sites:
    """Simulate one observation for every draw."""
    assert problem.simulate_observation is not None
    simulate = problem.simulate_observation
    return jax.lax.map(lambda row: simulate(*row), (keys, values), batch_size=_BLOCK)


@partial(jax.jit, static_argnums=0)
def _prior(problem: Problem, keys: Array) -> tuple[Values, Sites]:
    """Draw latent and deterministic sites from the prior, with one observation each."""

    def one(key: Key) -> tuple[Values, Sites]:
        assert problem.simulate is not None
        z, y = problem.simulate(key)
        return problem.constrain(z), y

    return jax.lax.map(one, keys, batch_size=_BLOCK)


def _from_groups(groups: dict[str, dict[str, np.ndarray]], coords: Any, dims: Any) -> Any:
    """Build the container of the installed generation of ArviZ."""
    import arviz as az

    names = {
        "coords": None if coords is None else dict(coords),
        "dims": None if dims is None else {site: list(of) for site, of in dims.items()},
    }
    if int(az.__version__.split(".")[0]) >= 1:
        return az.from_dict(groups, **names)
    return az.from_dict(**groups, **names)


def _split_info(draws: Draws) -> tuple[dict[str, ArrayLike], dict[str, Any]]:
    """Split what the sampler reports into what it says of each draw and what it says of the batch."""
    per_draw = {name: value for name, value in draws.info.items() if np.shape(value)[:1] == (draws.num,)}
    return per_draw, {name: value for name, value in draws.info.items() if name not in per_draw}


def _fields(record: Any) -> dict[str, Any]:
    """Read a NamedTuple or a dataclass as a dictionary; None is empty."""
    if record is None:
        return {}
    if dataclasses.is_dataclass(record):
        return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return record._asdict()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten to what netCDF can store as attributes: text, numbers and rows of numbers. None is left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}_")
            continue
        numeric = isinstance(value, bool | int | float | np.generic | np.ndarray | jax.Array) and np.ndim(value) <= 1
        if numeric and np.asarray(value).dtype.kind in "biuf":
            array = np.asarray(value)
            array = array.astype(int) if array.dtype.kind == "b" else array  # netCDF has no booleans
            flat[prefix + name] = array.item() if array.ndim == 0 else array
        else:
            flat[prefix + name] = str(value)
    return flat


def _versions() -> dict[str, str]:
    """Name the versions that made the draws."""
    installed = {"scoreinfer": "0.0.0"}  # a source tree that is not installed
    for name in ("scoreinfer", "numpyro", "jax"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return {
        "inference_library": "scoreinfer",
        "inference_library_version": installed["scoreinfer"],
        "numpyro_version": installed["numpyro"],
        "jax_version": installed["jax"],
        "python_version": platform.python_version(),
    }
