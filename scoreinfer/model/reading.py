"""Observed values from a model's own arguments, checked against the problem."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.handlers import seed, trace

from scoreinfer._tree import is_array, is_traced, reaches, same_leaf
from scoreinfer._typing import Key, Sites
from scoreinfer.model.arguments import bind
from scoreinfer.model.replay import NEEDS_VALUES, Open, Script, ahead_of_time, fixed_key, is_data
from scoreinfer.model.survey import Survey, in_words, probe_keys


class _Seen(NamedTuple):
    """Observed values in a model's arguments, and the shape of each site's distribution."""

    values: Sites
    shapes: dict[str, tuple[int, ...]]


def look(run: Callable[[], Any], key: Key) -> _Seen:
    """Run a model as NumPyro does, data and all, and take the observed values."""
    played = trace(seed(Open(run, frozenset()), key)).get_trace()
    data = {name: site for name, site in played.items() if is_data(site)}
    return _Seen(
        {name: jnp.asarray(site["value"]) for name, site in data.items()},
        {name: tuple(site["fn"].shape()) for name, site in data.items()},
    )


@dataclass(frozen=True, eq=False)
class _Structure:
    """Arguments with some arrays left open: what is compiled once and used for many data sets.

    Args:
        design: the problem that the arguments must fit.
        rebuild: arrays to arguments.
        arrays: shapes and dtypes of the arrays.
        alike: whether the arguments differ from the problem's own in the values of arrays only.
    """

    design: "Design"
    rebuild: Callable[[list[Any]], Callable[[], Any]]
    arrays: list[jax.ShapeDtypeStruct]
    alike: bool
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def observe(self, arrays: list[Any]) -> Sites:
        """Take the observed values."""
        return self._run(self._observe, lambda: self._observe_now, arrays)

    def fits(self, arrays: list[Any]) -> bool:
        """Say whether arguments with these arrays are of the design (traced ones are believed)."""
        if self._feeds_observations_only:
            return self._always_fits
        return is_traced(arrays) or self.design.fits(self._run(self._terms, lambda: self._terms_now, arrays))

    def _observe(self, arrays: list[Any], key: Key) -> Sites:
        seen = look(self.rebuild(arrays), key)
        self.shapes.update(seen.shapes)
        return seen.values

    def _terms(self, arrays: list[Any], key: Key) -> dict[str, Array]:
        del key
        return self.design.terms(self.rebuild(arrays))

    @functools.cached_property
    def _observe_now(self) -> Callable[..., Sites]:
        return ahead_of_time(self._observe, self.arrays, fixed_key())

    @functools.cached_property
    def _terms_now(self) -> Callable[..., dict[str, Array]]:
        return ahead_of_time(self._terms, self.arrays, fixed_key())

    @functools.cached_property
    def _feeds_observations_only(self) -> bool:
        return not self.arrays or not reaches(lambda arrays: self._terms(arrays, fixed_key()), self.arrays)

    @functools.cached_property
    def _always_fits(self) -> bool:
        zeros = [np.zeros(array.shape, array.dtype) for array in self.arrays]
        return self.alike or self.design.fits(self._terms_now(zeros, fixed_key()))

    def _run(self, traced: Callable[..., Any], now: Callable[[], Callable[..., Any]], arrays: list[Any]) -> Any:
        if is_traced(arrays):
            return traced(arrays, fixed_key())
        if any(map(np.ma.is_masked, arrays)):
            raise ValueError(
                "Expected arrays, got a masked one: its masked entries are no data. Pass `y.filled(...)`, and put the "
                "site under `numpyro.handlers.mask` with the mask as an argument of the model."
            )
        arrays = [np.asarray(given, array.dtype) for given, array in zip(arrays, self.arrays, strict=True)]
        return now()(arrays, fixed_key())


def _aval(leaf: Any) -> tuple[Any, Any]:
    return (jnp.shape(leaf), jnp.result_type(leaf)) if is_array(leaf) else (None, None)


def _agree(term: Array, own: np.ndarray) -> bool:
    tolerance = 1e-8 if term.dtype == own.dtype == np.float64 else 2e-4
    return term.shape == own.shape and np.allclose(term, own, rtol=tolerance, atol=tolerance, equal_nan=True)


class Design:
    """The part of a model's arguments that is not data: it belongs to the problem and is fixed.

    Two sets of arguments are of one design if every site has the same log density, entry by entry, at a few
    joint draws of the problem. Arguments that are the same by value need no such check.

    Args:
        model: the model.
        args: its arguments when the problem was made.
        kwargs: its keyword arguments.
        script: the problem's script.
        survey: its draws and their log densities.
    """

    def __init__(self, model: Any, args: tuple, kwargs: dict[str, Any], script: Script, survey: Survey) -> None:
        self.model, self.script, self.survey = model, script, survey
        paths, self.treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
        self.leaves = dict(paths)
        self._structure = functools.lru_cache(maxsize=16)(self._build_structure)

    def terms(self, run: Callable[[], Any]) -> dict[str, Array]:
        """Compute log densities at the problem's draws for other arguments."""
        script = Script(run, self.script.names, self.script.shapes)
        y = {name: self.survey.sites[name] for name in self.script.names}
        return jax.lax.map(lambda row: script.terms(*row), (probe_keys(), self.survey.points, y))

    def fits(self, terms: Mapping[str, Array]) -> bool:
        """Compare log densities with the problem's own, as closely as the coarser precision of the two allows."""
        own = self.survey.terms
        return terms.keys() == own.keys() and all(_agree(terms[name], own[name]) for name in own)

    def open(self, args: tuple, kwargs: dict[str, Any]) -> tuple[_Structure, list[Any]]:
        """Split arguments into arrays that differ from the problem's own, and the structure around them."""
        paths, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
        parts: list[tuple[Any, str, Any, Any]] = []
        arrays = []
        for path, leaf in paths:
            if path in self.leaves and same_leaf(self.leaves[path], leaf):
                parts.append((path, "same", None, None))
            elif is_array(leaf):
                parts.append((path, "array", *_aval(leaf)))
                arrays.append(leaf)
            else:
                parts.append((path, "static", type(leaf), leaf))
        try:
            return self._structure(treedef, tuple(parts)), arrays
        except TypeError:  # a leaf that cannot be hashed
            return self._build_structure(treedef, tuple(parts)), arrays

    def _build_structure(self, treedef: Any, parts: tuple) -> _Structure:
        is_open = [kind == "array" for _, kind, _, _ in parts]
        own = [self.leaves.get(path) if kind == "same" else value for path, kind, _, value in parts]

        def rebuild(arrays: list[Any]) -> Callable[[], Any]:
            rest = iter(arrays)
            leaves = [next(rest) if open_ else leaf for open_, leaf in zip(is_open, own, strict=True)]
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            return functools.partial(self.model, *args, **kwargs)

        arrays = [jax.ShapeDtypeStruct(shape, dtype) for _, kind, shape, dtype in parts if kind == "array"]
        alike = treedef == self.treedef and all(
            kind == "same" or (kind == "array" and _aval(self.leaves.get(path)) == (shape, dtype))
            for path, kind, shape, dtype in parts
        )
        return _Structure(self, rebuild, arrays, alike)

    def closed(self, args: tuple, kwargs: dict[str, Any]) -> _Structure:
        """Arguments with nothing left open, for models that need their values; compiled for each data set."""
        return _Structure(self, lambda _: functools.partial(self.model, *args, **kwargs), [], alike=False)


