"""Hyperparameters: modules as plain data, and back. Only the classes named here are made; nothing is executed."""

import dataclasses
import math
from typing import Any

import jax

from scoreinfer.nets import Concatenate, ConditionalMLP, ConvNet, DeepSet, Embedding, Series
from scoreinfer.nets.convnet import PADDING_MODES
from scoreinfer.process import VE, VP, Noising, SubVP
from scoreinfer.samplers.amortised import Size
from scoreinfer.samplers.diffusion import AbstractSampler, ProbabilityFlow, ReverseSDE

MAX_SIZE, MAX_DEPTH, MAX_STEPS = 65_536, 64, 100_000
"""Largest width, number of blocks and number of sampler steps that are written and read."""
SCHEDULES = (VE, VP, SubVP)
SAMPLERS = (ProbabilityFlow, ReverseSDE)
EMBEDDINGS = (Concatenate, DeepSet, Series)
YOURS = "yours"
"""Type of a module of the user's own, which is not saved but for its arrays."""


def describe_module(module: Any, known: tuple[type, ...]) -> dict[str, Any]:
    """Describe a module of one of these classes by its hyperparameters; of one of the user's own, its name alone."""
    if type(module) in known:
        return {"type": type(module).__name__, **module.hyperparameters}
    return {"type": YOURS, "name": f"{type(module).__module__}.{type(module).__qualname__}"}


def make_embedding(described: dict[str, Any], own: Embedding | None) -> Embedding:
    """Make an embedding of its hyperparameters, or take the user's own.

    Raises:
        TypeError: for hyperparameters that are none.
    """
    sizes = {name: size_of(value, name, MAX_SIZE) for name, value in described.items() if name not in ("type", "name")}
    if described["type"] == YOURS and own is not None:
        return own
    for made in EMBEDDINGS:
        if made.__name__ == described["type"]:
            return made() if made is Concatenate else made(jax.random.key(0), **sizes)
    raise TypeError(f"unknown embedding {described['type']!r}")


def make_field_network(shape: tuple[int, ...], num_context: int, described: dict[str, Any]) -> ConvNet:
    """Make a network of fields of its hyperparameters.

    Raises:
        TypeError: for hyperparameters that are none, or do not fit the state's shape.
    """
    if described["type"] != ConvNet.__name__ or described["padding"] not in PADDING_MODES:
        raise TypeError(f"unknown network {described['type']!r} or padding")
    dilations = tuple(size_of(number, "dilations", MAX_SIZE) for number in described["dilations"])
    options: dict[str, Any] = {
        "num_space": size_of(described["num_space"], "num_space", len(shape)),
        "padding": described["padding"],
        "physics": yes_or_no(described["physics"], "physics"),
        "width": size_of(described["width"], "width", MAX_SIZE),
        "dilations": dilations[:MAX_DEPTH],
        "kernel_size": size_of(described["kernel_size"], "kernel_size", MAX_DEPTH),
        "levels": size_of(described["levels"], "levels", MAX_DEPTH),
    }
    try:
        return ConvNet(jax.random.key(0), shape, num_context=num_context, **options)
    except ValueError as error:
        raise TypeError(str(error)) from error


def perceptron_size(described: dict[str, Any]) -> Size:
    """Read width and depth of a perceptron.

    Raises:
        TypeError: for hyperparameters that are none.
    """
    return Size(size_of(described["width"], "width", MAX_SIZE), size_of(described["depth"], "depth", MAX_DEPTH))


def octaves_of(described: dict[str, Any], dim: int) -> tuple[int, ...]:
    """Read the octaves of a score network's sine features.

    Raises:
        TypeError: for hyperparameters that are none.
    """
    octaves = tuple(size_of(number, "octaves", MAX_DEPTH, 0) for number in described["octaves"])
    if len(octaves) not in (0, dim):
        raise TypeError(f"expected no octaves or {dim}, got {len(octaves)}")
    return octaves


def is_perceptron(network: Any) -> bool:
    """Say whether a network is a perceptron without sine features."""
    return isinstance(network, ConditionalMLP) and not network.octaves


def describe_sampler(sampler: AbstractSampler) -> dict[str, Any]:
    """Describe a sampler and the noise schedule of its process.

    Raises:
        ValueError: where they are of other classes than those that are saved.
    """
    process = sampler.process
    if type(sampler) not in SAMPLERS or type(process) is not Noising or type(process.schedule) not in SCHEDULES:
        raise ValueError(
            f"A {type(sampler).__name__} with the process {process!r} cannot be saved: expected one of "
            f"{', '.join(c.__name__ for c in SAMPLERS)} with a Noising that has one of the schedules "
            f"{', '.join(c.__name__ for c in SCHEDULES)}. Save the posterior with one of these and put yours in after "
            "loading."
        )

    def fields(thing: Any) -> dict[str, Any]:
        values = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
        numbers = {name: float(value) for name, value in values.items() if name not in ("process", "num_steps")}
        return {"type": type(thing).__name__, **numbers}

    return {**fields(sampler), "num_steps": sampler.num_steps, "process": fields(process.schedule)}


def make_sampler(described: dict[str, Any]) -> AbstractSampler:
    """Invert `describe_sampler`.

    Raises:
        TypeError: for hyperparameters that are none.
    """
    return _make(SAMPLERS, described | {"process": Noising(_make(SCHEDULES, described["process"]))})


def _make(classes: tuple[type, ...], described: dict[str, Any]) -> Any:
    """Make an object of one of a few classes from its plain fields, and no other."""
    found = [cls for cls in classes if cls.__name__ == described["type"]]
    if not found:
        raise TypeError(f"expected one of {', '.join(c.__name__ for c in classes)}, got {described['type']!r}")
    fields = {field.name for field in dataclasses.fields(found[0])}
    if described.keys() != fields | {"type"}:
        raise TypeError(f"expected the fields {', '.join(sorted(fields))}, got {', '.join(described)}")
    values = {name: value for name, value in described.items() if name != "type"}
    for name, value in values.items():
        if name == "num_steps":
            size_of(value, name, MAX_STEPS)
        elif name != "process" and not (isinstance(value, float) and math.isfinite(value)):
            raise TypeError(f"expected a number for {name!r}, got {value!r}")
    return found[0](**values)


def size_of(value: Any, name: str, largest: int, smallest: int = 1) -> int:
    """Check a whole number that was read.

    Raises:
        TypeError: where it is none, or out of bounds.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= largest:
        raise TypeError(f"expected a whole number from {smallest} to {largest} for {name!r}, got {value!r}")
    return value


def yes_or_no(value: Any, name: str) -> bool:
    """Check a truth value that was read.

    Raises:
        TypeError: where it is none.
    """
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false for {name!r}, got {value!r}")
    return value


def positive(value: Any, name: str) -> float:
    """Check a positive number that was read.

    Raises:
        TypeError: where it is none.
    """
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise TypeError(f"expected a positive number for {name!r}, got {value!r}")
    return value
