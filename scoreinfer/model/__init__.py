"""Reading a NumPyro model: from a model and its arguments to a `Problem`.

A model is replayed, never rewritten. Every function of the `Problem` runs the user's model once under three
handlers, from the inside out:

- `Open` makes the observed sites sampled ones (also inside ``scan``), so that data in the arguments are not seen;
- ``seed`` gives every site without a value a key;
- ``substitute`` puts in latent values, through the bijector of the site's own support, and observations.

What a model does with its sites (which supports move, which terms depend on the data, which masks are fixed) is
not guessed from its code but measured, on a few joint draws with a fixed key, when the problem is made.

Arguments are closed over as they are: only keys, ``z`` and ``y`` are traced.
"""

from collections.abc import Callable
from typing import Any

from scoreinfer.model.arguments import bind
from scoreinfer.model.assembly import read_problem
from scoreinfer.model.likelihood import read_likelihood
from scoreinfer.model.path import PhysicsPath
from scoreinfer.model.physics import NoisyEnd, Unknowns, noisy_end, read_physics, sees_path, unknowns
from scoreinfer.model.report import Report, check
from scoreinfer.problem import Problem

__all__ = [
    "NoisyEnd",
    "PhysicsPath",
    "Report",
    "Unknowns",
    "check",
    "from_numpyro",
    "noisy_end",
    "problem_of",
    "read_likelihood",
    "read_physics",
    "sees_path",
    "unknowns",
]


def from_numpyro(model: Callable[..., Any], *args: Any, observed: Any = None, **kwargs: Any) -> Problem:
    """Read a NumPyro model as a `Problem`: pure functions on one flat unconstrained vector ``z``.

    ``model(t)`` and ``model(t, y=data)`` give the same problem. When the arguments hold data, the observed sites
    are those that NumPyro sees as observed. When nothing is observed, arguments that are None are filled to see
    which sites they feed.

    Sites of ``numpyro.factor`` count as likelihood. ``log_prior + log_likelihood`` is minus NumPyro's potential
    energy. Entries of an observation that a fixed mask removes hold the same constant in simulations and in what
    ``read`` returns, so nothing is learned from them.

    Args:
        model: any callable with NumPyro primitives, handlers around it included.
        *args: the model's arguments, with or without data.
        observed: tuple of names of the observed sites, for models where this cannot be seen. (A model's own parameter
            of this name works: anything but a tuple or list of strings is passed on to it.)
        **kwargs: the model's keyword arguments.

    Returns:
        The problem.

    Raises:
        UnsupportedModel: with every offending site and the way out.
        ValueError: when the data in the arguments do not fit the model.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(y=None):
        ...     rate = numpyro.sample("rate", dist.Exponential(1.0))
        ...     numpyro.sample("y", dist.Poisson(rate), obs=y)
        >>> problem = from_numpyro(model)
        >>> problem.dim, problem.observed[0].name
        (1, 'y')
        >>> float(problem.log_joint(jnp.zeros(1), problem.read((), {"y": 0})))
        -2.0
    """
    return read_problem(model, *bind(model, args, kwargs, observed))


def problem_of(
    model: Callable[..., Any] | Problem, args: tuple, kwargs: dict[str, Any], observed: tuple[str, ...] | None = None
) -> Problem:
    """Read a model with these arguments, or take the problem that it is.

    Raises:
        TypeError: where arguments are given beside a problem, which has been read already.
    """
    if not isinstance(model, Problem):
        return read_problem(model, *bind(model, args, kwargs, observed))
    if args or kwargs:
        given = ", ".join([*map(repr, args), *kwargs])
        raise TypeError(f"Expected no arguments beside a `Problem`, which has been read with its own; got {given}.")
    return model
