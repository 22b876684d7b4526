"""The README fits one screen, its links lead somewhere, and its code runs as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_fits_one_screen():
    assert len(README.splitlines()) <= 65
    assert len(BLOCKS) == 1


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).is_file()


def test_picture_is_small():
    (picture,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert (ROOT / picture).stat().st_size < 150_000


def test_example_is_certified():
    names: dict = {}
    exec(BLOCKS[0], names)
    assert names["draws"].certificate.certified, names["draws"].certificate
    assert "posterior" in names["idata"]
