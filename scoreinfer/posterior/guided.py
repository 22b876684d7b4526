"""Posteriors under a learned prior: a score and a likelihood that the score has never seen, without training."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from scoreinfer._program import Program
from scoreinfer._typing import Key
from scoreinfer.draws import DrawInfo, Draws
from scoreinfer.evidence.certificate import certify_weights
from scoreinfer.model.seen import Seen, read_seen
from scoreinfer.posterior.base import AbstractConditioned
from scoreinfer.problem import Problem, Site
from scoreinfer.process import VE, Noising
from scoreinfer.samplers.base import Target
from scoreinfer.samplers.batches import weighted_draws
from scoreinfer.samplers.learned_prior import MAX_DENSITY, LearnedPrior, as_prior
from scoreinfer.samplers.reverse import discretised_problem
from scoreinfer.samplers.twisted import AbstractTwisted, Twisted, TwistedNoise
from scoreinfer.score import AbstractGuidance, AbstractLikelihood, AbstractScore, MomentMatched

MODEL, FLOW, DISCRETISED = "the model's own density", "the flow of the learned prior", "the discretised learned prior"
"""What the weights are exact for."""
LEVELS = Noising(VE(level_max=20.0))
"""Noise levels of whitened draws: beyond 20 all but a quarter percent of the variance is hidden."""


class GuidedPosterior(AbstractConditioned):
    """The posterior of one site under a learned prior, for one observation.

    Args:
        proposal: twisted particles.
        target: the density that their weights are exact for. Its problem has no density of its own: programs then
            compile once for all data.
        exact_for: which density that is, in words.
        problem: the problem, with its density at these data.
    """

    proposal: AbstractTwisted
    target: Target
    exact_for: str = eqx.field(static=True)
    problem: Problem = eqx.field(static=True)

    def sample(self, key: Key, num: int, *, batch_size: int = 1024) -> Draws:
        """Draw, weigh every draw exactly, and certify the batch.

        Args:
            key: random key. Draw i depends on ``key`` and i only.
            num: number of draws.
            batch_size: draws per compiled call; bounds the memory.

        Raises:
            ValueError: if the likelihood is zero at every draw.

        Exactness: the weights are exact for the density that ``exact_for`` names. A mode that the prior's score does
            not show is not drawn, and weights cannot tell.
        """
        start = time.perf_counter()
        drawn = weighted_draws(key, self.proposal, self.target, batch_size, None, 0, num)
        if not np.isfinite(drawn.log_weight).any():
            raise ValueError(
                f"The likelihood is zero at every one of {num} draws. Do the data lie outside of what the prior allows?"
            )
        info = DrawInfo(num, num * self.proposal.num_evaluations, None, self.proposal.num_particles)
        draws = self._draws(drawn, certify_weights(drawn.log_weight), info, batch_size)
        return draws._replace(info=info._replace(seconds=time.perf_counter() - start), problem=self.problem)


class Guided:
    """Condition a learned prior on the data of a NumPyro model, without training.

    The prior may be one of `fit_score`, or any score of the site. The weights of the draws are exact for

    - the model's own density, if the site has one in the model (`numpyro.sample`);
    - the flow of the learned prior, if the site is a `score_prior` of at most 32 components: the same posterior that
      NUTS draws from;
    - the discretised learned prior otherwise.

    Args:
        model: the NumPyro model.
        site: name of the site that the score is of; no other site may be unknown.
        prior: the learned prior, or a score of the site.
        num_steps: number of steps of the reverse SDE.
        num_particles: particles for each draw; 1 means path weights without resampling.
        guide: makes the guided score from the prior's score and the likelihood.
        discretised: use the discretised prior in any case.

    Exactness: see `GuidedPosterior.sample`.

    References: Wu et al. 2023, arXiv 2306.17775; Rozet et al. 2024, arXiv 2405.13712.

    >>> import jax, numpyro, numpyro.distributions as dist
    >>> from scoreinfer.score import GaussianScore
    >>> def model(y=None):
    ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    ...     numpyro.sample("y", dist.Normal(x.sum(), 0.5), obs=y)
    >>> guided = Guided(model, "x", GaussianScore(jnp.zeros(2), jnp.eye(2)), num_steps=16)
    >>> draws = guided.condition(y=1.0).sample(jax.random.key(0), 512)
    >>> draws.certificate.certified, round(draws.certificate.log_evidence, 2)  # log N(1; 0, 2.25) = -1.55
    (True, -1.55)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        site: str,
        prior: LearnedPrior | AbstractScore,
        *,
        num_steps: int = 64,
        num_particles: int = 1,
        guide: Callable[[AbstractScore, AbstractLikelihood], AbstractGuidance] = MomentMatched,
        discretised: bool = False,
    ) -> None:
        self.model, self.site, self.prior, self.guide, self.discretised = model, site, prior, guide, discretised
        self.num_steps, self.num_particles = num_steps, num_particles
        self._without_data: dict[Any, Problem] = {}

    def condition(self, *args: Any, **kwargs: Any) -> GuidedPosterior:
        """Return the posterior of the data in these model arguments.

        Other data of the same shapes need no compilation. Whole numbers that are no arrays are part of the programs.

        Raises:
            UnsupportedModel: if the site cannot be read, or other sites are unknown.
            ValueError: if the data see nothing of the site, there are none, or the prior was made for another shape.
        """
        args, kwargs = jax.tree.map(_as_data, (args, kwargs))
        seen = read_seen(self.site, self.model, *args, **kwargs)
        prior = as_prior(self.prior, seen.shape)
        process = LEVELS if isinstance(self.prior, LearnedPrior) else prior.flow.process
        guidance = self.guide(prior.score, seen.likelihood.through(prior.change.forward))
        common: dict[str, Any] = {
            "guidance": guidance, "process": process, "dim": prior.dim, "num_steps": self.num_steps,
            "num_particles": self.num_particles,
        }  # fmt: skip
        if self.discretised or (seen.log_prior is None and prior.dim > MAX_DENSITY):
            site = Site(self.site, seen.shape, "float32", "real", (self.num_steps + 1) * prior.dim)
            problem = discretised_problem(
                prior.discretised(process, self.num_steps), guidance.likelihood, site, prior.change.forward
            )
            return self._posterior(TwistedNoise(**common), problem, DISCRETISED)
        twisted = Twisted(change=prior.change, **common)
        exact_for = FLOW if seen.log_prior is None else MODEL
        return self._posterior(
            twisted, problem_of_site(self.site, seen, seen.log_prior or prior.log_density), exact_for
        )

    def _posterior(self, proposal: AbstractTwisted, problem: Problem, exact_for: str) -> GuidedPosterior:
        """Make the target of a traced density, and of the problem that all data of these shapes share."""
        z = jax.ShapeDtypeStruct((problem.dim,), jnp.result_type(float))
        program = Program(problem.log_joint, z, {})
        shared = self._without_data.setdefault(
            (exact_for, problem.latents), dataclasses.replace(problem, log_prior=_unknown, log_likelihood=_unknown)
        )
        target = Target(shared, {}, program=program, constants=tuple(map(jnp.asarray, program.constants)))
        return GuidedPosterior(proposal, target, exact_for, problem)


