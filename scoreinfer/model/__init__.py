"""Reading a NumPyro model: from a model and its arguments to a `Problem`.

The model's code is never rewritten. Every function of the `Problem` runs the model once under three handlers, from
the inside out:

- `Open` turns observed sites into sampled sites (also inside ``scan``). So data in the arguments are ignored.
- ``seed`` gives a random key to every site without a value.
- ``substitute`` sets the observations, and the latent values through the bijector of each site's own support.

Some properties of a model are measured, on a few joint draws with a fixed key, when the problem is made: which
supports depend on other sites, which terms depend on the data, and which masks are fixed.

The model's arguments are constants. Only keys, ``z`` and ``y`` are traced.
"""

from collections.abc import Callable
from typing import Any

from scoreinfer.model.assembly import read_problem
from scoreinfer.model.designs import Designs, with_designs
from scoreinfer.model.likelihood import read_likelihood
from scoreinfer.model.path import PhysicsPath
from scoreinfer.model.physics import NoisyEnd, Unknowns, noisy_end, read_physics, sees_path, unknowns
from scoreinfer.model.report import Report, check
from scoreinfer.model.score_prior import ScorePrior, score_prior
from scoreinfer.model.seen import Seen, read_seen
from scoreinfer.model.states import StateSpace
from scoreinfer.problem import Problem

__all__ = [
    "Designs",
    "NoisyEnd",
    "PhysicsPath",
    "Report",
    "ScorePrior",
    "Seen",
    "StateSpace",
    "Unknowns",
    "check",
    "from_numpyro",
    "noisy_end",
    "problem_of",
    "read_likelihood",
    "read_physics",
    "read_seen",
    "score_prior",
    "sees_path",
    "unknowns",
]


def from_numpyro(
    model: Callable[..., Any],
    *args: Any,
    observed: Any = None,
    designs: Designs | None = None,
    missing: tuple[str, ...] = (),
    **kwargs: Any,
) -> Problem:
    """Read a NumPyro model as a `Problem`: pure functions on one flat unconstrained vector ``z``.

    ``model(t)`` and ``model(t, y=data)`` give the same problem. If the arguments hold data, the observed sites are
    those that NumPyro observes. If no site is observed, every argument that is None is replaced by test data, to find
    the sites that receive it.

    ``log_prior + log_likelihood`` is minus NumPyro's potential energy. Sites of ``numpyro.factor`` belong to the
    likelihood. Where a fixed mask removes entries of an observation, simulations and ``read`` put the same constant,
    so a sampler learns nothing from these entries.

    Args:
        model: any callable with NumPyro primitives, with or without handlers around it.
        *args: the model's arguments, with or without data.
        observed: tuple or list of the names of the observed sites. None means they are found as above. If the model
            itself has a parameter ``observed``, any other value is passed on to the model.
        designs: draws those arguments of the model that differ from data set to data set (masks, times, covariates),
            as a dictionary of arrays, from a key. They may be left out of the arguments here.
        missing: names of observed sites in whose data NaN stands for a missing entry. ``designs`` then gives, under
            these names, which entries are there.
        **kwargs: the model's keyword arguments.

    Returns:
        The problem.

    Raises:
        UnsupportedModel: if the model cannot be read. The message names every such site and what to write instead.
        ValueError: if the data in the arguments do not fit the model.
        TypeError: if ``observed`` is no tuple of names and the model has no such parameter, or the arguments do not
            fit the model's signature.

    Exactness: the densities are those of the model. The simulations are exact draws of its sample sites.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(y=None):
        ...     rate = numpyro.sample("rate", dist.Exponential(1.0))
        ...     numpyro.sample("y", dist.Poisson(rate), obs=y)
        >>> problem = from_numpyro(model)
        >>> problem.dim, problem.observed[0].name
        (1, 'y')
        >>> float(problem.log_joint(jnp.zeros(1), problem.read((), {"y": 0})))
        -2.0

        With designs, a posterior is learned for any of them:

        >>> def masked(present, y=None):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0).expand([3]).mask(present), obs=y)
        >>> problem = from_numpyro(masked, designs=lambda key: {"present": jax.random.bernoulli(key, 0.5, (3,))})
        >>> y = problem.read((jnp.array([True, False, False]),), {"y": jnp.array([0.0, 1.0, jnp.nan])})
        >>> round(float(problem.log_likelihood(jnp.zeros(1), y)), 3)
        -0.919
    """
    return problem_of(model, args, kwargs, observed, designs, missing)


def problem_of(
    model: Callable[..., Any] | Problem,
    args: tuple,
    kwargs: dict[str, Any],
    observed: Any = None,
    designs: Designs | None = None,
    missing: tuple[str, ...] = (),
) -> Problem:
    """Read a model with these arguments, or return a problem unchanged.

    Raises:
        TypeError: if arguments are given together with a problem, or do not fit the model's signature.
        UnsupportedModel: if the model cannot be read.
        ValueError: if the data in the arguments do not fit the model.
    """
    if not isinstance(model, Problem):
        return read_problem(*with_designs(model, args, kwargs, observed, designs, missing))
    if args or kwargs or designs is not None:
        given = ", ".join([*map(repr, args), *kwargs, *(["designs"] if designs is not None else [])])
        raise TypeError(
            f"Expected no arguments together with a `Problem`, got {given}. A `Problem` contains its arguments. Leave "
            "them out, or pass the model itself."
        )
    return model
