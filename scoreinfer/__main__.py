"""The command line: ``python -m scoreinfer --help``."""

import sys

from scoreinfer.command import main

if __name__ == "__main__":  # spawned workers import this module, too
    sys.exit(main())
