"""Print the oldest allowed version of every dependency, one constraint a line: python .ci/floors.py pyproject.toml."""

import re
import sys
import tomllib
from pathlib import Path

FLOOR = re.compile(r"^([A-Za-z0-9._-]+)(?:\[.*\])?>=([0-9][0-9.]*)$")


def floors(pyproject: str) -> list[str]:
    """List ``name==version`` for the dependencies that everybody installs.

    Raises:
        ValueError: if a dependency has no floor.
    """
    constraints = []
    for dependency in tomllib.loads(pyproject)["project"]["dependencies"]:
        found = FLOOR.match(dependency)
        if found is None:
            raise ValueError(f"Expected `name>=version`, got `{dependency}`: give it a floor and nothing else.")
        constraints.append(f"{found[1]}=={found[2]}")
    return constraints


if __name__ == "__main__":
    print("\n".join(floors(Path(sys.argv[1]).read_text())))
