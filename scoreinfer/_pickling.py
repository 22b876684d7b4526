"""Pickling by recipe: what holds the functions of a model is made again from the model, which pickle finds by name."""

import pickle
import sys
from collections.abc import Callable
from typing import Any

BY_VALUE = {"cloudpickle", "dill"}
"""Packages that pickle lambdas and local functions, too."""


class NotImportable(pickle.PicklingError):
    """A model that cannot be pickled, since it cannot be imported by its name."""


def by_recipe(recipe: Callable[[], Any]) -> tuple[Callable[..., Any], tuple[Any]]:
    """Answer ``__reduce_ex__``: pickle a call that makes the object again.

    Raises:
        NotImportable: where the call, or what it is given, cannot be pickled.
    """
    if not _pickles_by_value():
        try:
            pickle.dumps(recipe)
        except NotImportable:
            raise
        except Exception as error:  # whatever a user's objects make a pickler raise
            raise NotImportable(
                f"The model or its arguments cannot be pickled: {error}. Pickle finds functions by name: move the "
                "model to a module that can be imported (no lambda, no function in a function), or use cloudpickle. Or "
                "keep the posterior with `posterior.save(path)`, and read it with `scoreinfer.load(path, model)`."
            ) from error
    return _follow, (recipe,)


def _follow(recipe: Callable[[], Any]) -> Any:
    return recipe()


def _pickles_by_value() -> bool:
    """Say whether one of the picklers that need no names is at work."""
    frame: Any = sys._getframe()
    while frame is not None:
        if BY_VALUE & set(frame.f_globals.get("__name__", "").split(".")):
            return True
        frame = frame.f_back
    return False
