"""Survey: measuring the properties of a model's sites, and refusing models that cannot be read."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Bool
from numpyro.distributions import biject_to, constraints

from scoreinfer._tree import Layout, is_traced
from scoreinfer._typing import Key, Sites, Values
from scoreinfer.errors import Offence, UnsupportedModel
from scoreinfer.model.replay import LOG_DET, Notes, Script, Trace, compiled, fixed_key, layers, log_prob, unwrapped

NUM_PROBES = 8
"""Joint draws on which a model is measured. Binary sites need several, to take both values. Chosen by judgement."""


class Row(NamedTuple):
    """The static properties of one site.

    Args:
        type: NumPyro's type of the site.
        shape: shape of the value. For a deterministic site it may be a tree of shapes.
        dtype: NumPy dtype name of the value.
        support: tree structure of the support, without its bounds, which may be traced.
        words: name of the support.
        is_factor: whether the site is a ``numpyro.factor``.
        plate_axis: axis of the value along which its only plate runs. None means there is no such axis.
        num_classes: number of categories. None means the site is not categorical.
    """

    type: str
    shape: Any
    dtype: str = ""
    support: Any = None
    words: str = ""
    is_factor: bool = False
    plate_axis: int | None = None
    num_classes: int | None = None


def _row(site: dict[str, Any]) -> Row:
    if site["type"] != "sample":
        return Row(site["type"], jax.tree.map(jnp.shape, site["value"]))
    fn = site["fn"]
    return Row(
        site["type"],
        jnp.shape(site["value"]),
        str(jnp.result_type(site["value"])),
        jax.tree.structure(fn.support),
        in_words(fn.support),
        bool(site["infer"].get("is_auxiliary")),
        _plate_axis(site),
        _num_classes(fn),
    )


def _num_classes(fn: dist.Distribution) -> int | None:
    base = layers(fn)[-1]
    if isinstance(base, dist.CategoricalProbs):
        return jnp.shape(base.probs)[-1]
    return jnp.shape(base.logits)[-1] if isinstance(base, dist.CategoricalLogits) else None


def _rows(played: Trace) -> dict[str, Row]:
    kinds = ("sample", "deterministic")
    return {name: _row(site) for name, site in played.items() if site["type"] in kinds and LOG_DET not in name}


@dataclass(frozen=True, eq=False)
class Survey:
    """Properties of a model, measured on a few joint draws. All arrays have the draw axis first.

    Args:
        table: the static properties of every site.
        latents: names of the latent sites in order.
        layout: layout of the latent sites in ``z``.
        points: unconstrained values of the latent sites.
        sites: values of all sample sites except factors.
        terms: log density of every site, entry by entry.
        supports: support of each site whose support is the same in all draws.
        masks: for each observed site with a fixed mask, True for the entries that count (no draw axis).
        masked: the observed sites with a mask.
        exchangeable: for each observed site with exchangeable entries along its plate, the axis of the plate.
        after_data: latent and deterministic sites that depend on the value of an observed site.
        notes: see `Notes`.

    Exactness: the properties hold for the measured draws, which use a fixed key.
    """

    table: dict[str, Row]
    latents: tuple[str, ...]
    layout: Layout
    points: dict[str, np.ndarray]
    sites: dict[str, np.ndarray]
    terms: dict[str, np.ndarray]
    supports: dict[str, constraints.Constraint]
    masks: dict[str, Bool[np.ndarray, "..."]]
    masked: tuple[str, ...]
    exchangeable: dict[str, int]
    after_data: frozenset[str]
    notes: Notes


def probe_keys(num: int = NUM_PROBES, repeats: int = 1) -> Array:
    """Make the fixed key of each measured draw, ``repeats`` times over."""
    with jax.ensure_compile_time_eval():
        return _split_and_repeat(fixed_key(), num, repeats)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _split_and_repeat(key: Key, num: int, repeats: int) -> Array:
    return jnp.tile(jax.random.split(key, num), repeats)


@jax.jit
def _rows_of(keys: Array) -> list[Key]:
    return [keys[i] for i in range(len(keys))]


def map_probes(function: Callable[..., Any], *inputs: Any) -> Any:
    """Compile a function, map it over the leading axis of its inputs, and return NumPy arrays."""
    mapped = compiled(lambda inputs: jax.lax.map(lambda row: function(*row), inputs), inputs)
    return jax.device_get(mapped(inputs))


def draw_probes(function: Callable[[Key], Any], keys: Array) -> Any:
    """Call a function that draws with each key, and stack the results.

    The function is not compiled, because compiling random numbers of many sites takes much longer than drawing them.
    Exception: if a kernel makes a problem inside jit, the function is compiled for one key.
    """
    with jax.ensure_compile_time_eval():
        rows = _rows_of(keys)
    run = compiled(function, rows[0]) if is_traced(jnp.zeros(())) else function
    with numpyro.validation_enabled(False):  # as in compiled code: draws that are not finite are reported, no error
        drawn = [jax.device_get(run(row)) for row in rows]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)


def take_survey(script: Script) -> Survey:
    """Measure a model: make joint draws, then compute densities at the draws with their own data and with other data.

    Raises:
        UnsupportedModel: if a site cannot be read, or differs between two runs.
    """
    notes = Notes()
    table, drawn = _draw(script, notes)
    latents = tuple(name for name in table if name in drawn["points"])
    terms, after_data = _score(script, table, drawn)
    shapes = tuple(jnp.shape(drawn["points"][name])[1:] for name in latents)
    return Survey(
        table=table,
        latents=latents,
        layout=Layout(latents, shapes),
        points=drawn["points"],
        sites=drawn["sites"],
        terms=terms,
        supports={
            name: jax.tree.unflatten(table[name].support, [leaf[0] for leaf in leaves])
            for name, leaves in drawn["supports"].items()
            if all(map(_constant, leaves))
        },
        masks={name: np.asarray(mask[0]) for name, mask in drawn["masks"].items() if _constant(mask)},
        masked=tuple(drawn["masks"]),
        exchangeable={
            name: axis
            for name, (moved, stayed) in drawn["alike"].items()
            if (axis := table[name].plate_axis) is not None and close(moved, stayed)
        },
        after_data=after_data,
        notes=notes,
    )


def _draw(script: Script, notes: Notes) -> tuple[dict[str, Row], dict[str, Any]]:
    """Make joint draws. Return the table of the sites, and the drawn values, supports and masks."""
    tables: list[dict[str, Row]] = []

    def draw(key: Key) -> dict[str, Any]:
        played = script.play(key, notes=notes)
        _refuse(played, script.names)
        tables.append(_rows(played))
        _refuse_moving(tables[0], tables[-1])
        samples = {name: played[name] for name, row in tables[-1].items() if row.type == "sample" and not row.is_factor}
        data = {name: site for name, site in samples.items() if name in script.names}
        latents = {name: site for name, site in samples.items() if name not in data and not site["is_observed"]}
        return {
            "sites": {name: site["value"] for name, site in samples.items()},
            "points": {name: biject_to(site["fn"].support).inv(site["value"]) for name, site in latents.items()},
            "supports": {
                name: list(map(jnp.asarray, jax.tree.leaves(site["fn"].support))) for name, site in samples.items()
            },
            "masks": {name: mask for name, site in data.items() if (mask := mask_of(site)) is not None},
            "alike": {name: _rolled(site) for name, site in data.items() if _plate_axis(site) is not None},
        }

    drawn = draw_probes(draw, probe_keys())
    return tables[0], drawn


def _score(
    script: Script, table: dict[str, Row], drawn: dict[str, Any]
) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """Compute log densities at the draws, and find the sites that depend on the data.

    Returns:
        The log density of every site with the draws' own data, and the names of the sites that other data change.
    """
    tables: list[dict[str, Row]] = []
    y = {name: drawn["sites"][name] for name in table if name in script.names}
    other = {name: np.roll(value, 1, axis=0) for name, value in y.items()}

    def score(key: Key, points: Sites, y: Sites) -> tuple[dict[str, Array], Values]:
        played = script.play(key, points, y)
        tables.append(_rows(played))
        terms = {name: log_prob(site) for name, site in played.items() if site["type"] == "sample"}
        return terms, {name: site["value"] for name, site in played.items() if site["type"] == "deterministic"}

    repeat = {name: np.concatenate([value, value]) for name, value in drawn["points"].items()}
    both = {name: np.concatenate([y[name], other[name]]) for name in y}
    terms, reported = map_probes(score, probe_keys(repeats=2), repeat, both)
    _refuse_moving(table, tables[-1])
    after_data = frozenset(
        name
        for name, value in (terms | reported).items()
        if name not in script.names
        and not (name in table and table[name].is_factor)
        and not all(close(leaf[:NUM_PROBES], leaf[NUM_PROBES:]) for leaf in jax.tree.leaves(value))
    )
    return {name: term[:NUM_PROBES] for name, term in terms.items()}, after_data


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Decide whether arrays are equal up to rounding."""
    return np.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def _constant(rows: np.ndarray) -> bool:
    return bool(np.array_equal(rows, np.broadcast_to(rows[:1], rows.shape)))


