"""The amortised posterior: ``fit`` a score SDE on a model's own simulations, then draw, weigh and certify."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from scoreinfer._errors import UnsupportedModel
from scoreinfer._typing import Key, Sites
from scoreinfer.certificate import ForwardCheck, certify
from scoreinfer.correct import effective_sample_size, rejuvenate
from scoreinfer.draws import Draws
from scoreinfer.losses import ConditionalScore, ScoreBatch, denoising_loss, whitening_loss
from scoreinfer.model import from_numpyro
from scoreinfer.nets import Concatenate, ConditionalMLP
from scoreinfer.nets.embedding import flatten
from scoreinfer.problem import Problem
from scoreinfer.sampling import AbstractSampler, ProbabilityFlow, ReverseSDE
from scoreinfer.score import NeuralScore
from scoreinfer.simulation import Simulations, Standardiser, check_finite, simulate, standardiser
from scoreinfer.train import Budget, History, train
from scoreinfer.whitening import Affine, Whitening, linear_whitening

NUM_PILOT = 8192
POOL = 32_768
NUM_NEIGHBOURS = 64


class Context(NamedTuple):
    """What one observation means to the proposal.

    Args:
        affine: the map from the whitened space to z.
        features: the embedded observation.
    """

    affine: Affine
    features: Float[Array, " features"]


class Proposal(eqx.Module):
    """The learned sampler of one problem: draws z for an observation, with the log density of what it did.

    Exactness: ``log_q`` is exact for the flow and exact over paths for the reverse SDE (see the samplers), so
    weighting by log p(z, y) - log_q is exact whatever the networks learned.
    """

    standardiser: Standardiser
    whitening: Whitening
    embedding: eqx.Module
    score: NeuralScore
    sampler: AbstractSampler
    problem: Problem = eqx.field(static=True)

    def features(self, y: Sites) -> Sites:
        """Compute the standardised observation."""
        return self.standardiser(self.problem.encode(y))

    def context(self, y: Sites) -> Context:
        """Embed one observation."""
        x = self.features(y)
        return Context(self.whitening(x), self.embedding(x))

    def propose(self, key: Key, context: Context) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""
        u, log_q = self.sampler.sample(key, self.score, self.problem.dim, context.features)
        return _upcast(context.affine.forward(u)), _upcast(log_q - context.affine.log_det())

    def log_q(self, key: Key, context: Context, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z (the reverse SDE refreshes its path with ``key``)."""
        u = context.affine.inverse(z.astype(jnp.float32))
        log_q = self.sampler.log_q(key, self.score, u, context.features)
        return _upcast(log_q - context.affine.log_det())


def _upcast(x):
    return x.astype(jnp.result_type(float))


class ForwardBank(NamedTuple):
    """Joint simulations held against the proposal, kept for the forward check of every observation.

    Args:
        features: standardised, flattened observations.
        distance: distance of each to its nearest fellows.
        log_excess: log(w(z*) / mean proposal weight) of the truth z* each came from.
    """

    features: Float[Array, "num features"]
    distance: Float[Array, " num"]
    log_excess: Float[Array, " num"]

    def check(self, x: Float[Array, " features"]) -> ForwardCheck:
        """Look up the evidence near the observation with features ``x``."""
        distances = jnp.linalg.norm(self.features - x, axis=1)
        near = jnp.argsort(distances)[: min(NUM_NEIGHBOURS, distances.size)]
        rank = (self.distance >= _neighbour_distance(distances)).mean()
        return ForwardCheck(self.log_excess[near], rank)


def _neighbour_distance(distances: Float[Array, " num"], num_nearest: int = 5) -> Float[Array, ""]:
    return -jax.lax.top_k(-distances, min(num_nearest, distances.size))[0].mean()


