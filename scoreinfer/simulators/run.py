"""Running foreign simulators: any callable, called row by row by any executor. A store records every result."""

import concurrent.futures
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm.auto import tqdm

from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices
from scoreinfer._tree import in_batches, named_leaves
from scoreinfer._typing import Key, Sites
from scoreinfer.draws import Draws
from scoreinfer.errors import UnsupportedModel, warn
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
"""``(constrained parameters by site (NumPy), seed) -> array or dictionary of arrays``."""
_SomeRows = Callable[[Array], tuple[Array, Sites, Array]]
"""``row numbers -> (unconstrained parameters, constrained parameters by site, seeds)``."""
FLUSH_SECONDS, FLUSH_ROWS, FLUSH_BYTES = 5.0, 1000, 32 * 2**20
"""Finished rows are written after this many seconds, rows or bytes, whichever comes first. Chosen by judgement."""
PATIENCE = 10.0
"""If all workers are busy with timed-out rows, wait this many time-outs for a free worker. Chosen by judgement."""
BATCH = 4096
"""Rows that are drawn from the prior in one compiled call. It limits the memory. Chosen by judgement."""
NOT_FINITE = "numbers that are not finite"
"""Reason for an invalid row, in the warning of `simulate`."""


class Outcome(NamedTuple):
    """The result of one call of a simulator.

    Args:
        outputs: the outputs by name. None means the call failed.
        error: the error, or the masked entries, in words; otherwise empty.
        seconds: wall time of the call.
    """

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
    """Draw parameters from a prior, run a foreign simulator on each, and store every result on disk.

    The parameters and the seed of row i depend on ``key`` and i only, for every executor. A second call with the same
    arguments, or a larger ``num``, runs the missing rows. No row is stored twice. A row runs twice only if the process
    died before the row was written; rows are written every five seconds.

    Args:
        key: random key.
        prior: the prior of the parameters: a NumPyro model without arguments, or a `Problem`
            (``from_numpyro(model, *args)``). The latent sites are the parameters; observed sites are ignored. Or
            `Draws`: the simulator then runs on the first ``num`` draws (see `Conditioned.weigh`).
        simulator: ``simulator(parameters, seed)`` with constrained parameters by site (NumPy values), and a whole
            number as seed for its random numbers. It returns an array (which gets the name ``y``) or a dictionary of
            arrays by name. The row fails if an output is not made of real numbers, whole numbers or truth values.
            Masked entries are missing values and become NaN.
        num: number of rows.
        store: folder of the store. It is created if it does not exist.
        executor: any `concurrent.futures.Executor`: threads, spawned processes, dask's ``Client.get_executor()``,
            ``mpi4py.futures``. It is not shut down. None means the rows run in this process, one after the other.
        on_error: ``"record"`` stores the errors of the simulator, ``"raise"`` raises them.
        timeout: seconds after which a row gets the status ``timeout``. It needs an executor. The call itself is not
            killed: it keeps its worker busy until it ends. None means no limit.
        retries: how often a row that failed or timed out is run again.
        num_workers: number of rows that run at the same time. None means the executor's number of workers, or the
            number of processors if the executor does not report it.
        simulator_version: identifies the simulator, so that rows of an edited simulator are not mixed with its rows.
            None means a fingerprint of its code, constants, defaults, closure and global values, and of your own
            functions and classes that it calls (libraries count by name, and their objects by the arrays they hold).
            Paths add files whose bytes count, too, such as a program that it runs. A text is your own version and
            replaces the fingerprint.
        progress_bar: show a progress bar on a terminal.

    Returns:
        The `Store`. ``NPSE(prior, simulations=store).fit(key)`` learns from it.

    Raises:
        UnsupportedModel: if the prior has no simulator.
        ValueError: if an argument is wrong, or the folder holds other simulations or rows of another simulator (of
            another name, or edited since). The message says what differs.
        RuntimeError: if another process writes to the store, or every worker hangs.
        UnreadableFile: if the store is damaged.
        Exception: with ``on_error="raise"``, everything that the simulator raises.

    Warns:
        UserWarning: if all rows failed or are not finite.

    Exactness: exact draws from the joint distribution of prior and simulator, including failures.
    """
    if on_error not in ("record", "raise"):
        raise ValueError(f"`on_error` must be 'record' or 'raise', got {on_error!r}.")
    if timeout is not None and executor is None:
        raise ValueError(
            "A `timeout` needs an `executor`, because a call in this process cannot be abandoned. Pass an `executor`, "
            "or leave `timeout` out."
        )
    if executor is not None and _forks(executor):
        raise ValueError(
            "Expected threads or spawned processes, got forked processes, which deadlock with JAX. Create the "
            "ProcessPoolExecutor with mp_context=multiprocessing.get_context('spawn')."
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
        warn(
            f"None of the {len(faults)} simulations of this run succeeded with finite numbers. Correct the simulator. "
            f"The first: {faults[0]}",
            UserWarning,
        )
    return opened


class _Plan(NamedTuple):
    """How rows are run. See `simulate`."""

    simulator: Simulator
    on_error: str
    timeout: float | None
    retries: int
    num_workers: int


class _Task(NamedTuple):
    """One row to run.

    Args:
        number: number of the row.
        z: unconstrained parameters.
        parameters: constrained parameters by site.
        seed: seed for the simulator.
        attempts: number of earlier attempts.
    """

    number: int
    z: np.ndarray
    parameters: dict[str, Any]
    seed: int
    attempts: int = 0


def told_of_prior(problem: Problem) -> dict[str, Any]:
    """Describe the prior in a store's manifest.

    Raises:
        UnsupportedModel: if the prior has no simulator.
    """
    if problem.simulate is None:
        raise UnsupportedModel(
            "Parameters are drawn from the prior. Expected a model whose latent sites can be drawn, got one that "
            f"cannot be simulated: {problem.not_simulable}"
        )
    return {"dim": problem.dim, "latents": describe_sites(problem.latents)}


def told_of_draws(draws: Draws, num: int) -> dict[str, Any]:
    """Describe draws in a store's manifest.

    Raises:
        ValueError: if there are fewer draws than rows.
    """
    if num > draws.num:
        raise ValueError(
            f"`num` must be at most the number of draws, {draws.num}, got {num}. Reduce `num`, or sample more draws."
        )
    latents = [f"{name} {value.shape[1:]} drawn" for name, value in named_leaves(draws.sites).items()]
    z = np.asarray(draws.unconstrained)
    return {"dim": z.shape[1], "latents": latents, "draws": digest({"values": z})}


def first_rows(rows: _SomeRows, num: int) -> dict[str, Any]:
    """Describe the first rows, at most four, in a store's manifest.

    The same unconstrained values give other parameters under a prior with other bounds. So the manifest identifies the
    prior.
    """
    z, sites, seeds = rows(jnp.arange(min(num, 4)))
    first = [np.asarray(z, np.float64).round(4).tolist(), np.asarray(seeds).tolist()]
    return {"first": first, "parameters": _rounded(sites)}


def _name(simulator: Simulator) -> str:
    """Return the name of a simulator for the manifest."""
    while isinstance(simulator, partial):
        simulator = simulator.func
    return getattr(simulator, "__qualname__", type(simulator).__qualname__)


def _rounded(sites: Sites) -> dict[str, list]:
    return {name: np.asarray(value, np.float64).round(4).tolist() for name, value in sites.items()}


@over_devices
def _prior_rows(key: Key, problem: Problem, rows: Array) -> tuple[Array, Sites, Array]:
    def one(row):
        for_parameters, for_seed = jax.random.split(jax.random.fold_in(key, row))
        z = cast(Any, problem.simulate)(for_parameters)[0]
        return z, problem.latent_sites(z), jax.random.bits(for_seed, dtype=jnp.uint32)

    return map_rows(one, None)(rows)


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
    """Call a simulator once and measure its time. This runs in the workers.

    Args:
        simulator: the simulator.
        parameters: constrained parameters by site.
        seed: seed for the simulator.
        catch: whether errors of the simulator are returned, not raised.
    """
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
    """Run the rows. Write finished rows every few seconds, and also at the end or after an error."""
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
                if future.cancel():  # it has not started, because no worker was free
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
    """Make the row of an outcome. Outputs whose shapes differ from the first row's count as a failure."""
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
    """Compute the largest number of rows in one shard, for outputs of these shapes."""
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
            f"All {plan.num_workers} workers hang in rows that exceeded the time-out of {plan.timeout} s. The finished "
            "rows are stored. Call again with a new executor, and make the simulator end itself in time."
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
