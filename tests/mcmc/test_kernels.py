"""ScoreSDE: exact chains whatever the proposal, and every clause of NumPyro's kernel contract."""

import contextlib
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from jax import random
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, Predictive, log_likelihood

import doubles
import scoreinfer as si
from doubles import Y1, Y2, as_learned, fake_posterior, grid_moments, location_scale, location_scale_problem
from scoreinfer.errors import UnsupportedModel
from scoreinfer.mcmc import ScoreSDE, score_sde, transition
from scoreinfer.mcmc.transition import ScoreSDEState
from scoreinfer.model import from_numpyro
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import AbstractDensityProposal, Target

SIGMAS = 5


@pytest.fixture(scope="module")
def posterior():
    return fake_posterior()


@pytest.fixture(scope="module")
def kernel(posterior):
    return ScoreSDE(location_scale, posterior=posterior, bank_size=32)


def mcmc_of(kernel, **options):
    """Without a progress bar NumPyro compiles its loop again at every run; with one, only when it must."""
    defaults = {"num_warmup": 5, "num_samples": 100, "num_chains": 2, "chain_method": "vectorized"}
    mcmc = MCMC(kernel, **(defaults | {"progress_bar": False} | options))
    mcmc.progress_bar = options.get("progress_bar", False)  # NumPyro turns it off where it sees CI or xdist
    return mcmc


def run(kernel, *args, key=0, init_params=None, extra_fields=(), **options):
    mcmc = mcmc_of(kernel, **options)
    mcmc.run(random.key(key), *args, init_params=init_params, extra_fields=extra_fields)
    return mcmc


def assert_draws(sites, y):
    """Means and variances within SIGMAS standard errors of quadrature."""
    for name, (mean, sd) in grid_moments(y).items():
        for values, truth in ((sites[name], mean), ((sites[name] - mean) ** 2, sd**2)):
            values = np.asarray(values, np.float64)
            error = values.std() / np.sqrt(effective_sample_size(values))
            assert abs(values.mean() - truth) < SIGMAS * error, f"{name}: {(values.mean() - truth) / error:.1f} sigma"


def assert_same(one, two, atol=1e-4):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=atol, rtol=1e-4)


@contextlib.contextmanager
def compilations():
    """Count programs handed to the compiler."""
    count = []
    listener = lambda event, duration, **_: count.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield count
    jax.monitoring.unregister_event_duration_listener(listener)


# --- exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [False, True], ids=["flow", "path"])
@pytest.mark.parametrize("options", [{}, {"num_proposals": 4}, {"num_local_steps": 2}], ids=["one", "many", "local"])
def test_chain_is_exact(options, path):
    """Whatever is wrong with the proposal; run for other data than the warm-up."""
    mcmc = mcmc_of(
        ScoreSDE(posterior=fake_posterior(path=path), **options), num_warmup=200, num_samples=4000, num_chains=4
    )
    mcmc.warmup(random.key(1), Y2)
    mcmc.run(random.key(2), Y1)
    assert_draws(mcmc.get_samples(group_by_chain=True), Y1)


def test_wrong_weight_is_seen(monkeypatch):
    """The test above has the power to see a weight with the wrong sign of log q."""
    monkeypatch.setattr(doubles.GaussianProposal, "_log_ratio", lambda self, context, u, z: 0.0 * z.sum())
    mcmc = run(ScoreSDE(posterior=fake_posterior(path=True)), Y1, num_samples=4000, num_chains=4)
    with pytest.raises(AssertionError, match="sigma"):
        assert_draws(mcmc.get_samples(group_by_chain=True), Y1)


def test_local_steps_reach_what_proposals_miss():
    """Narrow proposals: local moves carry the chain through the tails; step size frozen after warm-up at 0.574."""
    kernel = ScoreSDE(posterior=fake_posterior(shift=0.0, scale=0.25), num_local_steps=5)
    mcmc = run(
        kernel, Y1, num_warmup=500, num_samples=2000, num_chains=4,
        extra_fields=("adapt_state.step_size", "adapt_state.accept_prob"),
    )  # fmt: skip
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert (np.ptp(fields["adapt_state.step_size"], axis=1) == 0).all()
    assert np.abs(fields["adapt_state.accept_prob"].mean(1) - 0.574).max() < 0.1
    assert_draws(mcmc.get_samples(group_by_chain=True), Y1)


