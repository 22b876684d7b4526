"""Score-based data assimilation with an exact finish: paths given data, by a score that has never seen the data."""

import functools
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreinfer._memory import map_rows
from scoreinfer._program import execute
from scoreinfer._typing import Key
from scoreinfer.draws import DrawInfo, Draws
from scoreinfer.evidence.paths import certify_paths, unfinished
from scoreinfer.model.replay import fixed_key
from scoreinfer.model.seen import read_seen, site_of
from scoreinfer.model.series import read_model_series
from scoreinfer.posterior.guided import problem_of_site
from scoreinfer.problem import Problem
from scoreinfer.samplers.assimilation import CorrectedFlow
from scoreinfer.samplers.finish import BATCH, HMC, AbstractFinish, swept
from scoreinfer.samplers.learned_prior import LearnedPrior, as_prior
from scoreinfer.samplers.local_prior import LocalPrior
from scoreinfer.samplers.path_target import PathTarget
from scoreinfer.score import AbstractGuidance, AbstractLikelihood, AbstractScore, MomentMatched

Paths = Float[Array, "num times dim"]
PARTICLES, MAX_PARTICLES_DIM = 512, 6
"""Particles of an explorer, and most components of a state for which explorers are particles. Chosen by judgement."""
NUM_EXPLORERS, LEAST_EXPLORERS = 32, 4
"""Chains that the certificate compares with, and fewest of them. Chosen by judgement."""


class SDAPosterior(eqx.Module):
    """The posterior of a path, for one observation.

    Args:
        problem: the path as a flat vector, with its densities.
        target: the same, time by time.
        guidance: the guided score of the path; None: starts are simulations of the model.
        prior: units of that score; None too.
        sampler: makes the starts from the guided score.
        finish: chains on the model's own density; None: none.
    """

    problem: Problem
    target: PathTarget
    guidance: AbstractGuidance | None
    prior: LearnedPrior | None
    sampler: CorrectedFlow
    finish: AbstractFinish | None

    def sample(
        self,
        key: Key,
        num: int,
        *,
        num_explorers: int = NUM_EXPLORERS,
        explorers: Float[Array | np.ndarray, "paths times *state"] | None = None,
    ) -> Draws:
        """Draw paths, finish them by one chain each, and certify them.

        Args:
            key: random key.
            num: number of draws.
            num_explorers: chains that the certificate compares with. They start from free particle filters, for states
                of up to six components; else from simulations of the model that meet the data little by little.
            explorers: paths from elsewhere that start further chains of comparison: the truth of a twin experiment, or
                draws of `smooth`.

        Raises:
            ValueError: if there are fewer than 4 explorers, or ``explorers`` has another shape.

        Exactness: with a finish: exact in the limit of its steps, on the model's own density; the certificate says
            whether chains from different starts agree. Lobes that no start visits are missing. Without a finish:
            biased, for comparison.
        """
        began = time.perf_counter()
        for_starts, for_explorers, for_finish = jax.random.split(key, 3)
        starts, certificate = self._starts(for_starts, num), unfinished(num)
        if self.finish is not None:
            others, cold, source = self._explorers(for_explorers, num_explorers, explorers)
            begun, warm = jnp.concatenate([starts, others]), jnp.full(num, self.guidance is None)
            finished = execute(
                lambda *rows: self.finish.run(rows[0], self.target, *rows[1:]),  # type: ignore[union-attr]
                for_finish, begun, jnp.concatenate([warm, cold]),
            )  # fmt: skip
            starts, accept = finished.x[:num], float(finished.accept_prob.mean())
            certificate = certify_paths(np.asarray(finished.trace), num, self.finish.num_steps, accept, source)
        flat = starts.reshape(num, -1)
        log_joint = execute(jax.vmap(lambda x: self.target.log_prior(x) + self.target.log_likelihood(x)), flat)
        site = self.problem.latents[0]
        return Draws(
            {site.name: flat.reshape(num, *site.shape)}, flat, None if self.finish is None else jnp.zeros(num),
            log_joint, log_joint, {}, certificate, DrawInfo(num, seconds=time.perf_counter() - began), self.problem,
        )  # fmt: skip

    def _starts(self, key: Key, num: int) -> Paths:
        if self.guidance is None or self.prior is None:
            return self._simulated(key, num)
        guidance, prior, shape = self.guidance, self.prior, self.target.shape

        def start(key: Key) -> Float[Array, "times dim"]:
            return prior.change.forward(self.sampler.sample(key, guidance, prior.dim)).reshape(shape)

        return _each(start, key, num)

    def _simulated(self, key: Key, num: int) -> Paths:
        model, ts = self.target.series.model, self.target.series.ts

        def path(key: Key) -> Float[Array, "times dim"]:
            for_first, for_rest = jax.random.split(key)
            first = model.initial(for_first)

            def step(x: Array, inputs: tuple[Key, Array, Array]) -> tuple[Array, Array]:
                new = model.transition(inputs[0], *inputs[1:], x)
                return new, new

            rest = jax.lax.scan(step, first, (jax.random.split(for_rest, ts.size - 1), ts[:-1], ts[1:]))[1]
            return jnp.concatenate([first[None], rest])

        return _each(path, key, num)

    def _explorers(self, key: Key, num: int, given: Any) -> tuple[Paths, Array, str]:
        """Make the explorers' starts; say which have not seen the data, and what they are."""
        small = self.target.shape[1] <= MAX_PARTICLES_DIM
        seen = lambda key: swept(key, self.target, PARTICLES)  # noqa: E731
        paths = _each(seen, key, num) if small else self._simulated(key, num)
        cold, source = jnp.full(num, not small), "particles" if small else "simulations that met the data slowly"
        if given is not None:
            expected = self.problem.latents[0].shape
            if np.shape(given)[1:] != expected:
                raise ValueError(f"`explorers` must be paths of shape {expected} each, got {np.shape(given)}.")
            more = jnp.asarray(given, paths.dtype).reshape(-1, *self.target.shape)
            paths, cold = jnp.concatenate([paths, more]), jnp.concatenate([cold, jnp.zeros(len(more), bool)])
            source += " and given paths"
        if len(paths) < LEAST_EXPLORERS:
            raise ValueError(f"Expected at least {LEAST_EXPLORERS} explorers, got {len(paths)}: nothing to agree with.")
        return paths, cold, source


