"""Test, site by site, whether a model's density describes the draws of its simulator.

Draws and density can disagree. A censored distribution may draw uncensored values. A scaled or masked site is drawn as
if it were neither scaled nor masked. The test uses an identity of two densities p and p'. With
L(x) = log p(x) - log p'(x), the logistic function sigma, and every function g,

    E[(1 - sigma(L)) g(x)] for x ~ p  =  E[sigma(L) g(x)] for x ~ p'.

For bounded g both sides are bounded. No derivative is needed, and p and p' may have different supports. For observed
sites, p and p' belong to neighbouring parameters. For a latent site, p' is the prior shifted by a constant.

References: Menon and Ong 2016, ICML, "Linking losses for density ratio and class-probability estimation" (calibrated
log density ratios).
"""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._program import RUN_ONCE
from scoreinfer._tree import own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.problem import Problem

NUM_PAIRS = 2048
"""Pairs of draws in each comparison. Chosen by judgement."""
SCALES = (1.0, 0.1, 0.01)
"""Distances of neighbouring parameters, in prior standard deviations; informative data need small ones. Judgement."""
MAX_Z = 6.5
"""Largest deviation that counts as noise, in standard errors: one comparison rejects a right model once in 1e10."""


_Cache = weakref.WeakKeyDictionary[Problem, tuple[str, ...]]
_LATENTS: _Cache = weakref.WeakKeyDictionary()
"""Cache of `misdrawn_latents`."""
_OBSERVED: _Cache = weakref.WeakKeyDictionary()
"""Cache of `misdrawn_data`."""


@own_broadcasting
def misdrawn_latents(problem: Problem) -> tuple[str, ...]:
    """Name the latent sites whose prior draws do not follow the prior density.

    The result is empty if the model has no latent sites, no density, or cannot be simulated.

    Exactness: a statistical test with 2048 pairs of draws. It does not see differences smaller than its noise.
    """
    if problem not in _LATENTS:
        scores = np.zeros(0)
        if problem.simulate is not None and problem.has_density and problem.latents:
            scores = np.asarray(
                jax.jit(lambda key: _latent_scores(problem, key), compiler_options=RUN_ONCE)(jax.random.key(0))
            )
        _LATENTS[problem] = tuple(
            site.name for site, score in zip(problem.latents, scores, strict=False) if score > MAX_Z
        )
    return _LATENTS[problem]


@own_broadcasting
def misdrawn_data(problem: Problem) -> tuple[str, ...]:
    """Name the first observed site whose simulated data do not follow its density.

    The result is empty if there is no such site, or if the model has no simulator or no density of single sites.

    Exactness: as for `misdrawn_latents`.
    """
    if problem not in _OBSERVED:
        scores = np.zeros(0)
        if problem.observed and problem.simulate_observation and problem.pointwise_log_likelihood:
            scores = np.asarray(
                jax.jit(lambda key: _observed_scores(problem, key), compiler_options=RUN_ONCE)(jax.random.key(1))
            )
        names = [site.name for site, score in zip(problem.data, scores, strict=False) if score > MAX_Z]
        _OBSERVED[problem] = tuple(names[:1])
    return _OBSERVED[problem]


def say_misdrawn(sites: tuple[str, ...]) -> str:
    """Write the message about sites whose draws do not follow their density, with what to do."""
    return (
        f"the density of {', '.join(sites)} does not describe the values that the model draws (common causes: "
        "`numpyro.handlers.scale`, a mask, a censored distribution). Weights, kernels and certificates follow the "
        "density. For methods that compare with simulations, write a model whose draws follow its density."
    )


def _prior_draws(problem: Problem, key: Key, num: int) -> tuple[Float[Array, "num dim"], Float[Array, " dim"]]:
    """Draw from the prior; also compute the standard deviation of every dimension."""
    assert problem.simulate is not None
    simulate = problem.simulate
    z = jax.vmap(lambda key: simulate(key)[0])(jax.random.split(key, num))
    return z, jnp.std(z, axis=0) + 1e-12


def _latent_scores(problem: Problem, key: Key) -> Float[Array, " latents"]:
    """Compute a z score for each latent site: compare the prior with itself, shifted in this site only."""
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

        def side(x: Array) -> Array:  # which of the two centres is nearer; this also tests where L is constant
            return jnp.tanh((middle + 0.5 * move - x) @ (block / spread))

        ratios = log_ratio(own, move), log_ratio(others, move)
        by_ratio = _z_score(*ratios, *(jnp.tanh(0.5 * ratio) for ratio in ratios))
        return jnp.maximum(by_ratio, _z_score(*ratios, side(own), side(others)))

    return jax.lax.map(one, blocks)


def _observed_scores(problem: Problem, key: Key) -> Float[Array, " observed"]:
    """Compute a z score for each observed site: compare data of neighbouring parameters, up to and with this site."""
    names = [site.name for site in problem.data]
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
    """Compute the error of the identity in standard errors, from L and g at draws of p (own) and of p' (others)."""
    terms = jax.nn.sigmoid(-own) * g - jax.nn.sigmoid(others) * g_others
    terms = jnp.where(jnp.isnan(terms), 0.0, terms)  # density zero under both: no information
    return jnp.abs(terms.mean()) / (terms.std() / jnp.sqrt(terms.size) + 1e-6)