def test_no_weight_at_all_stays_put():
    problem = doubles.Problem(**vars(location_scale_problem()) | {"log_likelihood": lambda z, y: -jnp.inf})
    mcmc = run(ScoreSDE(posterior=fake_posterior(problem)), Y1)
    assert (mcmc.get_extra_fields()["log_weight"] == -jnp.inf).all()
    assert (mcmc.get_extra_fields()["accept_prob"] == 0).all()


# --- chain methods and runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(kernel):
    return run(kernel, Y1).get_samples(group_by_chain=True)


@pytest.mark.parametrize("progress_bar", [False, True])
@pytest.mark.parametrize(
    "method", ["sequential", "vectorized", "parallel", jax.vmap], ids=lambda m: getattr(m, "__name__", m)
)
def test_chain_methods_agree(kernel, reference, method, progress_bar):
    if callable(method) and progress_bar:
        pytest.skip("NumPyro has no progress bar for callables")
    mcmc = run(kernel, Y1, chain_method=method, progress_bar=progress_bar)
    assert_same(mcmc.get_samples(group_by_chain=True), reference)


@pytest.mark.parametrize(
    "method", ["sequential", "vectorized", "parallel", jax.vmap], ids=lambda m: getattr(m, "__name__", m)
)
def test_second_run_answers_for_its_own_data(kernel, method):
    """After one warm-up: other data, other keys and continuation; the same in every chain method."""
    mcmc = mcmc_of(kernel, chain_method=method, num_samples=60)
    mcmc.warmup(random.key(0), Y1)
    draws = []
    for key, y in ((1, Y1), (2, Y1), (2, Y2), (2, Y1)):
        mcmc.run(random.key(key), y)
        draws.append(mcmc.get_samples()["mu"])
    assert abs(draws[2].mean() - grid_moments(Y2)["mu"][0]) < 0.5
    assert np.abs(draws[0] - draws[1]).max() > 0.1
    np.testing.assert_allclose(draws[1], draws[3], atol=1e-4)
    other = mcmc_of(kernel, num_samples=60)
    other.warmup(random.key(0), Y1)
    other.run(random.key(2), Y2)
    np.testing.assert_allclose(other.get_samples()["mu"], draws[2], atol=1e-4)


def test_continue_from_last_state(kernel):
    long = run(kernel, Y1, num_chains=1, num_warmup=0, num_samples=100).get_samples()
    mcmc = mcmc_of(kernel, num_chains=1, num_warmup=0, num_samples=50)
    mcmc.run(random.key(0), Y1)
    first = mcmc.get_samples()
    assert isinstance(mcmc.last_state, ScoreSDEState)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.post_warmup_state.rng_key, Y1)
    assert_same({name: np.concatenate([first[name], mcmc.get_samples()[name]]) for name in long}, long)


def test_thinning(kernel, reference):
    thin = run(kernel, Y1, thinning=4).get_samples(group_by_chain=True)
    assert_same(thin, {name: value[:, 3::4] for name, value in reference.items()})


def test_both_key_styles(kernel, reference):
    mcmc = mcmc_of(kernel)
    mcmc.run(random.PRNGKey(0), Y1)
    assert_same(mcmc.get_samples(group_by_chain=True), reference)


