"""Learning one posterior: the explorer, the learned sampler, and ScoreSDE without a fitted posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS

from doubles import Y1, Y2, grid_moments, location_scale
from scoreinfer.bijections.base import Chain
from scoreinfer.mcmc import MALA, ScoreSDE, UnderdampedLangevin, certify, certify_chains, chain_certificate as verdict
from scoreinfer.montecarlo.moves import LangevinMoves
from scoreinfer.montecarlo.population import first_population
from scoreinfer.montecarlo.reference import Overdispersed
from scoreinfer.montecarlo.tempering import begin
from scoreinfer.problem import from_potential
from scoreinfer.samplers.base import Target, Weighted
from scoreinfer.samplers.batches import weighted_draws
from scoreinfer.samplers.diffusion import ProbabilityFlow
from scoreinfer.samplers.explorer import Effort, explore
from scoreinfer.samplers.single import (
    Pools,
    Round,
    SingleProposal,
    Taught,
    choose,
    fewest_steps,
    judge,
    learn,
    more_steps,
    replace,
    stops,
)
from scoreinfer.score import MixtureScore
from scoreinfer.training.loop import FLAT, History

SIGMAS = 5
MEANS, WEIGHTS = jnp.array([[-4.0, 0.0], [4.0, 1.0]]), jnp.array([0.3, 0.7])
SMALL = Effort(num_particles=512, num_steps=600)


def two_modes(x):
    """Minus the log density of a normalised mixture of two unit Gaussians, times e^2."""
    squares = jnp.sum((x - MEANS) ** 2, axis=1)
    return -jax.nn.logsumexp(jnp.log(WEIGHTS) - 0.5 * squares) + jnp.log(2 * jnp.pi) - 2.0


def run_bare(potential, dim, num_warmup=100, seed=0, **options):
    kernel = ScoreSDE(potential_fn=potential, bank_size=32, key=random.key(seed), **options)
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=200, num_chains=4, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(random.key(2), init_params=jnp.zeros((4, dim)), extra_fields=("accept_prob",))
    return mcmc


@pytest.fixture(scope="module")
def both_modes():
    return run_bare(two_modes, 2, seed=1)  # 1000 steps of training: not every seed reaches k-hat below 0.7


# --- the explorer ------------------------------------------------------------------------------------------------


def test_explorer_finds_modes_and_evidence():
    """Several runs: their spread is the standard error of their mean."""
    target = jax.tree_util.Partial(from_potential(two_modes, jnp.zeros(2)).log_joint, y={})
    reference = Overdispersed(jnp.zeros(2), jnp.full(2, 5.0))
    runs = [explore(random.key(i), reference, target, SMALL, progress_bar=False) for i in range(12)]
    evidence = np.exp([float(run.log_evidence) - 2.0 for run in runs])
    share = np.array([float((run.values[:, 0] > 0).mean()) for run in runs])
    for values, truth in ((evidence, 1.0), (share, 0.7)):
        assert abs(values.mean() - truth) < SIGMAS * values.std(ddof=1) / np.sqrt(len(values)) < 0.15
    spread = np.concatenate([np.asarray(run.values)[:, 1] for run in runs])
    assert abs(spread.var() - (1 + 0.21)) < 0.2


def test_explorer_says_when_the_density_fails():
    problem = from_potential(lambda x: jnp.nan * x.sum(), jnp.zeros(2))
    with pytest.raises(FloatingPointError, match="finite at none"):
        learn(random.key(0), Target(problem, {}), SMALL, progress_bar=False)


def test_half_of_the_particles_outlive_a_round():
    """A mode that the sampler's draws have lost stays among the particles; the replaced ones follow the weights."""
    position = jnp.linspace(-1.0, 1.0, 1000)
    log_weight = jnp.log(jnp.where(position > 0, 3.0, 1.0))
    drawn = Weighted(position[:, None], log_weight, log_weight)
    target = Target(from_potential(lambda z: z @ z, jnp.zeros(1)), {})
    moves = LangevinMoves(Overdispersed(jnp.zeros(1), jnp.ones(1)), target, np.array(8))
    lost = begin(moves, first_population(jnp.full((1000, 1), -9.0), 1000), np.array(1.0))
    pools = Pools(moves, target, lost, Chain(()), {})
    values = np.asarray(replace(random.key(1), pools, drawn, 2).particles.values)
    assert (values == -9.0).sum() == 496  # 62 of 125 chains
    share = (values[values > -9.0] > 0).mean()
    assert abs(share - 0.75) < SIGMAS * np.sqrt(0.75 * 0.25 / 504)
    assert not (np.asarray(replace(random.key(1), pools, drawn).particles.values) == -9.0).any()


