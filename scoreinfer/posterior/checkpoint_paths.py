"""Write the arrays and hyperparameters of a posterior of paths to a folder, and read them back.

The physics is read from the model again. It must be the learned physics (`scoreinfer.identity.check_physics`).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Sites
from scoreinfer.evidence.bank import ForwardBank, Outliers
from scoreinfer.identity import (
    check_physics,
    probe_physics,
)
from scoreinfer.nets import ConvNet
from scoreinfer.nets.embedding import flatten
from scoreinfer.paths import Frame, LearnedBackward, Moments, OnWaves
from scoreinfer.paths.build import Reversal, Samplers, samplers, untrained_kernels
from scoreinfer.paths.proposal import PARAMETERS, AbstractPaths, StartedPaths, beginning, pinned
from scoreinfer.posterior.checkpoint import PATHS_FORMAT, check_outline, read_folder, read_run, run_record, write_folder
from scoreinfer.posterior.checkpoint_amortised import Saved, describe, nothing, outline_of
from scoreinfer.posterior.hyperparameters import (
    MAX_SIZE,
    YOURS,
    describe_module,
    is_perceptron,
    make_field_network,
    perceptron_size,
    positive,
    size_of,
    yes_or_no,
)
from scoreinfer.problem import Problem
from scoreinfer.process import PhysicsProcess
from scoreinfer.samplers.amortised import AmortisedProposal, Size
from scoreinfer.training.loop import History
from scoreinfer.training.simulations import Standardiser

MAX_PARTICLES = 65_536
"""Largest number of particles per draw that a file may contain. Chosen by judgement."""


class PathParts(NamedTuple):
    """The parts of a posterior of paths.

    Args:
        paths: the learned sampler.
        bank: weights of simulated paths under the sampler.
        outliers: simulated ends with which outlying ends are detected.
        history: the history of the training.
        num_particles: particles per draw, see `PathPosterior`.
    """

    paths: AbstractPaths
    bank: ForwardBank
    outliers: Outliers
    history: History
    num_particles: int | None


class SavedPaths(NamedTuple):
    """The parts of a posterior of paths that contain arrays.

    Args:
        backward: the kernels, without their physics.
        start: the sampler of what is drawn before the path. None means that nothing is.
        standardiser: the standardiser of the kernels' conditions.
        bank: see `PathParts`.
        outliers: see `PathParts`.
        physics: values that identify the physics (`scoreinfer.identity.probe_physics`).
    """

    backward: LearnedBackward
    start: AmortisedProposal | None
    standardiser: Standardiser
    bank: ForwardBank
    outliers: Outliers
    physics: dict[str, Any]


class _Setting(NamedTuple):
    """The model, from which the sizes of the kernels follow.

    Args:
        process: the physics; the noise of an observation of the last state is its last step.
        problem: the problem of the model.
        site: name of its physics site.
        start_problem: the problem of what is drawn before the path. None means that nothing is.
        conditioned: whether the kernels are conditioned on the observation.
    """

    process: PhysicsProcess
    problem: Problem
    site: str
    start_problem: Problem | None
    conditioned: bool


def write_paths(path: Path, problem: Problem, parts: PathParts) -> None:
    """Write a posterior of paths to a folder.

    Raises:
        ValueError: if the folder holds other files, or plain data cannot describe a part of the posterior.
    """
    paths, backward = parts.paths, parts.paths.backward
    assert isinstance(backward, LearnedBackward)
    start, scale, start_problem, sees_path = None, Standardiser({}, {}), None, False
    source = backward.process.source
    assert source is not None
    if isinstance(paths, StartedPaths):
        whole = problem if problem.observed else pinned(problem)
        start_problem = beginning(whole, backward.process, source.site, paths.site)
        start, scale, sees_path = paths.start, paths.standardiser, paths.sees_path
    physics = probe_physics(backward.process, _usual_states(backward.frame))
    tree = SavedPaths(_without_physics(backward), start, scale, parts.bank, parts.outliers, physics)
    network = _describe_paths(source.site, tree, parts.num_particles)
    setting = _Setting(backward.process, problem, source.site, start_problem, sees_path)
    own = backward.network.network if isinstance(backward.network, OnWaves) else backward.network
    check_outline(tree, _path_outline(setting, network, own))
    write_folder(path, PATHS_FORMAT, problem, tree, network, {"history": run_record(parts.history)})


def read_paths(path: Path, reversal: Reversal, net: Callable | None) -> tuple[Samplers, PathParts]:
    """Read a posterior of paths from a folder, for a model with the same sites, density and physics.

    Args:
        path: the folder.
        reversal: the given model.
        net: the network if it was a module of the user's own; its arrays are replaced. None means that it was not.

    Raises:
        UnreadableFile: if the folder or its content is incomplete, changed, of another version, or was not written by
            `write_paths`.
        ValueError: if the posterior was learned for another model or another physics, or needs a ``net``.
    """
    setting = _Setting(reversal.physics, reversal.problem, reversal.site, reversal.start_problem, reversal.conditioned)
    particles: list[int | None] = []

    def outline(network: dict[str, Any]) -> SavedPaths:
        _check_kernels(path, network, reversal, net)
        num = network["num_particles"]
        particles.append(None if num is None else size_of(num, "num_particles", MAX_PARTICLES))
        return _path_outline(setting, network, net)

    saved, history = read_folder(
        path, PATHS_FORMAT, reversal.problem, outline, lambda training: read_run(training["history"])
    )
    frame = saved.backward.frame
    check_physics(saved.physics, setting.process, _usual_states(frame), frame.spread)
    backward = dataclasses.replace(saved.backward, process=setting.process)
    built = samplers(reversal, backward, saved.standardiser, saved.start)
    return built, PathParts(built.paths, saved.bank, saved.outliers, history, particles[0])


def _check_kernels(path: Path, network: dict[str, Any], reversal: Reversal, net: Callable | None) -> None:
    """Refuse kernels of another site or another kind of update, or with a missing network of the user's own.

    Raises:
        ValueError: in these cases.
    """
    if network["site"] != reversal.site:
        raise ValueError(
            f"`{path}` holds physics of the site {network['site']!r}, got {reversal.site!r}: another model, or "
            "another process of the model. Pass the site that was fitted."
        )
    if network["kernels"]["type"] == YOURS and net is None:
        raise ValueError(
            f"The kernels in `{path}` have a network of your own, {network['kernels']['name']}, whose code is not "
            "saved. Pass such a module, trained or not: `SMDP(model, site, net=module).load(path, ...)`."
        )
    separate = reversal.free.source is not None and reversal.free.source.separate
    if yes_or_no(network["separate"], "separate") != separate:
        raise ValueError(
            f"The kernels in `{path}` were learned by {'joint' if separate else 'separate'} updates, got "
            f"`separate={separate}`. Pass `SMDP(..., separate={not separate})`."
        )


def _describe_paths(site: str, saved: SavedPaths, num_particles: int | None) -> dict[str, Any]:
    """Describe everything that is not an array."""
    backward, frame, start = saved.backward, saved.backward.frame, saved.start
    network = backward.network.network if isinstance(backward.network, OnWaves) else backward.network
    if is_perceptron(network):
        kernels = {"type": type(network).__name__, **network.hyperparameters}  # type: ignore[attr-defined]
    else:
        kernels = describe_module(network, (ConvNet,))
    return {
        "site": site,
        "separate": backward.separate,
        "frame": {
            "slope": frame.slope.ndim, "factor": frame.factor.ndim, "tilt": frame.tilt is not None,
            "root": frame.before is not None and frame.before.root is not None,
        },
        "kernels": kernels,
        "start": None if start is None else describe(Saved(start, None, None)),
        "bend": saved.standardiser.bend,
        "bank": saved.bank.log_share.size,
        "ends": saved.outliers.distance.size,
        "num_particles": num_particles,
    }  # fmt: skip


def _path_outline(setting: _Setting, network: dict[str, Any], net: Callable | None) -> SavedPaths:
    """Make the tree with shapes instead of arrays.

    Raises:
        TypeError: if the hyperparameters are invalid.
    """
    bend, described = positive(network["bend"], "bend"), network["frame"]
    steps, dim = setting.process.scale.shape
    ranks = {name: size_of(described[name], name, 3, 2) for name in ("slope", "factor")}
    tilted, rooted = (yes_or_no(described[name], name) for name in ("tilt", "root"))
    num_bank, num_ends = (size_of(network[name], name, MAX_SIZE) for name in ("bank", "ends"))
    start: Any = None
    if setting.start_problem is not None:
        start = outline_of(setting.start_problem, network["start"], None).proposal
    elif network["start"] is not None:
        raise TypeError("expected no sampler of the start, got one")

    def build() -> SavedPaths:
        x: Sites = nothing(setting.problem) if setting.conditioned else {}
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
        own, size = _make_kernels(setting.process, network["kernels"], usual.size, net)
        backward = untrained_kernels(jax.random.key(0), setting.process, frame, usual, own, *size)
        features = dim
        if start is not None:
            features = eqx.filter_eval_shape(_start_features, start, setting.start_problem).size
        one = jnp.zeros(num_bank)
        bank = ForwardBank(jnp.zeros((num_bank, features)), one, one)
        ends = Outliers(jnp.zeros((num_ends, features)), jnp.zeros(num_ends))
        physics = probe_physics(setting.process, _usual_states(frame))
        return SavedPaths(_without_physics(backward), None, scale, bank, ends, physics)

    return eqx.filter_eval_shape(build)._replace(start=start)


def _make_kernels(
    process: PhysicsProcess, described: dict[str, Any], num_context: int, net: Callable | None
) -> tuple[Callable | None, Size]:
    """Return the network: a network for fields, the user's own, or None for a perceptron of the returned size."""
    if described["type"] == "ConditionalMLP":
        return None, perceptron_size(described)
    if described["type"] == YOURS and net is not None:
        return net, Size(1, 1)
    return make_field_network(process.shape, 1 + num_context, described), Size(1, 1)


def _start_features(start: AmortisedProposal, problem: Problem) -> Float[Array, " features"]:
    return flatten(start.standardiser(nothing(problem)))


def _usual_states(frame: Frame) -> Float[Array, "steps dim"]:
    return frame.centre + frame.spread


def _without_physics(backward: LearnedBackward) -> LearnedBackward:
    return eqx.tree_at(lambda tree: tree.process, backward, None, is_leaf=lambda node: node is None)