def test_init_params(kernel):
    """The chain starts there, with the weight of that point; shapes are those of NumPyro's own kernels."""
    start = {"mu": jnp.array([9.0, -9.0]), "sigma": jnp.array([1.0, 2.0])}
    mcmc = mcmc_of(kernel, num_warmup=0)
    mcmc.warmup(random.key(0), Y1, init_params=start)
    state = mcmc.post_warmup_state
    assert_same(state.z, start)
    problem = location_scale_problem()
    z, y = jnp.array([9.0, 1.0]), problem.read((Y1,), {})
    log_q = fake_posterior().log_q(None, fake_posterior().context(Target(problem, y)), z)
    np.testing.assert_allclose(state.log_weight[0], problem.log_joint(z, y) - log_q, rtol=1e-4)
    one = run(kernel, Y1, num_chains=1, init_params={"mu": 9.0, "sigma": 1.0}, extra_fields=("z.mu",))
    assert one.get_extra_fields()["z.mu"].shape == (100,)
    with pytest.raises(ValueError, match="sigma"):
        run(kernel, Y1, num_chains=1, init_params={"mu": 9.0})


def test_extra_fields_and_excluded_sites(kernel):
    fields = ("z.mu", "adapt_state.step_size", "i", "mean_accept_prob", "~z.sigma")
    mcmc = run(kernel, Y1, extra_fields=fields)
    assert set(mcmc.get_samples()) == {"mu", "log_sigma"}
    found = mcmc.get_extra_fields(group_by_chain=True)
    assert all(found[name].shape == (2, 100) for name in (*fields[:-1], "log_weight", "accept_prob"))
    assert "acc. prob=0." in kernel.get_diagnostics_str(run(kernel, Y1, num_chains=1).last_state)


@pytest.mark.parametrize("x64", [False, True])
def test_dtypes_are_constant(x64):
    with jax.enable_x64(x64):
        mcmc = run(
            ScoreSDE(posterior=fake_posterior(from_numpyro(location_scale)), bank_size=32, num_local_steps=1), Y1
        )
        kinds = [leaf.dtype for leaf in jax.tree.leaves(mcmc.last_state)]
        mcmc.warmup(random.key(0), Y1.astype(float))
        mcmc.run(random.key(1), Y1)
        assert [leaf.dtype for leaf in jax.tree.leaves(mcmc.last_state)] == kinds
        assert mcmc.get_samples()["mu"].dtype == mcmc.get_extra_fields()["log_weight"].dtype == jnp.result_type(float)


@pytest.mark.parametrize("num_chains", [1, 2])
def test_other_data_compile_nothing(kernel, num_chains):
    mcmc = mcmc_of(kernel, num_chains=num_chains, jit_model_args=True, progress_bar=True)
    mcmc.run(random.key(0), Y1)
    first = mcmc.get_samples()
    with compilations() as count:
        mcmc.run(random.key(0), Y2)
    assert not count
    mean, sd = grid_moments(Y2)["mu"]
    assert abs(mcmc.get_samples()["mu"].mean() - mean) < sd
    mcmc.run(random.key(0), Y1)
    assert_same(mcmc.get_samples(), first)


def test_refill_stays_a_branch(monkeypatch):
    """Also where every chain brings a bank of its own: a select would run the sampler at each iteration."""
    kernel = ScoreSDE(posterior=fake_posterior(), bank_size=32, num_local_steps=1)  # no other branch: never at rest

    def branches():
        vectorized = kernel.init(random.split(random.key(0)), 0, None, model_args=(Y1,), model_kwargs={})
        one = kernel.init(random.key(0), 0, None, model_args=(Y1,), model_kwargs={})
        both = jax.tree.map(lambda x: jnp.stack([x, x]), one)
        move = lambda state: kernel.sample(state, (Y1,), {})  # noqa: E731
        programs = jax.make_jaxpr(move)(vectorized), jax.make_jaxpr(jax.vmap(move))(both)
        return ["cond[" in str(program) for program in programs]

    assert branches() == [True, True]
    monkeypatch.setattr(transition, "any_chain", lambda flag: flag)
    assert branches() == [False, False]


