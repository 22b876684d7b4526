"""From a model and its arguments to a `Problem`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.distributions import biject_to, constraints

from scoreinfer._program import own
from scoreinfer._tree import Layout
from scoreinfer._typing import Key, Sites, Values
from scoreinfer.model.arguments import abstract_trace, fix_parameters, infer_observed
from scoreinfer.model.encoding import encoder, fill
from scoreinfer.model.reading import Design, Reader, look, wrong_shape
from scoreinfer.model.replay import LOG_DET, Script, Trace, fixed_key, is_data, needs_no_values, sum_terms
from scoreinfer.model.survey import Survey, close, draw_probes, probe_keys, refuse_seeded, take_survey
from scoreinfer.problem import Problem, Site


class Facts(NamedTuple):
    """What `check` says besides what is in the problem."""

    survey: Survey
    script: Script
    inferred: frozenset[str]
    fixed: tuple[str, ...]
    pseudo: frozenset[str]
    overlooked: frozenset[str]


def read_problem(model: Any, args: tuple, kwargs: dict[str, Any], observed: Any = None) -> Problem:
    """Read a model with bound arguments."""
    return read_model(model, args, kwargs, observed)[0]


def read_model(model: Any, args: tuple, kwargs: dict[str, Any], observed: Any = None) -> tuple[Problem, Facts]:
    """Read a model with bound arguments: the problem, and what else `check` has to say."""
    args, kwargs = jax.tree.map(own, (args, kwargs))
    base = needs_no_values(abstract_trace, functools.partial(model, *args, **kwargs))
    closed, fixed = fix_parameters(model, args, kwargs, base)
    run = functools.partial(closed, *args, **kwargs)
    given, pseudo = _given(run, base)
    fed = infer_observed(closed, args, kwargs, base) if observed is None else frozenset()
    names = frozenset(observed) if observed is not None else frozenset(given) or fed
    script = Script(run, names, {name: shape for name, shape in given.items() if shape is not None})
    survey = take_survey(script)
    refuse_seeded(survey)
    inferred = frozenset() if given else fed
    facts = Facts(survey, script, inferred, fixed, pseudo, fed - names)
    problem = _problem(model, Design(closed, args, kwargs, script, survey), facts)
    recipe = functools.partial(read_problem, model, args, kwargs, observed)
    return dataclasses.replace(problem, recipe=recipe), facts


def _given(run: Callable[[], Any], base: Trace) -> tuple[dict[str, tuple[int, ...] | None], frozenset[str]]:
    """Find the sites that the arguments give data for, and sites "observed" at a function of the latent ones.

    For data broader than their distribution, the batch shape they need.
    """
    sites = {name: site for name, site in base.items() if is_data(site)}
    if not sites:
        return {}, frozenset()
    values = draw_probes(lambda key: look(run, key).values, probe_keys(3))
    pseudo = frozenset(name for name, value in values.items() if not close(value, value[:1]))
    return {name: _broad_shape(site) for name, site in sites.items() if name not in pseudo}, pseudo


def _broad_shape(site: dict[str, Any]) -> tuple[int, ...] | None:
    shape, own = jnp.shape(site["value"]), tuple(site["fn"].shape())
    if shape in ((), own):
        return None
    try:
        fits = jnp.broadcast_shapes(shape, own) == shape
    except ValueError:
        fits = False
    if not fits or site.get("_control_flow_done"):
        raise ValueError(wrong_shape(site["name"], own, shape))
    return shape[: len(shape) - site["fn"].event_dim]


def _problem(model: Callable, design: Design, facts: Facts) -> Problem:
    survey, script = facts.survey, facts.script
    layout, frozen_key = survey.layout, fixed_key()
    names = [name for name in survey.table if name in script.names]
    example = {name: survey.sites[name][0] for name in names}
    prior = frozenset(
        name for name in survey.terms if (name in survey.latents or LOG_DET in name) and name not in survey.after_data
    )
    moving = [name for name in survey.latents if name not in survey.supports]
    bijectors = {name: biject_to(survey.supports[name]) for name in survey.latents if name in survey.supports}
    reported = [n for n, row in survey.table.items() if row.type == "deterministic" and n not in survey.after_data]
    has_density = not survey.notes.draws_keys

    def log_prior(z: Float[Array, " dim"]) -> Float[Array, ""]:
        return sum_terms(script.terms(frozen_key, layout.unflatten(z), example), lambda name: name in prior)

    def log_likelihood(z: Float[Array, " dim"], y: Sites) -> Float[Array, ""]:
        if not has_density:
            raise ValueError(
                "This model draws random numbers through `numpyro.prng_key`, so its likelihood has no density "
                "(`Problem.has_density` is False). Make the noise a sample site to have one."
            )
        return sum_terms(script.terms(frozen_key, layout.unflatten(z), y), lambda name: name not in prior)

    def pointwise_log_likelihood(z: Float[Array, " dim"], y: Sites) -> Sites:
        terms = script.terms(frozen_key, layout.unflatten(z), y)
        return {name: terms[name] for name in names}

    def replayed(z: Float[Array, " dim"], wanted: list[str]) -> Values:
        played = script.play(frozen_key, layout.unflatten(z), example)
        return {name: played[name]["value"] for name in wanted}

    def latent_sites(z: Float[Array, " dim"]) -> Sites:
        if moving:
            return replayed(z, list(survey.latents))
        return {name: bijectors[name](point) for name, point in layout.unflatten(z).items()}

    def constrain(z: Float[Array, " dim"]) -> Values:
        return replayed(z, [*survey.latents, *reported]) if reported else latent_sites(z)

    def unconstrain(sites: Sites) -> Float[Array, " dim"]:
        missing = [name for name in survey.latents if name not in sites]
        if missing:
            raise ValueError(f"Expected a value for every latent site, got none for {', '.join(missing)}.")
        values = {name: jnp.asarray(sites[name]) for name in survey.latents}
        if not moving:
            return layout.flatten({name: bijectors[name].inv(value) for name, value in values.items()})
        return _points(script.play(frozen_key, sites=values | example), layout)

    def simulate(key: Key) -> tuple[Float[Array, " dim"], Sites]:
        played = script.play(key)
        return _points(played, layout), observation(played)

    def simulate_observation(key: Key, z: Float[Array, " dim"]) -> Sites:
        return observation(script.play(key, layout.unflatten(z)))

    def observation(played: Trace) -> Sites:
        return {name: filled(name, played[name]["value"]) for name in names}

    def filled(name: str, value: Array) -> Array:
        if name not in survey.masks:
            return value
        return fill(survey.supports.get(name, constraints.real), survey.masks[name], value)

    encoders = {name: encoder(survey.table[name], survey.supports.get(name)) for name in names}
    not_simulable = _why_not_simulable(facts)
    reader = Reader(design, filled)
    return Problem(
        dim=layout.dim,
        latents=tuple(
            _site(name, survey, size=int(np.prod(shape)))
            for name, shape in zip(layout.names, layout.shapes, strict=True)
        ),
        observed=tuple(_site(name, survey) for name in names),
        log_prior=log_prior,
        log_likelihood=log_likelihood,
        constrain=constrain,
        latent_sites=latent_sites,
        unconstrain=unconstrain,
        simulate=None if not_simulable else simulate,
        simulate_observation=None if not_simulable or survey.after_data & set(survey.latents) else simulate_observation,
        encode=lambda y: {name: encoders[name](y[name]) for name in names},
        read=reader,
        has_density=has_density,
        not_simulable=not_simulable,
        pointwise_log_likelihood=pointwise_log_likelihood if has_density else None,
        model=model,
    )


def _site(name: str, survey: Survey, size: int = 0) -> Site:
    row = survey.table[name]
    return Site(name, row.shape, row.dtype, row.words, size, survey.exchangeable.get(name))


def _points(played: Trace, layout: Layout) -> Float[Array, " dim"]:
    """Unconstrain the latent sites of a run; values rounded onto the edge of a support stay finite."""
    z = layout.flatten({n: biject_to(played[n]["fn"].support).inv(played[n]["value"]) for n in layout.names})
    edge = -jnp.log(jnp.finfo(z.dtype).tiny)
    return jnp.nan_to_num(z, nan=jnp.nan, posinf=edge, neginf=-edge)


def _why_not_simulable(facts: Facts) -> str:
    survey = facts.survey
    factors = [name for name, row in survey.table.items() if row.is_factor]
    reasons = [
        f"{', '.join(names)} {what}"
        for names, what in (
            (list(dict.fromkeys(survey.notes.improper)), "has an improper prior"),
            (factors, "is a `numpyro.factor`"),
            (sorted(facts.pseudo), "is observed at a function of the latent sites"),
        )
        if names
    ]
    return "; ".join(reasons)
