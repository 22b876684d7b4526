"""Classifier two-sample test as the sbibm benchmark defines it.

References:
    Lopez-Paz & Oquab (2017), arXiv:1610.06545; Lueckmann et al. (2021), arXiv:2101.04653, `sbibm/metrics/c2st.py`.
"""

import numpy as np
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier


def c2st(reference: np.ndarray, draws: np.ndarray, seed: int = 1, num_folds: int = 5) -> float:
    """Compute how well a classifier tells draws from reference draws: 0.5 not at all, 1 always.

    Both samples are standardised by mean and sd of the reference; the classifier has two hidden layers of ten ReLU
    units per dimension; the score is the mean accuracy over shuffled folds.

    Args:
        reference: draws that are right, one a row.
        draws: as many draws to be judged.
        seed: of the classifier and of the folds.
        num_folds: number of folds of the cross-validation.

    Returns:
        The accuracy.

    Exactness: with 10,000 draws on each side, equal samples score 0.5 with a standard deviation of about 0.004.
    """
    mean, sd = reference.mean(axis=0), reference.std(axis=0, ddof=1)
    data = (np.concatenate([reference, draws]) - mean) / sd
    target = np.concatenate([np.zeros(len(reference)), np.ones(len(draws))])
    width = 10 * reference.shape[1]
    classifier = MLPClassifier(
        activation="relu", hidden_layer_sizes=(width, width), max_iter=10_000, solver="adam", random_state=seed
    )
    folds = KFold(n_splits=num_folds, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, data, target, cv=folds, scoring="accuracy").mean())