def test_chain_without_local_steps_rests_in_warm_up(kernel):
    """It picks a start, rests, and makes the last ten moves of warm-up and every move after it."""
    state, step = (
        kernel.init(random.key(0), 30, None, (Y1,), {}),
        jax.jit(lambda state: kernel.sample(state, (Y1,), {})),
    )
    places = []
    for _ in range(60):
        state = step(state)
        places.append(float(state.z["mu"]))
    assert len(set(places[:20])) == 1 < len(set(places[20:30])) and len(set(places[30:])) > 5
    assert int(state.i) == 60


# --- inside jit and vmap -----------------------------------------------------------------------------------------


def test_run_inside_jit_and_vmap(kernel):
    def mean(key, y):
        mcmc = mcmc_of(kernel, num_chains=1)
        mcmc.run(key, y)
        return mcmc.get_samples()["mu"]

    alone = mean(random.key(3), Y2)
    np.testing.assert_allclose(jax.jit(mean)(random.key(3), Y2), alone, atol=1e-4)
    both = jax.vmap(mean)(jnp.stack([random.key(0), random.key(3)]), np.stack([Y1, Y2]))
    np.testing.assert_allclose(both[1], alone, atol=1e-4)


def test_refresh_weighs_for_the_new_data(kernel, posterior):
    """What `Gibbs` asks when other blocks have moved: the same z, its weight under the new data, no old proposals."""
    state = run(kernel, Y1, num_chains=1).last_state
    new = kernel.refresh(state, (Y2,), {})
    z, problem = jnp.stack([state.z["mu"], state.z["sigma"]]), posterior.problem
    y = problem.read((Y2,), {})
    log_joint = problem.log_joint(z, y)
    np.testing.assert_allclose(-new.potential_energy, log_joint, rtol=1e-5)
    np.testing.assert_allclose(
        new.log_weight, log_joint - posterior.log_q(None, posterior.context(Target(problem, y)), z), rtol=1e-4
    )
    assert new.bank.used == 32 and not np.allclose(new.log_weight, state.log_weight)
    np.testing.assert_array_equal(new.z["mu"], state.z["mu"])


# --- training ----------------------------------------------------------------------------------------------------


def design(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=y)


class Regression(doubles.GaussianProposal):
    def context(self, target):
        return self.shift


X = np.array([0.5, 1.0, 2.0], np.float32)


@pytest.fixture
def fits(monkeypatch):
    """Replace training by the double; the list grows by one at each fit."""
    done = []

    def fit(self, key, *args, **kwargs):
        assert not isinstance(key, jax.core.Tracer)
        problem = from_numpyro(self.model, *args, **kwargs)
        assert float(problem.log_joint(jnp.zeros(problem.dim), problem.simulate(key)[1])) < 0  # values, not tracers
        done.append(args)
        return Regression(jnp.full(problem.dim, 0.1), jnp.full(problem.dim, 1.5), problem)

    monkeypatch.setattr(score_sde.NPSE, "fit", fit)
    return done


@pytest.fixture
def learned(monkeypatch):
    """Replace the learning of one posterior by the double; the list grows by one at each."""
    done = []

    def learn(key, target, effort, **options):
        problem, y = target.problem, target.y
        assert not isinstance(key, jax.core.Tracer)
        assert float(problem.log_joint(jnp.zeros(problem.dim), y)) < 0
        done.append(effort)
        proposal = Regression(jnp.full(problem.dim, 0.1), jnp.full(problem.dim, 1.5), problem)
        return as_learned(proposal, y)

    monkeypatch.setattr(score_sde, "learn", learn)
    return done


@pytest.mark.parametrize("method", ["sequential", "parallel", jax.vmap], ids=lambda m: getattr(m, "__name__", m))
def test_learns_once_for_each_data_set(learned, method):
    """Once for all chains, also where keys are traced; data that were seen before are not learned again."""
    kernel = ScoreSDE(design, key=random.key(7), bank_size=32, num_local_steps=0)
    for y in (2.5 * X, -2.5 * X, 2.5 * X):
        mcmc = run(kernel, X, y, chain_method=method)
        assert abs(mcmc.get_samples()["slope"].mean() - (X @ y) / (1 + X @ X)) < 0.3
    assert [effort.num_steps for effort in learned] == [100, 100]