@eqx.filter_jit
def forward_bank(key: Key, proposal: Proposal, num: int = 1024, num_proposals: int = 16) -> ForwardBank:
    """Simulate joint draws (z*, y*) and weigh each truth z* under the proposal for its own y*.

    Exactness: log_excess estimates log p(z* | y*) - log q(z* | y*); it is exact as ``num_proposals`` grows.
    """
    problem = proposal.problem

    def one(key):
        for_pair, for_truth, for_draws = jax.random.split(key, 3)
        z, y = problem.simulate(for_pair)
        context = proposal.context(y)
        log_w = problem.log_joint(z, y) - proposal.log_q(for_truth, context, z)
        draws, log_q = jax.vmap(lambda k: proposal.propose(k, context))(jax.random.split(for_draws, num_proposals))
        log_ws = jax.vmap(lambda z: problem.log_joint(z, y))(draws) - log_q
        log_mean = jax.nn.logsumexp(jnp.where(jnp.isnan(log_ws), -jnp.inf, log_ws)) - jnp.log(num_proposals)
        return flatten(proposal.features(y)), log_w - log_mean

    features, excess = jax.lax.map(one, jax.random.split(key, num), batch_size=64)

    def lonely(i):
        return _neighbour_distance(jnp.linalg.norm(features - features[i], axis=1).at[i].set(jnp.inf))

    return ForwardBank(features, jax.lax.map(lonely, jnp.arange(num), batch_size=64), excess)


class TrainingHistory(NamedTuple):
    """The two training runs behind a posterior: the whitening map, then the score."""

    whitening: History
    score: History

    @property
    def num_simulations(self) -> int:
        """Number of simulations that trained the score."""
        return self.score.num_simulations


class Posterior(eqx.Module):
    """An amortised posterior: one training, any number of observations of the same design.

    Args:
        proposal: the learned sampler.
        bank: simulations held against it (None where the model has no density).
        history: how it was trained.
    """

    proposal: Proposal
    bank: ForwardBank | None
    history: TrainingHistory | None = None

    @property
    def problem(self) -> Problem:
        """The problem this posterior answers."""
        return self.proposal.problem

    def context(self, y: Sites) -> Context:
        """Embed one observation (see `Proposal.context`)."""
        return self.proposal.context(y)

    def propose(self, key: Key, context: Context) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and its ``log_q`` (see `Proposal.propose`)."""
        return self.proposal.propose(key, context)

    def log_q(self, key: Key, context: Context, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z (see `Proposal.log_q`)."""
        return self.proposal.log_q(key, context, z)

    def sample(
        self,
        key: Key,
        num: int,
        *args: Any,
        batch_size: int = 1024,
        prior_fraction: float = 0.0,
        max_proposals: int | None = None,
        num_moves: int = 20,
        progress_bar: bool = False,
        **kwargs: Any,
    ) -> Draws:
        """Draw from the posterior of one observation, weigh every draw, and certify the batch.

        Args:
            key: random key; draw i depends on ``key`` and i alone, whatever the batch size.
            num: number of draws.
            *args: the model's own arguments, with the data.
            batch_size: draws per compiled call: bounds the memory.
            prior_fraction: share of the draws taken from the prior instead (a defensive mixture: bounds the
                weights by the likelihood over the share; pays where the posterior is not far from the prior).
            max_proposals: where given, propose until the effective sample size reaches ``num`` or this many
                proposals are spent, then resample to ``num`` equally weighted draws and move each by
                ``num_moves`` Metropolis-adjusted Langevin steps, so that certainty can be bought with time.
            num_moves: see ``max_proposals``.
            progress_bar: show a progress bar over batches.
            **kwargs: the model's own keyword arguments.

        Returns:
            `Draws`; weighted, or equally weighted after resampling.

        Raises:
            ValueError: where the data are missing, not finite, of another shape or another design.

        Exactness: the weights are exact importance weights for any training; averages under them are consistent as
            ``num`` grows. Resampled and moved draws are consistent as the proposals grow.
        """
        start = time.perf_counter()
        problem = self.problem
        y = problem.read(args, kwargs)
        batches = partial(_weighted_draws, key, self.proposal, y, batch_size, prior_fraction)
        limit = num if max_proposals is None else max(num, max_proposals)
        with tqdm(total=limit, desc="drawing", disable=None if progress_bar else True, leave=False) as bar:
            drawn = batches(0, num, bar)
            while drawn.num < limit and effective_sample_size(drawn.log_weight) < num:
                more = batches(drawn.num, min(num, limit - drawn.num), bar)
                drawn = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), drawn, more)
        info: dict[str, Any] = {
            "num_proposals": drawn.num,
            "num_score_evaluations": drawn.num * self.proposal.sampler.num_evaluations,
            "num_simulations": None if self.history is None else self.history.num_simulations,
        }
        if not problem.has_density:
            draws = Draws(
                constrain(problem, drawn.values, batch_size), drawn.values, None, drawn.log_q, None, y, certify(None)
            )
            return draws._replace(info=info | {"seconds": time.perf_counter() - start})
        check = None if self.bank is None else _check_bank(self.bank, self.proposal, y)
        certificate = certify(drawn.log_weight, check)
        if max_proposals is not None and np.isfinite(certificate.log_evidence):
            density = jax.tree_util.Partial(partial(_log_joint, problem), y)
            values, log_joint, moves = rejuvenate(
                jax.random.fold_in(key, 2), density, drawn.values, drawn.log_weight, num, num_moves
            )
            drawn = Weighted(values, log_joint - certificate.log_evidence, log_joint)
            info |= {"moves": moves}
        sites = constrain(problem, drawn.values, batch_size)
        info |= {"seconds": time.perf_counter() - start}
        return Draws(
            sites, drawn.values, drawn.log_weight, drawn.log_q, drawn.log_joint, y, certificate, info
        )


