"""The list of slow tests names tests that exist, or it would leave nothing out."""

from costs import SLOW


def test_slow_tests_exist():
    root = SLOW.parents[1]
    for name in SLOW.read_text().splitlines():
        path, function = name.split("::")[:2]
        assert f"def {function.split('[')[0]}(" in (root / path).read_text(), name