def mask_of(site: dict[str, Any]) -> Array | None:
    """Find the entries of a site's value that count. None means that all entries count."""
    value, masks = site["value"], []
    for layer in layers(site["fn"]):
        if isinstance(layer, dist.MaskedDistribution) and layer._mask is not True:
            mask = jnp.asarray(layer._mask)
            masks.append(jnp.broadcast_to(mask.reshape(mask.shape + (1,) * layer.event_dim), jnp.shape(value)))
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _plate_axis(site: dict[str, Any]) -> int | None:
    """Find the axis of a site's value along which its only plate runs. None means there is no such axis."""
    frames, batch_ndim = site["cond_indep_stack"], len(site["fn"].batch_shape)
    if len(frames) != 1 or site.get("_control_flow_done") or frames[0].size < 2:
        return None
    return batch_ndim + frames[0].dim


def _rolled(site: dict[str, Any]) -> tuple[Array, Array]:
    """Compute the log density of the rolled value, and the rolled log density.

    They are equal if the entries are exchangeable.
    """
    axis = _plate_axis(site)
    moved = log_prob(site, jnp.roll(site["value"], 1, axis))
    stayed = log_prob(site)
    return moved, jnp.roll(stayed, 1, axis)


def _refuse(played: Trace, names: frozenset[str]) -> None:
    offences = [offence for site in played.values() for offence in _offences(site, played, names)]
    missing = [Offence(name, "is no sample site of this model", "Correct `observed=`") for name in names - set(played)]
    if offences or missing:
        raise UnsupportedModel(tuple(offences + missing))
    is_latent = [s["type"] == "sample" and not s["is_observed"] and s["name"] not in names for s in played.values()]
    if not any(is_latent):
        raise UnsupportedModel(
            "this model cannot be read: it has no latent site, so there is nothing to infer"
            + (f". Observed sites: {', '.join(sorted(names))}; choose others with `observed=`." if names else ".")
        )


