"""The certificate for chains of `ScoreSDE`, from the proposals' weights, independent explorers and R-hat."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC
from numpyro.util import is_prng_key

from scoreinfer._keys import keys_of
from scoreinfer._tree import own_broadcasting
from scoreinfer._typing import Key
from scoreinfer.draws import Draws
from scoreinfer.evidence.certificate import Certificate, ForwardCheck, certify_weights
from scoreinfer.evidence.witnesses import Witnesses, gather, hold_against
from scoreinfer.mcmc.score_sde import Fit, ScoreSDE
from scoreinfer.montecarlo.first_draws import num_first
from scoreinfer.montecarlo.population import num_ancestors
from scoreinfer.montecarlo.reference import AbstractReference, overdispersed, reference_draws, start_of
from scoreinfer.montecarlo.tempering import Tempered
from scoreinfer.montecarlo.weights import log_evidence
from scoreinfer.nets.embedding import flatten
from scoreinfer.samplers.amortised import AbstractAmortised
from scoreinfer.samplers.base import Target, Weighted
from scoreinfer.samplers.batches import BATCH, spaced, weigh_places, weighted_draws
from scoreinfer.samplers.explorer import Effort, explore
from scoreinfer.samplers.single import NUM_PLACES

MAX_R_HAT = 1.05
"""Largest accepted split or nested R-hat. Chosen by judgement."""
MAX_EXCESS, MAX_DEFICIT = 0.5, 1.0
"""How far an explorer's log evidence may lie above and below the proposals' log evidence. Chosen by judgement.

A larger excess means that the proposals miss mass. A deficit is no evidence against the proposals, but an explorer that
loses most of the mass cannot check them.
"""
EFFORT = Effort(max_moves=80)
"""Effort of the explorers. Chosen by judgement: the particles of the wider ones start further away, so they need more
moves than those of the learning."""
FASTER = 0.2
"""Share of the effective sample size that the third explorer keeps at each change of temperature. Chosen by judgement:
its evidence is not used, so that it may be noisier."""
FEWER = 2
"""Where evaluations are dear (`Target.is_dear`), the explorers have fewer particles by this factor, and the wider ones
fewer first draws. Chosen by judgement."""
WIDER, WIDEST = 10.0, 100.0
"""Start scales of the second and the third explorer. Chosen by judgement.