def test_chain_methods_learn_from_the_same_key(monkeypatch):
    """Without a key of its own, the kernel takes the first chain's: the same under every method."""
    keys = []

    def learn(key, *args, **options):
        keys.append(random.key_data(key))
        raise InterruptedError

    monkeypatch.setattr(score_sde, "learn", learn)
    for method in ("sequential", "vectorized"):
        with pytest.raises(InterruptedError):
            run(ScoreSDE(design), X, X, chain_method=method)
    np.testing.assert_array_equal(*keys)


@pytest.mark.parametrize("jit_model_args", [False, True])
def test_other_covariates_are_another_fit(fits, jit_model_args):
    """Each run answers for its own covariates, whichever loop is compiled; MCMC objects share the fits."""
    kernel = ScoreSDE(design, bank_size=32, num_local_steps=0)
    for x in (X, 2 * X):
        kernel.fit(random.key(7), x)
    mcmc = mcmc_of(kernel, jit_model_args=jit_model_args, num_samples=600, progress_bar=True)
    for y, x in ((2.5 * X, X), (2.5 * X, 2 * X), (-2.5 * X, X)):
        mcmc.run(random.key(0), x, y=y)
        mean = (x @ y) / (1 + x @ x)
        draws = np.asarray(mcmc.get_samples(group_by_chain=True)["slope"], np.float64)
        assert abs(draws.mean() - mean) < SIGMAS * draws.std() / np.sqrt(effective_sample_size(draws))
    other = mcmc_of(kernel)
    other.warmup(random.key(0), X, y=X)
    assert len(fits) == 2
    with pytest.raises(ValueError, match="covariates"):
        other.run(random.key(0), 3 * X, y=X)


@pytest.mark.parametrize(
    ("share", "bank_size", "expected"),
    [
        (0.9, 128, (1, 0)),
        (0.75, 128, (1, 0)),
        (0.5, 128, (2, 0)),
        (0.2, 128, (4, 0)),
        (0.05, 128, (8, 5)),
        (0.05, 6, (2, 5)),
        (0.0, 1, (1, 5)),
    ],
)
def test_moves_follow_the_share(share, bank_size, expected):
    """About one effective proposal; local moves where even eight proposals are none."""
    learned = as_learned(None, {})
    taught = learned.taught._replace(rounds=(learned.taught.best._replace(share=share),))
    fit = score_sde.Fit(None, None, learned.evidence, taught=taught)
    assert ScoreSDE(design, bank_size=bank_size).moves_of(fit) == expected
    assert ScoreSDE(design, bank_size=bank_size, num_proposals=1, num_local_steps=2).moves_of(fit) == (1, 2)
    assert ScoreSDE(posterior=fake_posterior()).moves_of(score_sde.Fit(None, None)) == (1, 0)


def test_what_cannot_be_learned(fits, learned):
    kernel = ScoreSDE(design, bank_size=32)
    draw = jax.vmap(lambda y: run(kernel, X, y, num_chains=1).get_samples()["slope"])
    with pytest.raises(ValueError, match="traced model arguments"):
        draw(np.stack([X, -X]))
    with pytest.raises(ValueError, match="num_warmup"):
        run(kernel, X, X, num_warmup=0)
    with pytest.raises(ValueError, match="key="):
        run(kernel, X, X, chain_method="parallel")
    kernel.learn(random.key(0), 10, X, y=X)
    run(kernel, X, X, num_warmup=0, chain_method="parallel")
    kernel.fit(random.key(0), X)
    above, below = draw(np.stack([X, -X])).mean(1)
    assert above > 0 > below


# --- the world around --------------------------------------------------------------------------------------------


def test_no_density_is_refused():
    problem = doubles.Problem(**vars(location_scale_problem()) | {"has_density": False})
    with pytest.raises(ValueError, match="no density"):
        run(ScoreSDE(posterior=fake_posterior(problem)), Y1)


