"""Foreign simulators: any callable, run row by row through any executor, every outcome recorded in a store."""

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm.auto import tqdm

from scoreinfer._errors import UnreadableFile, UnsupportedModel
from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites
from scoreinfer.model import from_numpyro
from scoreinfer.problem import Problem, Site
from scoreinfer.resuming import key_bits
from scoreinfer.store import FAILED, INVALID, OK, TIMEOUT, Row, Store, only_writer, open_store, write_shard

Simulator = Callable[[dict[str, Any], int], Any]
"""From constrained parameters by site (NumPy) and a seed to an array, or a dictionary of arrays."""
FLUSH_SECONDS, FLUSH_ROWS = 5.0, 1000
"""Finished rows are written at least this often."""
PATIENCE = 10.0
"""Time-outs that are waited for a worker where all are busy with rows that were given up."""
FOREIGN = "its simulator is foreign."
BATCH = 4096


class Outcome(NamedTuple):
    """What one call of a simulator gave."""

    outputs: dict[str, np.ndarray] | None
    error: str
    seconds: float


def simulate(
    key: Key,
    prior: Callable | Problem,
    simulator: Simulator,
    num: int,
    *args: Any,
    store: str | os.PathLike[str],
    executor: concurrent.futures.Executor | None = None,
    on_error: str = "record",
    timeout: float | None = None,
    retries: int = 0,
    num_workers: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Store:
    """Draw parameters from a prior, run a foreign simulator on each, and keep every outcome on disk.

    Row i (its parameters and its seed) depends on ``key`` and i alone, whatever the executor. Called again with the
    same arguments it runs the rows that are missing, after a crash or for a larger ``num``; no row is run twice
    unless the process died before it was written (every five seconds), and none is recorded twice.

    Args:
        key: random key.
        prior: a NumPyro model, or a `Problem`, whose latent sites are the parameters; its observed sites are ignored.
        simulator: ``simulator(parameters, seed)``: constrained parameters by site as NumPy values, and a whole number
            to seed what is random in it. Returns an array (then called ``y``) or a dictionary of arrays by name.
        num: number of rows.
        *args: the prior's own arguments.
        store: folder of the rows; made where there is none.
        executor: any `concurrent.futures.Executor`: threads, spawned processes, dask's ``Client.get_executor()``,
            ``mpi4py.futures``. None: one after the other, here. It is not shut down.
        on_error: ``record`` what the simulator raises, or ``raise`` it.
        timeout: seconds after which a row is given up as ``timeout``; needs an executor. What runs in it cannot be
            killed from here, and keeps its worker busy until it ends.
        retries: how often a row that failed or timed out is tried again.
        num_workers: rows in flight. None: what the executor says, else the number of processors.
        progress_bar: show a progress bar on a terminal.
        **kwargs: the prior's own keyword arguments.

    Returns:
        The `Store`; ``fit(key, prior, simulations=store)`` learns from it.

    Raises:
        UnsupportedModel: where the prior cannot be drawn from.
        ValueError: for wrong arguments, or a store of other simulations.
        RuntimeError: where another process writes to the store, or every worker hangs.

    Exactness: exact draws from the joint distribution of prior and simulator, failures included.
    """
    if on_error not in ("record", "raise"):
        raise ValueError(f"`on_error` must be 'record' or 'raise', got {on_error!r}.")
    if timeout is not None and executor is None:
        raise ValueError("A `timeout` needs an `executor`: what runs here cannot be left behind.")
    if executor is not None and _forks(executor):
        raise ValueError(
            "Forked processes deadlock with JAX: give the ProcessPoolExecutor "
            "mp_context=multiprocessing.get_context('spawn')."
        )
    problem = prior if isinstance(prior, Problem) else from_numpyro(prior, *args, **kwargs)
    if problem.simulate is None:
        raise UnsupportedModel(f"Parameters are drawn from the prior, and this one cannot be: {problem.not_simulable}")
    path = Path(store)
    opened = open_store(path, _manifest(key, problem, num))
    with only_writer(path):
        done = opened.read()
        missing = np.setdiff1d(np.arange(num), done.number)
        shapes = {name: value.shape[1:] for name, value in done.outputs.items()}
        plan = _Plan(simulator, on_error, timeout, retries, num_workers or _num_workers(executor))
        with tqdm(
            total=num,
            initial=num - missing.size,
            desc="simulating",
            disable=None if progress_bar else True,
            leave=False,
        ) as bar:
            _run(path, plan, executor, _tasks(key, problem, missing), shapes, bar.update)
    return opened


class _Plan(NamedTuple):
    """How rows are run."""

    simulator: Simulator
    on_error: str
    timeout: float | None
    retries: int
    num_workers: int


class _Task(NamedTuple):
    """One row to run."""

    number: int
    z: np.ndarray
    parameters: dict[str, Any]
    seed: int
    attempts: int = 0


def _manifest(key: Key, problem: Problem, num: int) -> dict[str, Any]:
    z, sites, seeds = _prior_rows(key, problem, jnp.arange(4))
    return {
        "num": num, "key": key_bits(key), "dim": problem.dim,
        "latents": [f"{site.name} {site.shape} {site.support}" for site in problem.latents],
        "first": [np.asarray(z, np.float64).round(4).tolist(), np.asarray(seeds).tolist()],
        "parameters": _rounded(sites),
    }  # fmt: skip


def _rounded(sites: Sites) -> dict[str, list]:
    return {name: np.asarray(value, np.float64).round(4).tolist() for name, value in sites.items()}


@eqx.filter_jit
def _prior_rows(key: Key, problem: Problem, rows: Array) -> tuple[Array, Sites, Array]:
    def one(row):
        for_parameters, for_seed = jax.random.split(jax.random.fold_in(key, row))
        z = cast(Any, problem.simulate)(for_parameters)[0]
        return z, problem.latent_sites(z), jax.random.bits(for_seed, dtype=jnp.uint32)

    return jax.vmap(one)(rows)


def _tasks(key: Key, problem: Problem, numbers: np.ndarray) -> list[_Task]:
    if not numbers.size:
        return []
    z, sites, seeds = in_batches(lambda i: _prior_rows(key, problem, jnp.asarray(numbers)[i]), numbers.size, BATCH)
    z, seeds, sites = np.asarray(z), np.asarray(seeds), {name: np.asarray(value) for name, value in sites.items()}
    return [
        _Task(int(number), z[i], {name: value[i] for name, value in sites.items()}, int(seeds[i]))
        for i, number in enumerate(numbers)
    ]


def attempt(simulator: Simulator, parameters: dict[str, Any], seed: int, catch: bool) -> Outcome:
    """Call a simulator once and time it; runs in the workers."""
    start = time.perf_counter()
    try:
        returned = simulator(parameters, seed)
        outputs = returned if isinstance(returned, dict) else {"y": returned}
        arrays = {str(name): np.asarray(value, np.float64) for name, value in outputs.items()}
    except Exception as error:
        if not catch:
            raise
        return Outcome(None, f"{type(error).__name__}: {error}", time.perf_counter() - start)
    return Outcome(arrays, "", time.perf_counter() - start)


def _run(
    path: Path,
    plan: _Plan,
    executor: concurrent.futures.Executor | None,
    tasks: list[_Task],
    shapes: dict[str, tuple[int, ...]],
    done: Callable[[int], Any],
) -> None:
    """Run the rows, and write what is finished every few seconds and whatever ends the run."""
    waiting, finished, flushed = tasks[::-1], [], time.monotonic()
    running: dict[concurrent.futures.Future, tuple[_Task, float]] = {}
    lost: set[concurrent.futures.Future] = set()
    submit = _here if executor is None else executor.submit

    def settle(task: _Task, outcome: Outcome, status: str | None = None) -> None:
        nonlocal shapes
        row = _row(task, outcome, status, shapes)
        if row.status in (FAILED, TIMEOUT) and task.attempts < plan.retries:
            waiting.append(task._replace(attempts=task.attempts + 1))
            return
        shapes = shapes or {name: value.shape for name, value in (row.outputs or {}).items()}
        finished.append(row)
        done(1)

    try:
        while waiting or running:
            lost = {future for future in lost if not future.done()}
            while waiting and len(running) + len(lost) < plan.num_workers:
                task = waiting.pop()
                call = partial(attempt, plan.simulator, task.parameters, task.seed, plan.on_error == "record")
                running[submit(call)] = task, time.monotonic()
            if not running:
                _wait_for_worker(lost, plan)
                continue
            ready, _ = concurrent.futures.wait(
                running, timeout=_next_deadline(running, plan), return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in ready:
                settle(running.pop(future)[0], future.result())
            now = time.monotonic()
            late = [f for f, (_, since) in running.items() if plan.timeout is not None and now - since > plan.timeout]
            for future in late:
                task, since = running.pop(future)
                if future.cancel():  # it never began: its worker was not free
                    waiting.append(task)
                    continue
                lost.add(future)
                settle(task, Outcome(None, f"no answer within {plan.timeout} s", now - since), TIMEOUT)
            if len(finished) >= FLUSH_ROWS or (finished and now - flushed > FLUSH_SECONDS):
                write_shard(path, finished)
                finished, flushed = [], now
    finally:
        for future, (task, _) in running.items():
            if not future.cancel() and future.done() and future.exception() is None:
                settle(task, future.result())
        if finished:
            write_shard(path, finished)


def _row(task: _Task, outcome: Outcome, status: str | None, shapes: dict[str, tuple[int, ...]]) -> Row:
    """Judge an outcome: outputs of another shape than the first ones are a failure, too."""
    outputs, error = outcome.outputs, outcome.error
    if outputs is not None and shapes and {name: value.shape for name, value in outputs.items()} != shapes:
        got = {name: value.shape for name, value in outputs.items()}
        outputs, error = None, f"expected outputs of shapes {shapes}, got {got}"
    if outputs is None:
        status = status or FAILED
    else:
        status = OK if all(np.isfinite(value).all() for value in outputs.values()) else INVALID
    return Row(task.number, task.z, status, error, task.seed, outcome.seconds, outputs)


def _here(call: Callable[[], Outcome]) -> concurrent.futures.Future:
    future: concurrent.futures.Future = concurrent.futures.Future()
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)
    return future


def _next_deadline(running: dict[concurrent.futures.Future, tuple[_Task, float]], plan: _Plan) -> float:
    if plan.timeout is None:
        return FLUSH_SECONDS
    first = min(since for _, since in running.values())
    return min(FLUSH_SECONDS, max(0.0, first + plan.timeout - time.monotonic()) + 1e-3)


def _wait_for_worker(lost: set[concurrent.futures.Future], plan: _Plan) -> None:
    assert plan.timeout is not None
    patience = PATIENCE * plan.timeout
    ready, _ = concurrent.futures.wait(lost, timeout=patience, return_when=concurrent.futures.FIRST_COMPLETED)
    if not ready:
        raise RuntimeError(
            f"All {plan.num_workers} workers hang in rows that were given up after {plan.timeout} s. The finished rows "
            "are kept: call again with a new executor, and let the simulator end itself in time."
        )


def _num_workers(executor: concurrent.futures.Executor | None) -> int:
    if executor is None:
        return 1
    return getattr(executor, "_max_workers", None) or os.cpu_count() or 1


def _forks(executor: concurrent.futures.Executor) -> bool:
    context = getattr(executor, "_mp_context", None)
    if context is None:
        return False
    return (context.get_start_method() or multiprocessing.get_start_method()) == "fork"


def with_outputs(problem: Problem, shapes: dict[str, tuple[int, ...]]) -> Problem:
    """Make the problem of a prior and a foreign simulator with outputs of these shapes.

    The data are given by name: ``posterior.sample(key, num, y=data)``.
    """

    def read(args: tuple, kwargs: dict[str, Any]) -> Sites:
        if args or kwargs.keys() != shapes.keys():
            raise ValueError(
                f"Expected data for {', '.join(shapes)} by name, as the simulator returns them; got "
                f"{', '.join(kwargs) or 'none'}{f' and {len(args)} without a name' if args else ''}."
            )
        values = {name: np.asarray(kwargs[name], np.float64) for name in shapes}
        for name, value in values.items():
            if value.shape != shapes[name] or not np.isfinite(value).all():
                raise ValueError(f"{name!r} must have shape {shapes[name]} and finite numbers, got {value.shape}.")
        return {name: jnp.asarray(value, jnp.result_type(float)) for name, value in values.items()}

    def log_likelihood(z: Array, y: Sites) -> Array:
        raise ValueError("A foreign simulator has no density (`Problem.has_density` is False).")

    return Problem(
        dim=problem.dim,
        latents=problem.latents,
        observed=tuple(Site(name, shape, str(jnp.result_type(float)), "real") for name, shape in shapes.items()),
        log_prior=problem.log_prior,
        log_likelihood=log_likelihood,
        constrain=problem.latent_sites,
        latent_sites=problem.latent_sites,
        unconstrain=problem.unconstrain,
        simulate=None,
        simulate_observation=None,
        encode=lambda y: y,
        read=read,
        has_density=False,
        not_simulable=FOREIGN,
        model=problem.model,
    )


class StoredSimulations(NamedTuple):
    """Rows of a store as fitting wants them.

    Args:
        problem: the problem of the prior and the foreign simulator.
        z: parameters of the valid rows.
        y: their outputs.
        all_z: parameters of all rows.
        valid: whether each of all rows is valid.
    """

    problem: Problem
    z: Array
    y: Sites
    all_z: Array
    valid: np.ndarray


def stored_simulations(prior: Problem, store: Store | str | os.PathLike[str]) -> StoredSimulations:
    """Read the rows of a store for the prior that its parameters were drawn from.

    Raises:
        ValueError: where no row is valid, or the prior has other sites than the store's.
        UnreadableFile: where the store is damaged.
    """
    store = store if isinstance(store, Store) else Store(store)
    own = [f"{site.name} {site.shape} {site.support}" for site in prior.latents]
    if own != store.manifest["latents"]:
        raise ValueError(
            f"The store's parameters are {', '.join(store.manifest['latents'])}, this prior's are {', '.join(own)}. "
            "Pass the prior that the simulations were made with."
        )
    _check_bounds(prior, store)
    rows = store.read()
    if not rows.valid.any():
        raise ValueError(f"No simulation in `{store.path}` is valid: {store}. Nothing can be learned.")
    outputs = {name: jnp.asarray(value[rows.valid], float) for name, value in rows.outputs.items()}
    problem = with_outputs(prior, {name: value.shape[1:] for name, value in outputs.items()})
    z = jnp.asarray(rows.z, float)
    return StoredSimulations(problem, z[rows.valid], outputs, z, rows.valid)


def _check_bounds(prior: Problem, store: Store) -> None:
    """Refuse a prior whose parameters differ from the store's at the same places of the unconstrained space."""
    try:
        places = np.asarray(store.manifest["first"][0], float).reshape(-1, prior.dim)
        told = {site.name: np.asarray(store.manifest["parameters"][site.name], float) for site in prior.latents}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UnreadableFile(
            store.path, f"its manifest does not say what the first parameters are ({error!r})"
        ) from error
    for name, values in jax.vmap(prior.latent_sites)(jnp.asarray(places, float)).items():
        stored = told[name]
        if values.shape != stored.shape or not np.allclose(values, stored, rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"The store's first parameters are {name} = {stored}, under this prior they would be "
                f"{np.asarray(values).tolist()}: its bounds are others. Pass the prior that the "
                "simulations were made with."
            )
