"""Clocks: wall seconds, CPU seconds of this process, and how many of them JAX spent compiling."""

import time
from typing import NamedTuple

import jax

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_compile_times: list[float] = []
_compilations: list[float] = []


def _listen(event: str, seconds: float, **_) -> None:
    if event in _COMPILE_EVENTS:
        _compile_times.append(seconds)
    if event == _COMPILE_EVENTS[-1]:
        _compilations.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_listen)


class Times(NamedTuple):
    """Seconds of a measured block, and the number of programs compiled in it.

    Tracing of nested functions is counted at every level, so ``compile`` is an upper bound. ``backend`` is what XLA
    alone took.
    """

    wall: float
    cpu: float
    compile: float
    num_compilations: int
    backend: float


class Clock:
    """Measure a block: ``with Clock() as clock: ...``, then ``clock.times``."""

    times: Times

    def __enter__(self):
        self._start = time.perf_counter(), time.process_time(), len(_compile_times), len(_compilations)
        return self

    def __exit__(self, *_):
        wall, cpu, first, count = self._start
        self.times = Times(
            time.perf_counter() - wall,
            time.process_time() - cpu,
            sum(_compile_times[first:]),
            len(_compilations) - count,
            sum(_compilations[count:]),
        )
