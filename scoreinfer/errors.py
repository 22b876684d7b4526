"""Errors and warnings that a caller may want to catch."""

import os
import sys
import warnings
from typing import NamedTuple


class Offence(NamedTuple):
    """One site that makes a model unsupported.

    Args:
        site: the name of the site.
        reason: what is wrong with the site.
        way_out: what to write instead.
    """

    site: str
    reason: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.site!r}: {self.reason}. {self.way_out}."


class UnsupportedModel(ValueError):
    """The NumPyro model is not supported. The message names each problem and what to write instead.

    Args:
        offences: all unsupported sites, or one sentence.
    """

    def __init__(self, offences: "tuple[Offence, ...] | str") -> None:
        self.offences = () if isinstance(offences, str) else tuple(offences)
        lines = "\n".join(f"  {offence}" for offence in self.offences)
        super().__init__(offences if isinstance(offences, str) else f"this model cannot be read:\n{lines}")


class TrainingWarning(UserWarning):
    """Training ended early, or its budget is likely too small."""


class MisspecificationWarning(UserWarning):
    """The observation is unlike the model's simulations.

    The model may be wrong, and the sampler was not trained near this observation.
    """


class DivergenceWarning(UserWarning):
    """Some members of a filter were not finite, and were replaced."""


class UnreadableFile(ValueError):
    """A file cannot be read: it is missing, damaged, changed, from a newer version, or not written by scoreinfer.

    Args:
        path: the file or folder.
        reason: what is wrong with the file.
        way_out: what to do instead.
    """

    def __init__(
        self, path: str | os.PathLike[str], reason: str, way_out: str = "Use another copy, or write it again"
    ) -> None:
        super().__init__(f"`{os.fspath(path)}` cannot be read: {reason}. {way_out}.")


BETWEEN = {"scoreinfer", "beartype", "contextlib", "equinox", "functools", "jax", "jaxtyping", "numpyro"}
"""This package, and those whose wrappers and loops stand between its functions and their caller."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called this package, however deep inside it the reason was found."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
