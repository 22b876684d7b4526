"""Pickling by recipe: an object that holds a model's functions is pickled as a call that builds it again.

Pickle finds the model by its name.
"""

import pickle
import sys
from collections.abc import Callable
from typing import Any

BY_VALUE = {"cloudpickle", "dill"}
"""Packages that can pickle lambdas and local functions."""


class NotImportable(pickle.PicklingError):
    """The model cannot be pickled, because it cannot be imported by its name."""


def by_recipe(recipe: Callable[[], Any]) -> tuple[Callable[..., Any], tuple[Any]]:
    """Make the value that ``__reduce_ex__`` returns: a call that builds the object again.

    Raises:
        NotImportable: if the call or its arguments cannot be pickled.
    """
    if not _pickles_by_value():
        try:
            pickle.dumps(recipe)
        except NotImportable:
            raise
        except Exception as error:  # a user's objects may raise anything
            raise NotImportable(
                f"Expected a model and arguments that can be pickled, got this error: {error}. Pickle finds functions "
                "by name: move the model to a module that can be imported (no lambda, no function in a function), or "
                "use cloudpickle. Or save the posterior with `posterior.save(path)`, and read it with "
                "`scoreinfer.load(path, model)`."
            ) from error
    return _follow, (recipe,)


def can_be_pickled(value: Any) -> bool:
    """Say whether the pickler among the callers can pickle a value that `by_recipe` reduces."""
    if _pickles_by_value():
        return True
    try:
        pickle.dumps(value)
    except Exception:  # a user's objects may raise anything
        return False
    return True


def _follow(recipe: Callable[[], Any]) -> Any:
    return recipe()


def _pickles_by_value() -> bool:
    """Say whether a pickler of `BY_VALUE` is among the callers."""
    frame: Any = sys._getframe()
    while frame is not None:
        if BY_VALUE & set(frame.f_globals.get("__name__", "").split(".")):
            return True
        frame = frame.f_back
    return False