class Weighted(NamedTuple):
    """Draws in the unconstrained space with the two log densities their weights are made of."""

    values: Float[Array, "num dim"]
    log_q: Float[Array, " num"]
    log_joint: Float[Array, " num"]

    @property
    def num(self) -> int:
        """Number of draws."""
        return self.values.shape[0]

    @property
    def log_weight(self) -> Float[Array, " num"]:
        """Log importance weights."""
        return self.log_joint - self.log_q


def _log_joint(problem, y, z):
    return problem.log_joint(z, y)


@eqx.filter_jit
def _check_bank(bank, proposal, y):
    return bank.check(flatten(proposal.features(y)))


def _weighted_draws(key, proposal, y, batch_size, prior_fraction, first, count, bar) -> Weighted:
    """Draw rows ``first`` to ``first + count`` of the endless stream of draws that belongs to ``key``."""
    from_prior = _is_prior(prior_fraction, first, count)
    parts = []
    for rows, draw in ((np.flatnonzero(~from_prior), _from_proposal), (np.flatnonzero(from_prior), _from_prior)):
        size = _batch_shape(len(rows), batch_size)
        for i in range(0, len(rows), size):
            chosen = rows[i : i + size]
            padded = np.resize(chosen, size)
            part = draw(key, proposal, y, jnp.asarray(first + padded), prior_fraction)
            parts.append(jax.tree.map(lambda leaf, n=len(chosen): leaf[:n], part))
            bar.update(len(chosen))
    order = jnp.argsort(jnp.asarray(np.concatenate([np.flatnonzero(~from_prior), np.flatnonzero(from_prior)])))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *parts)


def _is_prior(share: float, first: int, count: int) -> np.ndarray:
    """Flag the rows taken from the prior: evenly spread, the exact share of any long run."""
    edges = np.floor(share * np.arange(first, first + count + 1))
    return np.diff(edges) > 0


def _batch_shape(num: int, batch_size: int) -> int:
    """Round a small batch up to a power of two, so that few shapes are ever compiled."""
    return min(batch_size, max(64, 1 << max(num - 1, 1).bit_length()))


def _mixed(problem, z, log_q, share):
    if share == 0.0:
        return log_q
    return jnp.logaddexp(jnp.log1p(-share) + log_q, jnp.log(share) + problem.log_prior(z))


