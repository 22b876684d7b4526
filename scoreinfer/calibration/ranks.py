"""Simulation-based calibration: ranks of true parameters among posterior draws for simulated data.

If (z*, y) is drawn from the model, z* and exact draws from p(z | y) have the same distribution given y. So the rank of
f(z*, y) among the f(z, y) of the draws is uniform, for every function f. The functions are the components of every
latent site and two joint quantities: the log joint density log p(z, y), which detects a posterior that ignores its
data, and the distance of z to a reference point that depends on the data (TARP).
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm.auto import tqdm

from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices
from scoreinfer._tree import in_batches, own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.agreement import misdrawn_data, misdrawn_latents, say_misdrawn
from scoreinfer.arviz import to_prior_sbc
from scoreinfer.calibration.uniformity import RankTest, rank_test
from scoreinfer.errors import UnsupportedModel
from scoreinfer.mcmc.conditioning import chain_sampler, is_kernel
from scoreinfer.model import problem_of
from scoreinfer.montecarlo.weights import log_effective_share
from scoreinfer.nets.embedding import flatten
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import AbstractProposal, Target
from scoreinfer.simulators.dataset import stored_simulations
from scoreinfer.simulators.store import Store
from scoreinfer.training.simulations import Simulations, Standardiser, encode, encoded, simulate_joint, standardiser

AT_ONCE = 8192
"""Proposals in one compiled call, over all data sets of a batch. It limits the memory. Chosen by judgement."""
MIN_REFERENCES = 50
"""Least number of rows of a store that are reserved for reference points. Chosen by judgement."""
ALARM = 0.01
"""Significance level: the largest share of calibrated posteriors that the verdict rejects. Chosen by judgement."""


class SBC(NamedTuple):
    """Ranks of true parameters, and tests of their uniformity.

    Args:
        ranks: rank of every component of every latent site, ``(num_simulations, *site shape)``.
        joint: ranks of ``tarp`` and, if there is a density, of ``log_joint``: ``(num_simulations,)``.
        num_draws: number of posterior draws for each data set. Ranks run from 0 to this number.
        effective_share: effective sample size of the weighted proposals, divided by their number, for each data set.
            None means the draws have no weights.
        seconds: wall time.
        labels: the stratum of each data set. None means that there are no strata.
    """

    ranks: dict[str, np.ndarray]
    joint: dict[str, np.ndarray]
    num_draws: int
    effective_share: np.ndarray | None
    seconds: float
    labels: np.ndarray | None = None

    @property
    def num_simulations(self) -> int:
        """Number of simulated data sets."""
        return len(self.joint["tarp"])

    def columns(self) -> Iterator[tuple[str, np.ndarray, str]]:
        """Yield label, ranks and kind of every quantity. The kind is empty for components of sites."""
        yield from ((name, values, name) for name, values in self.joint.items())
        for name, values in self.ranks.items():
            for index in np.ndindex(values.shape[1:]):
                yield f"{name}{list(index) if index else ''}", values[(slice(None), *index)], ""

    def rows(self) -> list[RankTest]:
        """Test the ranks of every quantity.

        Raises:
            ValueError: if there are too few ranks for a test.
        """
        return [rank_test(name, values, self.num_draws, kind) for name, values, kind in self.columns()]

    @property
    def p_value(self) -> float:
        """Smallest p-value of all quantities, times their number (Bonferroni), at most 1."""
        rows = self.rows()
        return min(1.0, len(rows) * min(row.p_value for row in rows))

    @property
    def calibrated(self) -> bool:
        """Whether the tests do not reject calibration. Wrongly False for at most 1 % of calibrated posteriors."""
        return self.p_value > ALARM

    def strata(self) -> "dict[Any, SBC]":
        """Split the data sets by their labels; empty without labels."""
        labels = np.zeros(0) if self.labels is None else self.labels
        return {label: self._within(labels == label) for label in np.unique(labels).tolist()}

    def _within(self, chosen: np.ndarray) -> "SBC":
        ranks, joint = ({name: rows[chosen] for name, rows in told.items()} for told in (self.ranks, self.joint))
        share = None if self.effective_share is None else self.effective_share[chosen]
        return SBC(ranks, joint, self.num_draws, share, self.seconds)

    def to_arviz(self) -> Any:
        """Convert the ranks to the ArviZ group ``prior_sbc``, which `arviz_plots.plot_ecdf_pit` plots."""
        return to_prior_sbc(self.ranks)

    def __str__(self) -> str:
        head = "calibration not rejected" if self.calibrated else "not calibrated"
        lines = [f"{head}: p = {self.p_value:.3g} over all quantities, {self.num_simulations} simulations"]
        width = max(len(row.name) for row in self.rows())
        for row in self.rows():
            inside = " ".join(f"{share:6.1%}" for share in row.coverage)
            lines.append(f"  {row.name:<{width}}  p = {row.p_value:<8.3g}  in 50/80/95 %: {inside}  {row.finding}")
        lines += [
            f"  stratum {label}: p = {within.p_value:.3g} over all quantities, {within.num_simulations} simulations"
            for label, within in self.strata().items()
        ]
        return "\n".join(lines)


class References(NamedTuple):
    """Simulations from which TARP takes its reference points. They are independent of the tested simulations.

    Args:
        standardiser: standardises observations.
        x: standardised, flattened observations.
        z: true parameters of these simulations.
        spread: standard deviation of each component of ``z``.
    """

    standardiser: Standardiser
    x: Float[Array, "num features"]
    z: Float[Array, "num dim"]
    spread: Float[Array, " dim"]


@own_broadcasting
def sbc(
    key: Key,
    posterior: Any,
    num_simulations: int,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    problem: Problem | None = None,
    store: Store | None = None,
    num_draws: int = 63,
    num_proposals: int = 256,
    corrected: bool = True,
    num_warmup: int = 500,
    thinning: int = 10,
    label: Callable[[Sites], Array] | None = None,
    progress_bar: bool = True,
) -> SBC:
    """Rank true parameters among posterior draws for simulated data.

    For an amortised posterior, one compiled call handles a batch of data sets. A NumPyro kernel runs on one data set
    after the other; its program is compiled once.

    Args:
        key: random key. Simulation i depends on ``key`` and i only.
        posterior: a fitted posterior, or a NumPyro kernel of a model.
        num_simulations: number of simulated data sets.
        model_args: arguments of a kernel's model. Data may be missing, and are ignored.
        model_kwargs: keyword arguments of a kernel's model. None means no arguments.
        problem: the problem that simulates parameters and data. None means the problem of the posterior, or the
            kernel's model.
        store: stored simulations on which the posterior was not trained. Its valid rows replace the simulations. None
            means the problem simulates.
        num_draws: number of posterior draws for each data set.
        num_proposals: number of weighted proposals of a fitted posterior, from which ``num_draws`` are resampled.
        corrected: whether proposals are weighted. False tests the learned draws themselves. A problem without a density
            has no weights.
        num_warmup: warm-up steps of a kernel.
        thinning: steps of a kernel between two kept draws. Ranks are uniform for independent draws only.
        label: gives the stratum of a data set: a whole number, computed in JAX from the observed sites and the design,
            such as ``lambda y: y["present"].sum() > 20``. Every stratum is then tested by itself (`SBC.strata`). None
            means no strata.
        progress_bar: show a progress bar on a terminal.

    Returns:
        The ranks. Their text is a table of the tests.

    Raises:
        TypeError: if a model's arguments are given for a fitted posterior, which contains its problem.
        UnsupportedModel: if the model cannot be simulated, or its density does not describe its draws. In the second
            case, pass a ``problem`` with the same sites whose draws follow the posterior's density.
        ValueError: if a kernel has no ``model``, or is used with a store; or if the store has too few valid rows, or
            parameters of another prior.
        UnreadableFile: if the store is damaged.

    Exactness: ranks are exactly uniform if the draws are exact and independent. Learned draws without weights are
        independent, so their test is exact. Resampling by weight adds an error that vanishes as ``num_proposals``
        grows. Correlation within a chain adds an error that vanishes as ``thinning`` grows.

    References: Talts et al. 2020, arXiv 1804.06788; Modrak et al. 2023, arXiv 2211.02383 (quantities that depend on
    the data); Lemos et al. 2023, arXiv 2302.03026 (TARP); Hermans et al. 2022, arXiv 2110.06581 (expected coverage).
    """
    start = time.perf_counter()
    if not is_kernel(posterior) and (model_args or model_kwargs):
        raise TypeError(
            "Expected `model_args` and `model_kwargs` for a kernel only, got them for a fitted posterior, which "
            "contains its problem. Leave them out, or pass another model as `problem=from_numpyro(model, *args, "
            "**kwargs)`."
        )
    for_references, for_rows = jax.random.split(key)
    pairs: tuple[Array, Sites] | None = None
    if store is not None:
        problem, pairs, references = _stored_pairs(for_references, posterior, store, num_simulations)
    else:
        problem = _problem_of(posterior, model_args, model_kwargs or {}) if problem is None else problem
        if problem.simulate is None:
            raise UnsupportedModel(
                "Calibration simulates data, so it expects a model that can be simulated. Pass such a model as "
                f"`problem=`, or simulations as `store=`. This model cannot be simulated: {problem.not_simulable}"
            )
        weighs = is_kernel(posterior) or (corrected and problem.has_density)
        if weighs and (wrong := misdrawn_latents(problem) + misdrawn_data(problem)):
            raise UnsupportedModel(
                f"Calibration expects a model whose density describes its draws, but {say_misdrawn(wrong)} Pass that "
                "model as `problem=`."
            )
        references = _references(simulate_joint(for_references, problem, max(num_simulations, 100)))
    with tqdm(total=num_simulations, desc="calibrating", disable=None if progress_bar else True, leave=False) as bar:
        if is_kernel(posterior):
            sampler = chain_sampler(posterior, problem, model_args, model_kwargs or {}, num_warmup, num_draws, thinning)
            told = _rank_chains(for_rows, problem, references, sampler, label, num_simulations, num_draws, bar.update)
            share = None
        else:
            weighed = corrected and problem.has_density
            sizes = num_proposals if weighed else num_draws, num_draws, weighed

            def rank(rows: Int[Array, " size"]) -> Any:
                return _rank_rows(for_rows, posterior.proposal, problem, references, sizes, pairs, label, rows)

            told, share = in_batches(rank, num_simulations, max(1, AT_ONCE // sizes[0]), bar.update)
            share = np.asarray(share) if weighed else None
    sites, joint, labels = jax.tree.map(np.asarray, told)
    seconds = time.perf_counter() - start
    return SBC(sites, joint, num_draws, share, seconds, None if label is None else labels)


def _problem_of(posterior: Any, args: tuple, kwargs: dict[str, Any]) -> Problem:
    """Return the problem of a posterior, or read a kernel's model."""
    if not is_kernel(posterior):
        return posterior.problem
    if posterior.model is None:
        raise ValueError(
            "Calibration simulates data, so it expects a kernel of a model, but this "
            f"{type(posterior).__name__} has no `model`. Make the kernel from a model, or pass `problem=`."
        )
    return problem_of(posterior.model, args, kwargs)


