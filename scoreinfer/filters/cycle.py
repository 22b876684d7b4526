"""The cycle of a filter: forecast, repair, analyse; one scan over the times of a series."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer._typing import Key
from scoreinfer.filters.base import AbstractFilter, Analysis, Members, Memory, Predictive, predict, simulated, weighed
from scoreinfer.markov import Entries, MarkovModel, Observed, Time
from scoreinfer.montecarlo.resampling import multinomial


class Now(NamedTuple):
    """Where a filter stands.

    Args:
        t: the time.
        members: the members given all observations up to ``t``.
        memory: what the method has learned.
    """

    t: Float[Array, ""]
    members: Members
    memory: Memory


class Cycles(NamedTuple):
    """What a filter leaves at every time.

    Args:
        forecast: the members before the observation.
        analysis: the members after it, its evidence, and its forecast.
        replaced: number of members that were not finite after the forecast.
        memory: the method's memory after the analysis.
    """

    forecast: Members
    analysis: Analysis
    replaced: Int[Array, " times"]
    memory: Any


def begin(key: Key, method: AbstractFilter, model: MarkovModel, num: int, start: Time) -> Now:
    """Draw the first members."""
    for_members, for_memory = jax.random.split(key)
    first = Members(jax.vmap(model.initial)(jax.random.split(for_members, num)), jnp.zeros(num))
    return Now(start, first, method.init(for_memory, first))


def run(
    key: Key,
    method: AbstractFilter,
    model: MarkovModel,
    now: Now,
    ts: Float[Array, " times"],
    y: Float[Array, "times entries"],
) -> tuple[Now, Cycles]:
    """Go on from where a filter stands, through all observations.

    A time at which nothing is observed is a forecast only.
    """

    def step(now: Now, inputs: tuple[Key, Time, Entries]) -> tuple[Now, Cycles]:
        key, t, y = inputs
        for_forecast, for_repair, for_analysis = jax.random.split(key, 3)
        for_forecast, for_blind = jax.random.split(for_forecast) if method.looks_ahead else [for_forecast] * 2
        y = jnp.where(model.observed.present(t), y, jnp.nan)
        members = jax.lax.cond(
            t > now.t,
            lambda: method.forecast(for_forecast, now.memory, model, now.t, t, now.members, y),
            lambda: now.members,
        )
        members, replaced = repaired(for_repair, method, members)
        memory, analysis = jax.lax.cond(
            jnp.isnan(y).all(),
            lambda: (now.memory, unchanged(method, now.memory, t, members, model.observed)),
            lambda: method.analyse(for_analysis, now.memory, t, members, model.observed, y),
        )
        if method.looks_ahead:
            analysis = analysis._replace(predictive=blind(for_blind, method, model, now, t))
        return Now(t, analysis.members, memory), Cycles(members, analysis, replaced, memory)

    return jax.lax.scan(step, now, (jax.random.split(key, ts.size), ts, y))


def blind(key: Key, method: AbstractFilter, model: MarkovModel, now: Now, t: Time) -> Predictive:
    """Forecast the observation by the model's own transition, for methods whose members have looked at it."""
    for_moves, for_repair = jax.random.split(key)
    members = jax.lax.cond(t > now.t, lambda: simulated(for_moves, model, now.t, t, now.members), lambda: now.members)
    return predict(model.observed, t, repaired(for_repair, method, members)[0])


def unchanged(method: AbstractFilter, memory: Memory, t: Time, members: Members, observed: Observed) -> Analysis:
    """Keep the members where nothing is observed."""
    return Analysis(*weighed(members, jnp.zeros(())), method.foresee(memory, t, members, observed))


def repaired(key: Key, method: AbstractFilter, members: Members) -> tuple[Members, Int[Array, ""]]:
    """Replace members that are not finite by others, drawn by weight, and count them.

    Where the weights are particles' (the evidence is unbiased), a replaced one has weight zero: a state that the model
    cannot go on from has likelihood zero. Otherwise the copy counts as a member.
    """
    bad = ~jnp.isfinite(members.x).all(axis=1)
    donors = multinomial(key, jnp.where(bad, -jnp.inf, members.log_weight), bad.size)
    x = jnp.where(bad[:, None], members.x[donors], members.x)
    weightless = bad & (method.log_evidence_kind == "unbiased")
    return Members(x, jnp.where(weightless, -jnp.inf, members.log_weight)), bad.sum()
