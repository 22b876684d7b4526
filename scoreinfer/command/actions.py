"""What the commands do: simulate, fit, calibrate, report. Each prints its result and returns an `Exit`."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from scoreinfer.calibration import calibrate as run_calibration
from scoreinfer.command.exits import Exit
from scoreinfer.command.inputs import named_arguments, named_object
from scoreinfer.draws import Draws
from scoreinfer.posterior import NPSE, SMDP
from scoreinfer.simulators import Store, simulate as run_simulations
from scoreinfer.training.loop import INTERRUPTED, TrainingHistory

LEARNING = ("num_simulations", "num_steps", "target_share", "max_seconds", "tune", "checkpoint", "simulations")
"""Options of the command line that are fields of the learners."""


def simulate(arguments: argparse.Namespace) -> Exit:
    """Run a foreign simulator on draws of a prior, and store every result."""
    with _executor(arguments) as executor:
        store = run_simulations(
            jax.random.key(arguments.seed), named_object(arguments.model), named_object(arguments.simulator),
            arguments.num, store=arguments.store, executor=executor, timeout=arguments.timeout,
            retries=arguments.retries,
        )  # fmt: skip
    counts = Counter(store.index().status.tolist())
    print(f"{store.path}: " + ", ".join(f"{count} {status}" for status, count in counts.most_common()))
    return Exit.DONE if counts["ok"] else Exit.REFUSED


def fit(arguments: argparse.Namespace) -> Exit:
    """Learn a posterior and save it."""
    learner = _learner(arguments)
    options = {name: value for name in LEARNING if (value := getattr(arguments, name)) is not None}
    if foreign := options.keys() - {field.name for field in dataclasses.fields(learner)}:
        raise ValueError(f"{type(learner).__name__} has no options {', '.join(sorted(foreign))}. Leave them out.")
    start = time.perf_counter()
    posterior = dataclasses.replace(learner, **options).fit(
        jax.random.key(arguments.seed), **named_arguments(arguments.arguments)
    )
    posterior.save(arguments.output)
    print(f"{posterior.history}\n{arguments.output}: saved after {time.perf_counter() - start:.0f} s")
    return Exit.INTERRUPTED if _was_interrupted(posterior.history) else Exit.DONE


def calibrate(arguments: argparse.Namespace) -> Exit:
    """Test a saved posterior on simulated data with known parameters."""
    return _report(arguments, _loaded(arguments), None)


def report(arguments: argparse.Namespace) -> Exit:
    """Draw from a saved posterior for given data, certify the draws, calibrate, and write one page."""
    for_draws, for_file = jax.random.split(jax.random.key(arguments.seed))
    posterior, data = _loaded(arguments), named_arguments(arguments.arguments)
    draws = posterior.condition(**data).sample(for_draws, arguments.num_draws)
    if arguments.draws is not None:
        draws.to_arviz(for_file).to_netcdf(arguments.draws)
    return _report(arguments, posterior, draws)


def _report(arguments: argparse.Namespace, posterior: Any, draws: Draws | None) -> Exit:
    key = jax.random.fold_in(jax.random.key(arguments.seed), 1)
    store = None if arguments.simulations is None else Store(arguments.simulations)
    found = run_calibration(key, posterior, arguments.num, draws=draws, store=store)
    print(found)
    if arguments.output is not None:
        found.save(arguments.output)
    return Exit.DONE if found.trusted else Exit.REFUSED


def _learner(arguments: argparse.Namespace) -> NPSE | SMDP:
    """Take the learner that is named, or make one of the model that is named."""
    found = named_object(arguments.model)
    return found if isinstance(found, NPSE | SMDP) else NPSE(found)


def _loaded(arguments: argparse.Namespace) -> Any:
    return _learner(arguments).load(arguments.posterior, **named_arguments(arguments.arguments))


def _was_interrupted(history: Any) -> bool:
    runs = history[:2] if isinstance(history, TrainingHistory) else (history,)
    return any(run.stopped == INTERRUPTED for run in runs)


def _executor(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """Make the executor of the simulations: the user's own, spawned processes, or none."""
    if arguments.executor is not None:
        make: Callable[[], Any] = named_object(arguments.executor)
        return make()
    if arguments.workers == 1:
        return contextlib.nullcontext()
    return concurrent.futures.ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn"))
