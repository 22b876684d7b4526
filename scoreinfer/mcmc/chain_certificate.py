"""The verdict on chains of `ScoreSDE`: what their proposals' weights, independent explorers and R-hat say together."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jaxtyping import Float, PyTree
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC
from numpyro.util import is_prng_key

from scoreinfer._tree import own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.evidence.certificate import Certificate, ForwardCheck, certify as certify_weights
from scoreinfer.evidence.witnesses import gather, hold_against
from scoreinfer.mcmc.contract import observe
from scoreinfer.mcmc.score_sde import Fit, ScoreSDE
from scoreinfer.montecarlo.population import num_ancestors
from scoreinfer.montecarlo.reference import Overdispersed, reference_draws, reference_of
from scoreinfer.montecarlo.tempering import Tempered
from scoreinfer.montecarlo.weights import log_evidence
from scoreinfer.nets.embedding import flatten
from scoreinfer.samplers.base import Weighted
from scoreinfer.samplers.batches import weigh_rows, weighted_draws
from scoreinfer.samplers.refined import AmortisedProposal
from scoreinfer.samplers.single import Effort, explore

MAX_R_HAT = 1.05
MAX_EXCESS, MAX_DEFICIT = 0.5, 1.0
"""How far an explorer's log evidence may lie above that of the proposals, which then miss mass, and how far below: an
explorer that finds less than the proposals says nothing against them, but one that loses most is no witness."""
CROSS_CHECK = Effort(num_moves=100, kept_share=0.8)
"""The wider explorers': they have further to walk, and large steps of temperature would make their evidence noisy."""
NUM_PLACES = 512
"""Particles of each explorer that are held against the proposals."""
WIDER, WIDEST = 10.0, 100.0
"""How many times wider than what the first explorer has seen the second and the third one start."""


class ChainCertificate(NamedTuple):
    """Whether chains of `ScoreSDE` can be trusted, and why.

    Args:
        certified: the verdict.
        reason: the verdict in words.
        weights: the certificate of a fresh batch of global proposals: effective sample size, k-hat, log evidence, and
            the share of the witnesses, or of the explorers' particles, that the proposals miss.
        accept_prob: mean acceptance probability of the global moves; NaN where ``accept_prob`` was not collected.
        local_accept_prob: that of the last local moves; NaN without any.
        r_hat: largest split R-hat of any component (infinite for a single component that never moved).
        nested_r_hat: largest nested R-hat, chains taken in pairs; NaN for fewer than four chains.
        explorer_log_evidence: log evidences of the explorers (none for an amortised posterior).

    Exactness: evidence, not proof: a mode that neither the explorers nor the proposals find goes unseen.
    """

    certified: bool
    reason: str
    weights: Certificate
    accept_prob: float
    local_accept_prob: float
    r_hat: float
    nested_r_hat: float
    explorer_log_evidence: tuple[float, ...]

    def __str__(self) -> str:
        head = "certified" if self.certified else "not certified"
        w = self.weights
        explorers = ", ".join(f"{value:.3f}" for value in self.explorer_log_evidence) or "none"
        return (
            f"{head}: {self.reason}\n  global weights: ESS {w.ess:.0f} of {w.num}, k-hat {w.k_hat:.2f}, log evidence "
            f"{w.log_evidence:.3f} +- {w.log_evidence_se:.3f} (explorers: {explorers}), missed share {w.missed:.3f}\n"
            f"  acceptance: global {self.accept_prob:.2f}, local {self.local_accept_prob:.2f}; "
            f"R-hat {self.r_hat:.3f}, nested {self.nested_r_hat:.3f}\n  {w.resolution}"
        )