def test_round_that_misses_mass_is_not_chosen():
    """Its weights look better, its evidence is too low; rounds of hardly any effect do not count."""
    rounds = [
        Round("misses", 0, 0.5, 0.0, 0.0, -0.14, 0.016),
        Round("best", 0, 0.48, 0.0, 0.0, -0.03, 0.017),
        Round("good", 0, 0.4, 0.0, 0.0, 0.0, 0.02),
    ]
    assert choose(rounds).proposal == "best" and choose(rounds[:1]).proposal == "misses"
    assert choose([*rounds, Round("poor", 0, 0.01, 0.0, 0.0, 0.9, 0.2)]).proposal == "best"
    heavy = Round("heavy tails", 0, 0.9, 0.6, 0.0, -0.02, 0.01)
    assert choose([*rounds, heavy]).proposal == "best" and choose([heavy]).proposal == "heavy tails"


def tilted(z):
    """Minus the log density of N((1, -1), [[1, .9], [.9, 1]])."""
    x = z - jnp.array([1.0, -1.0])
    return 0.5 * (x @ x - 1.8 * x[0] * x[1]) / 0.19


@pytest.mark.always
def test_nothing_is_trained_where_the_affine_sampler_is_good_enough():
    learned = learn(random.key(0), Target(from_potential(tilted, jnp.zeros(2)), {}), SMALL, progress_bar=False)
    assert (learned.taught.stopped, len(learned.taught.rounds)) == ("good enough", 1)
    assert learned.taught.best.share > 0.8
    truth = np.log(2 * np.pi * np.sqrt(0.19))
    assert abs(learned.taught.best.log_evidence - truth) < SIGMAS * learned.taught.best.error < 0.2
    # At most forty steps of one in two of 512 particles, at few temperatures.
    assert 512 <= learned.evidence.num_gradients <= 5 * 40 * 256


@pytest.mark.parametrize(
    ("last", "gain", "is_last", "expected"),
    [
        ({"share": 0.9}, 0.5, False, "good enough"),
        ({"share": 0.9, "k_hat": 0.6}, 0.5, False, ""),
        ({"share": 0.9, "missed": 0.02}, 0.5, False, ""),
        ({"share": 0.6}, 0.01, False, "flat"),
        ({"share": 0.6, "k_hat": 0.6}, 0.01, False, ""),
        ({"share": 0.6}, 0.2, False, ""),
        ({"share": 0.3}, 0.01, False, ""),
        ({"share": 0.3}, 0.01, True, "finished"),
    ],
)
def test_rounds_stop(last, gain, is_last, expected):
    """Good weights end the training, and so do rounds that gain nothing where the share is fair."""
    latest = Round(None, 0, **{"share": 0.0, "k_hat": 0.0, "missed": 0.0, "log_evidence": 0.0, "error": 0.1} | last)
    before = latest._replace(share=latest.share / (1 + gain))
    history = History(np.zeros(1), np.zeros(1), 1, 1, 0.0, "finished")
    assert stops([before], latest, history, is_last) == expected


@pytest.mark.parametrize(("num_rounds", "expected"), [(3, ""), (4, "good enough")])
def test_a_long_round_begins_only_where_the_weights_are_poor(num_rounds, expected):
    latest = Round(None, 0, 0.6, 0.0, 0.0, 0.0, 0.1)
    history = History(np.zeros(1), np.zeros(1), 1, 1, 0.0, "finished")
    assert stops(num_rounds * [latest._replace(share=0.3)], latest, history, False) == expected