def test_no_density_is_refused_before_learning(monkeypatch):
    """And so is a budget of nothing."""
    problem = doubles.Problem(**vars(location_scale_problem()) | {"has_density": False})
    kernel = ScoreSDE(doubles.location_scale, progress_bar=False)
    with pytest.raises(ValueError, match="`num_warmup` must be at least 1, got 0"):
        kernel.learn(random.key(0), 0, Y1)
    monkeypatch.setattr(kernel, "_read", lambda *_: problem)
    with pytest.raises(UnsupportedModel, match=r"no density: use `posterior\.sample`"):
        kernel.learn(random.key(0), 10, Y1)


def test_certify_takes_the_options_of_the_kind():
    draws = si.Draws({}, np.zeros((1, 1)), None, np.zeros(1), None, {})
    with pytest.raises(TypeError, match="no options with draws, got num"):
        si.certify(draws, num=10)
    with pytest.raises(ValueError, match="ScoreSDE"):
        si.certify(MCMC(NUTS(doubles.location_scale), num_warmup=1, num_samples=1), num=10)


def test_constructor_errors(posterior):
    with pytest.raises(ValueError, match="model"):
        ScoreSDE()
    with pytest.raises(ValueError, match="multiple"):
        ScoreSDE(posterior=posterior, num_proposals=3, bank_size=10)
    by_hand = doubles.Problem(**vars(location_scale_problem()) | {"model": None})
    with pytest.raises(ValueError, match="no model"):
        ScoreSDE(posterior=fake_posterior(by_hand)).fit(random.key(0))


def test_latent_only_model():
    def prior():
        numpyro.sample("a", dist.Beta(2.0, 3.0))

    problem = from_numpyro(prior)
    mcmc = run(ScoreSDE(prior, posterior=fake_posterior(problem, scale=1.5)), num_samples=4000)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["a"], np.float64)
    assert abs(draws.mean() - 0.4) < SIGMAS * draws.std() / np.sqrt(effective_sample_size(draws))


def supports(y=None):
    numpyro.sample("corr", dist.LKJCholesky(3, 1.0))
    numpyro.sample("matrix", dist.Normal(0, 1).expand([2, 2]).to_event(2))
    numpyro.sample("ordered", dist.TransformedDistribution(dist.Normal(0, 1).expand([3]).to_event(1), ORDERED))
    numpyro.sample("pd", dist.Wishart(5.0, jnp.eye(2)))
    numpyro.sample("simplex", dist.Dirichlet(jnp.ones(4)))
    numpyro.sample("unit", dist.Uniform(0, 1).expand([2]).to_event(1))
    with numpyro.plate("groups", 2):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample("y", dist.Poisson(rate), obs=y)


ORDERED = dist.transforms.OrderedTransform()


@pytest.mark.slow
def test_every_support():
    class Fixed(doubles.GaussianProposal):
        def context(self, target):
            return self.shift

    problem, y = from_numpyro(supports), np.array([1, 4])
    kernel = ScoreSDE(supports, posterior=Fixed(jnp.zeros(problem.dim), jnp.ones(problem.dim), problem), bank_size=16)
    mcmc = run(kernel, y, num_samples=20)
    trace = numpyro.handlers.trace(numpyro.handlers.seed(supports, 0)).get_trace(y)
    for name, value in mcmc.get_samples().items():
        assert value.shape[1:] == trace[name]["value"].shape
        assert jnp.all(trace[name]["fn"].support(value))
    state = kernel.init(mcmc.last_state.rng_key, 0, mcmc.last_state.z, model_args=(y,), model_kwargs={})
    np.testing.assert_allclose(state.log_weight, mcmc.last_state.log_weight, rtol=1e-3)


def test_predictive_log_likelihood_and_summary(kernel, capsys):
    mcmc = run(kernel, Y1)
    draws = mcmc.get_samples()
    assert Predictive(location_scale, draws)(random.key(0))["y"].shape == (200, 5)
    assert log_likelihood(location_scale, draws, Y1)["y"].shape == (200, 5)
    mcmc.print_summary()
    printed = capsys.readouterr().out
    assert "mu" in printed and "sigma" in printed and "log_sigma" not in printed


