"""Conditioning: any NumPyro kernel as a function from a data set to draws, compiled once for all of them."""

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
    """Say whether something is a NumPyro kernel."""
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
        problem: the problem of the model at hand.
        args: the model's own arguments.
        kwargs: its own keyword arguments.
        num_warmup: warm-up steps.
        num_draws: draws that are kept.
        thinning: steps between two of them.

    Raises:
        ValueError: for a kernel of a bare density, which has no data to be given, and for one around another kernel.

    Exactness: that of the kernel.
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
    """Copy a kernel so that its only argument is the dictionary of observed sites; say whether it learns from it."""
    opened = dataclasses.replace(problem, read=lambda args, kwargs: args[0], recipe=None)
    kernel = copy.copy(kernel)
    if isinstance(kernel, ScoreSDE) and any(fit.evidence is None for fit in kernel._fits):
        kernel._fits = [fit._replace(problem=opened, arguments=None) for fit in kernel._fits]
        kernel._sample_fn, kernel.model = None, None
        return kernel, False
    model = kernel.model
    if model is None:
        raise ValueError(
            f"Calibration gives a kernel many data sets, and this {type(kernel).__name__} has no `model` to give them "
            "to. Make the kernel from a model, or pass the fitted posterior itself."
        )

    def conditioned(y: Sites) -> Any:
        return condition(model, data=y)(*args, **kwargs)

    if isinstance(kernel, ScoreSDE):  # learns this posterior from its data, which it has to see
        kernel = kernel.wrap_model(lambda _: conditioned)
        kernel._is_block = False
        return kernel, True
    if isinstance(kernel, AbstractLangevin):  # has its problem, and need not read the model while it is traced
        kernel._problems = [opened]
    if hasattr(kernel, "inner_kernel"):
        raise ValueError(
            f"A {type(kernel).__name__} runs another kernel on a model of its own, to which no other data can be "
            "given. Calibrate that kernel instead."
        )
    setattr(kernel, "_model" if hasattr(kernel, "_model") else "model", conditioned)
    for made in ("_init_fn", "_sample_fn", "_potential_fn_gen", "_postprocess_fn"):  # by an earlier run, for its data
        if hasattr(kernel, made):
            setattr(kernel, made, None)
    return kernel, False