def judged(scale, distance, num_steps):
    """Judge the flow of a mixture's exact score against the mixture."""
    means = distance * jnp.array([[-1.0, 0.0], [1.0, 0.5]])
    score = MixtureScore(jnp.array([0.3, 0.7]), means, jnp.full(2, scale))

    def potential(x):
        squares = jnp.sum((x - means) ** 2, axis=1) / scale**2
        return -jax.nn.logsumexp(jnp.log(WEIGHTS) - 0.5 * squares)

    target = Target(from_potential(potential, jnp.zeros(2)), {})
    flow = ProbabilityFlow(num_steps=num_steps, inflation=0.15)
    proposal = SingleProposal(Chain(()), score, flow.with_steps(num_steps), 2)
    places = jax.vmap(lambda key: flow.sample(key, score, 2)[0])(random.split(random.key(1), 512))
    return target, places, judge(random.key(2), proposal, target, places, 0)[0]


@pytest.mark.parametrize(("scale", "distance", "num_steps"), [(1.0, 0.0, 4), (0.1, 1.0, 8)])
def test_the_flow_takes_the_fewest_steps(scale, distance, num_steps):
    """For N(0, I) any number is exact, but steps of a quarter turn are not inverted far out. Narrow modes need all."""
    target, places, best = judged(scale, distance, 8)
    assert best.share > 0.8
    assert fewest_steps(random.key(0), best, target, places).sampler.num_evaluations == 2 * num_steps
    poor = best._replace(share=0.2)
    assert fewest_steps(random.key(0), poor, target, places).sampler.num_evaluations == 16


def test_narrow_modes_get_more_steps():
    """Where the draws of the best round are not good; the weights stay exact."""
    target, places, poor = judged(0.1, 1.0, 2)
    taught = Taught((poor,), FLAT, 0)
    found = more_steps(random.key(0), taught, target, places)
    shares = [one.share for one in found.rounds]
    assert shares == sorted(shares) and shares[-1] > 0.8 > 2 * shares[0]
    assert found.best.proposal.sampler.num_evaluations >= 16
    assert abs(found.best.log_evidence - np.log(2 * np.pi * 0.01)) < 5 * found.best.error
    good = Taught((found.best,), FLAT, 0)
    assert more_steps(random.key(0), good, target, places) is good


# --- the learned sampler -----------------------------------------------------------------------------------------


def test_learned_weights_are_exact(both_modes):
    """Evidence and moments by importance sampling, and the explorer's word for the modes' weights."""
    fit = both_modes.sampler.fit_of(both_modes.last_state)
    proposal, evidence = fit.proposal, fit.evidence
    drawn = weighted_draws(random.key(1), proposal, Target(fit.problem, {}), 1024, None, 0, 4096)
    weight = np.exp(np.asarray(drawn.log_weight, np.float64) - 2.0)
    assert weight.sum() ** 2 / (weight**2).sum() > 0.4 * weight.size
    right = np.asarray(drawn.z)[:, 0] > 0
    for values, truth in ((weight, 1.0), (weight * right, 0.7)):
        assert abs(values.mean() - truth) < SIGMAS * values.std() / np.sqrt(values.size)
    assert abs(float((evidence.places[:, 0] > 0).mean()) - 0.7) < 0.15


@pytest.fixture
def few_witnesses(monkeypatch):
    """Let a quarter of the particles be enough for the second opinions."""
    few = verdict.EFFORT._replace(num_particles=1024)
    monkeypatch.setattr(verdict, "EFFORT", few)


def test_chain_visits_both_modes(both_modes):
    """A chain without global moves would stay in its mode."""
    draws = np.asarray(both_modes.get_samples(group_by_chain=True), np.float64)
    right = (draws[..., 0] > 0).astype(float)
    assert abs(right.mean() - 0.7) < SIGMAS * right.std() / np.sqrt(effective_sample_size(right))
    assert np.all(np.abs(right.mean(1) - 0.7) < 0.25)


