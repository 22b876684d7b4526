"""Errors and warnings a caller may want to catch."""

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


class OutOfDistribution(UserWarning):
    """An observation lies far from everything that training has seen."""
