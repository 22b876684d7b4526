"""Laws of proposers and kernels, and the registry of everything that has to keep them.

A new proposer or kernel is tested by one more entry in `proposers` or `kernels`. Networks are disturbed at random and
samplers have few steps, so that weights are poor and say much; targets are skewed, so that no error hides by symmetry.

A proposer draws z, and a path u where it is one of paths, with density q(z, u); the posterior pi(z), with the noising
r(u | z), is what the weight w = Z pi r / q leads to. So for every function h

    E_q[w h(z, w)] = Z E_{pi r}[h(z, w)]:

the law of (z, w) over the proposer's draws, tilted by w / Z, is that over exact draws of the posterior which ``log_q``
weighs, over fresh paths. With h of z alone this is importance sampling; with h of w alone it sees a path that depends
on the draw, or on the path of another component. It is the fluctuation theorem of Crooks 1999, Phys. Rev. E 60, 2721.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import scoreinfer as si
from doubles import GaussianProposal
from modes import UnknownRate, ornstein_uhlenbeck
from oracles import Oracle, counts, gaussian_mixture
from scoreinfer._typing import Sites
from scoreinfer.bijections.affine import Affine, identity
from scoreinfer.bijections.asinh import Tails
from scoreinfer.bijections.base import Chain, spread
from scoreinfer.bijections.noncentring import Scales
from scoreinfer.mcmc.contract import layout
from scoreinfer.model import from_numpyro
from scoreinfer.model.seen import read_seen
from scoreinfer.montecarlo.kernel_estimate import kernel_estimate
from scoreinfer.montecarlo.reference import Prior
from scoreinfer.nets import Concatenate, ConditionalMLP
from scoreinfer.nets.embedding import flatten
from scoreinfer.paths import Frame, Moments, ReverseEuler
from scoreinfer.paths.build import read_reversal, samplers, untrained_kernels
from scoreinfer.paths.particles import ResampledPaths
from scoreinfer.paths.proposal import END_STATE, PARAMETERS, PathProposal, StartedPaths, pinned
from scoreinfer.problem import Problem, Site, from_potential
from scoreinfer.process import VE, Noising, Physics
from scoreinfer.samplers.amortised import AmortisedProposal
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted
from scoreinfer.samplers.batches import Defence, mixed, weigh_rows, weighted_draws
from scoreinfer.samplers.diffusion import AbstractSampler
from scoreinfer.samplers.focused import FocusedProposal
from scoreinfer.samplers.refined import RefinedProposal
from scoreinfer.samplers.reverse import DiscretisedPrior, discretised_problem
from scoreinfer.samplers.single import SingleProposal
from scoreinfer.samplers.tuned import TunedProposal, Tuning
from scoreinfer.samplers.twisted import AbstractTwisted, Twisted, TwistedNoise
from scoreinfer.score import AbstractScore, GaussianLikelihood, MomentMatched, NeuralScore
from scoreinfer.training.simulations import Standardiser, encode
from scoreinfer.training.whitening import Whitening, whitening_network

BRIDGES = (0.2, 1.0, 5.0)
"""The functions h are bounded: c / (c + w / Z) times sines and cosines of z; with larger c they tend to 1."""
FLOW, SDE = si.samplers.ProbabilityFlow(num_steps=4, inflation=0.15), si.samplers.ReverseSDE(num_steps=3)


class Exact(NamedTuple):
    """A posterior that can be sampled exactly.

    Args:
        problem: the problem.
        data: the observation, as keyword arguments of the model.
        sample: exact draws in the unconstrained space, ``sample(rng, num) -> (num, dim)``.
        log_evidence: log Z.
    """

    problem: Problem
    data: dict[str, np.ndarray]
    sample: Callable[[np.random.Generator, int], np.ndarray]
    log_evidence: float

    @property
    def density(self) -> Target:
        """The posterior, as proposals take it."""
        return Target(self.problem, {name: jnp.asarray(value) for name, value in self.data.items()})

    def exact(self, seed: int, num: int) -> jax.Array:
        """Draw from the posterior."""
        return jnp.asarray(self.sample(np.random.default_rng(seed), num), jnp.float32)

    def functions(self, z: Any, log_weight: Any) -> np.ndarray:
        """Compute the functions h(z, w), ``(num, functions)``; of z alone where there is no weight."""
        z = np.asarray(z, np.float64)
        exact = self.sample(np.random.default_rng(0), 2000)
        unit = (z - exact.mean(0)) / (exact.std(0) + 1e-3)
        of_z = np.concatenate([np.ones((len(z), 1)), np.sin(unit), np.cos(unit)], axis=1)
        if log_weight is None:
            return of_z
        relative = np.asarray(log_weight, np.float64)[:, None] - self.log_evidence - np.log(BRIDGES)
        bridges = np.exp(-np.logaddexp(0.0, relative))
        return (bridges[:, :, None] * of_z[:, None]).reshape(len(z), -1)


def standard_errors(left: np.ndarray, right: np.ndarray | float = 0.0) -> float:
    """Compute the largest distance between two samples' means, in standard errors."""
    left, right = np.atleast_2d(left), np.atleast_2d(right)
    variance = left.var(0) / len(left) + right.var(0) / len(right)
    distance = np.abs(left.mean(0) - right.mean(0))
    return float(np.max(distance / np.sqrt(variance + 1e-12)))


