r"""Power scaling: how much a posterior depends on its prior and on its likelihood.

The prior or the likelihood is raised to a power a near one, by weights of the same draws:

    prior:       w_a(z) = w(z) p(theta)^(a - 1),        likelihood:       w_a(z) = w(z) p(y | z)^(a - 1).

With F and F_a the distribution functions of one parameter without and with these weights, the sensitivity is

    (D(F, F_a) + D(F, F_(1/a))) / (2 log2 a),

where D is the cumulative Jensen-Shannon distance, normalised to lie between 0 and 1.

References: Kallioinen, Paananen, Buerkner and Vehtari 2024, "Detecting and diagnosing prior and likelihood sensitivity
with power-scaling", Statistics and Computing 34(57), arXiv 2107.14054 (weights: equation 6; distance: section 3.3;
threshold: section 3.4). Nguyen and Vreeken 2015, "Non-parametric Jensen-Shannon divergence" (the distance).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices
from scoreinfer._tree import own_broadcasting
from scoreinfer._typing import Sites
from scoreinfer.draws import Draws
from scoreinfer.montecarlo.weights import pareto_smooth
from scoreinfer.problem import NO_PROBLEM, Problem

SENSITIVE = 0.05
"""Sensitivity from which the paper calls a posterior sensitive (section 3.4)."""
BATCH = 1024
"""Draws that are evaluated at once. Chosen by judgement."""


class Sensitivity(NamedTuple):
    """Sensitivities of every component of the latent sites.

    Args:
        prior: sensitivities to the prior by site, in the site's shape.
        likelihood: sensitivities to the likelihood, likewise.
    """

    prior: dict[str, Float[np.ndarray, "..."]]
    likelihood: dict[str, Float[np.ndarray, "..."]]

    def __str__(self) -> str:
        lines = [f"{'':24s}{'prior':>8s}{'likelihood':>12s}  diagnosis"]
        for site, prior in self.prior.items():
            for index in np.ndindex(prior.shape):
                of_prior, of_likelihood = float(prior[index]), float(self.likelihood[site][index])
                name = site + (f"[{', '.join(map(str, index))}]" if index else "")
                lines.append(f"{name:24s}{of_prior:8.3f}{of_likelihood:12.3f}  {diagnosis(of_prior, of_likelihood)}")
        return "\n".join(lines)


def diagnosis(prior: float, likelihood: float) -> str:
    """Say what a pair of sensitivities means.

    >>> diagnosis(0.2, 0.1)
    'prior and data may conflict'
    >>> diagnosis(0.2, 0.01)
    'strong prior or weak likelihood'
    """
    if prior < SENSITIVE:
        return "the prior matters little"
    return "prior and data may conflict" if likelihood >= SENSITIVE else "strong prior or weak likelihood"


@own_broadcasting
def sensitivity(draws: Draws, *, power: float = 1.01) -> Sensitivity:
    """Compute how sensitive a posterior is to its prior and to its likelihood, by power scaling.

    Nothing is drawn or fitted again. ArviZ 1.x computes the same from ``to_arviz(..., log_prior=True,
    log_likelihood=True)`` by ``arviz.psense_summary``.

    Args:
        draws: weighted draws of a model with a density.
        power: the power; its inverse is used too.

    Returns:
        The sensitivities. From .05 on a posterior counts as sensitive.

    Raises:
        ValueError: if the draws hold no problem or no weights, or ``power`` is not greater than one.

    Exactness: consistent as the number of draws grows, up to the finite difference in ``power``.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from scoreinfer import from_numpyro
        >>> problem = from_numpyro(lambda: numpyro.sample("a", dist.Normal(0.0, 1.0)))  # a prior and no data
        >>> z = jax.random.normal(jax.random.key(0), (1000, 1))
        >>> log_joint = jax.vmap(lambda z: problem.log_joint(z, {}))(z)
        >>> draws = Draws({"a": z[:, 0]}, z, 0 * log_joint, log_joint, log_joint, {}, problem=problem)
        >>> found = sensitivity(draws)
        >>> float(found.prior["a"]) > 0.05, float(found.likelihood["a"])
        (True, 0.0)
    """
    if not power > 1.0:
        raise ValueError(f"`power` must be greater than 1, got {power}.")
    problem = draws.problem
    if problem is None or problem.site_log_prior is None or draws.log_weight is None:
        raise ValueError(f"Expected weighted draws of a NumPyro model with a density, got others: {NO_PROBLEM}.")
    terms, log_likelihood = _log_terms(problem, draws.unconstrained, draws.observed)
    log_prior = sum(np.asarray(term, np.float64).reshape(draws.num, -1).sum(1) for term in terms.values())
    parts = {"prior": log_prior, "likelihood": np.asarray(log_likelihood, np.float64)}
    latent = {site.name: np.asarray(draws.sites[site.name], np.float64) for site in problem.latents}
    found = {name: _of_sites(latent, np.asarray(draws.log_weight, np.float64), log_part, power)
             for name, log_part in parts.items()}  # fmt: skip
    return Sensitivity(**found)


@over_devices
def _log_terms(problem: Problem, z: Float[Array, "num dim"], y: Sites) -> tuple[Sites, Float[Array, " num"]]:
    assert problem.site_log_prior is not None
    site_log_prior = problem.site_log_prior
    return map_rows(lambda z: (site_log_prior(z), problem.log_likelihood(z, y)), BATCH)(z)


def _of_sites(
    latent: dict[str, Float[np.ndarray, "num ..."]],
    log_weight: Float[np.ndarray, " num"],
    log_part: Float[np.ndarray, " num"],
    power: float,
) -> dict[str, Float[np.ndarray, "..."]]:
    """Compute the sensitivities of every component of every site to one part of the density."""
    impossible = log_weight == -np.inf
    log_part = np.where(impossible, 0.0, log_part)
    base = _normalised(log_weight)
    scaled = [_normalised(log_weight + (exponent - 1) * log_part) for exponent in (power, 1 / power)]

    def one(values: Float[np.ndarray, " num"]) -> float:
        return sum(cumulative_distance(values, base, weight) for weight in scaled) / (2 * np.log2(power))

    return {
        name: np.apply_along_axis(one, 0, values.reshape(len(values), -1)).reshape(values.shape[1:])
        for name, values in latent.items()
    }


def _normalised(log_weight: Float[np.ndarray, " num"]) -> Float[np.ndarray, " num"]:
    return np.exp(pareto_smooth(log_weight)[0])


def cumulative_distance(
    values: Float[np.ndarray, " num"], one: Float[np.ndarray, " num"], other: Float[np.ndarray, " num"]
) -> float:
    """Compute the normalised cumulative Jensen-Shannon distance of two weightings of the same values.

    With distribution functions P and Q, and D(P, Q) = int P log2(2 P / (P + Q)) + (Q - P) / (2 ln 2) dx, it is

        sqrt((D(P, Q) + D(Q, P)) / int P + Q dx),

    for x or for -x, whichever is larger.

    >>> x, equal = np.arange(100.0), np.full(100, 0.01)
    >>> cumulative_distance(x, equal, equal)
    0.0
    >>> float(cumulative_distance(x, np.eye(100)[0], np.eye(100)[99]))
    1.0
    """
    return max(_one_sided(values, one, other), _one_sided(-values, one, other))


def _one_sided(
    values: Float[np.ndarray, " num"], one: Float[np.ndarray, " num"], other: Float[np.ndarray, " num"]
) -> float:
    order = np.argsort(values, kind="stable")
    widths = np.diff(values[order])
    p, q = (np.cumsum(weight[order])[:-1] for weight in (one, other))
    bound = widths @ (p + q)
    if bound <= 0.0:
        return 0.0
    divergence = _divergence(p, q, widths) + _divergence(q, p, widths)
    return float(np.sqrt(max(divergence, 0.0) / bound))


def _divergence(
    p: Float[np.ndarray, " bins"], q: Float[np.ndarray, " bins"], widths: Float[np.ndarray, " bins"]
) -> float:
    ratio = np.divide(2 * p, p + q, out=np.ones_like(p), where=p > 0)
    return float(widths @ (p * np.log2(ratio) + (q - p) / (2 * np.log(2))))
