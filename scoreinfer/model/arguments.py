"""The model's arguments: binding them, and finding the sites that receive the arguments which are None."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from scoreinfer._tree import is_traced
from scoreinfer._typing import Key
from scoreinfer.model.replay import Open, Trace, compiled, fixed_key, is_data


def bind(model: Any, args: tuple, kwargs: dict[str, Any], observed: Any) -> tuple[tuple, dict[str, Any], Any]:
    """Bind the arguments to the model's signature, so that positional, keyword and default arguments are equivalent.

    In a single-precision session, double-precision JAX arrays become NumPy arrays, because JAX would warn at every
    operation on them.

    Returns:
        The arguments, the keyword arguments, and the names of the observed sites (None if not given).

    Raises:
        TypeError: if ``observed`` is no tuple of names and the model has no such parameter, or the arguments do not
            fit the model's signature.
    """
    args, kwargs = _in_session_precision(args), _in_session_precision(kwargs)
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        signature = None
    named = isinstance(observed, tuple | list) and all(isinstance(name, str) for name in observed)
    if observed is not None and not named:
        if signature is None or "observed" not in signature.parameters:
            raise TypeError(
                f"Expected `observed` to be a tuple of site names, got {type(observed).__name__}. "
                "Write `observed=('name',)`."
            )
        kwargs, observed = kwargs | {"observed": observed}, None
    if signature is None:
        return args, kwargs, observed
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args, bound.kwargs, observed


def _in_session_precision(arguments: Any) -> Any:
    def too_wide(leaf: Any) -> bool:
        number = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.number) and not is_traced(leaf)
        return number and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype

    if not any(map(too_wide, jax.tree.leaves(arguments))):
        return arguments
    return jax.tree.map(lambda leaf: np.asarray(leaf) if too_wide(leaf) else leaf, arguments)


class _Blank:
    """A placeholder for data that are not given. Any item, attribute or call of it returns another placeholder."""

    __iter__ = None

    def __getitem__(self, _: Any) -> "_Blank":
        return _Blank()

    def __getattr__(self, name: str) -> "_Blank":
        if name.startswith("__") or name in ("shape", "dtype", "ndim", "size"):
            raise AttributeError(name)
        return _Blank()

    def __call__(self, *_: Any, **__: Any) -> "_Blank":
        return _Blank()

    def __contains__(self, _: Any) -> bool:
        return True


class _FindBlanks(Messenger):
    """Samples the sites that observe a `_Blank`, and stores their names."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.found: set[str] = set()
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and isinstance(msg["value"], _Blank):
            self.found.add(msg["name"])
            msg["value"], msg["is_observed"] = None, False


def abstract_trace(run: Callable[[], Any]) -> Trace:
    """Trace a model without computing values. Its arrays have shapes only."""
    traces: list[Trace] = []
    jax.eval_shape(lambda key: traces.append(trace(seed(Open(run, frozenset()), key)).get_trace()), fixed_key())
    return traces[0]


def _fed_by_blank(run: Callable[[], Any]) -> frozenset[str]:
    finder = _FindBlanks(run)
    abstract_trace(finder)
    return frozenset(finder.found)


def _fed_by_array(run: Callable[[], Any], base: Trace) -> frozenset[str]:
    sites = abstract_trace(run)
    found = [name for name, site in sites.items() if is_data(site) and name in base and not is_data(base[name])]
    fits = all(jnp.shape(sites[name]["value"]) == tuple(sites[name]["fn"].shape()) for name in found)
    return frozenset(found) if fits else frozenset()


def infer_observed(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any], base: Trace) -> frozenset[str]:
    """Find the sites that receive the arguments which are None.

    The first attempt passes a placeholder. It fails if the model computes with its data. The second attempt passes
    arrays with the shapes of the model's own sites, the last site first.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: leaf is None)
    slots = [i for i, leaf in enumerate(leaves) if leaf is None]
    if not slots:
        return frozenset()

    def filled(fillers: Mapping[int, Any]) -> Callable[[], Any]:
        args, kwargs = jax.tree.unflatten(treedef, [fillers.get(i, leaf) for i, leaf in enumerate(leaves)])
        return functools.partial(model, *args, **kwargs)

    def attempt(find: Callable[..., frozenset[str]], *given: Any) -> frozenset[str]:
        try:
            return find(*given)
        except Exception:  # a model may raise anything for data that it does not expect
            return frozenset()

    together = attempt(_fed_by_blank, filled(dict.fromkeys(slots, _Blank())))
    if together:
        return together
    samples = [site for site in base.values() if site["type"] == "sample" and not site["is_observed"]]
    shapes = dict.fromkeys((jnp.shape(site["value"]), jnp.result_type(site["value"])) for site in reversed(samples))
    found: frozenset[str] = frozenset()
    for slot in slots:
        fed = attempt(_fed_by_blank, filled({slot: _Blank()}))
        for shape, dtype in shapes:
            fed = fed or attempt(_fed_by_array, filled({slot: np.ones(shape, dtype)}), base)
        found |= fed
    return found


def fix_parameters(model: Any, args: tuple, kwargs: dict[str, Any], base: Trace) -> tuple[Any, tuple[str, ...]]:
    """Fix ``param`` and ``mutable`` sites at their initial values, as NumPyro's MCMC does.

    Returns:
        The model with these sites fixed, and their names.
    """
    names = tuple(name for name, site in base.items() if site["type"] in ("param", "mutable"))
    if not names:
        return model, ()

    def values(key: Key) -> dict[str, Any]:
        played = trace(seed(Open(functools.partial(model, *args, **kwargs), frozenset()), key)).get_trace()
        return {name: played[name]["value"] for name in names}

    return substitute(model, data=compiled(values, fixed_key())(fixed_key())), names
