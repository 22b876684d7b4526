"""Errors and warnings a caller may want to catch."""

import os
from typing import NamedTuple


class Offence(NamedTuple):
    """One thing in a model that cannot be read.

    Args:
        site: the name of the site.
        reason: what is wrong with it.
        way_out: what to write instead.
    """

    site: str
    reason: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.site!r}: {self.reason}. {self.way_out}."


class UnsupportedModel(ValueError):
    """A NumPyro model that cannot be read, with the offending sites and the way out.

    Args:
        offences: every offending site, or one sentence.
    """

    def __init__(self, offences: "tuple[Offence, ...] | str") -> None:
        self.offences = () if isinstance(offences, str) else tuple(offences)
        lines = "\n".join(f"  {offence}" for offence in self.offences)
        super().__init__(offences if isinstance(offences, str) else f"this model cannot be read:\n{lines}")


class TrainingWarning(UserWarning):
    """Training ended early or on a budget that is likely too small."""


class MisspecificationWarning(UserWarning):
    """An observation unlike the model's simulations: the model may be wrong, and what was learned does not reach it."""


class UnreadableFile(ValueError):
    """A file that is missing, damaged, changed, newer than this version, or not one of ours.

    Args:
        path: the file or folder.
        reason: what is wrong with it.
        way_out: what to do instead.
    """

    def __init__(
        self, path: str | os.PathLike[str], reason: str, way_out: str = "Take another copy, or make it again"
    ) -> None:
        super().__init__(f"`{os.fspath(path)}` cannot be read: {reason}. {way_out}.")