def test_certificate_of_chains(both_modes, few_witnesses):
    found = certify_chains(both_modes, num=2048)
    assert found.certified and "certified: " in str(found), found
    assert abs(found.weights.log_evidence - 2.0) < SIGMAS * found.weights.log_evidence_se < 0.2
    assert len(found.explorer_log_evidence) == 2
    assert max(found.r_hat, found.nested_r_hat) < 1.05 and 0.3 < found.accept_prob < 1


def far_mode(x):
    """Two modes, forty sd apart: the first explorer starts at one of them."""
    return -jax.nn.logsumexp(-0.5 * jnp.sum((x - jnp.array([[0.0, 0.0], [40.0, 0.0]])) ** 2, axis=1))


@pytest.mark.slow
def test_far_mode_is_refused(few_witnesses):
    """The weights look perfect, the wider explorers know."""
    mcmc = run_bare(far_mode, 2, num_warmup=60, start_scale=1.0, num_local_steps=0)
    found = certify_chains(mcmc, num=1024)
    assert found.weights.k_hat < 0.7 and found.weights.ess > 500
    assert not found.certified and "above the proposals'" in found.reason


@pytest.mark.slow
def test_far_mode_is_refused_by_the_last_explorer(monkeypatch, few_witnesses):
    """The second one misses it too: the third is left."""
    monkeypatch.setattr(verdict, "WIDER", 1e-3)
    mcmc = run_bare(far_mode, 2, num_warmup=60, start_scale=1.0, num_local_steps=0)
    found = certify_chains(mcmc, num=1024)
    assert max(found.explorer_log_evidence) < found.weights.log_evidence + 0.3
    assert not found.certified and "never draws" in found.reason


def test_certificate_is_for_score_sde():
    mcmc = MCMC(NUTS(location_scale), num_warmup=5, num_samples=5, progress_bar=False)
    with pytest.raises(ValueError, match="NUTS"):
        certify(mcmc)
    with pytest.raises(ValueError, match="not been run"):
        certify(MCMC(ScoreSDE(location_scale), num_warmup=5, num_samples=5, progress_bar=False))


@pytest.mark.slow
def test_pytree_potential_and_pickling():
    import pickle

    kernel = ScoreSDE(potential_fn=pytree_potential, bank_size=16)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=200, progress_bar=False)
    mcmc.run(random.key(0), init_params={"a": jnp.zeros(()), "b": (jnp.zeros(2),)})
    samples = pickle.loads(pickle.dumps(mcmc)).get_samples()
    assert samples["a"].shape == (200,) and samples["b"][0].shape == (200, 2)
    a = np.asarray(samples["a"], np.float64)[None]
    assert abs(a.mean() - 1.0) < SIGMAS * a.std() / np.sqrt(effective_sample_size(a))
    with pytest.raises(ValueError, match="init_params"):
        MCMC(ScoreSDE(potential_fn=two_modes), num_warmup=5, num_samples=5, progress_bar=False).run(random.key(0))


def pytree_potential(x):
    return 0.5 * (x["a"] - 1.0) ** 2 + jnp.sum((x["b"][0] + 1.0) ** 2)


@pytest.mark.slow
def test_model_is_learned_for_each_data_set():
    """One kernel, two data sets: the problem is read once, each posterior is right."""
    kernel = ScoreSDE(location_scale, bank_size=32)
    for number, y in enumerate((Y1, Y2)):
        mcmc = MCMC(kernel, num_warmup=30, num_samples=200, num_chains=2, chain_method="vectorized", progress_bar=False)
        mcmc.run(random.key(number), y)
        draws = mcmc.get_samples(group_by_chain=True)
        for name, (mean, _) in grid_moments(y).items():
            values = np.asarray(draws[name], np.float64)
            assert abs(values.mean() - mean) < SIGMAS * values.std() / np.sqrt(effective_sample_size(values))
    assert len({id(fit.problem) for fit in kernel._fits}) == 1 < len(kernel._fits)


# --- a block of Gibbs --------------------------------------------------------------------------------------------

VALUES = np.array([-1.6, -0.7, 0.4, 1.2, 2.1], np.float32)
CENTRES = np.array([-1.0, 1.0])


