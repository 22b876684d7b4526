"""Reading the observed values of a model from its arguments, closures or globals, and checking them.

The model is traced again at every reading. So the current values of its closures and globals are used. Exception: JAX
may keep the old values of a NumPy array that is changed in place. Assign a new array instead.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.handlers import seed, trace

from scoreinfer._program import Program, own, shapes_of, trace_afresh
from scoreinfer._tree import evaluated_at_once, is_traced
from scoreinfer._typing import Key, Sites
from scoreinfer.model.arguments import bind
from scoreinfer.model.designs import found, presence
from scoreinfer.model.replay import Open, Script, compiled, fixed_key, is_data
from scoreinfer.model.survey import NUM_PROBES, Survey, in_words, probe_keys


class _Seen(NamedTuple):
    """The observed values of a model, and the shape of each site's distribution."""

    values: Sites
    shapes: dict[str, tuple[int, ...]]


def look(run: Callable[[], Any], key: Key) -> _Seen:
    """Run a model with its data, as NumPyro does, and return the observed values."""
    played = trace(seed(Open(run, frozenset()), key)).get_trace()
    data = {name: site for name, site in played.items() if is_data(site)}
    return _Seen(
        {name: jnp.asarray(own(site["value"])) for name, site in data.items()},
        {name: tuple(site["fn"].shape()) for name, site in data.items()},
    )


def _agree(term: Array, own: np.ndarray) -> bool:
    tolerance = 1e-8 if term.dtype == own.dtype == np.float64 else 2e-4
    return term.shape == own.shape and np.allclose(term, own, rtol=tolerance, atol=tolerance, equal_nan=True)


def _compiled(program: Program) -> Callable[..., Any]:
    return compiled(program, program.constants, *program.shapes)


def _mapped(program: Program) -> Callable[..., Any]:
    """Compile log densities for all draws. They must not depend on traced arguments."""
    traced, row = program.shapes
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((NUM_PROBES, *leaf.shape), leaf.dtype), row)
    nothing = [0.0] * len(traced)
    mapped = lambda constants, rows: jax.lax.map(lambda row: program(constants, nothing, row), rows)  # noqa: E731
    return compiled(mapped, program.constants, rows)


