"""A posterior of paths as a folder of plain data, and back.

As in `scoreinfer.posterior.checkpoint`. The physics is read from the model again: its times, noise and steps forward
and back, at a state for every step, must be those that were learned.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._typing import Sites
from scoreinfer.evidence.bank import ForwardBank, Outliers
from scoreinfer.nets import ConditionalMLP, ConvNet
from scoreinfer.nets.convnet import PADDING_MODES
from scoreinfer.nets.embedding import flatten
from scoreinfer.paths import Frame, LearnedBackward, Moments, OnWaves
from scoreinfer.paths.build import Reversal, Samplers, samplers, untrained
from scoreinfer.paths.proposal import PARAMETERS, AbstractPaths, StartedPaths, beginning, pinned
from scoreinfer.posterior.checkpoint import (
    MAX_DEPTH,
    MAX_SIZE,
    PATHS_FORMAT,
    Parts,
    check_described,
    describe,
    outline,
    perceptron_sizes,
    read_folder,
    read_run,
    run_record,
    size_of,
    write_folder,
)
from scoreinfer.problem import Problem
from scoreinfer.process import PhysicsProcess
from scoreinfer.samplers.amortised import AmortisedProposal
from scoreinfer.training.loop import History
from scoreinfer.training.simulations import Standardiser, encode

MAX_PARTICLES = 65_536


class PathParts(NamedTuple):
    """What a posterior of paths is made of.

    Args:
        paths: its sampler.
        bank: simulations held against it.
        outliers: simulated ends, to tell a far one by.
        history: how it was trained.
        num_particles: particles of each draw.
    """

    paths: AbstractPaths
    bank: ForwardBank
    outliers: Outliers
    history: History
    num_particles: int | None


class Saved(NamedTuple):
    """What has arrays.

    Args:
        backward: the kernels, without their physics.
        start: what draws their start.
        standardiser: the scale of their conditions.
        bank: see `PathParts`.
        outliers: see `PathParts`.
        physics: what tells the physics from another (see `_fingerprint`).
    """

    backward: LearnedBackward
    start: AmortisedProposal | None
    standardiser: Standardiser
    bank: ForwardBank
    outliers: Outliers
    physics: dict[str, Any]


def write_paths(path: Path, problem: Problem, parts: PathParts) -> None:
    """Write a posterior of paths to a folder.

    Raises:
        ValueError: where the folder holds other things, or the posterior has parts that data alone cannot describe.
    """
    paths, backward = parts.paths, parts.paths.backward
    assert isinstance(backward, LearnedBackward)
    start, scale, start_problem = None, Standardiser({}, {}), None
    if isinstance(paths, StartedPaths):
        start_problem = _start_problem(problem, paths)
        assert isinstance(paths.start, AmortisedProposal)
        start, scale = paths.start, paths.standardiser
    frame, site = backward.frame, _site_of(paths)
    network = {
        "site": site,
        "separate": backward.separate,
        "frame": {
            "slope": frame.slope.ndim, "factor": frame.factor.ndim, "tilt": frame.tilt is not None,
            "root": frame.before is not None and frame.before.root is not None,
        },
        "kernels": _describe_network(backward.network),
        "start": None if start is None else describe(Parts(start, None, None)),
        "bend": scale.bend,
        "bank": parts.bank.log_share.size,
        "ends": parts.outliers.distance.size,
        "num_particles": parts.num_particles,
    }  # fmt: skip
    physics = _fingerprint(backward.process, frame)
    tree = Saved(_without_physics(backward), start, scale, parts.bank, parts.outliers, physics)
    sees_path = isinstance(paths, StartedPaths) and paths.sees_path
    setting = Setting(backward.process, problem, site, start_problem, sees_path)
    own = backward.network.network if isinstance(backward.network, OnWaves) else backward.network
    check_described(tree, _outline(setting, network, own))
    write_folder(path, PATHS_FORMAT, problem, tree, network, {"history": run_record(parts.history)})


def read_paths(path: Path, reversal: Reversal, net: Callable | None) -> tuple[Samplers, PathParts]:
    """Read a posterior of paths from a folder, for a model with the same sites, density and physics.

    Args:
        path: the folder.
        reversal: the model at hand.
        net: the network, where it was a module of the user's own; its arrays are replaced.

    Raises:
        UnreadableFile: where the folder or its content is not whole, newer, changed, or not ours.
        ValueError: where it was made for another model or another physics, or needs a ``net``.
    """
    setting = Setting(reversal.physics, reversal.problem, reversal.site, reversal.start_problem, reversal.conditioned)
    particles: list[int | None] = []

    def rebuild(network: dict[str, Any]) -> Saved:
        if network["site"] != reversal.site:
            raise ValueError(
                f"`{path}` holds physics of the site {network['site']!r}, got {reversal.site!r}: another model, or "
                "another process of it."
            )
        if network["kernels"]["type"] == "yours" and net is None:
            raise ValueError(
                f"The kernels in `{path}` have a network of your own, {network['kernels']['name']}, and files are "
                "never executed. Pass such a module, trained or not: `SMDP(model, site, net=module).load(path, ...)`."
            )
        separate = reversal.free.source is not None and reversal.free.source.separate
        if _yes_or_no(network["separate"], "separate") != separate:
            raise ValueError(
                f"The kernels in `{path}` were learned by {'joint' if separate else 'separate'} updates; these are "
                f"another model's. Pass `SMDP(..., separate={not separate})`."
            )
        num = network["num_particles"]
        particles.append(None if num is None else size_of(num, "num_particles", MAX_PARTICLES))
        return _outline(setting, network, net)

    saved, history = read_folder(
        path, PATHS_FORMAT, reversal.problem, rebuild, lambda training: read_run(training["history"])
    )
    _check_physics(saved, setting.process)
    backward = dataclasses.replace(saved.backward, process=setting.process)
    built = samplers(reversal, backward, saved.standardiser, saved.start)
    return built, PathParts(built.paths, saved.bank, saved.outliers, history, particles[0])


class Setting(NamedTuple):
    """What the sizes of kernels follow from.

    Args:
        process: the physics, with the noise of an observation as its last step.
        problem: the model.
        site: name of its physics site.
        start_problem: that of what is drawn before the path.
        conditioned: whether kernels see the observation.
    """

    process: PhysicsProcess
    problem: Problem
    site: str
    start_problem: Problem | None
    conditioned: bool


def _outline(setting: Setting, network: dict[str, Any], net: Callable | None) -> Saved:
    """Rebuild everything, with the shapes of arrays in the place of the arrays."""
    bend, described, (steps, dim) = network["bend"], network["frame"], setting.process.scale.shape
    if not isinstance(bend, float) or not bend > 0:
        raise TypeError(f"expected a positive number for 'bend', got {bend!r}")
    ranks = {name: size_of(described[name], name, 3, 2) for name in ("slope", "factor")}
    tilted, rooted = (_yes_or_no(described[name], name) for name in ("tilt", "root"))
    num_bank, num_ends = (size_of(network[name], name, MAX_SIZE) for name in ("bank", "ends"))
    start: Any = None
    if setting.start_problem is not None:
        start = outline(setting.start_problem, network["start"], None)[0]
    elif network["start"] is not None:
        raise TypeError("expected no start")

    def build() -> Saved:
        x: Sites = _nothing(setting.problem) if setting.conditioned else {}
        others = [latent.size for latent in setting.problem.latents if latent.name != setting.site]
        if others:
            x = x | {PARAMETERS: jnp.zeros(sum(others))}
        scale = Standardiser(x, x, bend)
        usual = flatten(scale(x)) if x else jnp.zeros(0, jnp.float32)
        row, rows = jnp.zeros((steps, dim)), jnp.zeros((steps, dim, dim))
        slope, factor = (row if ranks[name] == 2 else rows for name in ("slope", "factor"))
        tilt, root = jnp.zeros((steps, dim, usual.size)) if tilted else None, rows if rooted else None
        moments = Moments(row, row, tilt, root)
        frame = Frame(row, row, row, slope, factor, tilt, moments, moments)
        own = _make_network(setting.process, network["kernels"], usual.size, net)
        sizes = {"width": 1, "depth": 1} if own is not None else perceptron_sizes(network["kernels"])
        backward = untrained(jax.random.key(0), setting.process, frame, usual, own, **sizes)
        features = dim
        if start is not None:
            features = eqx.filter_eval_shape(_start_features, start, setting.start_problem).size
        one = jnp.zeros(num_bank)
        bank = ForwardBank(jnp.zeros((num_bank, features)), one, one)
        ends = Outliers(jnp.zeros((num_ends, features)), jnp.zeros(num_ends))
        return Saved(_without_physics(backward), None, scale, bank, ends, _fingerprint(setting.process, frame))

    return eqx.filter_eval_shape(build)._replace(start=start)


def _nothing(problem: Problem) -> Sites:
    """Make an encoded observation of zeros."""
    return encode(problem, {site.name: jnp.zeros(site.shape, site.dtype) for site in problem.observed})


def _start_features(start: AmortisedProposal, problem: Problem) -> Float[Array, " features"]:
    return flatten(start.standardiser(_nothing(problem)))


def _yes_or_no(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false for {name!r}, got {value!r}")
    return value


# --- the networks


def _describe_network(network: Callable) -> dict[str, Any]:
    if isinstance(network, OnWaves):
        network = network.network
    if isinstance(network, ConditionalMLP) and not network.octaves:
        return {"type": "ConditionalMLP", "width": network.width, "depth": len(network.blocks)}
    if isinstance(network, ConvNet):
        return {
            "type": "ConvNet", "num_space": network.num_space, "padding": network.padding, "physics": network.physics,
            "width": network.first.out_features, "dilations": list(network.dilations),
            "kernel_size": network.kernel_size, "levels": network.levels,
        }  # fmt: skip
    return {"type": "yours", "name": f"{type(network).__module__}.{type(network).__qualname__}"}


def _make_network(
    process: PhysicsProcess, described: dict[str, Any], num_context: int, net: Callable | None
) -> Callable | None:
    """Make a network of fields, or take the user's own; None for a perceptron."""
    if described["type"] == "ConditionalMLP":
        return None
    if described["type"] == "yours" and net is not None:
        return net
    if described["type"] != "ConvNet" or described["padding"] not in PADDING_MODES:
        raise TypeError(f"unknown network {described['type']!r} or padding")
    dilations = tuple(size_of(number, "dilations", MAX_SIZE) for number in described["dilations"])
    options: dict[str, Any] = {
        "num_space": size_of(described["num_space"], "num_space", len(process.shape)),
        "padding": described["padding"],
        "physics": _yes_or_no(described["physics"], "physics"),
        "width": size_of(described["width"], "width", MAX_SIZE),
        "dilations": dilations[:MAX_DEPTH],
        "kernel_size": size_of(described["kernel_size"], "kernel_size", MAX_DEPTH),
        "levels": size_of(described["levels"], "levels", MAX_DEPTH),
    }
    try:
        return ConvNet(jax.random.key(0), process.shape, num_context=1 + num_context, **options)
    except ValueError as error:
        raise TypeError(str(error)) from error


