"""Normalising: the change of variables that makes funnels and heavy tails look like a normal density."""

import numpy as np
from jaxtyping import Array, Float

from scoreinfer.bijections.asinh import Tails, fit_tails
from scoreinfer.bijections.base import Chain, pull
from scoreinfer.bijections.noncentring import fit_scales


def fit_shape(values: Float[Array, "num dim"], gradient: Float[Array, "num dim"]) -> Chain:
    """Fit the map w -> z that first bends the tails, by `Tails`, and then scales coordinates by others, by `Scales`.

    From z to w, scales are undone first; the tails are fitted to what is left.

    Args:
        values: draws.
        gradient: gradient of their log density.
    """
    scales = fit_scales(values, gradient)
    w = scales.inverse(values)
    return Chain((fit_tails(w, pull(scales, w, gradient)), scales))


def has_tails(chain: Chain) -> bool:
    """Tell whether heavy tails were found, that is, whether any coordinate is bent."""
    return any(bool((np.asarray(change.bend) > 0).any()) for change in chain.changes if isinstance(change, Tails))
