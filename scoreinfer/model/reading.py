"""Observed values from a model's own arguments, or wherever else it takes them from, checked against the problem.

The model is traced anew at every reading, so that what it closes over is seen as it is now. (JAX itself takes an array
that is edited in place, and that went through its operations before, for what it was: assign a new one instead.)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.handlers import seed, trace

from scoreinfer._program import Program, own, shapes_of, trace_afresh
from scoreinfer._tree import is_traced
from scoreinfer._typing import Key, Sites
from scoreinfer.model.arguments import bind
from scoreinfer.model.replay import Open, Script, compiled, fixed_key, is_data
from scoreinfer.model.survey import NUM_PROBES, Survey, in_words, probe_keys


class _Seen(NamedTuple):
    """Observed values as a model has them, and the shape of each site's distribution."""

    values: Sites
    shapes: dict[str, tuple[int, ...]]


def look(run: Callable[[], Any], key: Key) -> _Seen:
    """Run a model as NumPyro does, data and all, and take the observed values."""
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
    """Compile log densities for all draws; traced arguments do not matter to them."""
    traced, row = program.shapes
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((NUM_PROBES, *leaf.shape), leaf.dtype), row)
    nothing = [0.0] * len(traced)
    mapped = lambda constants, rows: jax.lax.map(lambda row: program(constants, nothing, row), rows)  # noqa: E731
    return compiled(mapped, program.constants, rows)


class Design:
    """What belongs to the problem and is fixed: the model and its arguments, but for the data.

    What the model has been given, as arguments or from elsewhere, is of one design if every site has the same log
    density, entry by entry, at a few joint draws of the problem. The same program with the same constants needs no
    such check.

    Args:
        model: the model.
        args: its arguments when the problem was made.
        kwargs: its keyword arguments.
        script: the problem's script.
        survey: its draws and their log densities.
    """

    def __init__(self, model: Any, args: tuple, kwargs: dict[str, Any], script: Script, survey: Survey) -> None:
        self.model, self.script, self.survey = model, script, survey
        self._rows = (probe_keys(), survey.points, {name: survey.sites[name] for name in script.names})
        self._compiled = functools.lru_cache(maxsize=16)(_compiled)
        self._mapped = functools.lru_cache(maxsize=16)(_mapped)
        self._agrees = functools.lru_cache(maxsize=64)(self._compare)
        self._own = self._terms(args, kwargs).fingerprint

    def look(self, args: tuple, kwargs: dict[str, Any]) -> _Seen:
        """Take the observed values as they are now."""
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
        """Say whether log densities are those of the design now (traced covariates are believed)."""
        program = self._terms(args, kwargs)
        if any(program.uses[: len(program.shapes[0])]) or is_traced(program.constants):
            return True
        return program.fingerprint == self._own or self._agrees(program, program.fingerprint)

    def _terms(self, args: tuple, kwargs: dict[str, Any]) -> Program:
        """Trace the log densities at one draw, with traced arguments as inputs."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        traced = [leaf for leaf in leaves if is_traced(leaf)]

        def terms(traced: list[Any], row: tuple) -> dict[str, Array]:
            rest = iter(traced)
            args, kwargs = jax.tree.unflatten(treedef, [next(rest) if is_traced(leaf) else leaf for leaf in leaves])
            script = Script(functools.partial(self.model, *args, **kwargs), self.script.names, self.script.shapes)
            return script.terms(*row)

        return Program(terms, shapes_of(traced), jax.tree.map(lambda leaf: leaf[0], self._rows))

    def _compare(self, program: Program, _fingerprint: str) -> bool:
        """Compare log densities with the problem's own, as closely as the coarser precision of the two allows."""
        with jax.ensure_compile_time_eval():
            terms, own = self._mapped(program)(program.constants, self._rows), self.survey.terms
        return terms.keys() == own.keys() and all(_agree(terms[name], own[name]) for name in own)


def wrong_shape(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> str:
    """Say that an observation does not fit its site."""
    return (
        f"Observed site {name!r} must have shape {expected}, like its distribution in this model, got {got}. "
        "Was the model built for other data, or is a `plate` (or an `expand`) missing around the site?"
    )


class Reader:
    """`Problem.read`: observed values as the model has them now, checked against the problem."""

    def __init__(self, design: Design, filled: Callable[[str, Array], Array]) -> None:
        self.design, self.filled = design, filled

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Sites:
        """Read, from the arguments and from wherever else the model takes its data, what they are now."""
        args, kwargs, _ = bind(self.design.model, tuple(args), dict(kwargs), None)
        if any(map(np.ma.is_masked, jax.tree.leaves((args, kwargs)))):
            raise ValueError(
                "Expected arrays, got a masked one: its masked entries are no data. Pass `y.filled(...)`, and put the "
                "site under `numpyro.handlers.mask` with the mask as an argument of the model."
            )
        args, kwargs = jax.tree.map(own, (args, kwargs))
        survey, names = self.design.survey, self.design.script.names
        seen = self.design.look(args, kwargs)
        self._check_names(seen.values)
        values = {name: seen.values[name] for name in survey.table if name in names}
        for name, value in values.items():
            self._check_shape(name, jnp.shape(value), seen.shapes[name])
            if jnp.iscomplexobj(value):
                raise ValueError(
                    f"Observed site {name!r} must be real or whole numbers, got {value.dtype}. Observe real and "
                    "imaginary parts as two sites."
                )
        if not self.design.fits(args, kwargs):
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