# --- the physics


def _site_of(paths: AbstractPaths) -> str:
    source = paths.backward.process.source
    assert source is not None
    return source.site


def _start_problem(problem: Problem, paths: StartedPaths) -> Problem:
    whole = problem if problem.observed else pinned(problem)
    return beginning(whole, paths.backward.process, _site_of(paths), paths.site)


def _without_physics(backward: LearnedBackward) -> LearnedBackward:
    return eqx.tree_at(lambda tree: tree.process, backward, None, is_leaf=lambda node: node is None)


@eqx.filter_jit
def _fingerprint(process: PhysicsProcess, frame: Frame) -> dict[str, Any]:
    """Compute the times and noise of the physics, and its steps forward and back from usual states."""
    states, steps = frame.centre + frame.spread, jnp.arange(process.num_steps)
    return {
        "times": process.ts,
        "noise": process.scale,
        "step": jax.vmap(process.forward)(steps, states),
        "reverse": jax.vmap(process.reverse)(steps, states),
    }


def _check_physics(saved: Saved, process: PhysicsProcess) -> None:
    own = _fingerprint(process, saved.backward.frame)
    for name, stored in saved.physics.items():
        unit = 1.0 if name in ("times", "noise") else np.asarray(saved.backward.frame.spread)
        if not np.allclose(np.asarray(own[name]) / unit, np.asarray(stored) / unit, 1e-3, 1e-4, equal_nan=True):
            raise ValueError(
                f"This posterior was learned for another model: the `{name}` of its physics differs. Pass the model, "
                "its arguments, and the `reverse` and `waves` of `SMDP` that it was fitted with."
            )
