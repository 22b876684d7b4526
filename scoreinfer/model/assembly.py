"""Assembly of a `Problem` from a model and its arguments."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.distributions import biject_to

from scoreinfer._program import own
from scoreinfer._tree import Layout
from scoreinfer._typing import PRESENT, Key, Sites, Values
from scoreinfer.model.arguments import abstract_trace, fix_parameters, infer_observed
from scoreinfer.model.designs import Designed
from scoreinfer.model.encoding import encoder
from scoreinfer.model.masks import Masks
from scoreinfer.model.reading import Design, Reader, look, wrong_shape
from scoreinfer.model.replay import LOG_DET, Script, Trace, fixed_key, is_data, needs_no_values, sum_terms
from scoreinfer.model.survey import Survey, close, draw_probes, probe_keys, refuse_seeded, take_survey
from scoreinfer.problem import Problem, Site


class Facts(NamedTuple):
    """Facts about a model that `check` reports and the problem does not hold.

    Args:
        survey: the measured properties of the model.
        script: the model with its arguments.
        inferred: observed sites that were found by filling arguments which are None.
        fixed: ``param`` and ``mutable`` sites, fixed at their initial values.
        pseudo: sites observed at a function of the latent sites.
        overlooked: latent sites that would receive arguments which are None.
        designs: sites of the design.
    """

    survey: Survey
    script: Script
    inferred: frozenset[str]
    fixed: tuple[str, ...]
    pseudo: frozenset[str]
    overlooked: frozenset[str]
    designs: tuple[str, ...] = ()


def read_problem(model: Any, args: tuple, kwargs: dict[str, Any], observed: Any = None) -> Problem:
    """Read a model with bound arguments.

    Raises:
        UnsupportedModel: if the model cannot be read.
        ValueError: if the data in the arguments do not fit the model.
    """
    return read_model(model, args, kwargs, observed)[0]


def read_model(model: Any, args: tuple, kwargs: dict[str, Any], observed: Any = None) -> tuple[Problem, Facts]:
    """Read a model with bound arguments: the problem, and further facts for `check`.

    Raises:
        UnsupportedModel: if the model cannot be read.
        ValueError: if the data in the arguments do not fit the model.
    """
    args, kwargs = jax.tree.map(own, (args, kwargs))
    base = needs_no_values(abstract_trace, functools.partial(model, *args, **kwargs))
    closed, fixed = fix_parameters(model, args, kwargs, base)
    run = functools.partial(closed, *args, **kwargs)
    given, pseudo = _given(run, base)
    fed = infer_observed(closed, args, kwargs, base) if observed is None else frozenset()
    designs = model.names if isinstance(model, Designed) else ()
    data = frozenset(given) - set(designs)
    names = (frozenset(observed) if observed is not None else data or fed) | set(designs)
    shapes = {name: shape for name, shape in given.items() if shape is not None}
    script = Script(run, names, shapes, (designs, model.designs) if isinstance(model, Designed) else None)
    survey = take_survey(script)
    refuse_seeded(survey)
    inferred = frozenset() if data else fed
    facts = Facts(survey, script, inferred, fixed, pseudo, fed - names, designs)
    problem = _problem(model, Design(closed, args, kwargs, script, survey), facts)
    recipe = functools.partial(read_problem, model, args, kwargs, observed)
    return dataclasses.replace(problem, recipe=recipe), facts


def _given(run: Callable[[], Any], base: Trace) -> tuple[dict[str, tuple[int, ...] | None], frozenset[str]]:
    """Find the sites with data in the arguments, and the sites observed at a function of the latent sites.

    Returns:
        The first kind by name, each with the batch shape that its data need if they are broader than its distribution
        (None otherwise). The names of the second kind.
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


class _Parts(NamedTuple):
    """The parts from which the functions of a problem are built.

    Args:
        survey: the measured properties of the model.
        script: the model with its arguments.
        data: names of the observed sites that have a density.
        example: an observation, used if its values do not matter.
        key: a random key, used if it does not matter.
    """

    survey: Survey
    script: Script
    data: list[str]
    example: Sites
    key: Key

    @property
    def layout(self) -> Layout:
        """Layout of the latent sites in ``z``."""
        return self.survey.layout

    def play(self, z: Float[Array, " dim"], wanted: Iterable[str], y: Sites | None = None) -> Values:
        """Run the model at ``z`` and ``y`` (None: at any data), and return the values of the ``wanted`` sites."""
        played = self.script.play(self.key, self.layout.unflatten(z), self.example if y is None else y)
        return {name: played[name]["value"] for name in wanted}


class _Densities(NamedTuple):
    """The log densities of a problem. See `Problem`."""

    log_prior: Callable[[Float[Array, " dim"]], Float[Array, ""]]
    log_likelihood: Callable[[Float[Array, " dim"], Sites], Float[Array, ""]]
    pointwise_log_likelihood: Callable[[Float[Array, " dim"], Sites], Sites] | None
    site_log_prior: Callable[[Float[Array, " dim"]], Sites]


