"""Figures of numbers that are not draws: weights, evidence, criteria and training, by matplotlib.

Every function takes axes or makes them, and returns them. Nothing is shown or saved.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

GOOD, BAD, PLAIN = "tab:green", "tab:red", "0.35"
"""Colours of what is inside its limit, of what is not, and of everything else. Chosen by judgement."""
LONGEST = 2.0
"""Longest bar of a criterion, as a multiple of its limit. Chosen by judgement."""
Axes = Any
"""A matplotlib axes, or an array of them. matplotlib is imported inside functions only."""


def row_of_axes(num: int, width: float = 4.2) -> Axes:
    """Make a row of axes in a new figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'scoreinfer[plot]'.") from error
    return plt.subplots(1, num, figsize=(width * num, 3.2), layout="constrained", squeeze=False)[1][0]


def draw_tail(axes: Axes, tail: Sequence[float], num: int, k_hat: float, limit: float) -> None:
    """Draw the largest weights over their mean against their rank, with the power law of their tail.

    A tail of shape k falls as w = c rank^-k: a straight line of slope -k (Vehtari et al. 2024, arXiv 1507.02646).

    Args:
        axes: where to draw.
        tail: log of weight / mean weight, largest first.
        num: number of all weights.
        k_hat: shape of the tail.
        limit: shape from which weights are refused; drawn for comparison.
    """
    rank = np.arange(1, len(tail) + 1)
    axes.loglog(rank, np.exp(tail), ".", color=PLAIN, label="largest weights")
    for shape, colour in ((k_hat, BAD if k_hat >= limit else GOOD), (limit, "0.7")):
        if math.isfinite(shape) and len(tail):
            line = math.exp(tail[-1]) * (rank / rank[-1]) ** -max(shape, 0.0)
            axes.loglog(rank, line, "--" if shape == limit else "-", color=colour, label=f"tail of shape {shape:.2f}")
    axes.set(xlabel=f"rank among {num} weights", ylabel="weight / mean", title=f"k-hat {k_hat:.2f}")
    axes.legend(fontsize="small")


def draw_evidence(axes: Axes, places: Mapping[str, Sequence[float]], unseen: float, missed: float) -> None:
    """Draw the weights of independent points, and the line right of which the proposal never draws.

    Args:
        axes: where to draw.
        places: log of weight / mean weight of the points, by source.
        unseen: log excess from which a point counts as missed.
        missed: share of the points that are missed.
    """
    for source, excess in places.items():
        told = np.sort(np.asarray(excess)[~np.isnan(excess)])
        axes.step(told, np.arange(1, told.size + 1) / max(told.size, 1), where="post", label=f"{told.size} of {source}")
    axes.axvline(unseen, color=BAD, linestyle="--", label="missed, right of here")
    title = "no independent points" if math.isnan(missed) else f"missed share {missed:.3f}"
    axes.set(xlabel="log weight of a point / mean weight", ylabel="share of the points", title=title, ylim=(0, 1.02))
    axes.legend(fontsize="small", loc="lower right")


def draw_criteria(axes: Axes, shares: Mapping[str, float], title: str) -> None:
    """Draw every criterion as a share of its limit: what is right of 1 refuses.

    Args:
        axes: where to draw.
        shares: value / limit by criterion; NaN means that it is not known.
        title: the verdict.
    """
    known = {name: share for name, share in shares.items() if not math.isnan(share)}
    bars = [min(max(share, 0.0), LONGEST) for share in known.values()]
    axes.barh(list(known), bars, color=[GOOD if share < 1 else BAD for share in known.values()])
    axes.axvline(1.0, color="k", linestyle="--")
    axes.set(xlabel="share of the limit", xlim=(0, LONGEST), title=title)
    axes.invert_yaxis()


def draw_losses(axes: Axes, epoch_steps: float, loss: Sequence[float], validation: Sequence[float], name: str) -> None:
    """Draw training and validation loss of one run against its optimiser steps."""
    steps = epoch_steps * np.arange(1, len(loss) + 1)
    (line,) = axes.plot(steps, validation, label=f"{name}, validation")
    axes.plot(steps, loss, ":", color=line.get_color(), label=f"{name}, training")
    axes.set(xlabel="optimiser steps", ylabel="loss")
    axes.legend(fontsize="small")


def draw_shares(axes: Axes, seconds: Sequence[float], shares: Sequence[float], name: str) -> None:
    """Draw the effective shares that the judge of a run saw, against wall time."""
    axes.plot(seconds, shares, "o-", label=name)
    axes.set(xlabel="seconds", ylabel="effective share of exact weights", ylim=(0, 1))
    axes.legend(fontsize="small")
