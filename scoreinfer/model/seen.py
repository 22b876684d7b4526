"""Reading what the data of a model see of one site: the likelihood in the form that guidance needs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import seed, substitute, trace

from scoreinfer._program import Traced, execute
from scoreinfer._typing import Key
from scoreinfer.errors import Offence, UnsupportedModel
from scoreinfer.model.replay import Trace, fixed_key, is_data, layers, log_prob, unwrapped
from scoreinfer.score.likelihood import AbstractLikelihood, DensityLikelihood, GaussianLikelihood, SiteLikelihood

NUM_PROBES = 8
"""Draws of the site on which the likelihood is measured. Chosen by judgement."""
BASE = "_base"
"""Suffix of the noise of a site that is written as a function of noise, as NumPyro's reparametrisations write it."""
State = Float[Array, " dim"]
Entries = Float[Array, " entries"]


class Seen(NamedTuple):
    """What a model says of one of its sites, as a flat vector x.

    Args:
        likelihood: of the data, given x.
        log_prior: log density of x, where it is a sample site; else None.
        shape: shape of the site.
    """

    likelihood: AbstractLikelihood
    log_prior: Callable[[State], Float[Array, ""]] | None
    shape: tuple[int, ...]


def read_seen(site: str, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Seen:
    """Read what the data in the arguments see of one site.

    The likelihood is the first of these that fits: Gaussian, where the data are normal around linear functions of x;
    sites, where every entry depends on one component of x; Gaussian around non-linear functions; sites, where every
    entry's distribution has one parameter that depends on x, which is mapped to the real line; else any density.

    Args:
        site: name of a latent site with real support, or of a deterministic site made of latent noise
            (`scoreinfer.score_prior`).
        model: the NumPyro model.
        *args: the model's arguments, with data.
        **kwargs: the model's keyword arguments.

    Raises:
        UnsupportedModel: if there is no such site, its support is not the real line, or other sites are unknown.
        ValueError: if there are no data, or they see nothing of x.

    Exactness: exact: the log density is that of the data. Which form it has is measured on 8 draws of the site.

    >>> import numpyro
    >>> def model(y=None):
    ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    ...     numpyro.sample("y", dist.Poisson(jnp.exp(x.sum())), obs=y)
    >>> seen = read_seen("x", model, y=3)
    >>> type(seen.likelihood).__name__, float(seen.likelihood.predict(jnp.array([1.0, 1.5]))[0])  # the log of the rate
    ('SiteLikelihood', 2.5)
    """
    run = functools.partial(model, *args, **kwargs)
    played = trace(seed(run, fixed_key())).get_trace()
    _check_sites(site, played)
    shape = jnp.shape(played[site]["value"])

    def play(x: State) -> Trace:
        return trace(substitute(seed(run, fixed_key()), data={site: x.reshape(shape)})).get_trace()

    def draw(key: Key) -> Array:
        return jnp.ravel(trace(seed(run, key)).get_trace()[site]["value"])

    probes = execute(jax.vmap(draw), jax.random.split(fixed_key(), NUM_PROBES))
    likelihood = _traced(_likelihood(site, _Reading(play, probes)), probes[0])

    def log_prior(x: State) -> Float[Array, ""]:
        return log_prob(play(x)[site]).sum()

    return Seen(likelihood, Traced(log_prior, probes[0]) if played[site]["type"] == "sample" else None, shape)


def _traced(likelihood: AbstractLikelihood, x: State) -> AbstractLikelihood:
    """Trace the functions of a likelihood: programs then compile once for all data."""
    u = jax.eval_shape(likelihood.predict, x)
    arguments = {"predict": x, "log_sites": u, "log_ratio": u}
    own = {name: Traced(getattr(likelihood, name), of) for name, of in arguments.items() if hasattr(likelihood, name)}
    return dataclasses.replace(likelihood, **own)


def site_of(site: str, run: Callable[[], Any]) -> tuple[Callable[[Key], Array], tuple[int, ...]]:
    """Return a function that draws one site of a model without arguments, and its shape.

    Raises:
        UnsupportedModel: if there is no such site, or its support is not the real line.
    """
    played = trace(seed(run, fixed_key())).get_trace()
    _check_site(site, played)

    def draw(key: Key) -> Array:
        return trace(seed(run, key)).get_trace()[site]["value"]

    return draw, jnp.shape(played[site]["value"])


def _check_site(site: str, played: Trace) -> None:
    row = played.get(site)
    if row is None or row["type"] not in ("sample", "deterministic"):
        found = ", ".join(repr(name) for name, row in played.items() if row["type"] in ("sample", "deterministic"))
        raise UnsupportedModel((Offence(site, f"is no site of this model, which has {found}", "Name one"),))
    if row["type"] == "sample" and unwrapped(row["fn"].support) not in (constraints.real, constraints.real_vector):
        way_out = "Give it a real support, and transform it in the model"
        raise UnsupportedModel((Offence(site, "has a support other than the real line", way_out),))


def _check_sites(site: str, played: Trace) -> None:
    _check_site(site, played)
    if not any(row["type"] == "sample" and row["is_observed"] for row in played.values()):
        raise ValueError(
            f"Expected data in the model's arguments, got none: no site beside {site!r} is observed. Pass the data by "
            "the names that the model gives them."
        )
    others = [
        name for name, row in played.items()
        if row["type"] == "sample" and not row["is_observed"] and name not in (site, site + BASE)
    ]  # fmt: skip
    if others:
        way_out = f"Fix it, or make it part of {site!r}"
        raise UnsupportedModel(tuple(Offence(name, f"is unknown beside {site!r}", way_out) for name in others))


class _Reading(NamedTuple):
    """A model that can be run at given x, and a few draws of x."""

    play: Callable[[State], Trace]
    probes: Float[Array, "probes dim"]

    def terms(self, x: State) -> Entries:
        """Compute the log density of every observed number."""
        rows = [row for row in self.play(x).values() if row["type"] == "sample" and row["is_observed"]]
        return jnp.concatenate([jnp.ravel(log_prob(row)) for row in rows])

    def over_probes(self, function: Callable[[State], Any]) -> Any:
        """Compute a function at all draws."""
        return execute(lambda x: jax.lax.map(function, x), self.probes)


def _likelihood(site: str, reading: _Reading) -> AbstractLikelihood:
    slopes = np.asarray(reading.over_probes(jax.jacfwd(reading.terms)))
    depends = (slopes != 0).any(axis=0)  # NaN counts as dependent
    if not depends.any() and np.isfinite(reading.over_probes(reading.terms)).any():
        raise ValueError(
            f"The data see nothing of {site!r}: their density is the same for every value of it. Use the site in the "
            "model of the data."
        )
    gaussian = _gaussian(reading)
    if not depends.any():  # zero at all draws: perhaps not elsewhere
        return DensityLikelihood(lambda x: x, lambda x: reading.terms(x).sum())
    if gaussian is not None and _is_linear(reading, gaussian.predict):
        return gaussian
    if (depends.sum(axis=1) <= 1).all():
        return _by_component(reading, depends)
    return gaussian or _by_parameter(reading) or DensityLikelihood(lambda x: x, lambda x: reading.terms(x).sum())


def _is_linear(reading: _Reading, predict: Callable[[State], Entries]) -> bool:
    slopes = np.asarray(reading.over_probes(jax.jacfwd(predict)))
    return bool(np.allclose(slopes, slopes[:1], rtol=1e-4, atol=1e-5 * np.abs(slopes).max()))


def _observed(played: Trace) -> list[dict[str, Any]] | None:
    """List the observed sites, or None where there is a factor or a scaled site."""
    rows = [row for row in played.values() if row["type"] == "sample" and row["is_observed"]]
    return None if any(not is_data(row) or row["scale"] is not None for row in rows) else rows


def _kept(row: dict[str, Any]) -> np.ndarray:
    """Flag the entries of an observed site that no mask takes out; masks must not depend on x."""
    shape, kept = jnp.shape(row["value"]), np.array(True)
    for layer in layers(row["fn"]):
        if isinstance(layer, dist.MaskedDistribution):
            kept = kept & np.asarray(layer._mask)
    return np.flatnonzero(np.broadcast_to(kept, shape))


def _gaussian(reading: _Reading) -> GaussianLikelihood | None:
    """Read normal data with a noise that does not depend on x."""
    rows = _observed(reading.play(reading.probes[0]))
    if rows is None or not all(isinstance(layers(row["fn"])[-1], dist.Normal) for row in rows):
        return None
    names, kept = [row["name"] for row in rows], [_kept(row) for row in rows]

    def part(x: State, name: str) -> Entries:
        played = reading.play(x)

        def entries(row: dict[str, Any], kept: np.ndarray) -> Array:
            fn = layers(row["fn"])[-1]
            value = row["value"] if name == "value" else getattr(fn, name)
            return jnp.ravel(jnp.broadcast_to(value, jnp.shape(row["value"])))[kept]

        return jnp.concatenate([entries(played[row], which) for row, which in zip(names, kept, strict=True)])

    scales = np.asarray(reading.over_probes(lambda x: part(x, "scale")))
    if not np.allclose(scales, scales[:1], rtol=1e-5):
        return None
    first = reading.probes[0]
    y = part(first, "value").astype(first.dtype)
    return GaussianLikelihood(lambda x: part(x, "loc"), y, jnp.asarray(scales[0], first.dtype))


def _by_component(reading: _Reading, depends: np.ndarray) -> SiteLikelihood:
    """Make sites of the components that are seen, where every entry sees one of them at most."""
    components, first = np.flatnonzero(depends.any(axis=0)), reading.probes[0]
    active = depends.any(axis=1)
    which = np.searchsorted(components, depends.argmax(axis=1))

    def log_sites(u: Entries) -> Entries:
        terms = reading.terms(first.at[components].set(u))
        rest = jnp.where(active, 0.0, terms).sum() / len(components)  # what does not depend on x
        own = jnp.zeros_like(u).at[which].add(jnp.where(active, terms, 0.0))
        return own + rest

    return SiteLikelihood(lambda x: x[components], log_sites)


def _by_parameter(reading: _Reading) -> SiteLikelihood | None:
    """Make sites of the one parameter of each entry's distribution that depends on x."""
    rows = _observed(reading.play(reading.probes[0]))
    found = [(row["name"], _varying(reading, row), _kept(row)) for row in rows or ()]
    pairs = [(site, name, kept) for site, name, kept in found if name is not None]
    if not pairs or len(pairs) < len(found):
        return None
    first = reading.play(reading.probes[0])
    sizes = np.cumsum([len(kept) for _, _, kept in pairs])[:-1]

    def real(x: State) -> Entries:
        played = reading.play(x)
        return jnp.concatenate([_real(played[site], name)[kept] for site, name, kept in pairs])

    def log_sites(u: Entries) -> Entries:
        parts = zip(pairs, jnp.split(u, sizes), strict=True)
        return jnp.concatenate([_log_entries(first[site], name, kept, part) for (site, name, kept), part in parts])

    sites = SiteLikelihood(real, log_sites)
    own, whole = (np.asarray(reading.over_probes(f)) for f in (sites.log_density, lambda x: reading.terms(x).sum()))
    return sites if np.allclose(own, whole, rtol=1e-3, atol=1e-3) else None


def _varying(reading: _Reading, row: dict[str, Any]) -> str | None:
    """Name the only parameter of a site's distribution that depends on x; None where there is no such one."""
    fn, name = layers(row["fn"])[-1], row["name"]
    if fn.event_dim:
        return None

    def parameters(x: State) -> dict[str, Array]:
        base = layers(reading.play(x)[name]["fn"])[-1]
        return {key: jnp.asarray(getattr(base, key)) for key in base.arg_constraints}

    values = reading.over_probes(parameters)
    moving = [key for key, value in values.items() if not (np.asarray(value) == np.asarray(value[:1])).all()]
    fits = len(moving) == 1 and not isinstance(fn.arg_constraints[moving[0]], constraints.dependent.__class__)
    return moving[0] if fits else None


def _real(row: dict[str, Any], name: str) -> Entries:
    """Compute the real value of a distribution's parameter, entry by entry."""
    fn = layers(row["fn"])[-1]
    value = biject_to(fn.arg_constraints[name]).inv(getattr(fn, name))
    return jnp.ravel(jnp.broadcast_to(value, jnp.shape(row["value"])))


def _log_entries(row: dict[str, Any], name: str, kept: np.ndarray, u: Entries) -> Entries:
    """Compute the log density of a site's entries with another value of one parameter."""
    fn, shape = layers(row["fn"])[-1], jnp.shape(row["value"])

    def entries(value: Any) -> Array:
        return jnp.ravel(jnp.broadcast_to(value, shape))[kept]

    given = {key: entries(getattr(fn, key)) for key in fn.arg_constraints if key != name}
    moved = type(fn)(**given, **{name: biject_to(fn.arg_constraints[name])(u)})
    return moved.log_prob(entries(row["value"]))