# --- proposers ---------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A proposer and a posterior that its draws are weighed for.

    Args:
        target: the posterior.
        proposer: the proposer.
        num: number of draws that the law is tested with.
        paths: whether it weighs a given z over a path drawn anew.
        defence: what the proposer is mixed with.
    """

    target: Exact
    proposer: AbstractProposal
    num: int = 40_000
    paths: bool = True
    defence: Defence | None = None

    def draw(self, first: int = 0) -> Weighted:
        """Draw, beginning with this row of the stream."""
        density = self.target.density
        return weighted_draws(jax.random.key(1), self.proposer, density, self.num, self.defence, first, self.num)

    def weigh(self, z: jax.Array) -> Weighted:
        """Weigh given draws."""
        weighed = weigh_rows(jax.random.key(2), self.proposer, self.target.density, jnp.arange(len(z)), z)
        return weighed if self.defence is None else mixed(self.defence, weighed)


def disagreement(case: Case) -> float:
    """Compute the largest distance, in standard errors, between both sides of the law (see the module's docstring)."""
    drawn, exact = case.draw(), case.weigh(case.target.exact(1, case.num))
    of_drawn, of_exact = (case.target.functions(each.z, each.log_weight) for each in (drawn, exact))
    weight = np.exp(np.asarray(drawn.log_weight, np.float64) - case.target.log_evidence)
    tilted = np.where(weight[:, None] > 0, weight[:, None] * of_drawn, 0.0)
    return standard_errors(tilted, of_exact)


def disturbed(tree: Any, seed: int, scale: float) -> Any:
    """Add noise to every array."""
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(arrays)
    return eqx.combine(unravel(flat + scale * jax.random.normal(jax.random.key(seed), flat.shape)), rest)


def random_score(dim: int, num_context: int, seed: int = 0) -> NeuralScore:
    """Make a score that nobody has trained."""
    network = ConditionalMLP(jax.random.key(seed), dim, num_context, 2 * dim, width=8, depth=1)
    return NeuralScore(disturbed(network, seed, 0.3 / dim))


def random_proposal(problem: Problem, y: Sites, values: jax.Array, sampler: AbstractSampler) -> AmortisedProposal:
    """Make a proposal of a random score, whitened by about the moments of some values at the observation."""
    x = encode(problem, y)
    centre, scale = ({name: jnp.full_like(value, fill) for name, value in x.items()} for fill in (0.1, 1.1))
    num_context, dim = flatten(x).size, problem.dim
    network = disturbed(whitening_network(jax.random.key(1), dim, num_context, width=8, depth=1), 2, 0.05)
    moments = jnp.zeros((dim, num_context)), values.mean(0), spread(values)
    score = random_score(dim, num_context)
    whitening = Whitening(*moments, Concatenate(), network)
    return AmortisedProposal(Standardiser(centre, scale), whitening, identity(dim), Concatenate(), score, sampler)


def adjusted(proposal: AmortisedProposal) -> AmortisedProposal:
    """Move and stretch a proposal."""
    dim = proposal.adjustment.mean.size
    stretch = jnp.tril(jnp.full((dim, dim), 0.2, jnp.float32), -1) + 1.4 * jnp.eye(dim, dtype=jnp.float32)
    return dataclasses.replace(proposal, adjustment=Affine(jnp.full(dim, -0.3, jnp.float32), stretch))


def of_oracle(oracle: Oracle, data: dict[str, np.ndarray]) -> Exact:
    """Take the posterior of an oracle."""
    truth, problem = oracle.truth(data), from_numpyro(oracle.model)
    (site,) = problem.latents

    def sample(rng: np.random.Generator, num: int) -> np.ndarray:
        values = truth.sample(rng, num).reshape(num, *site.shape)
        return np.asarray(jax.vmap(problem.unconstrain)({site.name: jnp.asarray(values)}))

    return Exact(problem, data, sample, truth.log_evidence)


@cache
def two_counts() -> Exact:
    """Make the posterior of a logarithm of a rate: one-dimensional, skewed to the left."""
    return of_oracle(counts(2), {"y": np.array([0, 1], np.int32)})


@cache
def mixture() -> Exact:
    """Make a posterior of two modes in two dimensions."""
    oracle = gaussian_mixture()
    return of_oracle(oracle, oracle.data)


def log_gamma(z: jax.Array) -> jax.Array:
    """Minus the log density, but for its constant log 2, of logarithms of draws from Gamma(3, 1)."""
    return -(3.0 * z - jnp.exp(z)).sum()


@cache
def bare() -> Exact:
    """Make a bare density in two dimensions, skewed."""
    problem = from_potential(log_gamma, jnp.zeros(2))
    return Exact(problem, {}, lambda rng, num: np.log(rng.gamma(3.0, size=(num, 2))), 2 * np.log(2.0))


RATE = UnknownRate(ornstein_uhlenbeck(3)._replace(rates=np.ones(1), start_sd=np.ones(1)), (0, 2, 3))
SEEN = np.array([[1.2], [0.3], [-0.2]], np.float32)
MODES, END = ornstein_uhlenbeck(3)._replace(rates=np.array([0.3, 1.0]), g=0.5), np.array([-0.8, 0.5], np.float32)


@cache
def unknown_rate() -> Exact:
    """Make the posterior of a rate and a path of three steps that is seen now and then."""
    problem = from_numpyro(RATE.model)
    return Exact(problem, {"y": SEEN}, lambda rng, num: RATE.draws(rng, SEEN, num), RATE.truth(SEEN)[2])


def of_paths(known_end: bool) -> Exact:
    """Make the posterior of a path whose end is seen with noise, or known."""
    problem = pinned(from_numpyro(MODES.path_model)) if known_end else from_numpyro(MODES.model)
    mean, covariance, log_evidence = MODES.smoother(END, not known_end)
    factor = np.linalg.cholesky(covariance)

    def sample(rng: np.random.Generator, num: int) -> np.ndarray:
        noise = rng.standard_normal((num, *covariance.shape[:2]))
        paths = (mean + np.einsum("its,nis->nti", factor, noise)).reshape(num, -1)
        return np.concatenate([paths, np.broadcast_to(END, (num, 2))], axis=1) if known_end else paths

    return Exact(problem, {END_STATE if known_end else "y": END}, sample, log_evidence)


def random_paths(known_end: bool) -> Case:
    """Make paths of a random score."""
    exact = MODES.score(not known_end)
    score = lambda t, x: 0.8 * exact(t, x) + 0.5 * jnp.sin(3 * x[::-1] + t)  # noqa: E731
    target, backward = of_paths(known_end), ReverseEuler(MODES.process(not known_end), score)
    site = END_STATE if known_end else "y"
    return Case(target, PathProposal(backward, backward.process.num_steps, site), paths=False)


@cache
def started(sampler: AbstractSampler) -> StartedPaths:
    """Make paths of random kernels, from a start drawn by a random score."""
    target, reversal = unknown_rate(), read_reversal(Physics("x"), RATE.model)
    column = lambda *values: jnp.array(values)[:, None]  # noqa: E731
    leans = 0.1 * jax.random.normal(jax.random.key(2), (3, 3, 1, 4))
    before, after = column(1.0, 0.7, 0.3), column(0.7, 0.3, 0.0)  # about the states' means
    spreads, kernels = jnp.full((3, 1), 0.5), (jnp.full((3, 1, 1), -0.2), jnp.full((3, 1, 1), 0.3))
    moments = Moments(before, spreads, leans[0]), Moments(after, spreads, leans[1])
    frame = Frame(after, spreads, column(0.3, 0.3, 0.3), *kernels, leans[2], *moments)
    backward = untrained_kernels(jax.random.key(1), reversal.physics, frame, jnp.zeros(4), None, 8, 1)
    backward = eqx.tree_at(lambda tree: tree.network, backward, replace_fn=lambda net: disturbed(net, 3, 0.05))
    centre = {PARAMETERS: jnp.full(1, 0.2), "y": SEEN - 0.2}
    scale = Standardiser(centre, jax.tree.map(jnp.ones_like, centre))
    first = target.exact(3, 2000)[:, jnp.array([0, -1])]  # rate and last state
    start = random_proposal(reversal.start_problem, target.density.y, first, sampler)
    return samplers(reversal, backward, scale, start).paths


def of_one(sampler: AbstractSampler) -> SingleProposal:
    """Make the sampler of one posterior, through all changes of variables."""
    affine = Affine(jnp.array([1.0, 0.8]), jnp.array([[0.7, 0.0], [0.2, 0.6]]))
    tails = Tails(jnp.array([0.1, -0.1]), jnp.array([0.0, 0.4]))
    scales = Scales(
        jnp.array([0]), jnp.array([0.9]), jnp.array([0.7]), jnp.array([[0.0, 0.1], [0.0, -0.1]]),
        jnp.array([[0.0, 0.1], [0.0, 0.2]]),
    )  # fmt: skip
    return SingleProposal(Chain((affine, tails, scales)), random_score(2, 0), sampler, 2)


def double(path: bool) -> GaussianProposal:
    """Make the double of the tests."""
    return GaussianProposal(jnp.array([0.7, 0.4]), jnp.array([0.9, 1.1]), bare().problem, path)


def amortised(target: Exact, sampler: AbstractSampler) -> AmortisedProposal:
    """Make a proposal that nobody has trained."""
    return random_proposal(target.problem, target.density.y, target.exact(3, 2000), sampler)


def focused(target: Exact, sampler: AbstractSampler) -> FocusedProposal:
    """Make a mixture of two components that differ much."""
    original = amortised(target, sampler)
    return FocusedProposal(original, adjusted(original))


def tuned(target: Exact) -> TunedProposal:
    """Make a proposal that is tuned in haste, so that its weights are uneven."""
    return TunedProposal(amortised(target, FLOW), jax.random.key_data(jax.random.key(7)), Tuning(256, 2, 2))


def refined(target: Exact, here: bool) -> RefinedProposal:
    """Make a proposal that has been trained further on its observation, or on another."""
    original = amortised(target, SDE)
    x = flatten(original.features(target.density))
    score = random_score(target.problem.dim, x.size, seed=7)
    return RefinedProposal(original, dataclasses.replace(adjusted(original), score=score), x + (0.0 if here else 1.0))


def of_prior(target: Exact) -> Defence:
    """Mix with the prior."""
    return Defence(Prior(target.problem), 0.3)


def of_witnesses(target: Exact) -> Defence:
    """Mix with a kernel estimate fitted to a part of the posterior."""
    values = np.asarray(target.exact(5, 400))
    return Defence(kernel_estimate(values[values[:, 0] > np.median(values[:, 0])]), 0.3)


class WithoutContext(AbstractScore):
    """A score that nobody has trained, of no observation."""

    score: NeuralScore

    def denoise(self, level, x, y=None):
        return self.score.denoise(level, x, jnp.zeros(0))


COARSE = Noising(VE(level_min=0.5, level_max=2.0, power=3.0))
RANDOM = WithoutContext(random_score(2, 0))


def twisted(num_particles: int) -> Case:
    """Make twisted particles of a random score, for a model that has a density."""
    target = mixture()
    seen = read_seen("theta", gaussian_mixture().model, **target.data).likelihood
    change = Affine(jnp.array([0.3, -0.2]), jnp.array([[2.5, 0.0], [0.2, 0.8]]))
    guidance = MomentMatched(RANDOM, seen.through(change.forward))
    return Case(target, Twisted(guidance, COARSE, change, 2, 3, num_particles), 10_000)


@cache
def twisted_noise(num_particles: int) -> Case:
    """Make twisted particles for the discretised prior of a random score; exact draws are by rejection."""
    prior, rows = DiscretisedPrior(RANDOM, COARSE, 3, 2), jnp.array([[1.0, -0.5]])
    seen = GaussianLikelihood(lambda x: rows @ x, jnp.array([0.9]), jnp.array([0.4]))
    problem = discretised_problem(prior, seen, Site("x", (2,), "float32", "real vector", 8))
    log_seen = jax.jit(jax.vmap(lambda z: problem.log_likelihood(z, {})))
    most = float(-jnp.log(0.4) - 0.5 * jnp.log(2 * jnp.pi))

    def sample(rng: np.random.Generator, num: int) -> np.ndarray:
        kept = np.zeros((0, 8))
        while len(kept) < num:
            z = rng.standard_normal((50_000, 8))
            kept = np.concatenate([kept, z[np.log(rng.uniform(size=len(z))) < np.asarray(log_seen(z)) - most]])
        return kept[:num]

    draws = jax.random.normal(jax.random.key(8), (400_000, 8))
    log_evidence = float(jax.nn.logsumexp(log_seen(draws)) - jnp.log(len(draws)))
    proposer: AbstractTwisted = TwistedNoise(MomentMatched(RANDOM, seen), COARSE, 2, 3, num_particles)
    return Case(Exact(problem, {}, sample, log_evidence), proposer, 10_000)


def proposers() -> dict[str, Callable[[], Case]]:
    """Name every proposer."""
    one, two, rate = two_counts, mixture, unknown_rate
    return {
        "amortised, flow": lambda: Case(two(), amortised(two(), FLOW), 20_000, paths=False),
        "amortised, SDE": lambda: Case(two(), amortised(two(), SDE)),
        "amortised, SDE, one dimension": lambda: Case(one(), amortised(one(), SDE)),
        "prior mixture, SDE": lambda: Case(two(), amortised(two(), SDE), defence=of_prior(two())),
        "focused, flow": lambda: Case(two(), focused(two(), FLOW), 20_000, paths=False),
        "focused, SDE": lambda: Case(one(), focused(one(), SDE)),
        "tuned": lambda: Case(two(), tuned(two()), 20_000, paths=False),
        "prior mixture, focused": lambda: Case(one(), focused(one(), SDE), defence=of_prior(one())),
        "mended, flow": lambda: Case(two(), amortised(two(), FLOW), 20_000, False, of_witnesses(two())),
        "mended, SDE": lambda: Case(two(), amortised(two(), SDE), defence=of_witnesses(two())),
        "refined, here": lambda: Case(two(), refined(two(), here=True)),
        "refined, elsewhere": lambda: Case(two(), refined(two(), here=False)),
        "of one posterior, flow": lambda: Case(bare(), of_one(FLOW), 20_000, paths=False),
        "of one posterior, SDE": lambda: Case(bare(), of_one(SDE)),
        "double": lambda: Case(bare(), double(path=False), paths=False),
        "double with a path": lambda: Case(bare(), double(path=True)),
        "paths, noisy end": lambda: random_paths(known_end=False),
        "paths, known end": lambda: random_paths(known_end=True),
        "started paths, flow": lambda: Case(rate(), started(FLOW), 4000, paths=False),
        "started paths, SDE": lambda: Case(rate(), started(SDE), 4000),
        "resampled paths": lambda: Case(rate(), ResampledPaths(started(SDE), 4), 20_000),
        "twisted particles": lambda: twisted(4),
        "twisted noise": lambda: twisted_noise(4),
    }


# --- kernels -----------------------------------------------------------------------------------------------------


class KernelCase(NamedTuple):
    """A kernel and a posterior that it must leave invariant.

    Args:
        target: the posterior.
        kernel: the kernel, nothing of it adapted.
        num: number of chains.
        num_iterations: iterations of each.
    """

    target: Exact
    kernel: Any
    num: int = 4000
    num_iterations: int = 1


def drift(case: KernelCase) -> float:
    """Start chains from exact draws; compute how far, in standard errors, functions of their states drift.

    The state of `ScoreSDE` is z and its weight, both.
    """
    target, kernel = case.target, case.kernel
    sites = layout(target.problem)
    start = jax.vmap(sites.unflatten)(target.exact(2, case.num))
    keys = jax.random.split(jax.random.key(3), case.num)
    state = kernel.init(keys, 0, start, model_args=(), model_kwargs=target.data)

    @jax.jit
    def run(state: Any) -> Any:
        move = lambda _, state: kernel.sample(state, (), target.data)  # noqa: E731
        return jax.lax.fori_loop(0, case.num_iterations, move, state)

    def functions(state: Any) -> np.ndarray:
        return target.functions(jax.vmap(sites.flatten)(state.z), getattr(state, "log_weight", None))

    return standard_errors(functions(run(state)) - functions(state))


def score_sde(target: Exact, proposer: AbstractProposal, **options: Any) -> si.ScoreSDE:
    """Make the kernel of a proposer."""
    return si.ScoreSDE(posterior=SimpleNamespace(proposal=proposer, outliers=None, problem=target.problem), **options)


def kernels() -> dict[str, Callable[[], KernelCase]]:
    """Name every kernel that is exact."""
    fixed = {"potential_fn": log_gamma, "adapt_step_size": False, "adapt_mass_matrix": False}
    one, rate = two_counts, unknown_rate
    both = {"num_proposals": 2, "bank_size": 2, "num_local_steps": 1}
    return {
        "global moves": lambda: KernelCase(bare(), score_sde(bare(), double(path=True), bank_size=2), 20_000),
        "many tries": lambda: KernelCase(
            bare(), score_sde(bare(), double(path=True), num_proposals=3, bank_size=3), 40_000, 3
        ),
        "local moves": lambda: KernelCase(bare(), score_sde(bare(), double(path=True), **both), 20_000),
        "all moves, focused": lambda: KernelCase(one(), score_sde(one(), focused(one(), SDE), **both)),
        "resampled paths": lambda: KernelCase(rate(), score_sde(rate(), ResampledPaths(started(FLOW), 4), **both), 500),
        "MALA": lambda: KernelCase(bare(), si.mcmc.MALA(step_size=0.9, **fixed), num=40_000, num_iterations=5),
        "underdamped": lambda: KernelCase(
            bare(), si.mcmc.UnderdampedLangevin(step_size=0.9, **fixed), num=40_000, num_iterations=5
        ),
        "much friction": lambda: KernelCase(
            bare(), si.mcmc.UnderdampedLangevin(step_size=0.6, friction=10.0, **fixed), num=40_000, num_iterations=5
        ),
    }