def _each(function: Callable[[Key], Array], key: Key, num: int) -> Array:
    return execute(map_rows(function, BATCH), jax.random.split(key, num))


def _over(prior: LocalPrior, shape: tuple[int, ...], run: Callable[[], Any]) -> LearnedPrior:
    """Make the prior of the path, told what the model says of its context."""
    return prior.over(shape, None if prior.context is None else site_of(prior.context.site, run)[0](fixed_key()))


class SDA:
    """Score-based data assimilation, finished exactly: draw the path of a NumPyro model given its data.

    Three parts. A score of the path, learned from the model's simulations without data (`fit_local`), is guided by the
    data and drawn from: biased, but near. Then every draw starts a Markov chain on the model's own density: the
    *finish*. Chains from starts that owe nothing to the score decide whether the draws are certified.

    For states of few components the score is not needed: ``SDA(model, "x", finish=ParticleGibbs())``.

    Args:
        model: the NumPyro model.
        site: its path, `PhysicsPath` or ``EulerMaruyama``; no other site may be unknown.
        prior: a prior of `fit_local`, or any score of the path. None: chains start from simulations of the model.
        finish: `scoreinfer.samplers.HMC` or `scoreinfer.samplers.ParticleGibbs`. None: guided draws as published,
            biased and labelled so.
        num_steps: steps of the guided draws.
        num_corrections: Langevin moves at each of their levels.
        guide: makes the guided score from the prior's score and the likelihood.

    Exactness: see `SDAPosterior.sample`.

    References: Rozet and Louppe 2023, arXiv 2306.10574 (without the finish); Rozet et al. 2024, arXiv 2405.13712 (the
        guidance).

    >>> import numpyro, numpyro.distributions as dist
    >>> import scoreinfer as si
    >>> def model(y=None):
    ...     ts = jnp.arange(6.0)
    ...     x = numpyro.sample("x", si.PhysicsPath(lambda s, t, x: 0.8 * x, 0.6, ts, dist.Normal(0.0, 1.0)))
    ...     numpyro.sample("y", dist.Normal(x[::5], 0.5), obs=y)
    >>> posterior = SDA(model, "x", finish=si.samplers.ParticleGibbs()).condition(y=jnp.array([1.0, -1.0]))
    >>> posterior.target.shape  # times, components; `posterior.sample(key, 64)` draws
    (6, 1)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        site: str,
        prior: LocalPrior | LearnedPrior | AbstractScore | None = None,
        *,
        finish: AbstractFinish | None = HMC(),
        num_steps: int = 64,
        num_corrections: int = 1,
        guide: Callable[[AbstractScore, AbstractLikelihood], AbstractGuidance] = MomentMatched,
    ) -> None:
        if prior is None and finish is None:
            raise ValueError("`SDA` needs a `prior`, whose draws it guides, or a `finish`, or both; got neither.")
        self.model, self.site, self.prior, self.finish, self.guide = model, site, prior, finish, guide
        self.sampler = CorrectedFlow(num_steps=num_steps, num_corrections=num_corrections)

    def condition(self, *args: Any, **kwargs: Any) -> SDAPosterior:
        """Return the posterior of the data in these model arguments.

        Raises:
            UnsupportedModel: if the site is no process in time, other sites are unknown, or an observation depends on
                two times.
            ValueError: if the data see nothing of the path, there are none, the prior was made for another shape, a
                longer path or another context, or the finish cannot run on this model.
        """
        seen = read_seen(self.site, self.model, *args, **kwargs)
        prior = self.prior
        if prior is not None:
            run = functools.partial(self.model, *args, **kwargs)
            prior = _over(prior, seen.shape, run) if isinstance(prior, LocalPrior) else as_prior(prior, seen.shape)
        series = read_model_series(self.model, self.site, args, kwargs)
        assert seen.log_prior is not None
        target = PathTarget(series, seen.log_prior, seen.likelihood.log_density)
        if self.finish is not None:
            self.finish.check(target)
        guidance = None if prior is None else self.guide(prior.score, seen.likelihood.through(prior.change.forward))
        problem = problem_of_site(self.site, seen, seen.log_prior)
        return SDAPosterior(problem, target, guidance, prior, self.sampler, self.finish)