def wrong_shape(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> str:
    """Say that an observation does not fit its site."""
    return (
        f"Observed site {name!r} must have shape {expected}, like its distribution in this model, got {got}. "
        "Was the model built for other data, or is a `plate` (or an `expand`) missing around the site?"
    )


class Reader:
    """`Problem.read`: observed values from the model's own arguments, checked against the problem."""

    def __init__(self, design: Design, filled: Callable[[str, Array], Array]) -> None:
        self.design, self.filled = design, filled

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Sites:
        """Read; where the model needs values of its arguments in Python, compile for these alone."""
        args, kwargs, _ = bind(self.design.model, tuple(args), dict(kwargs), None)
        structure, arrays = self.design.open(args, kwargs)
        try:
            return self._checked(structure, arrays)
        except NEEDS_VALUES:
            return self._checked(self.design.closed(args, kwargs), [])

    def _checked(self, structure: _Structure, arrays: list[Any]) -> Sites:
        survey, names = self.design.survey, self.design.script.names
        values = structure.observe(arrays)
        self._check_names(values)
        values = {name: values[name] for name in survey.table if name in names}
        for name, value in values.items():
            self._check_shape(name, jnp.shape(value), structure.shapes[name])
            if jnp.iscomplexobj(value):
                raise ValueError(
                    f"Observed site {name!r} must be real or whole numbers, got {value.dtype}. Observe real and "
                    "imaginary parts as two sites."
                )
        if not structure.fits(arrays):
            raise ValueError(
                "These arguments give another model than the one this problem was made from: covariates, shapes, "
                "constants or masks differ, not just the data. Call `from_numpyro` (or `fit`) again with them. (A mask "
                "that the model computes from the data is part of the design, too: pass the mask as an argument of its "
                "own, here and there the same.)"
            )
        return {name: self._value(name, value) for name, value in values.items()}

    def _check_names(self, values: Sites) -> None:
        missing = [name for name in self.design.survey.table if name in self.design.script.names - set(values)]
        if missing:
            raise ValueError(
                f"Expected data for every observed site, got none for {', '.join(missing)}: pass data for "
                f"{', '.join(missing)} in the model's arguments. (If it is no data, name the observed sites in "
                "`observed=` when the problem is made.)"
            )
        latent = [name for name in values if name in self.design.survey.latents]
        if latent:
            raise ValueError(
                f"Site {', '.join(latent)} is latent in this problem, but these arguments give data for it. "
                "Call `from_numpyro` (or `fit`) again with them, or with `observed=`."
            )

    def _check_shape(self, name: str, got: tuple[int, ...], own: tuple[int, ...]) -> None:
        expected = self.design.survey.table[name].shape
        broad = name in self.design.script.shapes
        if got not in (expected, ()) or (own != expected and not broad):
            raise ValueError(wrong_shape(name, expected, own if got == expected else got))

    def _value(self, name: str, value: Array) -> Array:
        row = self.design.survey.table[name]
        if is_traced(value):
            return self.filled(name, jnp.broadcast_to(value, row.shape)).astype(row.dtype)
        with jax.ensure_compile_time_eval():
            value = self.filled(name, jnp.broadcast_to(value, row.shape))
            self._check_value(name, value)
            return value.astype(row.dtype)

    def _check_value(self, name: str, value: Array) -> None:
        if np.isnan(value).any():
            raise ValueError(
                f"Observed site {name!r} has {int(np.isnan(value).sum())} NaN of {value.size}. Drop missing entries, "
                "or put the site under `numpyro.handlers.mask`."
            )
        support = self.design.survey.supports.get(name)
        inside = np.asarray(True if support is None else support(value))
        if not inside.all():
            raise ValueError(
                f"Observed site {name!r} must lie in the support `{in_words(support)}`, but {np.sum(~inside)} of its "
                f"{inside.size} values do not. Expected data that this model can produce."
            )
