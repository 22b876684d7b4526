"""Conditioning: a NumPyro kernel as a function from a data set to draws. It is compiled once for all data sets."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from numpyro.handlers import condition
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from scoreinfer._typing import Key, Sites
from scoreinfer.mcmc.langevin import AbstractLangevin
from scoreinfer.mcmc.score_sde import ScoreSDE
from scoreinfer.problem import Problem


def is_kernel(thing: Any) -> bool:
    """Say whether an object is a NumPyro kernel."""
    return isinstance(thing, MCMCKernel)


def chain_sampler(
    kernel: MCMCKernel,
    problem: Problem,
    args: tuple,
    kwargs: dict[str, Any],
    num_warmup: int,
    num_draws: int,
    thinning: int,
) -> Callable[[Key, Sites], Sites]:
    """Make the function from a key and the observed sites to constrained draws of one chain.

    Args:
        kernel: a kernel with a ``model``, or a `ScoreSDE` with a fitted posterior.
        problem: the problem of the model.
        args: arguments of the model.
        kwargs: keyword arguments of the model.
        num_warmup: number of warm-up steps.
        num_draws: number of kept draws.
        thinning: steps between two kept draws.

    Raises:
        ValueError: if the kernel has no model (a bare density has no data), or if it runs another kernel.

    Exactness: the same as the kernel's.
    """
    kernel, learns = _open_to_data(kernel, problem, args, kwargs)

    def run(key: Key, y: Sites) -> Sites:
        mcmc = MCMC(
            kernel, num_warmup=num_warmup, num_samples=num_draws * thinning, thinning=thinning, progress_bar=False
        )
        mcmc.run(key, y)
        return mcmc.get_samples()

    return run if learns else jax.jit(run)


def _open_to_data(kernel: MCMCKernel, problem: Problem, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Copy a kernel so that its only argument is the dictionary of observed sites.

    Returns:
        The copy, and whether it learns the posterior of each data set.
    """
    opened = dataclasses.replace(problem, read=lambda args, kwargs: args[0], recipe=None)
    kernel = copy.copy(kernel)
    if isinstance(kernel, ScoreSDE) and any(fit.evidence is None for fit in kernel._fits):
        kernel._fits = [fit._replace(problem=opened) for fit in kernel._fits]
        kernel._sample_fn, kernel.model = None, None
        return kernel, False
    model = kernel.model
    if model is None:
        raise ValueError(
            f"Expected a kernel with a model, because calibration runs it on many data sets; this "
            f"{type(kernel).__name__} has no `model`. Make the kernel from a model, or pass the fitted posterior."
        )

    def conditioned(y: Sites) -> Any:
        return condition(model, data=y)(*args, **kwargs)

    if isinstance(kernel, ScoreSDE):  # it learns the posterior from the data, so these cannot be traced
        kernel = kernel.wrap_model(lambda _: conditioned)
        kernel._is_block = False
        return kernel, True
    if isinstance(kernel, AbstractLangevin):  # give it the problem: then it does not read the model in a trace
        kernel._problems = [opened]
    if hasattr(kernel, "inner_kernel"):
        raise ValueError(
            f"Expected a kernel that can be given other data, got a {type(kernel).__name__}: it runs another kernel "
            "on its own model. Calibrate that kernel instead."
        )
    setattr(kernel, "_model" if hasattr(kernel, "_model") else "model", conditioned)
    for made in ("_init_fn", "_sample_fn", "_potential_fn_gen", "_postprocess_fn"):  # of an earlier run, for other data
        if hasattr(kernel, made):
            setattr(kernel, made, None)
    return kernel, False
