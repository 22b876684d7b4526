"""Which tests are slow, by measurement: `make slow-list` runs all tests with this plugin, and writes `slow.txt` anew.

python -m pytest -p costs --costs FILE ...    # append the CPU seconds of every test to FILE
python tests/costs.py FILE                    # write slow.txt from it
"""

import json
import resource
import sys
from pathlib import Path

import pytest

SLOW = Path(__file__).with_name("slow.txt")
LIMIT = 3.0
"""CPU seconds of a cold run from which on a test is slow. All others together take eight minutes on two cores."""


def pytest_addoption(parser):
    parser.addoption("--costs", help="append the CPU seconds of every test to this file")


def seconds():
    """CPU seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    start = seconds()
    yield
    if path := item.config.getoption("--costs"):
        with Path(path).open("a") as file:
            file.write(json.dumps([item.nodeid, round(seconds() - start, 2)]) + "\n")


def main(path):
    """Write the names of all tests above the limit."""
    rows = (json.loads(line)[:2] for line in Path(path).read_text().splitlines())
    SLOW.write_text("".join(sorted(f"{name}\n" for name, cost in rows if cost >= LIMIT)))


if __name__ == "__main__":
    main(sys.argv[1])