The unit is the standard deviation of the first explorer's particles and their start together.
"""


class ChainCertificate(NamedTuple):
    """The verdict whether chains of `ScoreSDE` can be trusted, and the reasons.

    Args:
        certified: the verdict.
        reason: the verdict in words.
        weights: the certificate of a fresh batch of global proposals: effective sample size, k-hat, log evidence, and
            the share of the witnesses, or of the explorers' particles, that the proposals miss.
        accept_prob: mean acceptance probability of the global moves. NaN if ``accept_prob`` was not collected.
        local_accept_prob: mean acceptance probability of the last local moves. NaN if there were none.
        r_hat: largest split R-hat of any component. Infinite if a component never moved.
        nested_r_hat: largest nested R-hat of any component, with chains in pairs. NaN for fewer than four chains.
        explorer_log_evidence: log evidences of the explorers. Empty for an amortised posterior.
        learning: why the learning stopped, and the effective shares that its rounds reached. Empty for an amortised
            posterior.

    Exactness: evidence, not proof. A mode that neither the explorers nor the proposals find is not detected. The
        explorers start from different random numbers and places, but all move alike.
    """

    certified: bool
    reason: str
    weights: Certificate
    accept_prob: float
    local_accept_prob: float
    r_hat: float
    nested_r_hat: float
    explorer_log_evidence: tuple[float, ...]
    learning: str = ""

    def __str__(self) -> str:
        head = "certified" if self.certified else "not certified"
        w = self.weights
        explorers = ", ".join(f"{value:.3f}" for value in self.explorer_log_evidence) or "none"
        return (
            f"{head}: {self.reason}\n  global weights: ESS {w.ess:.0f} of {w.num}, k-hat {w.k_hat:.2f}, log evidence "
            f"{w.log_evidence:.3f} +- {w.log_evidence_se:.3f} (explorers: {explorers}), missed share {w.missed:.3f}\n"
            f"  acceptance: global {self.accept_prob:.2f}, local {self.local_accept_prob:.2f}; "
            f"R-hat {self.r_hat:.3f}, nested {self.nested_r_hat:.3f}\n  {w.resolution}"
        ) + (f"\n  {self.learning}" if self.learning else "")


def certify(drawn: Draws | MCMC, **options: Any) -> Certificate | ChainCertificate:
    """Return the certificate of draws, or certify the last run of an `MCMC` object with a `ScoreSDE` kernel.

    Draws were already certified when they were made. Chains are certified by `certify_chains`, which takes the
    ``options``.

    Raises:
        TypeError: if ``drawn`` is neither, or ``options`` are given with draws.
        ValueError: as `certify_chains`.

    Exactness: see `Certificate` and `ChainCertificate`.
    """
    if isinstance(drawn, Draws):
        if options:
            raise TypeError(f"Expected no options with draws, got {', '.join(options)}: draws are already certified.")
        return drawn.certificate
    if isinstance(drawn, MCMC):
        return certify_chains(drawn, **options)
    raise TypeError(f"Expected the draws of a posterior or an `MCMC` object, got {type(drawn).__name__}.")


@own_broadcasting
def certify_chains(mcmc: MCMC, *, num: int = 4096) -> ChainCertificate:
    """Certify the last run of an `MCMC` object with a `ScoreSDE` kernel.

    A fresh batch of global proposals is weighed. The proposals are compared with three sources:

    - Witnesses (`scoreinfer.evidence.witnesses`): draws from the prior, weighted by the data and tempered. If there is
      no prior to draw from, the draws come from the explorer's start distribution. They move as the first explorer's
      particles did; those for an amortised posterior, which is compared with witnesses only, move without gradients.
    - A second explorer. It starts ten times wider than the first explorer's particles and their start. Proposals and
      explorers must have about the same log evidence, and hardly any particle may lie where the proposals never draw.
    - A third explorer. It starts a hundred times wider. Only its particles with densities as high as the proposals'
      count, and the proposals must draw there too.

    Modes further away, or too narrow for all three explorers, are not detected.

    Args:
        mcmc: the `MCMC` object, after ``run``.
        num: number of global proposals to weigh.

    Returns:
        A certificate. It refuses for every reason of a batch (`Certificate`), if a split or nested R-hat is above 1.05,
        or if an explorer's log evidence is more than 0.5 above or more than 1 below the proposals'. If the second
        explorer does not reach the posterior, its log evidence is minus infinity.

    Raises:
        ValueError: if the kernel is no `ScoreSDE`, if it has not been run, or if the data have changed since the run.

    Exactness: see `ChainCertificate`.

    References: Margossian et al. 2024, Bayesian Analysis (nested R-hat); Vehtari et al. 2024 (k-hat).
    """
    kernel, state = mcmc.sampler, mcmc.last_state
    if not isinstance(kernel, ScoreSDE):
        raise ValueError(f"Expected an `MCMC` object with a `ScoreSDE` kernel, got {type(kernel).__name__}.")
    if state is None:
        raise ValueError("Expected an `MCMC` object after `run`, this one has not been run: call `mcmc.run`.")
    key = state.rng_key if is_prng_key(state.rng_key) else state.rng_key[0]
    for_draws, for_explorer, for_places, for_witnesses, *_ = keys_of(key)
    fit = kernel.fit_of(state)
    target = fit.target(mcmc._args, mcmc._kwargs)
    y = target.y
    if not all(np.allclose(y[name], state.y[name], rtol=1e-5, atol=1e-6, equal_nan=True) for name in y):
        raise ValueError("The data have changed since this run, and its chains are for the old data: run it again.")
    drawn = weighted_draws(for_draws, fit.proposal, target, BATCH, None, 0, num)
    checks = [_witnessed(for_witnesses, for_places, kernel, fit, target, drawn)]
    evidences: tuple[float, ...] = ()
    if fit.evidence is not None:
        explored, evidences = _explored(for_explorer, for_places, kernel, fit, target, drawn)
        checks.append(explored)
    if fit.outliers is not None and isinstance(fit.proposal, AbstractAmortised):
        rank = float(fit.outliers.rank(flatten(fit.proposal.features(target))))
        checks.append(ForwardCheck(np.zeros(0), rank))
    weights = certify_weights(drawn.log_weight, *checks)
    samples = mcmc.get_samples(group_by_chain=True)
    latent = {site.name for site in fit.problem.latents}
    if latent:
        samples = {name: values for name, values in samples.items() if name in latent}
    r_hat, nested = _largest(split_gelman_rubin, samples), np.nan
    if mcmc.num_chains >= 4:
        nested = _largest(nested_r_hat, samples)
    accept = mcmc.get_extra_fields().get("accept_prob", np.nan)
    local = float(np.mean(state.adapt_state.accept_prob)) if kernel.moves_of(fit)[1] else np.nan
    faults = [] if weights.certified else [weights.reason]
    faults += [f"{name} {value:.3f} > {MAX_R_HAT}" for name, value in (("R-hat", r_hat), ("nested R-hat", nested))
               if not (value <= MAX_R_HAT or np.isnan(value))]  # fmt: skip
    gaps = [value - weights.log_evidence for value in evidences]
    faults += [f"an explorer's log evidence is {abs(gap):.2f} {'above' if gap > 0 else 'below'} the proposals'"
               for gap in gaps if not -MAX_DEFICIT <= gap <= MAX_EXCESS]  # fmt: skip
    reason = "; ".join(faults) or weights.reason
    learning = "" if fit.taught is None else str(fit.taught)
    return ChainCertificate(
        not faults, reason, weights, float(np.mean(accept)), local, r_hat, nested, evidences, learning
    )


def _witnessed(
    for_witnesses: Key, for_weights: Key, kernel: ScoreSDE, fit: Fit, target: Target, drawn: Weighted
) -> ForwardCheck:
    """Compare the proposals with witnesses from the prior, or from the explorer's start if there is no prior."""
    reference = start_of(fit.problem, kernel.start_scale)
    if fit.evidence is None:
        witnesses = gather(for_witnesses, reference, target)
    else:
        witnesses = gather_by(for_witnesses, reference, target, _effort(target))
    return hold_against(for_weights, fit.proposal, target, drawn, witnesses)