@own_broadcasting
def certify(mcmc: MCMC, *, num: int = 4096) -> ChainCertificate:
    """Judge the last run of an `MCMC` object whose kernel is a `ScoreSDE`.

    A fresh batch of global proposals is weighed. Where the kernel learned this posterior alone, a second explorer
    starts ten times wider than the first one's particles and their start, and proposals and explorers must agree both
    ways: hardly any explorer's particles where the proposals never draw, and about the same log evidence. A third one
    starts a hundred times wider, and where it finds densities as high, the proposals must draw too; modes beyond that
    reach, or too narrow for all three, go unseen. Witnesses are held against the proposals as well
    (`scoreinfer.evidence.witnesses`): draws of the prior, or where there is none of the explorer's start, weighed by
    the data and tempered. Of an amortised posterior they alone are asked.

    Args:
        mcmc: after ``run``.
        num: global proposals to weigh.

    Returns:
        A certificate. It refuses for any reason for which a batch is refused (`Certificate`), for a split or nested
        R-hat above 1.05, and where an explorer's log evidence is more than 0.5 above the proposals' or 1 below
        (infinitely far below where the second explorer does not reach the posterior).

    Raises:
        ValueError: where the kernel is another, or has not been run, or the data have changed since.

    Exactness: see `ChainCertificate`.

    References: Margossian et al. 2024, Bayesian Analysis (nested R-hat); Vehtari et al. 2024 (k-hat).
    """
    kernel, state = mcmc.sampler, mcmc.last_state
    if not isinstance(kernel, ScoreSDE):
        raise ValueError(f"Expected an MCMC object with a ScoreSDE kernel, got {type(kernel).__name__}.")
    if state is None:
        raise ValueError("Expected an MCMC object after `run`, this one has not been run.")
    key = state.rng_key if is_prng_key(state.rng_key) else state.rng_key[0]
    for_draws, for_explorer, for_places, for_witnesses = random.split(random.fold_in(key, 0), 4)
    fit = kernel.fit_of(state)
    y = observe(fit.proposer.problem, mcmc._args, mcmc._kwargs)
    if not all(np.allclose(y[name], state.y[name], rtol=1e-5, atol=1e-6, equal_nan=True) for name in y):
        raise ValueError("The data have changed since this run, whose chains answer for the old ones. Run it again.")
    drawn = weighted_draws(for_draws, fit.proposer, y, 1024, None, 0, num)
    checks = [_witnessed(for_witnesses, for_places, kernel, fit, y, drawn)]
    evidences: tuple[float, ...] = ()
    if fit.evidence is not None:
        explored, evidences = _explored(for_explorer, for_places, kernel, fit, y, drawn)
        checks.append(explored)
    if fit.outliers is not None and isinstance(fit.proposer, AmortisedProposal):
        rank = float(fit.outliers.rank(flatten(fit.proposer.features(y))))
        checks.append(ForwardCheck(jnp.zeros(0), rank))
    weights = certify_weights(drawn.log_weight, *checks)
    samples = mcmc.get_samples(group_by_chain=True)
    latent = {site.name for site in fit.proposer.problem.latents}
    if latent:
        samples = {name: values for name, values in samples.items() if name in latent}
    r_hat, nested = _largest(split_gelman_rubin, samples), np.nan
    if mcmc.num_chains >= 4:
        nested = _largest(nested_r_hat, samples)
    accept = mcmc.get_extra_fields().get("accept_prob", np.nan)
    local = float(np.mean(state.adapt_state.accept_prob)) if kernel.num_local_steps else np.nan
    faults = [] if weights.certified else [weights.reason]
    faults += [f"{name} {value:.3f} > {MAX_R_HAT}" for name, value in (("R-hat", r_hat), ("nested R-hat", nested))
               if not (value <= MAX_R_HAT or np.isnan(value))]  # fmt: skip
    gaps = [value - weights.log_evidence for value in evidences]
    faults += [f"an explorer's log evidence is {abs(gap):.2f} {'above' if gap > 0 else 'below'} the proposals'"
               for gap in gaps if not -MAX_DEFICIT <= gap <= MAX_EXCESS]  # fmt: skip
    reason = "; ".join(faults) or weights.reason
    return ChainCertificate(not faults, reason, weights, float(np.mean(accept)), local, r_hat, nested, evidences)


