"""Checkpoint: a trained posterior as a folder of plain data, and back.

``config.json`` says what the posterior is: schema, versions, the model's sites, the networks, how it was trained.
``weights.safetensors`` holds every array. Reading rebuilds the networks' outline from the model at hand and the
description, without allocating or executing anything, and takes only arrays that fit this outline.
"""

import dataclasses
import math
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from scoreinfer._errors import UnreadableFile
from scoreinfer._tree import arrays_by_name, put_arrays
from scoreinfer._typing import Sites
from scoreinfer.bijections.affine import identity
from scoreinfer.evidence.bank import Outliers
from scoreinfer.files import (
    Arrays,
    check_seal,
    read_arrays,
    read_record,
    remove_leftovers,
    seal,
    write_arrays,
    write_record,
)
from scoreinfer.nets import Concatenate, ConditionalMLP, DeepSet, Embedding, Series
from scoreinfer.nets.embedding import flatten
from scoreinfer.problem import Problem, Site
from scoreinfer.process import VE, VP, Noising, SubVP
from scoreinfer.samplers.amortised import Proposal
from scoreinfer.samplers.diffusion import AbstractSampler, ProbabilityFlow, ReverseSDE
from scoreinfer.samplers.focused import FocusedProposal
from scoreinfer.samplers.refined import AmortisedProposal, RefinedProposal
from scoreinfer.score.network import score_module
from scoreinfer.simulators.dataset import FOREIGN
from scoreinfer.simulators.validity import Validity, validity_network
from scoreinfer.training.loop import Budget, History, TrainingHistory
from scoreinfer.training.simulations import Standardiser, encode
from scoreinfer.training.whitening import Whitening, whitening_network

FORMAT, SCHEMA = "scoreinfer posterior", 2
PATHS_FORMAT = "scoreinfer posterior of paths"
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
MAX_SIZE, MAX_DEPTH, MAX_STEPS = 65_536, 64, 100_000
"""Largest width, number of blocks and number of sampler steps that are written and read."""
DROPPED = ("1.log_excess", "1.log_share", "1.truth")
"""Arrays of saved posteriors of schema 1 that are no longer needed."""
SCHEDULES = (VE, VP, SubVP)
SAMPLERS = (ProbabilityFlow, ReverseSDE)


class Parts(NamedTuple):
    """What a posterior is made of, besides its problem."""

    proposal: AmortisedProposal
    outliers: Outliers | None
    history: TrainingHistory | None
    validity: Validity | None = None


def write_posterior(path: Path, parts: Parts) -> None:
    """Write a posterior to a folder.

    Raises:
        ValueError: where the folder holds other things, or the posterior has parts that data alone cannot describe.
    """
    problem, tree = parts.proposal.problem, (parts.proposal, parts.outliers, parts.validity)
    network = describe(parts)
    check_described(tree, outline(problem, network, _first(parts.proposal).embedding))
    write_folder(path, FORMAT, problem, tree, network, _training(parts))


def read_posterior(path: Path, problem: Problem, embedding: Embedding | None) -> Parts:
    """Read a posterior from a folder, for a problem with the same sites and density.

    Args:
        path: the folder.
        problem: the problem of the model at hand.
        embedding: the embedding module, where it was the user's own; its arrays are replaced.

    Raises:
        UnreadableFile: where the folder or its content is not whole, newer, changed, or not ours.
        ValueError: where it was made for another model, or needs an ``embedding``.
    """

    def rebuild(network: dict[str, Any]) -> PyTree:
        _check_embedding(path, network["embedding"], embedding)
        return outline(problem, network, embedding)

    (proposal, outliers, validity), history = read_folder(path, FORMAT, problem, rebuild, _history)
    return Parts(proposal, outliers, history, validity)