@eqx.filter_jit
def _from_proposal(key, proposal, y, rows, share):
    context = proposal.context(y)

    def one(row):
        z, log_q = proposal.propose(jax.random.fold_in(key, row), context)
        return Weighted(z, _mixed(proposal.problem, z, log_q, share), proposal.problem.log_joint(z, y))

    return jax.vmap(one)(rows)


@eqx.filter_jit
def _from_prior(key, proposal, y, rows, share):
    context = proposal.context(y)

    def one(row):
        for_z, for_path = jax.random.split(jax.random.fold_in(key, row))
        z, _ = proposal.problem.simulate(for_z)
        log_q = proposal.log_q(for_path, context, z)
        return Weighted(z, _mixed(proposal.problem, z, log_q, share), proposal.problem.log_joint(z, y))

    return jax.vmap(one)(rows)


@eqx.filter_jit
def _constrain(problem, values):
    return jax.vmap(problem.constrain)(values)


def constrain(problem: Problem, values: Float[Array, "num dim"], batch_size: int = 1024) -> Sites:
    """Compute latent and deterministic sites of every row, in batches of bounded memory."""
    num, size = values.shape[0], _batch_shape(values.shape[0], batch_size)
    parts = []
    for i in range(0, num, size):
        rows = jnp.minimum(i + jnp.arange(size), num - 1)
        parts.append(jax.tree.map(lambda leaf, n=min(size, num - i): leaf[:n], _constrain(problem, values[rows])))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def default_sampler(dim: int) -> AbstractSampler:
    """Choose the sampler by dimension: the flow up to 16, the reverse SDE beyond."""
    return ProbabilityFlow() if dim <= 16 else ReverseSDE()