class Design:
    """The fixed part of a problem: the model and its arguments without the data (covariates, masks, constants).

    Two sets of arguments belong to the same design if every site has the same log density, entry by entry, at a few
    joint draws of the problem. If both give the same program with the same constants, this check is skipped.

    Args:
        model: the model.
        args: the arguments with which the problem was made.
        kwargs: the keyword arguments with which the problem was made.
        script: the problem's script.
        survey: the problem's draws and their log densities.

    Exactness: the check uses 8 joint draws, and a tolerance of 2e-4 (1e-8 in double precision).
    """

    def __init__(self, model: Any, args: tuple, kwargs: dict[str, Any], script: Script, survey: Survey) -> None:
        self.model, self.script, self.survey = model, script, survey
        self._rows = (probe_keys(), survey.points, {name: survey.sites[name] for name in script.names})
        self._compiled = functools.lru_cache(maxsize=16)(_compiled)
        self._mapped = functools.lru_cache(maxsize=16)(_mapped)
        self._agrees = functools.lru_cache(maxsize=64)(self._compare)
        self._own = self._terms(args, kwargs).fingerprint

    def look(self, args: tuple, kwargs: dict[str, Any]) -> _Seen:
        """Return the current observed values."""
        seen: list[_Seen] = []

        def values(arguments: tuple[tuple, dict[str, Any]], key: Key) -> Sites:
            seen.append(look(functools.partial(self.model, *arguments[0], **arguments[1]), key))
            return seen[-1].values

        program, arrays = trace_afresh(values, (args, kwargs), fixed_key())
        now = program if program.is_trivial or is_traced((program.constants, arrays)) else self._compiled(program)
        with jax.ensure_compile_time_eval():
            values_now = now(program.constants, arrays, fixed_key())
            return _Seen(jax.tree.map(jnp.asarray, values_now), seen[-1].shapes)

    def fits(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Decide whether these arguments belong to the design. Traced covariates are not checked and count as equal."""
        program = self._terms(args, kwargs)
        if any(program.uses[: len(program.shapes[0])]) or is_traced(program.constants):
            return True
        return program.fingerprint == self._own or self._agrees(program, program.fingerprint)

    def _terms(self, args: tuple, kwargs: dict[str, Any]) -> Program:
        """Trace the log densities at one draw, as a program with the traced arguments as inputs."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        traced = [leaf for leaf in leaves if is_traced(leaf)]

        def terms(traced: list[Any], row: tuple) -> dict[str, Array]:
            rest = iter(traced)
            args, kwargs = jax.tree.unflatten(treedef, [next(rest) if is_traced(leaf) else leaf for leaf in leaves])
            script = dataclasses.replace(self.script, run=functools.partial(self.model, *args, **kwargs))
            return script.terms(*row)

        return Program(terms, shapes_of(traced), jax.tree.map(lambda leaf: leaf[0], self._rows))

    def _compare(self, program: Program, _fingerprint: str) -> bool:
        """Compare log densities with the problem's, with the tolerance of the lower precision of the two."""
        with jax.ensure_compile_time_eval():
            terms, own = self._mapped(program)(program.constants, self._rows), self.survey.terms
        return terms.keys() == own.keys() and all(_agree(terms[name], own[name]) for name in own)


def wrong_shape(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> str:
    """Write the error message for an observation whose shape does not fit its site."""
    return (
        f"Observed site {name!r} must have shape {expected}, like its distribution in this model, got {got}. "
        "Build the problem for data of this shape, or put the site into a `plate` (or an `expand`)."
    )


class Reader:
    """The function `Problem.read`: it returns the model's current observed values and checks them.

    Args:
        design: the design of the problem.
        filled: replaces masked entries of all sites by a constant.
        missing: observed sites in whose data NaN stands for a missing entry, and an example of their masks.
    """

    def __init__(
        self, design: Design, filled: Callable[[Sites], Sites], missing: dict[str, np.ndarray] | None = None
    ) -> None:
        self.design, self.filled, self.missing = design, filled, missing or {}

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Sites:
        """Read the current data, from the arguments or from the model's closures and globals.

        Raises:
            ValueError: if data are missing, have a wrong shape or type, are NaN or outside the support, or if the
                arguments do not belong to this problem's design.
            TypeError: if the arguments do not fit the model's signature.
        """
        args, kwargs, _ = bind(self.design.model, tuple(args), dict(kwargs), None)
        if any(map(np.ma.is_masked, jax.tree.leaves((args, kwargs)))):
            raise ValueError(
                "Expected plain arrays, got a masked array: its masked entries are no data. Pass `y.filled(...)`, and "
                "put the site under `numpyro.handlers.mask` with the mask as an argument of the model."
            )
        args, kwargs = jax.tree.map(own, (args, kwargs))
        survey, names = self.design.survey, self.design.script.names
        seen = self.design.look(args, kwargs)
        data = seen.values | {
            presence(name): found(name, seen.values[name], mask)
            for name, mask in self.missing.items()
            if name in seen.values
        }
        self._check_names(data)
        values = {name: data[name] for name in survey.table if name in names}
        for name, value in values.items():
            self._check_shape(name, jnp.shape(value), seen.shapes.get(name, jnp.shape(value)))
            if jnp.iscomplexobj(value):
                raise ValueError(
                    f"Observed site {name!r} must be real or whole numbers, got {value.dtype}. Observe the real and "
                    "the imaginary part as two sites."
                )
        if not self.design.fits(args, kwargs):
            raise ValueError(
                "Expected arguments that differ from those of this problem in the data only, but these arguments give "
                "another model: covariates, shapes, constants or masks differ. Call `from_numpyro` (or `fit`) again "
                "with these arguments. If the model computes a mask from the data, pass the mask as an argument of its "
                "own, with the same value in both calls."
            )
        shaped = {name: jnp.broadcast_to(value, survey.table[name].shape) for name, value in values.items()}
        with evaluated_at_once():
            filled = self.filled(shaped)
        return {name: self._value(name, value) for name, value in filled.items()}

    def _check_names(self, values: Sites) -> None:
        missing = [name for name in self.design.survey.table if name in self.design.script.names - set(values)]
        if missing:
            raise ValueError(
                f"Expected data for every observed site, got none for {', '.join(missing)}: pass data for "
                f"{', '.join(missing)} in the model's arguments. If it is not data, name the observed sites in "
                "`observed=` when the problem is made."
            )
        latent = [name for name in values if name in self.design.survey.latents]
        if latent:
            raise ValueError(
                f"Expected data for observed sites only, but these arguments give data for {', '.join(latent)}, which "
                "is latent in this problem. Call `from_numpyro` (or `fit`) again with these arguments, or with "
                "`observed=`."
            )

    def _check_shape(self, name: str, got: tuple[int, ...], own: tuple[int, ...]) -> None:
        expected = self.design.survey.table[name].shape
        broad = name in self.design.script.shapes
        if got not in (expected, ()) or (own != expected and not broad):
            raise ValueError(wrong_shape(name, expected, own if got == expected else got))

    def _value(self, name: str, value: Array) -> Array:
        row = self.design.survey.table[name]
        if is_traced(value):
            return value.astype(row.dtype)
        with jax.ensure_compile_time_eval():
            self._check_value(name, value)
            return value.astype(row.dtype)

    def _check_value(self, name: str, value: Array) -> None:
        if np.isnan(value).any():
            raise ValueError(
                f"Observed site {name!r} has {int(np.isnan(value).sum())} NaN of {value.size} entries; expected none. "
                "Drop missing entries, put the site under `numpyro.handlers.mask`, or let NaN stand for missing ones "
                "(`designs` and `missing` of `NPSE`)."
            )
        support = self.design.survey.supports.get(name)
        inside = np.asarray(True if support is None else support(value))
        if not inside.all():
            raise ValueError(
                f"Observed site {name!r} must lie in the support `{in_words(support)}`, but {np.sum(~inside)} of its "
                f"{inside.size} values do not. Correct the data, or use a distribution that can produce them."
            )
