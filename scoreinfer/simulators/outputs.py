"""Outputs of foreign programs as real numbers by name. Any other output is refused, never converted."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

WAYS_OUT = {
    "c": "Return real and imaginary parts as two outputs",
    "M": "Return a number, such as the seconds since a fixed time",
    "m": "Return a number, such as seconds",
}
"""Advice for outputs that are no real numbers, by the kind of their NumPy type."""


class Numbers(NamedTuple):
    """Real numbers, some of which may be missing.

    Args:
        values: the numbers, with NaN for missing entries.
        masked: True for masked entries. None means no entry was masked.
    """

    values: Float[np.ndarray, "..."]
    masked: Bool[np.ndarray, "..."] | None = None


def real_numbers(what: str, value: Any) -> Numbers:
    """Convert real numbers, whole numbers and truth values to floats. Refuse everything else.

    Args:
        what: what the value is, for the error message.
        value: an array, a masked array, or lists of them.

    Raises:
        ValueError: if the value holds complex numbers, dates, text or other objects, or lists of different lengths.

    >>> real_numbers("Output 'y'", np.ma.array([1, 2], mask=[False, True])).values
    array([ 1., nan])
    """
    is_masked = _is_masked(value)
    try:
        array = np.asarray(_each(np.ma.getdata, value) if is_masked else value)
    except ValueError as error:  # NumPy's message does not say which value is meant
        raise ValueError(
            f"{what} must be an array of real numbers, but NumPy cannot make one: {error}. Give all rows the same "
            "length."
        ) from error
    if not np.can_cast(array.dtype, np.float64, "same_kind"):
        got = type(array.flat[0]).__name__ if array.dtype == object and array.size else array.dtype
        way_out = WAYS_OUT.get(array.dtype.kind, "Convert it to an array of floats, or leave it out")
        raise ValueError(f"{what} must be real or whole numbers, got {got}. {way_out}.")
    values = array.astype(np.float64)
    if not is_masked:
        return Numbers(values)
    masked = np.asarray(_each(lambda entry: np.ma.getmaskarray(np.asanyarray(entry)), value))
    return Numbers(np.where(masked, np.nan, values), masked)


def named_outputs(returned: Any) -> dict[str, Numbers]:
    """Convert the result of a simulator to numbers by name. A single array gets the name ``y``.

    Raises:
        ValueError: if an output is not made of real numbers. The message names the output.
    """
    named = returned if isinstance(returned, Mapping) else {"y": returned}
    return {str(name): real_numbers(f"Output {str(name)!r}", value) for name, value in named.items()}


def say_masked(masks: Mapping[str, Bool[np.ndarray, "..."] | None]) -> str:
    """Describe which outputs have masked entries. The text is empty if there are none.

    >>> say_masked({"y": np.array([True, False]), "x": None})
    "masked: 'y' (1 of 2 entries)"
    """
    counts = {name: (int(mask.sum()), mask.size) for name, mask in masks.items() if mask is not None}
    told = [f"{name!r} ({count} of {size} entries)" for name, (count, size) in counts.items() if count]
    return f"masked: {', '.join(told)}" if told else ""


def _is_masked(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_masked, value))
    return hasattr(value, "__array__") and bool(np.ma.getmask(np.asanyarray(value)).any())


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the entries of nested lists."""
    return [_each(function, entry) for entry in value] if isinstance(value, list | tuple) else function(value)