def _densities(parts: _Parts) -> _Densities:
    survey, script, has_density = parts.survey, parts.script, not parts.survey.notes.draws_keys
    prior = frozenset(
        name for name in survey.terms if (name in survey.latents or LOG_DET in name) and name not in survey.after_data
    )

    def log_prior(z: Float[Array, " dim"]) -> Float[Array, ""]:
        terms = script.terms(parts.key, parts.layout.unflatten(z), parts.example)
        return sum_terms(terms, lambda name: name in prior)

    def site_log_prior(z: Float[Array, " dim"]) -> Sites:
        terms = script.terms(parts.key, parts.layout.unflatten(z), parts.example)
        return {name: terms[name] for name in survey.latents if name in prior}

    def log_likelihood(z: Float[Array, " dim"], y: Sites) -> Float[Array, ""]:
        if not has_density:
            raise ValueError(
                "Expected a likelihood with a density, but this model draws random numbers through `numpyro.prng_key` "
                "(`Problem.has_density` is False). Make the noise a sample site."
            )
        return sum_terms(script.terms(parts.key, parts.layout.unflatten(z), y), lambda name: name not in prior)

    def pointwise_log_likelihood(z: Float[Array, " dim"], y: Sites) -> Sites:
        terms = script.terms(parts.key, parts.layout.unflatten(z), y)
        return {name: terms[name] for name in parts.data}

    return _Densities(log_prior, log_likelihood, pointwise_log_likelihood if has_density else None, site_log_prior)


class _Bijections(NamedTuple):
    """The maps between ``z`` and the sites of a problem. See `Problem`."""

    constrain: Callable[[Float[Array, " dim"]], Values]
    after_data: Callable[[Float[Array, " dim"], Sites], Values] | None
    latent_sites: Callable[[Float[Array, " dim"]], Sites]
    unconstrain: Callable[[Sites], Float[Array, " dim"]]


def _bijections(parts: _Parts) -> _Bijections:
    survey, layout = parts.survey, parts.layout
    moving = [name for name in survey.latents if name not in survey.supports]
    bijectors = {name: biject_to(survey.supports[name]) for name in survey.latents if name in survey.supports}
    deterministic = [name for name, row in survey.table.items() if row.type == "deterministic"]
    late = [name for name in deterministic if name in survey.after_data]
    reported = [name for name in deterministic if name not in survey.after_data]

    def latent_sites(z: Float[Array, " dim"]) -> Sites:
        if moving:
            return parts.play(z, survey.latents)
        return {name: bijectors[name](point) for name, point in layout.unflatten(z).items()}

    def constrain(z: Float[Array, " dim"]) -> Values:
        return parts.play(z, [*survey.latents, *reported]) if reported else latent_sites(z)

    def after_data(z: Float[Array, " dim"], y: Sites) -> Values:
        return parts.play(z, late, y)

    def unconstrain(sites: Sites) -> Float[Array, " dim"]:
        missing = [name for name in survey.latents if name not in sites]
        if missing:
            raise ValueError(
                f"Expected a value for every latent site, got none for {', '.join(missing)}. Add these sites."
            )
        values = {name: jnp.asarray(sites[name]) for name in survey.latents}
        if not moving:
            return layout.flatten({name: bijectors[name].inv(value) for name, value in values.items()})
        return _points(parts.script.play(parts.key, sites=values | parts.example), layout)

    return _Bijections(constrain, after_data if late else None, latent_sites, unconstrain)


def _problem(model: Callable, design: Design, facts: Facts) -> Problem:
    survey, script = facts.survey, facts.script
    names = [name for name in survey.table if name in script.names]
    data = [name for name in names if name not in facts.designs]
    parts = _Parts(survey, script, data, {name: survey.sites[name][0] for name in names}, fixed_key())
    layout = parts.layout
    masks = Masks(survey, script, facts.designs)

    def observation(played: Trace) -> Sites:
        return masks.fill({name: played[name]["value"] for name in names}, masks.of(played))

    def simulate(key: Key) -> tuple[Float[Array, " dim"], Sites]:
        played = script.play(key)
        return _points(played, layout), observation(played)

    def simulate_observation(key: Key, z: Float[Array, " dim"], y: Any = None) -> Sites:
        design = {name: y[name] for name in facts.designs} if y is not None else {}
        return observation(script.play(key, layout.unflatten(z), design))

    encoders = {name: encoder(survey.table[name], survey.supports.get(name)) for name in names}

    def encode(y: Any) -> Sites:
        encoded = {name: encoders[name](y[name]) for name in names}
        return (
            encoded | {name + PRESENT: mask * 1.0 for name, mask in masks.at(y).items()} if facts.designs else encoded
        )

    not_simulable = _why_not_simulable(facts)
    sizes = zip(layout.names, layout.shapes, strict=True)
    return Problem(
        dim=layout.dim,
        latents=tuple(_site(name, survey, size=int(np.prod(shape))) for name, shape in sizes),
        observed=tuple(_site(name, survey) for name in names),
        **_densities(parts)._asdict(),
        **_bijections(parts)._asdict(),
        simulate=None if not_simulable else simulate,
        simulate_observation=None if not_simulable or survey.after_data & set(survey.latents) else simulate_observation,
        encode=encode,
        read=Reader(design, lambda y: masks.fill(y, masks.at(y)), _missing(model)),
        has_density=not survey.notes.draws_keys,
        not_simulable=not_simulable,
        model=model,
        designs=facts.designs,
    )


def _missing(model: Callable) -> dict[str, np.ndarray]:
    return {name: model.example[name] for name in model.missing} if isinstance(model, Designed) else {}


def _site(name: str, survey: Survey, size: int = 0) -> Site:
    row = survey.table[name]
    return Site(name, row.shape, row.dtype, row.words, size, survey.exchangeable.get(name))


def _points(played: Trace, layout: Layout) -> Float[Array, " dim"]:
    """Map the latent sites of a run to ``z``. Values that rounding put on the edge of a support stay finite."""
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