def _references(simulations: Simulations) -> References:
    scale = standardiser(simulations.x)
    features = jax.vmap(lambda x: flatten(scale(x)))(simulations.x)
    return References(scale, features, simulations.z, simulations.z.std(axis=0) + 1e-12)


def _stored_pairs(key: Key, posterior: Any, store: Store, num: int) -> tuple[Problem, tuple[Array, Sites], References]:
    """Take the tested simulations and the references from different rows of a store."""
    if is_kernel(posterior):
        raise ValueError(
            "Expected a fitted posterior together with `store`, got a kernel. Leave `store` out, or pass a fitted "
            "posterior."
        )
    stored = stored_simulations(key, posterior.problem, store)
    if len(stored.z) < num + MIN_REFERENCES:
        raise ValueError(
            f"Expected {num + MIN_REFERENCES} valid rows, {MIN_REFERENCES} more than `num_simulations`, got "
            f"{len(stored.z)}. Simulate more rows, or reduce `num_simulations`."
        )
    rest = jax.tree.map(lambda leaf: leaf[num:], (stored.z, stored.y))
    return stored.problem, (stored.z, stored.y), _references(encoded(stored.problem, *rest))


@over_devices
def _rank_rows(
    key: Key,
    proposal: AbstractProposal,
    problem: Problem,
    references: References,
    sizes: tuple[int, int, bool],
    pairs: tuple[Array, Sites] | None,
    label: Callable[[Sites], Array] | None,
    rows: Array,
) -> tuple[tuple[Sites, Sites, Array], Float[Array, " num"]]:
    """Simulate these data sets (or take them from ``pairs``), draw from the posteriors, and rank the true parameters.

    ``sizes`` holds the number of proposals, the number of draws, and whether proposals are weighted.
    """
    num_proposals, num_draws, weighed = sizes

    def one(row):
        for_pair, for_draws, for_pick, for_ties = jax.random.split(jax.random.fold_in(key, row), 4)
        z, y = cast(Any, problem.simulate)(for_pair) if pairs is None else jax.tree.map(lambda leaf: leaf[row], pairs)
        target = Target(problem, y)
        context = proposal.context(target)
        drawn = jax.vmap(lambda k: proposal.sample(k, target, context))(jax.random.split(for_draws, num_proposals))
        if not weighed:
            return _ranks(for_ties, problem, references, label, z, y, drawn.z), jnp.ones(())
        log_weight = jnp.where(jnp.isnan(drawn.log_weight), -jnp.inf, drawn.log_weight)
        picked = jax.random.categorical(for_pick, log_weight, shape=(num_draws,))
        share = jnp.exp(log_effective_share(log_weight))
        return _ranks(for_ties, problem, references, label, z, y, drawn.z[picked]), share

    return map_rows(one, None)(rows)


