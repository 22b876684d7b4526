"""Which tests are slow, by measurement: `make slow-list` runs the quick tests with this plugin, and adds to `slow.txt`.

python -m pytest -p costs --costs FILE ...    # append the CPU seconds of every test to FILE
python tests/costs.py FILE                    # add those above the limit to slow.txt

The first test that uses a shared fixture pays for it. If it is left out, the next one pays: run again until nothing is
added. To begin from nothing, empty `slow.txt`.
"""

import json
import resource
import sys
from pathlib import Path

import pytest

SLOW = Path(__file__).with_name("slow.txt")
LIMIT = 2.0
"""CPU seconds of a cold run from which on a test is slow. All others together take five minutes on two cores."""


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
    """Add the names of all tests above the limit."""
    rows = (json.loads(line)[:2] for line in Path(path).read_text().splitlines())
    slow = {*SLOW.read_text().splitlines(), *(name for name, cost in rows if cost >= LIMIT)}
    SLOW.write_text("".join(sorted(f"{name}\n" for name in slow)))


if __name__ == "__main__":
    main(sys.argv[1])