def _witnessed(
    for_witnesses: Key, for_weights: Key, kernel: ScoreSDE, fit: Fit, y: Sites, drawn: Weighted
) -> ForwardCheck:
    """Hold witnesses from the prior against the proposals; from the explorer's start where there is no prior."""
    problem = fit.proposer.problem
    reference, target = reference_of(problem, kernel.start_scale), jax.tree_util.Partial(problem.log_joint, y=y)
    return hold_against(for_weights, fit.proposer, y, drawn, gather(for_witnesses, reference, target))


def _explored(
    for_explorer: Key, for_places: Key, kernel: ScoreSDE, fit: Fit, y: Sites, drawn: Weighted
) -> tuple[ForwardCheck, tuple[float, ...]]:
    """Hold the explorers' particles against the proposals; return their log evidences, too."""
    assert fit.evidence is not None
    informative = fit.evidence.num_informative
    first = fit.evidence.places
    for_start, for_second, for_third = random.split(for_explorer, 3)
    start = reference_of(fit.proposer.problem, kernel.start_scale)
    began = reference_draws(for_start, start, CROSS_CHECK.num_particles)
    seen = jnp.concatenate([first, began])
    target = jax.tree_util.Partial(fit.proposer.problem.log_joint, y=y)

    def explore_from(key: Key, times: float) -> Tempered:
        reference = Overdispersed(seen.mean(0), times * seen.std(0), degrees=1.0)
        return explore(key, reference, target, CROSS_CHECK, progress_bar=False)[0]

    parts, evidences = [first[:NUM_PLACES]], [fit.evidence.log_evidence]
    try:
        second = explore_from(for_second, WIDER)
        parts.append(second.values[:NUM_PLACES])
        evidences.append(float(second.log_evidence))
        informative = max(informative, num_ancestors(second.ancestors))
    except FloatingPointError:  # no witness
        evidences.append(-np.inf)
    num_trusted = sum(len(part) for part in parts)
    with contextlib.suppress(FloatingPointError):  # so far away a density may overflow or be too far to walk to
        parts.append(explore_from(for_third, WIDEST).values[:NUM_PLACES])
    places = jnp.concatenate(parts)
    weighed = weigh_rows(for_places, fit.proposer, y, jnp.arange(places.shape[0]), places)
    log_excess = weighed.log_weight - log_evidence(drawn.log_weight)[0]
    # From so far away some of the third one's particles get stuck; its evidence is worth nothing, its finds are.
    counts = (weighed.log_joint >= _floor(drawn)) | (jnp.arange(places.shape[0]) < num_trusted)
    log_excess = jnp.where(counts, log_excess, jnp.nan)
    return ForwardCheck(log_excess, np.nan, "the explorers' particles", informative), tuple(evidences)


def _floor(drawn: Weighted) -> float:
    """Compute the log density above which 99 % of the draws' weight lies."""
    log_weight = np.nan_to_num(np.asarray(drawn.log_weight, np.float64), nan=-np.inf)
    order = np.argsort(drawn.log_joint)
    below = np.cumsum(np.exp(log_weight[order] - log_weight.max()))
    return float(drawn.log_joint[order[np.searchsorted(below, 0.01 * below[-1])]])


def nested_r_hat(draws: Float[np.ndarray, "chains draws"]) -> float:
    """Compute nested R-hat of one component, neighbouring chains taken in pairs.

    >>> bool(nested_r_hat(np.random.default_rng(0).normal(size=(4, 1000))) < 1.01)
    True
    """
    pairs = draws[: 2 * (len(draws) // 2)].reshape(len(draws) // 2, 2, -1)
    within = pairs.var(axis=2, ddof=1).mean(axis=1) + pairs.mean(axis=2).var(axis=1, ddof=1)
    between = pairs.mean(axis=(1, 2)).var(ddof=1)
    return float(np.sqrt(1.0 + between / within.mean()))


def _largest(statistic: Callable[[np.ndarray], Any], samples: PyTree) -> float:
    """Compute a statistic of every component of every site, and take the largest."""
    columns = [np.asarray(leaf, np.float64).reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(samples)]
    values = [float(statistic(column[..., i])) for column in columns for i in range(column.shape[-1])]
    return float(np.max(np.where(np.isnan(values), np.inf, values)))