@pytest.mark.filterwarnings("ignore")
def test_arviz(kernel):
    import arviz as az

    mcmc = run(kernel, Y1)
    found = az.from_numpyro(mcmc, log_likelihood=True)
    assert {"posterior", "sample_stats", "log_likelihood", "observed_data"} <= {
        str(group).strip("/") for group in (found.groups() if callable(found.groups) else found.groups)
    }
    assert found["posterior"]["mu"].shape == (2, 100)
    stats = found["sample_stats"]
    assert {"log_weight", "acceptance_rate", "lp"} <= set(stats)
    problem, state = location_scale_problem(), mcmc.last_state
    z = jnp.stack([state.z["mu"][0], state.z["sigma"][0]])
    log_joint = problem.log_joint(z, problem.read((Y1,), {}))
    np.testing.assert_allclose(stats["lp"][0, -1], log_joint, rtol=1e-5)


class Nested(AbstractDensityProposal):
    """Made of another sampler, as a focused one is: the problem is the other's, and the model the problem's."""

    original: doubles.GaussianProposal
    proposal = property(lambda self: self)
    outliers = property(lambda self: None)
    problem = property(lambda self: self.original.problem)

    def context(self, target):
        return self.original.context(target)

    def propose(self, key, context):
        return self.original.propose(key, context)

    def log_q(self, key, context, z):
        return self.original.log_q(key, context, z)


@pytest.mark.parametrize("nested", [False, True])
def test_pickle(kernel, nested):
    """Draws, summaries and states survive; the problem is read from the model again when the kernel is next run."""
    mcmc = run(ScoreSDE(posterior=Nested(fake_posterior()), bank_size=32) if nested else kernel, Y1)
    copy = pickle.loads(pickle.dumps(mcmc))
    assert_same(copy.get_samples(), mcmc.get_samples(), atol=0)
    copy.print_summary()
    copy.run(random.key(0), Y1)
    assert_same(copy.get_samples(), mcmc.get_samples())
    copy.post_warmup_state = copy.last_state
    copy = pickle.loads(pickle.dumps(copy))
    copy.run(random.key(5), Y2)
    assert abs(copy.get_samples()["mu"].mean() - grid_moments(Y2)["mu"][0]) < 0.5


class Cut(AbstractDensityProposal):
    """Proposals that never exceed one: N(.7, 1) cut off there."""

    problem: Problem = eqx.field(static=True)
    proposal = property(lambda self: self)
    outliers = property(lambda self: None)

    def context(self, target):
        return None

    def propose(self, key, context):
        z = 0.7 + random.truncated_normal(key, -jnp.inf, 0.3, (1,))
        return z, self.log_q(key, context, z)

    def log_q(self, key, context, z):
        log_q = jax.scipy.stats.norm.logpdf(z[0], 0.7) - jax.scipy.stats.norm.logcdf(0.3)
        return jnp.where(z[0] < 1.0, log_q, -jnp.inf)


def test_local_moves_reach_where_proposals_never_come():
    """The weight there is infinite: global moves stay, local ones come and go. The posterior is N(.7, 1/2)."""

    def model(y=None):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(a, 1.0), obs=y)

    kernel = ScoreSDE(posterior=Cut(from_numpyro(model)), num_local_steps=3, bank_size=64)
    mcmc = MCMC(
        kernel, num_warmup=300, num_samples=3000, num_chains=4, chain_method="vectorized", progress_bar=False
    )  # fmt: skip
    mcmc.run(random.key(0), 1.4)
    beyond = (np.asarray(mcmc.get_samples(group_by_chain=True)["a"]) > 1.0).astype(float)
    exact = 1 - scipy.stats.norm.cdf(0.3 * np.sqrt(2))
    assert abs(beyond.mean() - exact) < 5 * np.sqrt(exact * (1 - exact) / effective_sample_size(beyond))
