"""Exact weights of old draws under a changed model.

With log weights log w(z) = log p(z, y) - log q(z) of draws from a density q,

    log w'(z) = log p'(z, y') - log q(z) = log w(z) + log p'(z, y') - log p(z, y).

The prior, the likelihood and the data may change: rows may be added or left out. The latent sites may not.

References: Geyer 1994, "Estimating normalizing constants and reweighting mixtures in MCMC" (weights between
posteriors); Vehtari et al. 2024, arXiv 1507.02646 (k-hat).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._memory import each
from scoreinfer._program import over_devices
from scoreinfer._tree import own_broadcasting
from scoreinfer._typing import Key
from scoreinfer.draws import Draws
from scoreinfer.evidence.certificate import Certificate, ForwardCheck, certify_weights
from scoreinfer.evidence.witnesses import forward_check, gather
from scoreinfer.model import problem_of
from scoreinfer.montecarlo.reference import reference_of
from scoreinfer.montecarlo.weights import log_evidence
from scoreinfer.problem import NO_PROBLEM, Problem
from scoreinfer.samplers.base import Target, Weighted, bounded_target
from scoreinfer.samplers.batches import constrain

COMPARED = 64
"""Draws at which the latent sites of both models are compared. Chosen by judgement."""


class Change(NamedTuple):
    """The posterior that draws come from, and the one that they are wanted for.

    Args:
        old: the posterior of the draws.
        new: the posterior of the changed model.
        before: the draws, weighted for the old posterior.
    """

    old: Target
    new: Target
    before: Weighted


def read_change(draws: Draws, model: Callable[..., Any] | Problem, args: tuple, kwargs: dict[str, Any]) -> Change:
    """Read the changed model, and check that its unconstrained vector means the same.

    Raises:
        ValueError: if the draws hold no problem or no weights, or the latent sites differ.
    """
    if draws.problem is None or draws.log_weight is None or draws.log_joint is None:
        raise ValueError(
            f"Expected weighted draws of a model with a density, got others: {NO_PROBLEM}."
            if draws.problem is None
            else "Expected weighted draws of a model with a density, got draws without weights."
        )
    problem = problem_of(model, args, kwargs)
    if differ := _differing(draws.problem, problem, draws.unconstrained[:COMPARED]):
        raise ValueError(
            "The changed model must have the same latent sites, with the same shapes and supports, as the model of the "
            f"draws; these differ: {', '.join(differ)}. Fit the changed model by itself."
        )
    y = problem.read(() if isinstance(model, Problem) else args, {} if isinstance(model, Problem) else kwargs)
    before = Weighted(draws.unconstrained, draws.log_weight, draws.log_joint)
    return Change(bounded_target(draws.problem, draws.observed), bounded_target(problem, y), before)


def _differing(old: Problem, new: Problem, z: Float[Array, "num dim"]) -> list[str]:
    """Name the latent sites that only one problem has, or whose values at the same z differ."""
    sites = [{site.name: (site.shape, site.size) for site in problem.latents} for problem in (old, new)]
    differ = sorted(name for name in sites[0].keys() | sites[1].keys() if sites[0].get(name) != sites[1].get(name))
    if differ or old.dim != new.dim:
        return differ or [f"{old.dim} and {new.dim} dimensions"]
    ours, theirs = (jax.jit(jax.vmap(problem.latent_sites))(z) for problem in (old, new))
    return [name for name in ours if not np.allclose(ours[name], theirs[name], 1e-4, 1e-6, equal_nan=True)]


@own_broadcasting
def reweigh(key: Key, draws: Draws, model: Callable[..., Any] | Problem, *args: Any, **kwargs: Any) -> Draws:
    """Weigh draws anew for a changed prior, likelihood or data: log w' = log w + log p'(z, y') - log p(z, y).

    The new certificate refuses where the weights have become too uneven (ESS, k-hat), where the old draws were refused,
    or where witnesses of the new posterior lie in places that the old one hardly reaches. Then use `bridge`.

    Args:
        key: random key of the witnesses.
        draws: weighted draws of the old model.
        model: the changed model, with the same latent sites.
        *args: its arguments, with the data.
        **kwargs: its keyword arguments.

    Returns:
        The same draws with new weights, deterministic sites, data and certificate. Their log evidence is that of the
        changed model.

    Raises:
        ValueError: if the draws hold no problem or no weights, the latent sites differ, or the data do not fit.
        UnsupportedModel: if the model cannot be read.

    Exactness: exact importance weights in the same sense as the old ones, where the old density is positive. A place
        that the old model makes impossible keeps weight zero; the witnesses show whether the new one needs it.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from scoreinfer import from_numpyro
        >>> def model(mean, y=None):
        ...     a = numpyro.sample("a", dist.Normal(mean, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0), obs=y)
        >>> old = from_numpyro(model, 0.0, y=1.0)  # its posterior is N(1/2, 1/2)
        >>> z = 0.5 + jnp.sqrt(0.5) * jax.random.normal(jax.random.key(0), (4000, 1))
        >>> log_joint = jax.vmap(lambda z: old.log_joint(z, {"y": jnp.array(1.0)}))(z)
        >>> draws = Draws({"a": z[:, 0]}, z, 0 * log_joint, log_joint, log_joint, {"y": jnp.array(1.0)}, problem=old)
        >>> new = reweigh(jax.random.key(1), draws, model, 0.5, y=1.0)
        >>> new.certificate.certified, abs(float(new.get_samples()["a"].mean()) - 0.75) < 0.05
        (True, True)
    """
    change = read_change(draws, model, args, kwargs)
    problem, (z, old_weight, old_joint) = change.new.problem, change.before
    log_joint = _log_joints(change.new, z)
    log_weight = jnp.where(old_weight == -jnp.inf, -jnp.inf, old_weight + log_joint - old_joint)
    certificate = certify_weights(log_weight, *_check(key, change, Weighted(z, log_weight, log_joint)))
    return draws._replace(
        sites=constrain(problem, z, change.new.y), log_weight=log_weight, log_joint=log_joint, observed=change.new.y,
        certificate=_joined(draws.certificate, certificate), problem=problem,
    )  # fmt: skip


@over_devices
def _log_joints(target: Target, z: Float[Array, "num dim"]) -> Float[Array, " num"]:
    return each(target, target)(z)


def _joined(old: Certificate | None, new: Certificate) -> Certificate:
    """Refuse new weights of draws that were refused: they may miss a part of the old posterior."""
    if old is None or old.certified:
        return new
    return new._replace(certified=False, reason=f"the draws were not certified before ({old.reason}); {new.reason}")


def _check(key: Key, change: Change, drawn: Weighted) -> list[ForwardCheck]:
    """Weigh witnesses of the new posterior with the old one as the proposal: by p'(z, y') / p(z, y) over its mean."""
    if change.new.problem.simulate is None:
        return []
    witnesses = gather(key, reference_of(change.new.problem), change.new)

    def log_ratio(values: Float[np.ndarray, "held dim"]) -> Float[Array, " held"]:
        z = jnp.asarray(values)
        return _log_joints(change.new, z) - _log_joints(change.old, z)

    mean = log_evidence(drawn.log_weight)[0] - log_evidence(change.before.log_weight)[0]
    return [forward_check(drawn, witnesses, log_ratio, mean, "the witnesses of the changed posterior")]
