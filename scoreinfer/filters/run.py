"""Filtering a series, going on with new data, and what both return."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scoreinfer import errors
from scoreinfer._program import execute
from scoreinfer._tree import is_traced
from scoreinfer._typing import Key
from scoreinfer.filters import cycle
from scoreinfer.filters.base import LEAST_MEMBERS, AbstractFilter, EvidenceKind, Members, Predictive
from scoreinfer.filters.cycle import Cycles, Now
from scoreinfer.filters.to_arviz import to_arviz
from scoreinfer.model.series import read_series
from scoreinfer.model.states import Series, StateSpace


@dataclasses.dataclass(frozen=True)
class FilterRun:
    """Members of the state at every time, before and after each observation.

    Args:
        method: the method.
        series: the model, the times and the observations.
        cycles: what the filter left at every time, states as flat vectors.
        now: where the filter stands, for `extend`.
    """

    method: AbstractFilter
    series: Series
    cycles: Cycles
    now: Now
    source: Any = dataclasses.field(repr=False)

    @property
    def ts(self) -> Float[Array, " times"]:
        """The times."""
        return self.series.ts

    @property
    def forecast(self) -> Members:
        """Members before each observation, ``(times, members, *state)``, with log weights."""
        return self._shaped(self.cycles.forecast)

    @property
    def analysis(self) -> Members:
        """Members after each observation, ``(times, members, *state)``, with log weights."""
        return self._shaped(self.cycles.analysis.members)

    @property
    def predictive(self) -> Predictive:
        """The one-step forecast of every entry of every observation."""
        return self.cycles.analysis.predictive

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """Log evidence of all observations, as the method estimates it (see `log_evidence_kind`)."""
        return self.cycles.analysis.log_evidence.sum()

    @property
    def log_evidence_kind(self) -> EvidenceKind:
        """``"unbiased"`` (particles; the evidence itself, not its logarithm), ``"approximate"`` or ``"none"`` (NaN)."""
        return self.method.log_evidence_kind

    @property
    def replaced(self) -> Int[Array, " times"]:
        """Members that were not finite, and were replaced, at each time."""
        return self.cycles.replaced

    def mean(self) -> Float[Array, "times *state"]:
        """Compute the mean of the state given the observations so far."""
        return _moment(self.analysis)

    def sd(self) -> Float[Array, "times *state"]:
        """Compute the standard deviation of the state given the observations so far, with divisor N - 1."""
        members, num = self.analysis, self.now.members.log_weight.size
        centred = members._replace(x=(members.x - self.mean()[:, None]) ** 2)
        return jnp.sqrt(_moment(centred) * num / (num - 1))

    def to_arviz(self, key: Key, **options: Any) -> Any:
        """Convert the run to ArviZ groups. `scoreinfer.filters.to_arviz` lists the options and what it raises."""
        return to_arviz(key, self, **options)

    def _shaped(self, members: Members) -> Members:
        return members._replace(x=members.x.reshape(*members.log_weight.shape, *self.series.model.shape))


def _moment(members: Members) -> Float[Array, "times *state"]:
    weight = jax.nn.softmax(members.log_weight, axis=1)
    return jax.vmap(lambda w, x: jnp.tensordot(w, x, 1))(weight, members.x)


def filter(  # noqa: A001 - the verb of the field
    key: Key,
    model: Callable[..., Any] | StateSpace,
    site: str | None = None,
    *args: Any,
    method: AbstractFilter,
    num_members: int,
    **kwargs: Any,
) -> FilterRun:
    """Filter a series: draw p(x_k | y_1, ..., y_k) at every time k.

    Args:
        key: random key.
        model: a NumPyro model with known parameters, or a `scoreinfer.StateSpace`.
        site: the site of the state in a NumPyro model: ``EulerMaruyama``, `scoreinfer.PhysicsPath`, or sampled in the
            body of NumPyro's ``scan``. Not for a state space.
        *args: the model's arguments, with data, as `numpyro.infer.MCMC.run` takes them.
        method: the method, such as `scoreinfer.filters.BootstrapFilter()`.
        num_members: number N of members.
        **kwargs: the model's keyword arguments, such as ``y=data``. For a state space: ``y``, the observations, times
            first; and ``ts``, their times, or its ``start`` + 1, 2, ... NaN entries are missing in both.

    Returns:
        The run. It may be differentiated by what the state space closes over, and used inside a NumPyro model:
        ``numpyro.factor("y", filter(...).log_evidence)``.

    Raises:
        ValueError: if shapes or times do not fit, there are fewer than three members, the method cannot filter this
            model, or no member is finite at some time.
        UnsupportedModel: if the site is no process in time, the model has unknown parameters, or an observation depends
            on two times.
        TypeError: if a part of the state space, or an argument, is not what it should be.

    Exactness: as the method's.

    Example:
        >>> import numpyro.distributions as dist
        >>> import scoreinfer as si
        >>> space = si.StateSpace(
        ...     initial=dist.Normal(0.0, 1.0),
        ...     transition=lambda t0, t1, x: dist.Normal(0.9 * x, 0.5),
        ...     observation=lambda t, x: dist.Poisson(jnp.exp(x)),
        ... )
        >>> run = si.filter(
        ...     jax.random.key(0), space, method=si.filters.BootstrapFilter(), num_members=100, y=jnp.array([1.0, 0.0])
        ... )
        >>> run.analysis.x.shape, run.log_evidence_kind
        ((2, 100), 'unbiased')
    """
    if num_members < LEAST_MEMBERS:
        raise ValueError(
            f"`num_members` must be at least {LEAST_MEMBERS}, got {num_members}: fewer have no usable variance. "
            "Twenty and more are usual; particle methods need hundreds."
        )
    series = read_series(model, site, args, kwargs)
    method.check(series.model)

    def whole(key: Key, ts: Array, y: Array) -> tuple[Now, Cycles]:
        for_first, for_cycles = jax.random.split(key)
        now = cycle.begin(for_first, method, series.model, num_members, series.start)
        return cycle.run(for_cycles, method, series.model, now, ts, y)

    now, cycles = execute(whole, key, series.ts, series.y)
    return _checked(FilterRun(method, series, cycles, now, (model, site)))


def extend(key: Key, run: FilterRun, *args: Any, **kwargs: Any) -> FilterRun:
    """Go on with new observations from where a run stands; nothing is computed again.

    Args:
        key: random key, another than the run's.
        run: the run so far.
        *args: for a NumPyro model, its arguments with the longer series: the times of the run, and further ones.
        **kwargs: its keyword arguments. For a state space ``y``, the new observations, and ``ts``, their times, or
            the last time + 1, 2, ...

    Returns:
        The run with the new times at its end.

    Raises:
        ValueError: if shapes or times do not fit.

    Exactness: as the method's: the same law as filtering the whole series at once.
    """
    series, more = run.series, _more(run, args, kwargs)
    go_on = lambda key, now, ts, y: cycle.run(key, run.method, more.model, now, ts, y)  # noqa: E731
    now, cycles = execute(go_on, key, run.now, more.ts, more.y)
    ts, y, joined = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]), (series.ts, series.y, run.cycles), (more.ts, more.y, cycles)
    )
    return _checked(FilterRun(run.method, series._replace(model=more.model, ts=ts, y=y), joined, now, run.source))


def _more(run: FilterRun, args: tuple, kwargs: dict[str, Any]) -> Series:
    """Read the observations that a run has not met."""
    model, site = run.source
    if site is None:
        return read_series(dataclasses.replace(model, start=run.now.t), None, args, kwargs)
    whole, num = read_series(model, site, args, kwargs), run.ts.size
    if whole.ts.size <= num or not jnp.array_equal(whole.ts[:num], run.ts):
        raise ValueError(
            f"`extend` needs the {num} times of the run and further ones, got {whole.ts.size} times"
            f"{'' if whole.ts.size <= num else ' that begin otherwise'}. Pass the longer series."
        )
    return whole._replace(ts=whole.ts[num:], y=whole.y[num:])


def _checked(run: FilterRun) -> FilterRun:
    """Tell how many members were replaced.

    Raises:
        ValueError: if at some time no member was finite after the forecast, or an analysis returned numbers that are
            not finite.
    """
    if is_traced(run.replaced):
        return run
    replaced, num = np.asarray(run.replaced), run.now.members.log_weight.size
    lost, broken = replaced == num, ~np.asarray(_is_sound(run))
    if (lost | broken).any():
        first = int(np.argmax(lost | broken))
        now = f"{float(run.ts[first]):g}"
        if lost[first]:
            raise ValueError(
                f"No member is finite after the forecast to time {now}: the transition returns numbers that are not "
                "finite. Use smaller solver steps, or bound the state."
            )
        raise ValueError(
            f"The analysis by `{type(run.method).__name__}` at time {now} returns members or a log evidence that are "
            "not finite, from finite forecasts. Look at the observation and its law there: a variance of zero, or a "
            "parameter that overflows, does this."
        )
    if replaced.any():
        errors.warn(
            f"{int(replaced.sum())} of {replaced.size * num} members were not finite after a forecast, first at time "
            f"{float(run.ts[int(np.argmax(replaced > 0))]):g}. They were replaced by others (`run.replaced`).",
            errors.DivergenceWarning,
        )
    return run


def _is_sound(run: FilterRun) -> Bool[Array, " times"]:
    """Say where members are finite and log evidences numbers, minus infinity included; a method may have none."""
    analysis = run.cycles.analysis
    finite = jnp.isfinite(analysis.members.x).all(axis=(1, 2)) & ~jnp.isnan(analysis.members.log_weight).any(axis=1)
    return finite & ((run.log_evidence_kind == "none") | (analysis.log_evidence < jnp.inf))
