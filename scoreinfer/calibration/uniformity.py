"""Uniformity: how far ranks are from uniform, as a p-value and in words."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Integer

MAX_BINS = 20
MIN_EXPECTED = 5
"""Least expected count of a bin of the chi-squared test."""
NOTABLE = 3.0
"""Standard errors beyond which the mean or the spread of ranks is put into words."""


class RankTest(NamedTuple):
    """What the ranks of one quantity say.

    Args:
        name: the quantity: a component of a site, ``log_joint`` or ``tarp``.
        p_value: of the chi-squared test that ranks are uniform.
        finding: the direction of the misfit in words, empty where nothing stands out.
        coverage: share of truths inside the central 50 %, 80 % and 95 % intervals (of ``log_joint``: inside the
            regions of highest density; of ``tarp``: inside balls around a reference point).
    """

    name: str
    p_value: float
    finding: str
    coverage: tuple[float, float, float]


LEVELS = (0.5, 0.8, 0.95)


def rank_test(name: str, ranks: Integer[np.ndarray, " num"], num_draws: int, kind: str = "") -> RankTest:
    """Test the ranks of one quantity among ``num_draws`` draws.

    ``kind`` is ``log_joint`` or ``tarp`` for the ranks of these, where only one direction is outwards.

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

    Ranks are gathered in at most 20 bins of equal size.

    Raises:
        ValueError: where there are too few ranks for two bins.
    """
    most = min(MAX_BINS, len(ranks) // MIN_EXPECTED)
    bins = max((size for size in range(1, most + 1) if (num_draws + 1) % size == 0), default=1)
    if bins < 2:
        raise ValueError(
            f"Expected at least {2 * MIN_EXPECTED} simulations, and a number of draws that is one less than a multiple "
            f"of a small number (63, 99); got {len(ranks)} simulations and {num_draws} draws."
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
    return "truths lie too far out" if shift > 0 else "truths lie too far in"