def clusters(y=None):
    """Two cluster centres and discrete assignments."""
    with numpyro.plate("cluster", 2):
        mu = numpyro.sample("mu", dist.Normal(jnp.array(CENTRES, jnp.float32), 0.7))
    with numpyro.plate("n", 5):
        c = numpyro.sample("c", dist.Categorical(probs=jnp.array([0.3, 0.7])))
        numpyro.sample("y", dist.Normal(mu[c], 1.0), obs=y)


def exact_mean_of_first_centre():
    """By enumeration of the 32 assignments, each Gaussian in the centres."""
    total, first = 0.0, 0.0
    for code in range(32):
        c = (code >> np.arange(5)) & 1
        weight = np.prod(np.where(c == 1, 0.7, 0.3))
        for k in range(2):
            y = VALUES[c == k] - CENTRES[k]
            covariance = np.eye(len(y)) + 0.49
            weight *= np.exp(-0.5 * y @ np.linalg.solve(covariance, y)) / np.sqrt(np.linalg.det(2 * np.pi * covariance))
        y = VALUES[c == 0] - CENTRES[0]
        total += weight
        first += weight * (CENTRES[0] + y.sum() / (len(y) + 1 / 0.49))
    return first / total


@pytest.mark.slow
def test_block_of_gibbs():
    """Discrete assignments by DiscreteGibbs, centres by ScoreSDE: the answer of enumeration."""
    gibbs = pytest.importorskip("numpyro.infer.gibbs")
    kernel = gibbs.Gibbs(
        [(gibbs.DiscreteGibbs(clusters), ["c"]), (ScoreSDE(clusters, bank_size=1, key=random.key(1)), ["mu"])]
    )
    mcmc = MCMC(kernel, num_warmup=50, num_samples=300, num_chains=2, chain_method="sequential", progress_bar=False)
    mcmc.run(random.key(0), y=VALUES)
    first = np.asarray(mcmc.get_samples(group_by_chain=True)["mu"], np.float64)[..., 0]
    error = first.std() / np.sqrt(effective_sample_size(first))
    assert error < 0.15
    assert abs(first.mean() - exact_mean_of_first_centre()) < SIGMAS * error


@pytest.mark.parametrize(
    ("kind", "method"),
    [(MALA, "sequential"), (MALA, "parallel"), (MALA, jax.vmap), (UnderdampedLangevin, "sequential")],
    ids=["MALA", "MALA parallel", "MALA vmap", "underdamped"],
)
def test_langevin_block_of_gibbs(kind, method):
    gibbs = pytest.importorskip("numpyro.infer.gibbs")
    kernel = gibbs.Gibbs([(gibbs.DiscreteGibbs(clusters), ["c"]), (kind(clusters), ["mu"])])
    mcmc = MCMC(kernel, num_warmup=200, num_samples=1500, num_chains=2, chain_method=method, progress_bar=False)
    mcmc.run(random.key(0), y=VALUES)
    first = np.asarray(mcmc.get_samples(group_by_chain=True)["mu"], np.float64)[..., 0]
    error = first.std() / np.sqrt(effective_sample_size(first))
    assert error < 0.05
    assert abs(first.mean() - exact_mean_of_first_centre()) < SIGMAS * error


def test_langevin_block_is_refreshed():
    """Density and gradient are those of the new values; then they are not computed again."""
    kernel = MALA(location_scale)
    state = kernel.init(random.key(0), 10, None, model_args=(Y1,), model_kwargs={})
    new, fresh = kernel.refresh(state, (Y2,), {}), kernel.init(random.key(0), 10, state.z, (Y2,), {})
    for name in ("potential_energy", "z_grad", "y", "z"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), getattr(new, name), getattr(fresh, name))
    assert abs(new.potential_energy - state.potential_energy) > 1


def test_only_a_model_can_be_a_block():
    gibbs = pytest.importorskip("numpyro.infer.gibbs")
    with pytest.raises(ValueError, match="potential function"):
        gibbs.Gibbs([(NUTS(clusters), ["mu"]), (MALA(potential_fn=two_modes), ["c"])])
    with pytest.raises(ValueError, match="potential function"):
        gibbs.Gibbs([(NUTS(clusters), ["mu"]), (ScoreSDE(potential_fn=two_modes), ["c"])])