def gather_by(key: Key, reference: AbstractReference, target: Target, effort: Effort) -> Witnesses:
    """Gather witnesses by an explorer.

    Exactness: as for `explore`.
    """
    of_prior = num_first(reference, effort.num_first) if reference.is_prior else 0
    try:
        found = explore(key, reference, target, effort, progress_bar=False)
    except FloatingPointError:  # it did not reach the posterior
        return Witnesses(jnp.zeros((0, target.problem.dim)), 0.0, of_prior, -np.inf)
    return Witnesses(found.values, num_ancestors(found.ancestors), of_prior, float(found.log_evidence))


def _effort(target: Target) -> Effort:
    """Choose the effort of an explorer."""
    return EFFORT._replace(num_particles=EFFORT.num_particles // FEWER) if target.is_dear else EFFORT


def _explored(
    for_explorer: Key, for_places: Key, kernel: ScoreSDE, fit: Fit, target: Target, drawn: Weighted
) -> tuple[ForwardCheck, tuple[float, ...]]:
    """Compare the proposals with the explorers' particles. Return the check and the explorers' log evidences."""
    assert fit.evidence is not None
    informative = fit.evidence.num_informative
    first = fit.evidence.places
    for_start, for_second, for_third, *_ = keys_of(for_explorer)
    start = start_of(fit.problem, kernel.start_scale)
    seen = np.concatenate([first, reference_draws(for_start, start, num_first(start))])
    effort = _effort(target)
    effort = effort._replace(num_first=effort.num_first * effort.num_particles // EFFORT.num_particles)

    def explore_from(key: Key, times: float, effort: Effort) -> Tempered:
        reference = overdispersed(start, seen.mean(0), times * seen.std(0), 1.0)
        return explore(key, reference, target, effort, progress_bar=False)

    parts, evidences = [spaced(first, NUM_PLACES)], [fit.evidence.log_evidence]
    try:
        second = explore_from(for_second, WIDER, effort)
        parts.append(spaced(second.values, NUM_PLACES))
        evidences.append(float(second.log_evidence))
        informative = max(informative, num_ancestors(second.ancestors))
    except FloatingPointError:  # the second explorer did not reach the posterior
        evidences.append(-np.inf)
    num_trusted = sum(len(part) for part in parts)
    with contextlib.suppress(FloatingPointError):  # far away, the density may overflow or be unreachable
        third = explore_from(for_third, WIDEST, effort._replace(kept_share=FASTER))
        parts.append(spaced(third.values, NUM_PLACES))
    weighed = weigh_places(for_places, fit.proposal, target, np.concatenate(parts))
    log_excess = np.asarray(weighed.log_weight) - log_evidence(drawn.log_weight)[0]
    # Some particles of the third explorer get stuck far away, so its log evidence is not used. Its particles count only
    # if their density is high enough.
    counts = (np.asarray(weighed.log_target) >= _floor(drawn)) | (np.arange(len(log_excess)) < num_trusted)
    log_excess = np.where(counts, log_excess, np.nan)
    return ForwardCheck(log_excess, np.nan, "the explorers' particles", informative), tuple(evidences)


def _floor(drawn: Weighted) -> float:
    """Compute the log density that 99 % of the draws' weight exceeds."""
    log_weight = np.nan_to_num(np.asarray(drawn.log_weight, np.float64), nan=-np.inf)
    log_target = np.asarray(drawn.log_target)
    order = np.argsort(log_target)
    below = np.cumsum(np.exp(log_weight[order] - log_weight.max()))
    return float(log_target[order[np.searchsorted(below, 0.01 * below[-1])]])


def nested_r_hat(draws: Float[np.ndarray, "chains draws"]) -> float:
    """Compute the nested R-hat of one component. Neighbouring chains form pairs.

    References: Margossian et al. 2024, Bayesian Analysis.

    >>> bool(nested_r_hat(np.random.default_rng(0).normal(size=(4, 1000))) < 1.01)
    True
    """
    pairs = draws[: 2 * (len(draws) // 2)].reshape(len(draws) // 2, 2, -1)
    within = pairs.var(axis=2, ddof=1).mean(axis=1) + pairs.mean(axis=2).var(axis=1, ddof=1)
    between = pairs.mean(axis=(1, 2)).var(ddof=1)
    return float(np.sqrt(1.0 + between / within.mean()))


def _largest(statistic: Callable[[np.ndarray], Any], samples: PyTree) -> float:
    """Compute a statistic of every component of every site, and return the largest. NaN counts as infinite."""
    columns = [np.asarray(leaf, np.float64).reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(samples)]
    values = [float(statistic(column[..., i])) for column in columns for i in range(column.shape[-1])]
    return float(np.max(np.where(np.isnan(values), np.inf, values)))