def write_folder(
    path: Path, kind: str, problem: Problem, tree: PyTree, network: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write the arrays of a tree, and the description by which it can be rebuilt.

    Raises:
        ValueError: where the folder holds other things.
    """
    remove_leftovers(path, CONFIG, WEIGHTS)
    entries = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    strangers = {name for name in entries - {CONFIG, WEIGHTS} if not name.endswith(".tmp")}
    if strangers or (path.exists() and not path.is_dir()):
        raise ValueError(
            f"`{path}` must be a new folder or hold a saved posterior and nothing else, got "
            f"{', '.join(sorted(strangers)) or 'a file'}. Choose another path."
        )
    arrays = arrays_by_name(tree) | _prefixed("probe", _probe(problem))
    record = {
        "format": kind,
        "schema": SCHEMA,
        "versions": versions(),
        "model": {
            "name": getattr(problem.model, "__qualname__", type(problem.model).__name__),
            "latents": [_site(site) for site in problem.latents],
            "observed": [_site(site) for site in problem.observed],
            "dim": problem.dim,
            "has_density": problem.has_density,
            "foreign": problem.not_simulable == FOREIGN,
            "likelihood": problem.observation is not None,
        },
        "network": network,
        "training": training,
    }
    path.mkdir(parents=True, exist_ok=True)
    write_arrays(path / WEIGHTS, {name: np.asarray(array) for name, array in arrays.items()})
    write_record(path / CONFIG, record | {"weights": seal(path / WEIGHTS)})


def read_folder(
    path: Path,
    kind: str,
    problem: Problem,
    rebuild: Callable[[dict[str, Any]], PyTree],
    recount: Callable[[dict[str, Any]], Any],
) -> tuple[PyTree, Any]:
    """Read what `write_folder` wrote: the tree, and the training.

    Args:
        path: the folder.
        kind: its format.
        problem: the problem of the model at hand.
        rebuild: from the description to the tree, with the shapes of its arrays in their place.
        recount: what to make of the record of the training.

    Raises:
        UnreadableFile: where the folder or its content is not whole, newer, changed, or not ours.
        ValueError: where it was made for another model.
    """
    record = read_description(path, kind)
    try:
        check_seal(path / WEIGHTS, record["weights"])
        _check_sites(record["model"], problem)
        tree = rebuild(record["network"])
        expected = arrays_by_name(tree) | _prefixed("probe", jax.eval_shape(lambda: _probe(problem)))
        size = sum(math.prod(leaf.shape) * 8 for leaf in expected.values())
        arrays, _ = read_arrays(path / WEIGHTS, size)
        if record["schema"] == 1:  # which kept more of each simulation
            arrays = {name: array for name, array in arrays.items() if name not in DROPPED}
        _check_arrays(path / WEIGHTS, arrays, expected)
        training = recount(record["training"])
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise UnreadableFile(path / CONFIG, f"it does not describe a posterior ({error!r})") from error
    _check_density(arrays, problem)
    return put_arrays(tree, arrays), training


def read_description(path: Path, kind: str = FORMAT) -> dict[str, Any]:
    """Read and check the config.json of a saved posterior.

    Raises:
        UnreadableFile: where it is not whole, newer, changed, or not ours.
        ValueError: where it is a posterior of the other kind.
    """
    if not path.is_dir():
        raise UnreadableFile(path, "there is no such folder", "A saved posterior is the folder that `save` wrote")
    record = read_record(path / CONFIG)
    found = record.get("format")
    if found in (FORMAT, PATHS_FORMAT) and found != kind:
        raise ValueError(
            f"`{path}` holds a {found.removeprefix('scoreinfer ')}, not a {kind.removeprefix('scoreinfer ')}: "
            f"`load` it {'with' if found == PATHS_FORMAT else 'without'} `process=`, as it was fitted."
        )
    if found != kind:
        raise UnreadableFile(path / CONFIG, f"expected the format {kind!r}, got {found!r}")
    schema = record.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise UnreadableFile(path / CONFIG, f"expected a schema number, got {schema!r}")
    if schema > SCHEMA:
        raise UnreadableFile(
            path / CONFIG, f"it has schema {schema}, this version reads up to {SCHEMA}", "Install a newer scoreinfer"
        )
    return record


def foreign_outputs(path: Path) -> dict[str, tuple[int, ...]] | None:
    """Name the outputs, with their shapes, that a posterior of a foreign simulator was learned for; else None."""
    try:
        model = read_description(path)["model"]
        if model["foreign"] is False:
            return None
        if model.get("likelihood"):
            raise ValueError(
                f"The posterior in `{path}` was fitted with a likelihood, and files hold no code: pass `likelihood=` "
                "and a store of the same simulator, `simulations=`, to `load`."
            )
        return {
            str(site["name"]): tuple(size_of(n, "shape", MAX_SIZE) for n in site["shape"]) for site in model["observed"]
        }
    except (KeyError, TypeError) as error:
        raise UnreadableFile(path / CONFIG, f"it does not describe a posterior ({error!r})") from error


def versions() -> dict[str, str]:
    """Name the versions at work."""
    found = {"python": platform.python_version()}
    for name in ("scoreinfer", "jax", "numpyro", "equinox", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "0.0.0"  # a source tree that is not installed
    return found


# --- the model


def _site(site: Site) -> dict[str, Any]:
    return site._asdict() | {"shape": list(site.shape)}


def _check_sites(stored: dict[str, Any], problem: Problem) -> None:
    """Say which sites of the model at hand differ from those of the model that was learned."""
    differences = []
    for kind, sites in (("latent", problem.latents), ("observed", problem.observed)):
        theirs = {site["name"]: site for site in stored["latents" if kind == "latent" else "observed"]}
        ours = {site.name: _site(site) for site in sites}
        differences += [f"{kind} site {name!r} is missing" for name in theirs.keys() - ours.keys()]
        differences += [f"{kind} site {name!r} is new" for name in ours.keys() - theirs.keys()]
        for name in sorted(ours.keys() & theirs.keys()):
            differences += [
                f"{kind} site {name!r} has {field} {ours[name][field]}, was {theirs[name][field]}"
                for field in ("shape", "support", "size", "exchangeable")  # the type changes with 64-bit mode
                if ours[name][field] != theirs[name][field]
            ]
        if not differences and list(theirs) != list(ours):
            differences.append(f"the {kind} sites come in another order: {', '.join(ours)}, was {', '.join(theirs)}")
    differences += [
        f"`{name}` is {own}, was {stored[name]}"
        for name, own in (("dim", problem.dim), ("has_density", problem.has_density))
        if stored[name] != own
    ]
    if differences:
        raise ValueError(
            f"This posterior was learned for another model ({stored['name']}): {'; '.join(differences)}. "
            "Pass the model and the arguments it was fitted with (and `observed=`, where it was given to `fit`)."
        )


def _probe(problem: Problem) -> dict[str, Any]:
    """Compute densities and parameters at three places: they tell a design from another with the same sites."""
    source = problem.observation or problem
    probe: dict[str, Any] = {"z": 0.5 * jnp.sin(jnp.arange(3.0)[:, None] + jnp.arange(problem.dim)), "y": {}}
    if source.simulate is not None and source.has_density:
        rows, y = jax.vmap(source.simulate)(jax.vmap(jax.random.key)(jnp.arange(3)))
        probe |= {"z" if source is problem else "outputs": rows, "y": y}
    return probe | _densities(problem, probe)


@eqx.filter_jit
def _densities(problem: Problem, probe: dict[str, Any]) -> dict[str, Any]:
    source, z, y = problem.observation or problem, probe["z"], probe["y"]
    densities = {"log_prior": jax.vmap(problem.log_prior)(z)}
    densities |= {f"site {name}": value for name, value in jax.vmap(problem.latent_sites)(z).items()}
    return densities | ({"log_likelihood": jax.vmap(source.log_likelihood)(probe.get("outputs", z), y)} if y else {})


def _check_density(arrays: Arrays, problem: Problem) -> None:
    places = {name: jnp.asarray(arrays[f"probe.{name}"]) for name in ("z", "outputs") if f"probe.{name}" in arrays}
    y = {name: jnp.asarray(arrays[f"probe.y.{name}"]) for name in sorted(site.name for site in problem.observed)
         if f"probe.y.{name}" in arrays}  # fmt: skip
    own = _densities(problem, {**places, "y": y})
    for name, value in own.items():
        stored = arrays[f"probe.{name}"]
        if not np.allclose(value, stored, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise ValueError(
                f"This posterior was learned for a model with other densities or bounds: expected {name} {stored} at "
                f"three stored places, got {np.asarray(value)}. Covariates or constants differ: pass the arguments it "
                "was fitted with, or fit again."
            )


# --- the networks


def _first(proposal: AmortisedProposal) -> Proposal:
    return proposal if isinstance(proposal, Proposal) else proposal.original


def describe(parts: Parts) -> dict[str, Any]:
    """Describe everything that is not an array."""
    proposal = _first(parts.proposal)
    network = proposal.score.network
    if not isinstance(network, ConditionalMLP):
        raise ValueError(f"A score with a {type(network).__name__} cannot be saved, only one with a ConditionalMLP.")
    return {
        "proposal": type(parts.proposal).__name__,
        "bend": proposal.standardiser.bend,
        "embedding": _describe_embedding(proposal.embedding),
        "whitening": {
            "width": proposal.whitening.network.first.out_features,
            "depth": len(proposal.whitening.network.blocks),
        },
        "score": {"width": network.width, "depth": len(network.blocks), "octaves": list(network.octaves)},
        "sampler": _describe_sampler(proposal.sampler),
        "bank": None if parts.outliers is None else parts.outliers.distance.size,
        "validity": parts.validity is not None,
    }


def _describe_embedding(embedding: Embedding) -> dict[str, Any]:
    if isinstance(embedding, Concatenate):
        return {"type": "Concatenate"}
    if isinstance(embedding, DeepSet):
        inner = embedding.inner.first
        sizes = {"num_entry": inner.in_features, "width": inner.out_features, "num_out": embedding.outer.out_features}
        return {"type": "DeepSet", **sizes}
    if isinstance(embedding, Series):
        first, num_out = embedding.layers[0], embedding.outer.out_features
        sizes = {"num_channels": first.in_channels, "width": first.out_channels, "num_out": num_out}
        return {"type": "Series", **sizes}
    return {"type": "yours", "name": f"{type(embedding).__module__}.{type(embedding).__qualname__}"}


def _check_embedding(path: Path, stored: dict[str, Any], embedding: Embedding | None) -> None:
    if stored["type"] == "yours" and embedding is None:
        raise ValueError(
            f"The posterior in `{path}` embeds its data by a module of your own, {stored['name']}, and files are never "
            "executed. Pass such a module, trained or not: `load(path, model, ..., embedding=module)`."
        )


def _make_embedding(network: dict[str, Any], x: Sites, embedding: Embedding | None) -> Embedding:
    sizes = {name: size_of(value, name, MAX_SIZE) for name, value in network.items() if name not in ("type", "name")}
    key = jax.random.key(0)
    if network["type"] == "Concatenate":
        return Concatenate()
    if network["type"] == "DeepSet":
        return DeepSet(key, **sizes)
    if network["type"] == "Series":
        return Series(key, next(iter(x.values())).shape[0], **sizes)
    if network["type"] == "yours" and embedding is not None:
        return embedding
    raise TypeError(f"unknown embedding {network['type']!r}")


def _describe_sampler(sampler: AbstractSampler) -> dict[str, Any]:
    process = sampler.process
    if type(sampler) not in SAMPLERS or type(process) is not Noising or type(process.schedule) not in SCHEDULES:
        raise ValueError(
            f"A {type(sampler).__name__} with the process {process!r} cannot be saved: expected one of "
            f"{', '.join(c.__name__ for c in SAMPLERS)} with a Noising that has one of the schedules "
            f"{', '.join(c.__name__ for c in SCHEDULES)}. "
            "Save the posterior with one of these and put yours in after loading."
        )

    def fields(thing: Any) -> dict[str, Any]:
        values = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
        numbers = {name: float(value) for name, value in values.items() if name not in ("process", "num_steps")}
        return {"type": type(thing).__name__, **numbers}

    return {**fields(sampler), "num_steps": sampler.num_steps, "process": fields(process.schedule)}


def _make_sampler(described: dict[str, Any]) -> AbstractSampler:
    process = Noising(_make(SCHEDULES, described["process"]))
    return _make(SAMPLERS, described | {"process": process})


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
    """Check a whole number that was read."""
    if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= largest:
        raise TypeError(f"expected a whole number from {smallest} to {largest} for {name!r}, got {value!r}")
    return value


def perceptron_sizes(described: dict[str, Any]) -> dict[str, int]:
    """Check width and depth that were read."""
    return {
        "width": size_of(described["width"], "width", MAX_SIZE),
        "depth": size_of(described["depth"], "depth", MAX_DEPTH),
    }


def outline(problem: Problem, network: dict[str, Any], embedding: Embedding | None) -> tuple[PyTree, PyTree, PyTree]:
    """Rebuild everything with the shapes of their arrays in place of the arrays."""
    sampler, bend = _make_sampler(network["sampler"]), network["bend"]
    if not isinstance(bend, float) or not bend > 0:
        raise TypeError(f"expected a positive number for 'bend', got {bend!r}")
    sizes = {part: perceptron_sizes(network[part]) for part in ("whitening", "score")}
    octaves = tuple(size_of(number, "octaves", MAX_DEPTH, 0) for number in network["score"]["octaves"])
    if len(octaves) not in (0, problem.dim):
        raise TypeError(f"expected no octaves or {problem.dim}, got {len(octaves)}")
    kind = network["proposal"]
    if kind not in ("Proposal", "FocusedProposal", "RefinedProposal"):
        raise TypeError(f"unknown proposal {kind!r}")
    has_validity = network["validity"]
    if not isinstance(has_validity, bool):
        raise TypeError(f"expected true or false for 'validity', got {has_validity!r}")
    num = None if network["bank"] is None else size_of(network["bank"], "bank", MAX_SIZE)

    def build() -> tuple[PyTree, PyTree, PyTree]:
        dim, key = problem.dim, jax.random.key(0)
        x = encode(problem, {site.name: jnp.zeros(site.shape, site.dtype) for site in problem.observed})
        standardiser = Standardiser(x, x, bend)
        x = standardiser(x)
        features, own = flatten(x), _make_embedding(network["embedding"], x, embedding)
        whitening = Whitening(
            jnp.zeros((dim, features.size)), jnp.zeros(dim), jnp.zeros((dim, dim)), own,
            whitening_network(key, dim, own(x).size, **sizes["whitening"]),
        )  # fmt: skip
        rows = jax.tree.map(lambda leaf: leaf[None], x)
        module = score_module(key, dim, own, rows, **sizes["score"], octaves=octaves)
        first = Proposal(standardiser, whitening, identity(dim), module.embedding, module.score, sampler, problem)
        proposal: Any = first
        if kind == "FocusedProposal":
            proposal = FocusedProposal(first, first)
        elif kind == "RefinedProposal":
            proposal = RefinedProposal(first, first, features)
        outliers = None if num is None else Outliers(jnp.zeros((num, features.size)), jnp.zeros(num))
        validity = Validity(jnp.zeros(dim), jnp.zeros(dim), validity_network(key, dim)) if has_validity else None
        return proposal, outliers, validity

    return eqx.filter_eval_shape(build)


# --- the arrays


def _prefixed(prefix: str, tree: PyTree) -> dict[str, Any]:
    return {f"{prefix}.{name}": leaf for name, leaf in arrays_by_name(tree).items()}


def check_described(tree: PyTree, rebuilt: PyTree) -> None:
    """Refuse, while writing, what could not be read back."""
    own, theirs = arrays_by_name(tree), arrays_by_name(rebuilt)
    wrong = [name for name in own.keys() | theirs.keys()
             if name not in own or name not in theirs or own[name].shape != theirs[name].shape]  # fmt: skip
    if wrong:
        raise ValueError(
            f"This posterior cannot be described by its sizes: {', '.join(sorted(wrong)[:3])} differ from those of a "
            "network of the kinds that are saved. Was a part of it replaced by hand?"
        )


def _check_arrays(path: Path, arrays: Arrays, expected: dict[str, Any]) -> None:
    names = arrays.keys() ^ expected.keys()
    if names:
        raise UnreadableFile(path, f"expected other arrays: {', '.join(sorted(names)[:3])} missing or too many")
    for name, array in arrays.items():
        own = expected[name]
        kinds = "f" if np.issubdtype(own.dtype, np.floating) else "iub"
        if array.shape != own.shape or array.dtype.kind not in kinds:
            raise UnreadableFile(
                path, f"array {name!r} must have shape {own.shape}, got {array.dtype} of shape {array.shape}"
            )


# --- the training


def _training(parts: Parts) -> dict[str, Any]:
    history = parts.history
    told: dict[str, Any] = {"history": None, "budget": None}
    if history is not None:
        told["history"] = {"whitening": run_record(history.whitening), "score": run_record(history.score)}
        told["budget"] = None if history.budget is None else history.budget._asdict()
    return told


def run_record(history: History) -> dict[str, Any]:
    """Make a record of a training run."""
    rows = {name: [float(v) if np.isfinite(v) else None for v in getattr(history, name)]
            for name in ("loss", "validation")}  # fmt: skip
    return history._asdict() | rows


def _history(training: dict[str, Any]) -> TrainingHistory | None:
    stored, budget = training["history"], training["budget"]
    if stored is None:
        return None
    return TrainingHistory(
        read_run(stored["whitening"]), read_run(stored["score"]), None if budget is None else Budget(**budget)
    )


def read_run(part: dict[str, Any]) -> History:
    """Invert `run_record`."""
    rows = {name: np.array([np.nan if v is None else v for v in part[name]], float)
            for name in ("loss", "validation")}  # fmt: skip
    return History(**part | rows)
