"""Hyperparameters: modules to plain data, and back. Only the classes in this file are made; nothing is executed."""

import dataclasses
import math
from typing import Any

import jax

from scoreinfer.nets import Concatenate, ConditionalMLP, ConvNet, DeepSet, Embedding, MaskedGroups, MaskedRows, Series
from scoreinfer.nets.convnet import PADDING_MODES
from scoreinfer.process import VE, VP, Angular, Noising, SubVP
from scoreinfer.samplers.amortised import Size
from scoreinfer.samplers.diffusion import AbstractSampler, ProbabilityFlow, ReverseSDE

MAX_SIZE, MAX_DEPTH, MAX_STEPS = 65_536, 64, 100_000
"""Largest size, number of blocks and number of sampler steps that a file may contain. Chosen by judgement."""
SCHEDULES = (VE, Angular, VP, SubVP)
"""Noise schedules that can be saved."""
SAMPLERS = (ProbabilityFlow, ReverseSDE)
"""Samplers that can be saved."""
EMBEDDINGS = (Concatenate, DeepSet, MaskedGroups, MaskedRows, Series)
"""Embeddings that can be saved."""
YOURS = "yours"
"""Type name of a module of the user's own. Only its arrays are saved."""


def describe_module(module: Any, known: tuple[type, ...]) -> dict[str, Any]:
    """Describe a module of a known class by its hyperparameters, and any other module by the name of its class."""
    if type(module) in known:
        return {"type": type(module).__name__, **module.hyperparameters}
    return {"type": YOURS, "name": f"{type(module).__module__}.{type(module).__qualname__}"}


def make_embedding(described: dict[str, Any], own: Embedding | None) -> Embedding:
    """Make an embedding from its hyperparameters, or return the user's own.

    Raises:
        TypeError: if the hyperparameters are invalid.
    """
    sizes = {
        name: size_of(value, name, MAX_SIZE, 0 if name in ("num_other", "num_covariates") else 1)
        for name, value in described.items()
        if name not in ("type", "name")
    }
    if described["type"] == YOURS and own is not None:
        return own
    for made in EMBEDDINGS:
        if made.__name__ == described["type"]:
            return made() if made is Concatenate else made(jax.random.key(0), **sizes)
    raise TypeError(f"expected an embedding of a known type, got {described['type']!r}")


def make_field_network(shape: tuple[int, ...], num_context: int, described: dict[str, Any]) -> ConvNet:
    """Make a network for fields from its hyperparameters.

    Raises:
        TypeError: if the hyperparameters are invalid, or do not fit the state's shape.
    """
    if described["type"] != ConvNet.__name__ or described["padding"] not in PADDING_MODES:
        raise TypeError(f"expected a ConvNet with a known padding, got type {described['type']!r} or another padding")
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
        TypeError: if the hyperparameters are invalid.
    """
    return Size(size_of(described["width"], "width", MAX_SIZE), size_of(described["depth"], "depth", MAX_DEPTH))


def octaves_of(described: dict[str, Any], dim: int) -> tuple[int, ...]:
    """Read the octaves of a score network's sine features.

    Raises:
        TypeError: if the hyperparameters are invalid.
    """
    octaves = tuple(size_of(number, "octaves", MAX_DEPTH, 0) for number in described["octaves"])
    if len(octaves) not in (0, dim):
        raise TypeError(f"expected no octaves or {dim}, got {len(octaves)}")
    return octaves


def is_perceptron(network: Any) -> bool:
    """Return whether a network is a perceptron without sine features."""
    return isinstance(network, ConditionalMLP) and not network.octaves


def describe_sampler(sampler: AbstractSampler) -> dict[str, Any]:
    """Describe a sampler and the noise schedule of its process.

    Raises:
        ValueError: if the sampler or its schedule is of a class that cannot be saved.
    """
    process = sampler.process
    if type(sampler) not in SAMPLERS or type(process) is not Noising or type(process.schedule) not in SCHEDULES:
        raise ValueError(
            f"To be saved, a sampler must be one of {', '.join(c.__name__ for c in SAMPLERS)} with a Noising of one of "
            f"the schedules {', '.join(c.__name__ for c in SCHEDULES)}, got {type(sampler).__name__} with the process "
            f"{process!r}. Save the posterior with one of these, and replace the sampler after loading."
        )

    def fields(thing: Any) -> dict[str, Any]:
        values = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
        numbers = {name: float(value) for name, value in values.items() if name not in ("process", "num_steps")}
        return {"type": type(thing).__name__, **numbers}

    return {**fields(sampler), "num_steps": sampler.num_steps, "process": fields(process.schedule)}


def make_sampler(described: dict[str, Any]) -> AbstractSampler:
    """Make a sampler from the description by `describe_sampler`.

    Raises:
        TypeError: if the hyperparameters are invalid.
    """
    return _make(SAMPLERS, described | {"process": Noising(_make(SCHEDULES, described["process"]))})


def _make(classes: tuple[type, ...], described: dict[str, Any]) -> Any:
    """Make an object of one of the given classes from its plain fields."""
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
    """Check an integer from a file.

    Raises:
        TypeError: if the value is not an integer, or is out of bounds.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= largest:
        raise TypeError(f"expected a whole number from {smallest} to {largest} for {name!r}, got {value!r}")
    return value


def yes_or_no(value: Any, name: str) -> bool:
    """Check a Boolean from a file.

    Raises:
        TypeError: if the value is not a Boolean.
    """
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false for {name!r}, got {value!r}")
    return value


def positive(value: Any, name: str) -> float:
    """Check a positive number from a file.

    Raises:
        TypeError: if the value is not a finite positive float.
    """
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise TypeError(f"expected a positive number for {name!r}, got {value!r}")
    return value