def _ranks(
    key: Key,
    problem: Problem,
    references: References,
    label: Callable[[Sites], Array] | None,
    z: Array,
    y: Sites,
    values: Float[Array, "draws dim"],
) -> tuple[Sites, Sites, Array]:
    """Rank the true ``z`` among the draws ``values``, for every site, and for the joint quantities; label the data."""
    x = flatten(references.standardiser(encode(problem, y)))
    reference = references.z[jnp.argmin(jnp.linalg.norm(references.x - x, axis=1))]

    def quantities(z: Array) -> tuple[Sites, Sites]:
        joint = {"tarp": jnp.linalg.norm((z - reference) / references.spread)}
        joint |= {"log_joint": problem.log_joint(z, y)} if problem.has_density else {}
        return dict(problem.latent_sites(z)), joint

    truth, drawn = quantities(z), jax.vmap(quantities)(values)
    leaves, tree = jax.tree.flatten(truth)
    ranks = [_rank(k, *pair) for k, *pair in
             zip(jax.random.split(key, len(leaves)), leaves, jax.tree.leaves(drawn), strict=True)]  # fmt: skip
    stratum = jnp.zeros((), int) if label is None else jnp.asarray(label(y)).astype(int)
    return *jax.tree.unflatten(tree, ranks), stratum


