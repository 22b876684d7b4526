"""Certificates of finished paths: do chains from different starts agree, and did the finish move them enough.

Importance weights of whole paths say nothing in hundreds of dimensions. So the evidence is that of Markov chains: those
from the starts in question, and explorers, from starts that owe nothing to these.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

MAX_R_HAT = 1.2
"""Largest R-hat of what chains saw in the second half of the finish: each then saw more than two independent draws.
Chosen by judgement: the chains are short and many, and their common bias shows as drift or disagreement."""
MAX_Z = 4.0
"""Largest distance of means from different starts, in standard errors. Chosen by judgement: about 15 are compared."""
MAX_DRIFT = 0.25
"""Largest drift of the log density over the second half, in its standard deviations. Chosen by judgement."""
MAX_SHARE_ERROR = 0.1
"""Largest error of a lobe's share that cannot be ruled out at 95 %. Chosen by judgement."""
MIN_GAP = 3.0
"""Least gap between the means of chains in two lobes, in standard deviations of one chain. Chosen by judgement."""
MAX_LOBES, MIN_LOBE = 8, 2
"""Most lobes that are told apart, and fewest chains of one. Chosen by judgement."""
Trace = Float[np.ndarray, "chains steps seen"]


class PathCertificate(NamedTuple):
    """The verdict whether finished paths can be trusted, and the reasons.

    Args:
        certified: the verdict.
        reason: the verdict in words.
        num: number of chains from the starts in question; each leaves one draw.
        num_steps: steps of the finish; zero where there was none.
        ess: effective number of draws behind the least certain mean of what the chains saw.
        accept_prob: mean acceptance probability; 1 for Gibbs steps.
        r_hat: largest R-hat of all chains, within lobes where there are several.
        disagreement: largest distance between means from the starts and from the explorers, in standard errors.
        drift: change of the mean log density from the third to the fourth quarter of the steps, in its standard
            deviations.
        shares: shares of the lobes that the finish does not leave, among the chains from the starts.
        explorer_shares: the same among the explorers.
        log_prior: median of log p(x) in the second half.
        log_likelihood: median of log p(y | x).

    Exactness: evidence, not proof. A lobe that no start has found is not detected.
    """

    certified: bool
    reason: str
    num: int
    num_steps: int = 0
    ess: float = math.nan
    accept_prob: float = math.nan
    r_hat: float = math.nan
    disagreement: float = math.nan
    drift: float = math.nan
    shares: tuple[float, ...] = ()
    explorer_shares: tuple[float, ...] = ()
    log_prior: float = math.nan
    log_likelihood: float = math.nan

    def __str__(self) -> str:
        head = "certified" if self.certified else "not certified"
        if not self.num_steps:
            return f"{head}: {self.reason}"
        lobes = "/".join(f"{share:.2f}" for share in self.shares)
        theirs = "/".join(f"{share:.2f}" for share in self.explorer_shares)
        return (
            f"{head}: {self.reason}\n  {self.num} draws after {self.num_steps} steps, ESS {self.ess:.0f}, acceptance "
            f"{self.accept_prob:.2f}, R-hat {self.r_hat:.3f}, disagreement of starts {self.disagreement:.1f} standard "
            f"errors\n  log p(x) {self.log_prior:.1f}, log p(y | x) {self.log_likelihood:.1f}, drift {self.drift:+.2f} "
            f"sd; shares of lobes {lobes} (explorers: {theirs})"
        )


def unfinished(num: int) -> PathCertificate:
    """Make the certificate of draws without a finish: they are biased, and nothing was checked."""
    reason = "unfinished: guided draws are biased, and have no weights. Use a `finish`"
    return PathCertificate(False, reason, num)


def certify_paths(trace: Trace, num: int, num_steps: int, accept_prob: float, explorers: str) -> PathCertificate:
    """Judge chains by what they saw in the second half of the finish.

    Args:
        trace: what every chain saw: log p(x), log p(y | x), numbers of the path.
        num: how many chains, the first ones, have the starts in question; the others are explorers.
        num_steps: steps of the finish.
        accept_prob: mean acceptance probability.
        explorers: what the explorers are, in words.

    Returns:
        A certificate. It refuses if

        - a number is not finite;
        - R-hat is above 1.2 within a lobe: chains from one start have not met the others;
        - means from the starts and from the explorers are more than four standard errors apart;
        - the log density still drifts, by more than a quarter of its standard deviation and four standard errors;
        - the finish does not move between lobes, and shares of the lobes among the starts and among the explorers may
          differ by more than 0.1: the starts disagree, or are too few to tell.

    Exactness: as for `PathCertificate`.

    References: Gelman and Rubin 1992 (R-hat); Margossian et al. 2024, Bayesian Analysis (many short chains).
    """
    trace = np.asarray(trace, np.float64)
    ours = np.arange(len(trace)) < num
    if not np.isfinite(trace).all():
        bad = int((~np.isfinite(trace)).any(axis=(1, 2)).sum())
        reason = f"{bad} of {len(trace)} chains have densities that are not finite"
        return PathCertificate(False, reason, num, num_steps, accept_prob=accept_prob)
    labels = find_lobes(trace)
    names = np.unique(labels)
    r_hat = max(float(_r_hat(trace[labels == name]).max()) for name in names)
    means = trace.mean(axis=1)
    disagreement = max(_distance(means[ours & (labels == n)], means[~ours & (labels == n)]) for n in names)
    drift, drift_error = _drift(trace[..., :2].sum(-1))
    mine, theirs = (np.array([(labels[which] == name).mean() for name in names]) for which in (ours, ~ours))
    faults = []
    if not r_hat <= MAX_R_HAT:
        faults.append(f"R-hat {r_hat:.2f} > {MAX_R_HAT}: the finish was too short")
    if not disagreement <= MAX_Z:
        faults.append(f"draws and {explorers} disagree by {disagreement:.1f} standard errors")
    if abs(drift) > MAX_DRIFT and abs(drift) > MAX_Z * drift_error:
        faults.append(f"the log density still drifts, by {drift:+.2f} standard deviations")
    faults += _share_faults(mine, theirs, num, len(trace) - num)
    lobes = f"; {len(names)} lobes, with shares on which the starts agree" if len(names) > 1 else ""
    reason = "; ".join(faults) or f"draws and {explorers} agree after {num_steps} steps{lobes}"
    return PathCertificate(
        not faults, reason, num, num_steps, _ess(trace[ours]), accept_prob, r_hat, disagreement, drift,
        tuple(mine.tolist()), tuple(theirs.tolist()), *np.median(trace[ours][..., :2], axis=(0, 1)).tolist(),
    )  # fmt: skip