def fit(
    key: Key,
    model: Callable | Problem,
    *args: Any,
    num_simulations: int | None = None,
    num_steps: int = 10_000,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    width: int = 128,
    depth: int = 4,
    embedding: eqx.Module | None = None,
    sampler: AbstractSampler | None = None,
    target_score: bool | None = None,
    observed: tuple[str, ...] | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Learn the posterior of a model, for every observation of its design, from the model's own simulations.

    First the whitening map of each observation is learned by Gaussian likelihood, then the score in the whitened
    space by denoising (and target-score matching where the joint density has a usable gradient).

    Args:
        key: random key; the same key gives the same weights.
        model: a NumPyro model, or a `Problem`.
        *args: the model's own arguments; data may be left out, and are not looked at.
        num_simulations: fixed budget of simulations, a tenth of them held out for validation and early stopping.
            None: fresh simulations at every epoch.
        num_steps: optimiser steps of the score; the whitening map takes half as many more.
        batch_size: simulations per step.
        learning_rate: peak learning rate.
        width: width of the networks.
        depth: residual blocks of the score network.
        embedding: module from the standardised observed sites (a dictionary) to one vector. None: side by side.
        sampler: how draws are made. None: the flow up to 16 dimensions, the reverse SDE beyond.
        target_score: use gradients of the joint density in training. None: where they pass Stein's identity.
        observed: names of the observed sites, where they cannot be told from the model without data.
        progress_bar: show progress bars on a terminal.
        **kwargs: the model's own keyword arguments.

    Returns:
        The `Posterior`, with the history of its training.

    Raises:
        UnsupportedModel: where the model cannot be read or simulated.
        ValueError: where simulations are not finite.

    Exactness: biased as a density, like every learned posterior; its weighted draws are exact.

    References: Geffner et al. 2023, arXiv 2209.14249 (neural posterior score estimation); Karras et al. 2022,
    arXiv 2206.00364 (preconditioning).
    """
    problem = model if isinstance(model, Problem) else from_numpyro(model, *args, observed=observed, **kwargs)
    if problem.simulate is None:
        raise UnsupportedModel(f"`fit` learns from simulations, and this model has none: {problem.not_simulable}")
    keys = dict(zip(("pilot", "white", "net", "train", "score", "bank"), jax.random.split(key, 6), strict=True))
    use_gradient = problem.has_density and target_score is not False
    pilot = _simulate(keys["pilot"], problem, num_simulations or NUM_PILOT, use_gradient)
    check_finite(pilot)
    scale = standardiser(pilot.x)
    pilot = pilot._replace(x=jax.vmap(scale)(pilot.x))
    held_out = max(pilot.num // 10, 1)
    validation, training = _rows(pilot, slice(None, held_out)), _rows(pilot, slice(held_out, None))
    budget = Budget(num_steps, min(batch_size, training.num), learning_rate=learning_rate)
    if num_simulations is not None:
        budget = budget._replace(epoch_steps=min(250, -(-2 * training.num // budget.batch_size)), patience=30)

    def pools(key: Key) -> Simulations:
        if num_simulations is not None:
            return training
        return _simulate_scaled(key, problem, scale, POOL, use_gradient)

    embedding = Concatenate() if embedding is None else embedding
    whitening = linear_whitening(keys["white"], training.z, training.x, embedding, width=width, depth=2)
    short = budget._replace(num_steps=num_steps // 2)
    whitening, white_history = train(
        keys["train"], whitening, whitening_loss, pools, validation, short, progress_bar=progress_bar, title="whitening"
    )

    check = _whiten(whitening, training)
    precision = _precision(check, target_score) if use_gradient else None
    module = _score_module(keys["net"], problem.dim, embedding, training.x, width, depth)
    loss = partial(denoising_loss, precision=precision)
    fixed = check if num_simulations is not None else None
    module, score_history = train(
        keys["score"],
        module,
        loss,
        lambda key: _whiten(whitening, pools(key)) if fixed is None else fixed,
        _whiten(whitening, validation),
        budget,
        progress_bar=progress_bar,
        title="score",
    )
    proposal = Proposal(
        scale, whitening, module.embedding, module.score, sampler or default_sampler(problem.dim), problem
    )
    bank = forward_bank(keys["bank"], proposal) if problem.has_density else None
    return Posterior(proposal, bank, TrainingHistory(white_history, score_history))


def _rows(tree, where):
    return jax.tree.map(lambda leaf: leaf[where], tree)


@eqx.filter_jit
def _simulate(key, problem, num, gradient):
    return simulate(key, problem, num, gradient=gradient)


@eqx.filter_jit
def _simulate_scaled(key, problem, scale, num, gradient):
    simulations = simulate(key, problem, num, gradient=gradient)
    return simulations._replace(x=jax.vmap(scale)(simulations.x))


@eqx.filter_jit
def _whiten(whitening: Whitening, simulations: Simulations) -> ScoreBatch:
    """Move simulations, and the gradients of their log density, to the whitened space."""

    def one(simulation):
        affine = whitening(simulation.x)
        gradient = simulation.gradient
        gradient = jnp.zeros_like(simulation.z) if gradient is None else affine.factor.T @ gradient
        u = affine.inverse(simulation.z.astype(jnp.float32))
        return ScoreBatch(u, simulation.x, gradient.astype(jnp.float32))

    return jax.lax.map(one, simulations, batch_size=4096)


def _precision(batch: ScoreBatch, target_score: bool | None) -> Float[Array, " dim"] | None:
    """Compute the mean squared gradients, or None where they fail Stein's identity E[u grad log p(u)] = -1.

    Jumps of the density and wrong gradients break the identity; target-score matching would then be biased.
    """
    products = batch.u * batch.gradient
    error = jnp.abs(products.mean(0) + 1.0) / (products.std(0) / jnp.sqrt(products.shape[0]) + 1e-6)
    precision = jnp.mean(batch.gradient**2, axis=0)
    usable = bool(jnp.isfinite(precision).all()) and (target_score is True or bool((error < 5.0).all()))
    return precision if usable else None


def _score_module(key, dim, embedding, x, width, depth) -> ConditionalScore:
    context = jax.eval_shape(embedding, jax.tree.map(lambda leaf: leaf[0], x))
    network = ConditionalMLP(key, dim, context.shape[0], 2 * dim, width=width, depth=depth)
    return ConditionalScore(embedding, NeuralScore(network))
