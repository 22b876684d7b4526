"""Whether a model's density describes its simulator, site by site.

It need not: a censored distribution may draw uncensored values, a scaled or masked site is drawn as if it were not. Let
a value x come from p or from p' with equal chances, and L = log p(x) - log p'(x). Then for every function g

    E[(1 - sigma(L)) g(L)] over x of p  =  E[sigma(L) g(L)] over x of p',

with sigma the logistic function. Both sides are bounded, no derivative is needed, and supports may move. For observed
sites p and p' belong to neighbouring parameters. For a latent site p' is the prior moved by a constant.

References: Menon and Ong 2016, ICML, "Linking losses for density ratio and class-probability estimation" (calibrated
log density ratios).
"""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._tree import own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.problem import Problem

NUM_PAIRS = 2048
SCALES = (1.0, 0.1, 0.01)
"""Distances of neighbouring parameters, in standard deviations of the prior: data may be more or less informative."""
MAX_Z = 6.5
"""Standard errors that are noise: one right model in ten thousand million is taken for wrong by one comparison."""


_Cache = weakref.WeakKeyDictionary[Problem, tuple[str, ...]]
_LATENTS: _Cache = weakref.WeakKeyDictionary()
_OBSERVED: _Cache = weakref.WeakKeyDictionary()


@own_broadcasting
def misdrawn_latents(problem: Problem) -> tuple[str, ...]:
    """Name the latent sites whose prior draws the prior density does not describe; none where there are no draws.

    Exactness: a test: differences smaller than its noise, with 2048 pairs of draws, go unseen.
    """
    if problem not in _LATENTS:
        scores = np.zeros(0)
        if problem.simulate is not None and problem.has_density and problem.latents:
            scores = np.asarray(jax.jit(lambda key: _latent_scores(problem, key))(jax.random.key(0)))
        _LATENTS[problem] = tuple(
            site.name for site, score in zip(problem.latents, scores, strict=False) if score > MAX_Z
        )
    return _LATENTS[problem]


@own_broadcasting
def misdrawn_data(problem: Problem) -> tuple[str, ...]:
    """Name the first observed site whose simulated data its density does not describe; none where it has none.

    Exactness: as for `misdrawn_latents`.
    """
    if problem not in _OBSERVED:
        scores = np.zeros(0)
        if problem.observed and problem.simulate_observation and problem.pointwise_log_likelihood:
            scores = np.asarray(jax.jit(lambda key: _observed_scores(problem, key))(jax.random.key(1)))
        names = [site.name for site, score in zip(problem.observed, scores, strict=False) if score > MAX_Z]
        _OBSERVED[problem] = tuple(names[:1])
    return _OBSERVED[problem]


def say_misdrawn(sites: tuple[str, ...]) -> str:
    """Say what is wrong with sites whose density does not describe their draws, and what to do."""
    return (
        f"the density of {', '.join(sites)} does not describe what the model draws there (as under "
        "`numpyro.handlers.scale`, a mask, or a distribution that censors). Weights, kernels and certificates follow "
        "the density; for what compares with simulations, write a model that draws what its density describes."
    )


def _prior_draws(problem: Problem, key: Key, num: int) -> tuple[Float[Array, "num dim"], Float[Array, " dim"]]:
    """Draw from the prior; compute the standard deviations, too."""
    assert problem.simulate is not None
    simulate = problem.simulate
    z = jax.vmap(lambda key: simulate(key)[0])(jax.random.split(key, num))
    return z, jnp.std(z, axis=0) + 1e-12


def _latent_scores(problem: Problem, key: Key) -> Float[Array, " latents"]:
    """Compare the prior with itself moved, one latent site at a time."""
    sizes = [site.size for site in problem.latents]
    blocks = jnp.repeat(jnp.eye(len(sizes)), jnp.array(sizes), axis=1, total_repeat_length=problem.dim)
    z, spread = _prior_draws(problem, key, 2 * NUM_PAIRS)
    middle = jnp.median(z, axis=0)

    def log_ratio(x: Array, move: Array) -> Array:
        return jax.vmap(lambda x: problem.log_prior(x) - problem.log_prior(x - move))(x)

    def one(block: Array) -> Array:
        own, moved = z[:NUM_PAIRS], z[NUM_PAIRS:]
        move = block * spread / jnp.sqrt(block.sum())
        others = moved + move

        def side(x: Array) -> Array:  # which of the two a value lies nearer to: seen where a density says nothing
            return jnp.tanh((middle + 0.5 * move - x) @ (block / spread))

        ratios = log_ratio(own, move), log_ratio(others, move)
        by_ratio = _z_score(*ratios, *(jnp.tanh(0.5 * ratio) for ratio in ratios))
        return jnp.maximum(by_ratio, _z_score(*ratios, side(own), side(others)))

    return jax.lax.map(one, blocks)


def _observed_scores(problem: Problem, key: Key) -> Float[Array, " observed"]:
    """Compare neighbouring parameters by what each makes of the observed sites, up to each of these in turn."""
    names = [site.name for site in problem.observed]
    for_prior, for_pairs = jax.random.split(key)
    z, spread = _prior_draws(problem, for_prior, NUM_PAIRS)

    def log_likelihoods(z: Array, y: Sites) -> Array:
        assert problem.pointwise_log_likelihood is not None
        terms = problem.pointwise_log_likelihood(z, y)
        return jnp.cumsum(jnp.stack([jnp.sum(terms[name]) for name in names]))

    def pair(key: Key, z: Array, scale: Array) -> tuple[Array, Array]:
        assert problem.simulate_observation is not None
        for_move, for_one, for_other = jax.random.split(key, 3)
        other = z + scale * spread * jax.random.normal(for_move, z.shape, z.dtype)
        y, y_other = problem.simulate_observation(for_one, z), problem.simulate_observation(for_other, other)
        own = log_likelihoods(z, y) - log_likelihoods(other, y)
        return own, log_likelihoods(z, y_other) - log_likelihoods(other, y_other)

    def at(scale: Array) -> Array:
        keys = jax.random.split(for_pairs, NUM_PAIRS)
        own, others = jax.vmap(lambda key, z: pair(key, z, scale))(keys, z)
        score = jax.vmap(_z_score, in_axes=1)
        return score(own, others, jnp.tanh(0.5 * own), jnp.tanh(0.5 * others))

    return jax.lax.map(at, jnp.array(SCALES)).max(axis=0)


def _z_score(
    own: Float[Array, " num"], others: Float[Array, " num"], g: Float[Array, " num"], g_others: Float[Array, " num"]
) -> Float[Array, ""]:
    """Compute how many standard errors the identity is off, for log ratios and g of draws of p and of p'."""
    terms = jax.nn.sigmoid(-own) * g - jax.nn.sigmoid(others) * g_others
    terms = jnp.where(jnp.isnan(terms), 0.0, terms)  # impossible under both: it tells nothing
    return jnp.abs(terms.mean()) / (terms.std() / jnp.sqrt(terms.size) + 1e-6)
