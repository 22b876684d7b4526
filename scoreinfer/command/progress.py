"""Progress on standard error: bars on a terminal, lines in the log file of a job."""

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from typing import Any


class LineStream(io.TextIOBase):
    r"""A stream that turns progress bars into lines.

    Bars redraw themselves after a carriage return. Of these texts at most one in ``seconds`` is written, as a line of
    its own. Everything else is written as it is.

    Args:
        stream: where lines are written.
        seconds: least time between two lines of progress.

    >>> stream = LineStream(sys.stdout, seconds=3600.0)
    >>> for number in range(3):
    ...     _ = stream.write(f"\rrow {number}")
    row 0
    """

    def __init__(self, stream: Any, seconds: float) -> None:
        self._stream, self._seconds, self._written = stream, seconds, -float("inf")

    def isatty(self) -> bool:
        """Say yes, because bars are shown on terminals only."""
        return True

    def write(self, text: str) -> int:
        """Write a text, or hold a bar back."""
        if "\r" not in text:
            self._stream.write(text)
        elif (bar := text.strip()) and time.monotonic() - self._written >= self._seconds:
            self._stream.write(f"{bar}\n")
            self._written = time.monotonic()
        return len(text)

    def flush(self) -> None:
        """Write through to the log file."""
        self._stream.flush()


@contextlib.contextmanager
def told_progress(seconds: float) -> Iterator[None]:
    """Show bars on a terminal, and otherwise a line of progress every ``seconds``."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(LineStream(sys.stderr, seconds)):
        yield