def _offences(site: dict[str, Any], played: Trace, names: frozenset[str]) -> list[Offence]:
    name, found = site["name"], []

    def add(reason: str, way_out: str) -> None:
        found.append(Offence(name, reason, way_out))

    if site["type"] == "plate" and site["args"][1] not in (None, site["args"][0]):
        add("is a plate with subsampling", "Drop `subsample_size`: every simulation needs the whole plate")
    if site["type"] == "deterministic" and {f"{name}_observed", f"{name}_unobserved"} <= set(played):
        add("is sampled with `obs_mask`", "Put the observed site under `numpyro.handlers.mask` instead")
    if site["type"] != "sample" or site["is_observed"] or name in names:
        return found
    fn = site["fn"]
    if isinstance(layers(fn)[-1], dist.Delta):
        add("is a latent site with a Delta distribution", "Use `numpyro.deterministic`")
    elif fn.support.is_discrete:
        add(
            "is a discrete latent site",
            "Sum it out (`dist.MixtureSameFamily`, `dist.MixtureGeneral`), or name it in `observed=` if it is data",
        )
    else:
        try:
            biject_to(fn.support)
        except NotImplementedError:
            add(
                f"has support `{in_words(fn.support)}`, which has no bijector to real numbers",
                "Write it as a function of unconstrained sites, for instance with `numpyro.handlers.reparam`",
            )
    return found


def _refuse_moving(one: dict[str, Row], two: dict[str, Row]) -> None:
    moving = [name for name in one | two if name not in one or name not in two or one[name][:2] != two[name][:2]]
    if moving:
        way_out = "Make every run of the model visit the same sites with the same shapes"
        raise UnsupportedModel(tuple(Offence(name, "differs between two runs", way_out) for name in moving))


def refuse_seeded(survey: Survey) -> None:
    """Refuse latent sites that have the same value for every key.

    Raises:
        UnsupportedModel: if there is such a site and no improper prior.
    """
    frozen = [name for name in survey.latents if _constant(survey.points[name])]
    if frozen and not survey.notes.improper:
        way_out = "Pass the model itself, without `numpyro.handlers.seed` and without fixed keys"
        raise UnsupportedModel(tuple(Offence(name, "is the same in every draw", way_out) for name in frozen))


def in_words(support: constraints.Constraint) -> str:
    """Return the name of a support, such as ``positive`` or ``corr_cholesky``."""
    name = type(unwrapped(support)).__name__.strip("_")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
