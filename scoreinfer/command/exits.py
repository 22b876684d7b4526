"""Exit codes, and signals that end a command in order."""

import contextlib
import enum
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Exit(enum.IntEnum):
    """What a scheduler learns from a command.

    Attributes:
        DONE: everything is written, and the verdict, where there is one, is good.
        FAILED: an error that nobody foresaw; the traceback is on standard error.
        UNUSABLE: the command line, the model, the data or a file cannot be used. The same command fails again.
        REFUSED: everything is written, but the verdict is bad: not certified, not calibrated, or no valid simulation.
        INTERRUPTED: ended by SIGINT or SIGTERM. The same command goes on where it stopped, if it has a store or a
            checkpoint. The number is ``EX_TEMPFAIL`` of ``sysexits.h``.

    >>> int(Exit.INTERRUPTED)
    75
    """

    DONE = 0
    FAILED = 1
    UNUSABLE = 2
    REFUSED = 3
    INTERRUPTED = 75


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM, which schedulers send before they kill, like Ctrl-C: runs on disk are kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
