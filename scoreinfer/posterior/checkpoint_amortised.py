"""Write the arrays and hyperparameters of an amortised posterior to a folder, and read them back."""

from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from scoreinfer._typing import Sites
from scoreinfer.evidence.bank import Outliers
from scoreinfer.nets import ConditionalMLP, Embedding
from scoreinfer.nets.embedding import flatten
from scoreinfer.posterior.checkpoint import (
    FORMAT,
    check_outline,
    read_folder,
    read_training,
    training_record,
    write_folder,
)
from scoreinfer.posterior.design_range import describe_design
from scoreinfer.posterior.hyperparameters import (
    EMBEDDINGS,
    MAX_SIZE,
    YOURS,
    describe_module,
    describe_sampler,
    make_embedding,
    make_sampler,
    octaves_of,
    perceptron_size,
    positive,
    size_of,
    yes_or_no,
)
from scoreinfer.problem import Problem
from scoreinfer.samplers.amortised import AbstractAmortised, AmortisedProposal, Architecture, untrained
from scoreinfer.samplers.focused import FocusedProposal
from scoreinfer.samplers.refined import RefinedProposal
from scoreinfer.samplers.tuned import TunedMixture, TunedProposal, Tuning, untuned
from scoreinfer.simulators.validity import Validity, validity_network
from scoreinfer.training.loop import TrainingHistory
from scoreinfer.training.simulations import encode

PROPOSALS = (AmortisedProposal, FocusedProposal, RefinedProposal, TunedProposal, TunedMixture)
"""Proposals that can be saved."""


class Parts(NamedTuple):
    """The parts of an amortised posterior without its problem (see `Posterior`)."""

    proposal: AbstractAmortised
    outliers: Outliers | None
    history: TrainingHistory | None
    validity: Validity | None = None


class Saved(NamedTuple):
    """The parts of an amortised posterior that contain arrays (see `Posterior`)."""

    proposal: AbstractAmortised
    outliers: Outliers | None
    validity: Validity | None


def write_posterior(path: Path, problem: Problem, parts: Parts) -> None:
    """Write an amortised posterior to a folder.

    Raises:
        ValueError: if the folder holds other files, or plain data cannot describe a part of the posterior.
    """
    tree = Saved(parts.proposal, parts.outliers, parts.validity)
    network = describe(tree)
    check_outline(tree, outline_of(problem, network, parts.proposal.amortised.embedding))
    write_folder(path, FORMAT, problem, tree, network, training_record(parts.history))


def read_posterior(path: Path, problem: Problem, embedding: Embedding | None) -> Parts:
    """Read an amortised posterior from a folder, for a problem with the same sites and density.

    Args:
        path: the folder.
        problem: the problem of the given model.
        embedding: the embedding module if it was the user's own; its arrays are replaced. None means that it was not.

    Raises:
        UnreadableFile: if the folder or its content is incomplete, changed, of another version, or was not written by
            `write_posterior`.
        ValueError: if the posterior was learned for another model, or needs an ``embedding``.
    """

    def outline(network: dict[str, Any]) -> Saved:
        stored = network["embedding"]
        if stored["type"] == YOURS and embedding is None:
            raise ValueError(
                f"The posterior in `{path}` embeds its data by a module of your own, {stored['name']}, whose code is "
                "not saved. Pass such a module, trained or not: `NPSE(model, embedding=module).load(path, ...)`."
            )
        return outline_of(problem, network, embedding)

    saved, history = read_folder(path, FORMAT, problem, outline, read_training)
    return Parts(saved.proposal, saved.outliers, history, saved.validity)


def describe(saved: Saved) -> dict[str, Any]:
    """Describe everything that is not an array.

    Raises:
        ValueError: if the score network or the sampler is of a class that cannot be saved.
    """
    proposal = saved.proposal.amortised
    network = proposal.score.network
    if not isinstance(network, ConditionalMLP):
        raise ValueError(
            f"To be saved, a score must have a ConditionalMLP, got a {type(network).__name__}. Save the posterior "
            "before the network is replaced."
        )
    return {
        "proposal": type(saved.proposal).__name__,
        "effort": None if (effort := _effort(saved.proposal)) is None else effort._asdict(),
        "bend": proposal.standardiser.bend,
        "embedding": describe_module(proposal.embedding, EMBEDDINGS),
        "whitening": proposal.whitening.network.hyperparameters,
        "score": network.hyperparameters,
        "sampler": describe_sampler(proposal.sampler),
        "outliers": None if saved.outliers is None else saved.outliers.distance.size,
        "validity": saved.validity is not None,
    }


def _effort(proposal: AbstractAmortised) -> Tuning | None:
    """Return the effort of a tuned proposal. Of a mixture only the number of components matters."""
    if isinstance(proposal, TunedMixture):
        return Tuning(num_components=len(proposal.mixture.log_shares) - 1)
    return proposal.effort if isinstance(proposal, TunedProposal) else None


def outline_of(problem: Problem, network: dict[str, Any], embedding: Embedding | None) -> Saved:
    """Make the tree with shapes instead of arrays.

    Raises:
        TypeError: if the hyperparameters are invalid.
    """
    whitening, score = (perceptron_size(network[part]) for part in ("whitening", "score"))
    architecture = Architecture(
        whitening, score, make_sampler(network["sampler"]), octaves_of(network["score"], problem.dim),
        positive(network["bend"], "bend"),
    )  # fmt: skip
    kinds = {kind.__name__: kind for kind in PROPOSALS}
    if network["proposal"] not in kinds:
        raise TypeError(f"expected a proposal of a known type, got {network['proposal']!r}")
    effort = Tuning(**{name: size_of(value, name, MAX_SIZE) for name, value in (network.get("effort") or {}).items()})
    kind, has_validity = kinds[network["proposal"]], yes_or_no(network["validity"], "validity")
    num = None if network["outliers"] is None else size_of(network["outliers"], "outliers", MAX_SIZE)

    def build() -> Saved:
        key, dim = jax.random.key(0), problem.dim
        first = untrained(key, key, problem, architecture, make_embedding(network["embedding"], embedding))
        features = flatten(first.standardiser(nothing(problem)))
        proposal: Any = first
        if kind is FocusedProposal:
            proposal = FocusedProposal(first, first)
        elif kind is RefinedProposal:
            proposal = RefinedProposal(first, first, features)
        elif kind is TunedProposal:
            proposal = TunedProposal(first, jnp.zeros(2, jnp.uint32), effort)
        elif kind is TunedMixture:
            proposal = TunedMixture(first, untuned(dim, effort))
        width = len(describe_design(problem, zeros(problem))) if problem.designs else features.size
        outliers = None if num is None else Outliers(jnp.zeros((num, width)), jnp.zeros(num))
        validity = Validity(jnp.zeros(dim), jnp.zeros(dim), validity_network(key, dim)) if has_validity else None
        return Saved(proposal, outliers, validity)

    return eqx.filter_eval_shape(build)


def nothing(problem: Problem) -> Sites:
    """Make an encoded observation that consists of zeros."""
    return encode(problem, zeros(problem))


def zeros(problem: Problem) -> Sites:
    """Make an observation that consists of zeros."""
    return {site.name: jnp.zeros(site.shape, site.dtype) for site in problem.observed}
