"""The command line: simulate, fit, calibrate, report and doctor, for the queue of a cluster.

Results go to standard output, progress goes to standard error. The exit code says what a scheduler should do next
(`Exit`).
"""

from scoreinfer.command.exits import Exit
from scoreinfer.command.parser import main

__all__ = ["Exit", "main"]
