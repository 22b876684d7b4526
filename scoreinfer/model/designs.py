"""Designs: arguments of a model that differ from data set to data set, such as masks, times and covariates.

A design is data without density. Each of its arguments is read as an observed site whose log density is zero. So the
design travels with the data to embedding and likelihood, and everything else stays as it is: simulations draw a design
first, and the log likelihood of an observation is evaluated with its own masks.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Bool
from numpyro.distributions import constraints
from numpyro.primitives import Messenger

from scoreinfer._tree import is_traced
from scoreinfer._typing import Key, Sites
from scoreinfer.model.arguments import abstract_trace, bind
from scoreinfer.model.replay import fixed_key

Designs = Callable[[Key], Mapping[str, Any]]
"""Draws a design: arrays by the names of the model's arguments. It is written in JAX."""


def presence(name: str) -> str:
    """Name the site that says which entries of an observed site are there."""
    return f"{name}_present"


class Given(dist.Distribution):
    """The law of one argument of a design: its log density is zero, whatever its value.

    Args:
        shape: shape of the argument.
        dtype: NumPy dtype name of the argument.
    """

    pytree_aux_fields = ("dtype",)

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.dtype = dtype
        super().__init__(batch_shape=shape)

    @property
    def support(self) -> constraints.Constraint:
        """Return the support: true and false, or all numbers."""
        return constraints.boolean if self.dtype == "bool" else constraints.real

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Return zeros: `Designed.designs` draws the values."""
        return jnp.zeros(sample_shape + self.batch_shape, self.dtype)

    def log_prob(self, value: Any) -> Array:
        """Return zeros."""
        return jnp.zeros(jnp.shape(value))


class _Hide(Messenger):
    """Masks the entries of sites that are not there."""

    def __init__(self, present: Mapping[str, Bool[Array, "..."]]) -> None:
        self.present = present
        super().__init__(None)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Mask one site."""
        if msg["type"] == "sample" and msg["name"] in self.present and not msg.get("_control_flow_done"):
            present, (fn, events) = self.present[msg["name"]], ungrouped(msg["fn"])
            msg["fn"] = fn.mask(present).to_event(events)


def ungrouped(fn: dist.Distribution) -> tuple[dist.Distribution, int]:
    """Undo ``to_event``, so that single entries can be masked; return the number of its dimensions, too.

    >>> ungrouped(dist.Normal(jnp.zeros(3), 1.0).to_event(1))[1]
    1
    """
    if not isinstance(fn, dist.Independent):
        return fn, 0
    inner, events = ungrouped(fn.base_dist)
    return inner, events + fn.reinterpreted_batch_ndims


