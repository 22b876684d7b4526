"""Foreign simulators: any callable, run row by row through any executor, every outcome recorded in a store."""

import concurrent.futures
import math
import multiprocessing
import os
import time
import warnings
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

from scoreinfer._tree import in_batches, named_leaves
from scoreinfer._typing import Key, Sites
from scoreinfer.draws import Draws
from scoreinfer.errors import UnsupportedModel
from scoreinfer.files import digest
from scoreinfer.identity import Version, describe_sites, fingerprint, key_bits, moved
from scoreinfer.model import problem_of
from scoreinfer.problem import Problem
from scoreinfer.simulators.outputs import named_outputs, say_masked
from scoreinfer.simulators.store import (
    FAILED,
    FINGERPRINT,
    INVALID,
    TIMEOUT,
    Row,
    Store,
    leave_out,
    only_writer,
    open_store,
    status_of,
    write_shard,
)

Simulator = Callable[[dict[str, Any], int], Any]
"""From constrained parameters by site (NumPy) and a seed to an array, or a dictionary of arrays."""
_SomeRows = Callable[[Array], tuple[Array, Sites, Array]]
"""From numbers of rows to their unconstrained parameters, their parameters by site, and their seeds."""
FLUSH_SECONDS, FLUSH_ROWS, FLUSH_BYTES = 5.0, 1000, 32 * 2**20
"""Finished rows are written at least this often, and as soon as there are so many of them, or so large ones."""
PATIENCE = 10.0
"""Time-outs that are waited for a worker where all are busy with rows that were given up."""
BATCH = 4096
NOT_FINITE = "numbers that are not finite"


class Outcome(NamedTuple):
    """What one call of a simulator gave."""

    outputs: dict[str, np.ndarray] | None
    error: str
    seconds: float


def simulate(
    key: Key,
    prior: Callable | Problem | Draws,
    simulator: Simulator,
    num: int,
    *,
    store: str | os.PathLike[str],
    executor: concurrent.futures.Executor | None = None,
    on_error: str = "record",
    timeout: float | None = None,
    retries: int = 0,
    num_workers: int | None = None,
    simulator_version: Version = None,
    progress_bar: bool = True,
) -> Store:
    """Draw parameters from a prior, run a foreign simulator on each, and keep every outcome on disk.

    Row i (its parameters and its seed) depends on ``key`` and i alone, whatever the executor. Called again with the
    same arguments it runs the rows that are missing, after a crash or for a larger ``num``; no row is run twice
    unless the process died before it was written (every five seconds), and none is recorded twice.

    Args:
        key: random key.
        prior: a NumPyro model without arguments, or a `Problem` (``from_numpyro(model, *args)``), whose latent sites
            are the parameters; its observed sites are ignored. Or `Draws`, to run the simulator on the first ``num`` of
            them (see `Conditioned.weigh`).
        simulator: ``simulator(parameters, seed)``: constrained parameters by site as NumPy values, and a whole number
            to seed what is random in it. Returns an array (then called ``y``) or a dictionary of arrays by name.
            A row fails where one of them holds anything but real or whole numbers or truth values. Masked entries are
            missing values: NaN.
        num: number of rows.
        store: folder of the rows; made where there is none.
        executor: any `concurrent.futures.Executor`: threads, spawned processes, dask's ``Client.get_executor()``,
            ``mpi4py.futures``. None: one after the other, here. It is not shut down.
        on_error: ``record`` what the simulator raises, or ``raise`` it.
        timeout: seconds after which a row is given up as ``timeout``; needs an executor. What runs in it cannot be
            killed from here, and keeps its worker busy until it ends.
        retries: how often a row that failed or timed out is tried again.
        num_workers: rows in flight. None: what the executor says, else the number of processors.
        simulator_version: what tells this simulator from an edited one, whose rows do not belong with its own. None:
            its code, constants, defaults, closure and global values, and those of your own functions and classes that
            it calls (libraries count by name, and their objects by the arrays they hold). Paths: files whose bytes
            count as well, such as a program that it runs. A text: your own version, which stands in place of all that.
        progress_bar: show a progress bar on a terminal.

    Returns:
        The `Store`; ``NPSE(prior, simulations=store).fit(key)`` learns from it.

    Raises:
        UnsupportedModel: where the prior cannot be drawn from.
        ValueError: for wrong arguments, or a store of other simulations or of another simulator: one of another name,
            or edited since; the message says where.
        RuntimeError: where another process writes to the store, or every worker hangs.

    Warns:
        UserWarning: where nothing has come of any row: all have failed, or are not finite.

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
    if isinstance(prior, Draws):
        rows, told = partial(_rows_of_draws, key, prior), told_of_draws(prior, num)
    else:
        problem = problem_of(prior, (), {})
        rows, told = partial(_prior_rows, key, problem), told_of_prior(problem)
    path, version = Path(store), fingerprint(simulator, simulator_version)
    described = {"num": num, "key": key_bits(key), "simulator": _name(simulator), FINGERPRINT: version}
    opened = open_store(path, described | told | first_rows(rows, 4))
    with only_writer(path):
        done = opened.index()
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
            faults: list[str] = []

            def settled(row: Row) -> None:
                faults.append(row.error or NOT_FINITE if row.status in (FAILED, INVALID) else "")
                bar.update()

            try:
                _run(path, plan, executor, _tasks(rows, missing), shapes, settled)
            finally:
                if counting := moved(version, simulator):
                    leave_out(path, counting)
    if faults and all(faults) and not done.valid.any():
        warnings.warn(
            f"None of the {len(faults)} simulations of this run can be learned from. The first: {faults[0]}",
            stacklevel=2,
        )
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


def told_of_prior(problem: Problem) -> dict[str, Any]:
    """Describe the prior in a store's manifest."""
    if problem.simulate is None:
        raise UnsupportedModel(f"Parameters are drawn from the prior, and this one cannot be: {problem.not_simulable}")
    return {"dim": problem.dim, "latents": describe_sites(problem.latents)}


