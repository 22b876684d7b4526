"""Classifier two-sample test: how well a classifier distinguishes posterior draws from reference draws."""

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from scoreinfer._typing import Key

Sample = ArrayLike | Mapping[str, ArrayLike]
"""Draws as an array ``(num, dim)``, or by site with the draw axis first."""


def c2st(
    key: Key,
    reference: ArrayLike | Mapping[str, ArrayLike],
    draws: ArrayLike | Mapping[str, ArrayLike],
    *,
    num_folds: int = 5,
) -> float:
    """Compute the classifier two-sample test of draws against reference draws.

    The result is a mean accuracy over shuffled folds: about 0.5 if the samples have the same distribution, 1 if the
    classifier separates them. The definition is that of sbibm: both samples are standardised by the mean and standard
    deviation of the reference, and the classifier has two hidden layers of ten ReLU units per dimension.

    Args:
        key: random key of the classifier and the folds.
        reference: correct draws: ``(num, dim)``, or by site with the draw axis first.
        draws: draws to be tested, of the same dimension, with equal weights (see `Draws.resample`). Use as many draws
            as the reference has.
        num_folds: number of folds of the cross-validation.

    Returns:
        The accuracy.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if the samples have different dimensions, are not finite, or have fewer draws than folds.

    Exactness: an estimate. With n draws in each sample, equal distributions give 0.5 with a standard deviation of about
        0.4 / sqrt(n).

    References: Lopez-Paz and Oquab 2017, arXiv 1610.06545; Lueckmann et al. 2021, arXiv 2101.04653.
    """
    try:
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise ImportError("`c2st` needs scikit-learn: pip install 'scoreinfer[calibration]'.") from error
    right, judged = _columns(reference), _columns(draws)
    if right.shape[1] != judged.shape[1] or min(len(right), len(judged)) < num_folds:
        raise ValueError(
            f"Expected two samples of the same dimension and at least {num_folds} draws each, got shapes {right.shape} "
            f"and {judged.shape}. Pass the same components of both, or reduce `num_folds`."
        )
    if not (np.isfinite(right).all() and np.isfinite(judged).all()):
        raise ValueError("Expected finite draws, got NaN or infinity. If some weights are zero, resample first.")
    mean, sd = right.mean(axis=0), right.std(axis=0, ddof=1)
    data = (np.concatenate([right, judged]) - mean) / np.where(sd > 0, sd, 1.0)
    target = np.repeat([0, 1], [len(right), len(judged)])
    width, seed = 10 * right.shape[1], int(jax.random.randint(key, (), 0, 2**31 - 1))
    classifier = MLPClassifier(hidden_layer_sizes=(width, width), max_iter=10_000, random_state=seed)
    folds = KFold(n_splits=num_folds, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, data, target, cv=folds, scoring="accuracy").mean())


def _columns(draws: Sample) -> Float[np.ndarray, "num dim"]:
    """Flatten draws to an array ``(num, dim)``. Sites are sorted by name."""
    parts = [draws[name] for name in sorted(draws)] if isinstance(draws, Mapping) else [draws]
    arrays = [np.asarray(part, np.float64) for part in parts]
    return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)