def find_lobes(trace: Trace) -> Int[np.ndarray, " chains"]:
    """Number the lobes of the chains: sets of chains, far from each other, that do not mix.

    A set whose R-hat is above the limit is cut in two at the widest gap along the main direction of its chains'
    means, if that is wide; and so on.

    >>> walls = np.repeat([[-9.0], [9.0]], 20, axis=0)[:, None] + np.random.default_rng(0).normal(size=(40, 30, 1))
    >>> np.bincount(find_lobes(walls)).tolist()
    [20, 20]
    """
    labels = np.zeros(len(trace), int)
    waiting = [0]
    while waiting and labels.max() < MAX_LOBES - 1:
        name = waiting.pop()
        rows = np.flatnonzero(labels == name)
        upper = _halves(trace[rows]) if _r_hat(trace[rows]).max() > MAX_R_HAT else np.zeros(len(rows), bool)
        if upper.any():
            labels[rows[upper]] = labels.max() + 1
            waiting += [name, int(labels.max())]
    return labels


def _halves(trace: Trace) -> np.ndarray:
    """Flag one of two sets of chains with a gap between them; none where there is no gap."""
    if len(trace) < 2 * MIN_LOBE:
        return np.zeros(len(trace), bool)
    spread = np.sqrt(trace.var(axis=1).mean(axis=0)) + 1e-300
    means = (trace.mean(axis=1) - trace.mean(axis=(0, 1))) / spread
    scores = means @ np.linalg.svd(means, full_matrices=False)[2][0]
    line = np.sort(scores)
    gaps = np.diff(line)[MIN_LOBE - 1 : len(line) - MIN_LOBE]
    cut = int(np.argmax(gaps))
    return (scores > line[cut + MIN_LOBE - 1]) & (gaps[cut] > MIN_GAP)


def _r_hat(trace: Trace) -> Float[np.ndarray, " seen"]:
    """Compute R-hat of everything that chains saw."""
    within = trace.var(axis=1, ddof=1).mean(axis=0)
    between = trace.mean(axis=1).var(axis=0, ddof=1) if len(trace) > 1 else 0.0
    return np.sqrt(1 - 1 / trace.shape[1] + between / np.maximum(within, 1e-300))


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Compute the largest distance of two means over chains, in standard errors; 0 where one set has too few."""
    if min(len(one), len(other)) < MIN_LOBE:
        return 0.0
    error = np.sqrt(one.var(axis=0, ddof=1) / len(one) + other.var(axis=0, ddof=1) / len(other))
    return float((np.abs(one.mean(axis=0) - other.mean(axis=0)) / np.maximum(error, 1e-300)).max())


def _drift(log_density: Float[np.ndarray, "chains steps"]) -> tuple[float, float]:
    """Compute the change of the mean from the first to the second half, and its error, in standard deviations."""
    half = log_density.shape[1] // 2
    change = log_density[:, half : 2 * half].mean(axis=1) - log_density[:, :half].mean(axis=1)
    sd = max(float(log_density.std()), 1e-300)
    return float(change.mean()) / sd, float(change.std(ddof=1)) / math.sqrt(len(change)) / sd


def _ess(trace: Trace) -> float:
    """Compute the effective number of draws: variance of one over that of the mean, from independent chains."""
    means = trace.mean(axis=1)
    share = trace.var(axis=(0, 1)) / np.maximum(means.var(axis=0, ddof=1), 1e-300)
    return float(len(trace) * share.min())


def _share_faults(mine: np.ndarray, theirs: np.ndarray, num: int, num_explorers: int) -> list[str]:
    if len(mine) < 2:
        return []
    variance = mine * (1 - mine) / num + theirs * (1 - theirs) / num_explorers
    worst = np.abs(mine - theirs) + 1.64 * np.sqrt(variance)
    which = int(np.argmax(worst))
    if worst[which] <= MAX_SHARE_ERROR:
        return []
    told = (
        f"the finish does not move between {len(mine)} lobes, and their shares are uncertain: one has "
        f"{mine[which]:.2f} of {num} draws, {theirs[which]:.2f} of {num_explorers} explorers. Use more draws and "
        "explorers, or `ParticleGibbs`"
    )
    return [told]