def told_of_draws(draws: Draws, num: int) -> dict[str, Any]:
    """Describe draws in a store's manifest."""
    if num > draws.num:
        raise ValueError(f"`num` must be at most the number of draws, {draws.num}, got {num}.")
    latents = [f"{name} {value.shape[1:]} drawn" for name, value in named_leaves(draws.sites).items()]
    z = np.asarray(draws.unconstrained)
    return {"dim": z.shape[1], "latents": latents, "draws": digest({"values": z})}


def first_rows(rows: _SomeRows, num: int) -> dict[str, Any]:
    """Tell the first rows, at most four: parameters of other bounds have others at the same places."""
    z, sites, seeds = rows(jnp.arange(min(num, 4)))
    first = [np.asarray(z, np.float64).round(4).tolist(), np.asarray(seeds).tolist()]
    return {"first": first, "parameters": _rounded(sites)}


def _name(simulator: Simulator) -> str:
    """Name a simulator for the manifest."""
    while isinstance(simulator, partial):
        simulator = simulator.func
    return getattr(simulator, "__qualname__", type(simulator).__qualname__)


def _rounded(sites: Sites) -> dict[str, list]:
    return {name: np.asarray(value, np.float64).round(4).tolist() for name, value in sites.items()}


@eqx.filter_jit
def _prior_rows(key: Key, problem: Problem, rows: Array) -> tuple[Array, Sites, Array]:
    def one(row):
        for_parameters, for_seed = jax.random.split(jax.random.fold_in(key, row))
        z = cast(Any, problem.simulate)(for_parameters)[0]
        return z, problem.latent_sites(z), jax.random.bits(for_seed, dtype=jnp.uint32)

    return jax.vmap(one)(rows)


def _rows_of_draws(key: Key, draws: Draws, rows: Array) -> tuple[Array, Sites, Array]:
    seeds = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), dtype=jnp.uint32))(rows)
    z, sites = jax.tree.map(lambda leaf: leaf[rows], (draws.unconstrained, named_leaves(draws.sites)))
    return z, sites, seeds


def _tasks(rows: _SomeRows, numbers: np.ndarray) -> list[_Task]:
    if not numbers.size:
        return []
    z, sites, seeds = in_batches(lambda i: rows(jnp.asarray(numbers)[i]), numbers.size, BATCH)
    z, seeds, sites = np.asarray(z), np.asarray(seeds), {name: np.asarray(value) for name, value in sites.items()}
    return [
        _Task(int(number), z[i], {name: value[i] for name, value in sites.items()}, int(seeds[i]))
        for i, number in enumerate(numbers)
    ]


def attempt(simulator: Simulator, parameters: dict[str, Any], seed: int, catch: bool) -> Outcome:
    """Call a simulator once and time it; runs in the workers."""
    start = time.perf_counter()
    try:
        outputs = named_outputs(simulator(parameters, seed))
    except Exception as error:
        if not catch:
            raise
        return Outcome(None, f"{type(error).__name__}: {error}", time.perf_counter() - start)
    arrays = {name: output.values for name, output in outputs.items()}
    masked = say_masked({name: output.masked for name, output in outputs.items()})
    return Outcome(arrays, masked, time.perf_counter() - start)


def _run(
    path: Path,
    plan: _Plan,
    executor: concurrent.futures.Executor | None,
    tasks: list[_Task],
    shapes: dict[str, tuple[int, ...]],
    done: Callable[[Row], Any],
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
        done(row)

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
            if len(finished) >= most_rows(shapes) or (finished and now - flushed > FLUSH_SECONDS):
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
        status = status_of(outputs)
    return Row(task.number, task.z, status, error, task.seed, outcome.seconds, outputs)


def most_rows(shapes: dict[str, tuple[int, ...]]) -> int:
    """Count the rows that are written at once, where there are so many."""
    size = 8 * sum(map(math.prod, shapes.values()))
    return min(FLUSH_ROWS, max(FLUSH_BYTES // max(size, 1), 1))


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
