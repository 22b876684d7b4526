"""Run the first example of the README that the installed package carries, and see that its draws are certified."""

import re
from importlib.metadata import metadata


def main() -> None:
    """Run it.

    Raises:
        SystemExit: if the draws are not certified.
    """
    description = str(metadata("scoreinfer").get_payload())
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", description, flags=re.DOTALL)[0], names)
    if not names["draws"].certificate.certified:
        raise SystemExit("The draws of the quick start are not certified.")


if __name__ == "__main__":
    main()