def _as_data(leaf: Any) -> Any:
    """Make an array of a number: as a constant of a program it would be part of its text."""
    is_number = isinstance(leaf, float | np.floating) or (isinstance(leaf, np.ndarray) and leaf.ndim == 0)
    return jnp.asarray(leaf) if is_number else leaf


def _unknown(*args: Any) -> Any:
    raise NotImplementedError("This problem is shared by many data sets: weigh by the target.")


def problem_of_site(name: str, seen: Seen, log_prior: Callable[..., Any]) -> Problem:
    """Make the problem of one flat site: a prior density, that of the model or of a flow, and the likelihood."""
    dim = math.prod(seen.shape)
    site = Site(name, seen.shape, "float32", "real", dim)
    shaped = lambda z: {name: z.reshape(seen.shape)}  # noqa: E731
    return Problem(
        dim=dim,
        latents=(site,),
        observed=(),
        log_prior=log_prior,
        log_likelihood=lambda z, y: seen.likelihood.log_density(z),
        constrain=shaped,
        latent_sites=shaped,
        unconstrain=lambda sites: jnp.ravel(sites[name]),
        simulate=None,
        simulate_observation=None,
        encode=lambda y: y,
        read=lambda args, kwargs: {},
        not_simulable="only its likelihood was read",
    )
