"""Tests of the uniformity of ranks: a p-value, and the direction of the deviation in words."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Integer

MAX_BINS = 20
"""Largest number of bins of the chi-squared test. Chosen by judgement."""
MIN_EXPECTED = 5
"""Least expected count in a bin of the chi-squared test: the usual rule of thumb."""
NOTABLE = 3.0
"""Deviation of the ranks' mean or spread, in standard errors, above which it is put into words. Judgement."""


class RankTest(NamedTuple):
    """The test of the ranks of one quantity.

    Args:
        name: the quantity: a component of a site, ``log_joint`` or ``tarp``.
        p_value: p-value of the chi-squared test that the ranks are uniform.
        finding: direction of the deviation in words. Empty if there is no clear direction.
        coverage: share of true parameters inside the central 50 %, 80 % and 95 % intervals. For ``log_joint``: inside
            regions of highest density. For ``tarp``: inside balls around a reference point.
    """

    name: str
    p_value: float
    finding: str
    coverage: tuple[float, float, float]


LEVELS = (0.5, 0.8, 0.95)
"""Nominal levels of the reported coverage. Chosen by judgement."""


def rank_test(name: str, ranks: Integer[np.ndarray, " num"], num_draws: int, kind: str = "") -> RankTest:
    """Test the ranks of one quantity among ``num_draws`` draws.

    Args:
        name: label of the quantity.
        ranks: the ranks, from 0 to ``num_draws``.
        num_draws: number of draws for each rank.
        kind: ``log_joint``, ``tarp``, or empty for a component of a site. For a component, low and high ranks are both
            far from the centre. For the other two, only one direction is.

    Raises:
        ValueError: if there are too few ranks for two bins.

    Exactness: the p-value is asymptotic in the number of ranks.

    >>> rank_test("a", np.arange(1000) % 100, 99).p_value
    1.0
    >>> rank_test("a", 40 + np.arange(1000) % 20, 99).finding
    'too wide'
    """
    position = (ranks + 0.5) / (num_draws + 1)
    outwards = {"": np.abs(2 * position - 1), "log_joint": 1 - position, "tarp": position}[kind]
    half, most, nearly_all = (float(np.mean(outwards <= level)) for level in LEVELS)
    finding = _joint_finding(outwards) if kind else _finding(position)
    return RankTest(name, chi_squared_p(ranks, num_draws), finding, (half, most, nearly_all))


def chi_squared_p(ranks: Integer[np.ndarray, " num"], num_draws: int) -> float:
    """Compute the p-value of the chi-squared test that ranks 0 to ``num_draws`` are equally frequent.

    Ranks are counted in at most 20 bins of equal size.

    Raises:
        ValueError: if there are too few ranks for two bins, or ``num_draws + 1`` has no suitable divisor.

    Exactness: asymptotic in the number of ranks.
    """
    most = min(MAX_BINS, len(ranks) // MIN_EXPECTED)
    bins = max((size for size in range(1, most + 1) if (num_draws + 1) % size == 0), default=1)
    if bins < 2:
        raise ValueError(
            f"Expected at least {2 * MIN_EXPECTED} simulations, and a number of draws such as 63 or 99, for which "
            f"draws + 1 has small divisors; got {len(ranks)} simulations and {num_draws} draws. Change "
            "`num_simulations` or `num_draws`."
        )
    counts = np.bincount(ranks * bins // (num_draws + 1), minlength=bins)
    expected = len(ranks) / bins
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(jax.scipy.special.gammaincc((bins - 1) / 2, statistic / 2))


def _finding(position: Float[np.ndarray, " num"]) -> str:
    num = len(position)
    shift = (position.mean() - 0.5) / np.sqrt(1 / 12 / num)
    spread = (((position - 0.5) ** 2).mean() - 1 / 12) / np.sqrt(1 / 180 / num)
    words = []
    if abs(shift) > NOTABLE:
        words.append("too low" if shift > 0 else "too high")
    if abs(spread) > NOTABLE:
        words.append("too narrow" if spread > 0 else "too wide")
    return ", ".join(words)


def _joint_finding(outwards: Float[np.ndarray, " num"]) -> str:
    shift = (outwards.mean() - 0.5) / np.sqrt(1 / 12 / len(outwards))
    if abs(shift) <= NOTABLE:
        return ""
    return "true parameters lie too far out" if shift > 0 else "true parameters lie too far in"
