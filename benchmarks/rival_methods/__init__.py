"""One module for each sampler of `rivals.py`.

Each has ``SETTINGS``, those ``TUNED`` to single targets where there are any, and ``prepare(target)``, which returns a
function from a seed to an `Outcome`. That function is called twice, cold and warm. The setting ``scales`` widens the
Gaussian that covers a bare density (`rival_targets`): the funnel's mouth is wider than what scoreinfer is told.
"""

from typing import NamedTuple

import numpy as np
from measure import Times


class Outcome(NamedTuple):
    """What a sampler returns.

    Args:
        draws: constrained values, one row a draw.
        weights: the draws' weights; None: equal.
        log_evidence: log of the normalising constant, where the method estimates it.
        num_evaluations: evaluations of the density, with or without gradient, where the method tells.
        chains: the same draws by chain, where there are chains.
        certifying: what the certificate cost (part of the run's seconds).
        extra: further figures of the row.
    """

    draws: np.ndarray
    weights: np.ndarray | None = None
    log_evidence: float | None = None
    num_evaluations: float | None = None
    chains: np.ndarray | None = None
    certifying: Times | None = None
    extra: dict | None = None


WIDE_FUNNEL = [5.0] + 9 * [40.0]
"""Standard deviations that cover the funnel in ten dimensions."""