def _rank(key: Key, truth: Array, drawn: Array) -> Int[Array, "*shape"]:
    """Count the draws below the truth. Ties, caused by rounding, are broken at random."""
    below, ties = (drawn < truth).sum(axis=0), (drawn == truth).sum(axis=0)
    return below + jax.random.randint(key, jnp.shape(truth), 0, ties + 1)


def _rank_chains(
    key: Key,
    problem: Problem,
    references: References,
    sampler: Callable[[Key, Sites], Sites],
    label: Callable[[Sites], Array] | None,
    num_simulations: int,
    num_draws: int,
    done: Callable[[int], Any],
) -> tuple[Sites, Sites, Array]:
    """Run a kernel on every simulated data set, and rank the true parameters."""

    @jax.jit
    def simulate_one(key):
        return cast(Any, problem.simulate)(key)

    @jax.jit
    def rank_one(key, z, y, sites):
        return _ranks(key, problem, references, label, z, y, jax.vmap(problem.unconstrain)(sites))

    told = []
    for row in range(num_simulations):
        for_pair, for_chain, for_ties = jax.random.split(jax.random.fold_in(key, row), 3)
        z, y = simulate_one(for_pair)
        sites = sampler(for_chain, y)
        told.append(rank_one(for_ties, z, y, {site.name: sites[site.name][-num_draws:] for site in problem.latents}))
        done(1)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *told)