@dataclass(eq=False)
class Designed:
    """A model whose design is drawn anew for every simulation: a model with observed sites without density.

    Args:
        model: the model.
        draw: draws a design.
        missing: observed sites in whose data NaN stands for a missing entry.
        example: one design; only shapes and types matter.
    """

    model: Callable[..., Any]
    draw: Designs
    missing: tuple[str, ...]
    example: dict[str, np.ndarray] = field(repr=False)

    def __post_init__(self) -> None:
        """Take the model's name and signature."""
        update_wrapper(self, self.model)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments that belong to the design."""
        return tuple(name for name in self.example if name not in self.missing)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites of the design."""
        return self.arguments + tuple(map(presence, self.missing))

    def designs(self, key: Key) -> Sites:
        """Draw a design, by the names of its sites."""
        drawn = {name: jnp.asarray(value, self.example[name].dtype) for name, value in self.draw(key).items()}
        return {presence(name) if name in self.missing else name: value for name, value in drawn.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its design as observed sites."""
        bound = inspect.signature(self.model).bind(*args, **kwargs)
        bound.apply_defaults()
        for name in self.arguments:
            bound.arguments[name] = self._site(name, self.example[name], bound.arguments[name])
        present = {name: self._site(presence(name), self.example[name], None) for name in self.missing}
        with ExitStack() as stack:
            if present:
                stack.enter_context(_Hide(present))
            return self.model(*bound.args, **bound.kwargs)

    def _site(self, name: str, example: np.ndarray, value: Any) -> Any:
        if value is not None:  # as NumPy where possible: a constant must not become an operation of the program
            value = jnp.asarray(value, example.dtype) if is_traced(value) else np.asarray(value, example.dtype)
            if value.shape not in (example.shape, ()):
                raise ValueError(
                    f"`{name}` must have shape {example.shape}, as `designs` draws it, got {value.shape}. Pad it (and "
                    "the data) to this length; a mask says which rows are there."
                )
            value = (
                jnp.broadcast_to(value, example.shape) if is_traced(value) else np.broadcast_to(value, example.shape)
            )
        return numpyro.sample(name, Given(example.shape, str(example.dtype)), obs=value)


def designed(
    model: Callable[..., Any], args: tuple, kwargs: dict[str, Any], designs: Designs, missing: tuple[str, ...] = ()
) -> tuple[Designed, tuple, dict[str, Any]]:
    """Wrap a model whose arguments ``designs`` draws, and complete its arguments.

    Returns:
        The wrapped model, and arguments in which an example stands for every part of the design.

    Raises:
        TypeError: if ``designs`` is no function of a key that returns arrays by name.
        ValueError: if a name is no argument of the model, or a site that the model draws itself.
    """
    example = _example(designs)
    own = Designed(model, designs, tuple(missing), example)
    signature = inspect.signature(model)
    strange = [name for name in own.arguments if name not in signature.parameters]
    if strange or set(missing) - set(example):
        raise ValueError(
            f"`designs` must give arguments of the model ({', '.join(signature.parameters)}) and, for every site in "
            f"`missing`, which entries are there; got {', '.join(example)}. Correct {', '.join(strange) or 'missing'}."
        )
    bound = signature.bind_partial(*args, **kwargs)
    for name in own.arguments:
        if bound.arguments.get(name) is None:
            bound.arguments[name] = example[name]
    sites = abstract_trace(lambda: model(*bound.args, **bound.kwargs))
    drawn = [name for name in own.arguments if name in sites]
    if drawn:
        raise ValueError(
            f"`designs` must not draw {', '.join(drawn)}, which the model draws itself. If it says which entries are "
            "missing, this is informative: whether an entry is missing tells something about the parameters. Then the "
            "mask is data; pass it with the data and leave it out of `designs`."
        )
    for name in missing:
        _check_missing(name, sites, example[name])
    return own, bound.args, bound.kwargs


def with_designs(
    model: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    observed: Any,
    designs: Designs | None,
    missing: tuple[str, ...],
) -> tuple[Callable[..., Any], tuple, dict[str, Any], Any]:
    """Wrap a model with designs, and bind its arguments (`scoreinfer.model.arguments.bind`).

    Raises:
        TypeError, ValueError: as for `designed`; a ValueError also if there are missing entries without designs.
    """
    if designs is None:
        if missing:
            raise ValueError(
                "`missing` needs `designs`, which draws which entries are there, got none. Write "
                f"`designs=lambda key: dict({missing[0]}=jax.random.bernoulli(key, 0.7, (20,)))`, say."
            )
        return model, *bind(model, args, kwargs, observed)
    wrapped, args, kwargs = designed(model, args, kwargs, designs, missing)
    return wrapped, *bind(wrapped, args, kwargs, observed)


def _example(designs: Designs) -> dict[str, np.ndarray]:
    drawn: Any = designs(fixed_key())
    if not isinstance(drawn, Mapping) or not drawn:
        raise TypeError(
            f"`designs` must be a function of a key that returns a dictionary of arrays, got {type(drawn).__name__}. "
            "Write `designs=lambda key: dict(present=jax.random.bernoulli(key, 0.7, (20,)))`, say."
        )
    example = {name: np.asarray(jnp.asarray(value)) for name, value in drawn.items()}
    return dict(sorted(example.items()))


def _check_missing(name: str, sites: dict[str, Any], present: np.ndarray) -> None:
    if name not in sites or sites[name]["type"] != "sample":
        raise ValueError(f"`missing` must name observed sites of the model, got {name!r}, which is none.")
    shape = tuple(ungrouped(sites[name]["fn"])[0].batch_shape)
    if present.dtype != bool or present.shape != shape:
        raise ValueError(
            f"`designs` must say by an array of booleans of shape {shape} which entries of {name!r} are there, got "
            f"{present.dtype} of shape {present.shape}."
        )


def found(name: str, value: Array, present: np.ndarray) -> Bool[Array, "..."]:
    """Say which entries of the data of a site are not NaN.

    Raises:
        ValueError: if a part of a vector is missing, which a mask cannot say.
    """
    isnan = jnp.isnan(value)
    within = tuple(range(present.ndim, isnan.ndim))
    gone = isnan.any(axis=within)
    if not is_traced(value) and bool((gone != isnan.all(axis=within)).any()):
        raise ValueError(
            f"Observed site {name!r} has vectors with NaN in a part of their components; expected all or none. Write "
            "the site as independent numbers, or mask it in the model."
        )
    return ~gone
