import functools
import io

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer import Predictive
from numpyro.infer.reparam import LocScaleReparam, TransformReparam
from numpyro.infer.util import constrain_fn, potential_energy, unconstrain_fn

from scoreinfer.errors import UnsupportedModel
from scoreinfer.model import check, from_numpyro, survey

pytestmark = pytest.mark.filterwarnings("ignore:Continuous inference poorly handles circular")  # NumPyro's own
KEY = random.key(7)
sample, plate, deterministic = numpyro.sample, numpyro.plate, numpyro.deterministic


# -- models -----------------------------------------------------------------------------------------------------


def one_prior(prior):
    def model(y=None):
        x = sample("x", prior())
        sample("y", dist.Normal(jnp.sum(x), 1.0), obs=y)

    return model


PRIORS = {
    "real": lambda: dist.Normal(1.0, 2.0),
    "positive": lambda: dist.Gamma(2.0, 3.0),
    "unit_interval": lambda: dist.Beta(2.0, 3.0),
    "interval": lambda: dist.Uniform(-1.0, 4.0),
    "greater_than": lambda: dist.Pareto(2.0, 3.0),
    "truncated": lambda: dist.TruncatedNormal(0.0, 1.0, low=-0.5),
    "below": lambda: dist.TruncatedNormal(0.0, 1.0, high=0.5),
    "circular": lambda: dist.VonMises(0.3, 2.0),
    "vector": lambda: dist.Normal(0.0, 1.0).expand([3]).to_event(1),
    "multivariate": lambda: dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3) + 0.5),
    "simplex": lambda: dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0).expand([3]).to_event(1), dist.transforms.OrderedTransform()
    ),
    "positive_definite": lambda: dist.Wishart(5.0, jnp.eye(3)),
    "corr_cholesky": lambda: dist.LKJCholesky(3, 2.0),
    "corr_matrix": lambda: dist.LKJ(3, 2.0),
    "lower_cholesky": lambda: dist.ImproperUniform(constraints.lower_cholesky, (), event_shape=(2, 2)),
    "zero_sum": lambda: dist.ZeroSumNormal(1.0, (4,)),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.array([-1.0, 1.0]), 0.5)
    ),
    "batch of simplex": lambda: dist.Dirichlet(jnp.ones((2, 3))),
}


def hierarchical(group, y=None):
    loc = sample("loc", dist.Normal(0.0, 3.0))
    scale = sample("scale", dist.HalfNormal(2.0))
    with plate("groups", 4):
        effect = sample("effect", dist.Normal(loc, scale))
    deterministic("spread", effect.max() - effect.min())
    with plate("data", len(group)):
        sample("y", dist.Normal(effect[group], 1.0), obs=y)


def moving_support(y=None):
    top = sample("top", dist.Exponential(1.0))
    low = sample("low", dist.Uniform(0.0, top))
    with plate("data", 5):
        sample("y", dist.Normal(low, top), obs=y)


def masked_scaled(mask, y=None):
    with numpyro.handlers.scale(scale=0.5):
        x = sample("x", dist.Gamma(2.0, 1.0))
    with plate("data", 6), numpyro.handlers.mask(mask=mask), numpyro.handlers.scale(scale=3.0):
        sample("y", dist.LogNormal(x, 1.0), obs=y)


@functools.partial(numpyro.handlers.reparam, config={"effect": LocScaleReparam(0.0), "b": TransformReparam()})
def reparametrised(y=None):
    scale = sample("scale", dist.HalfNormal(2.0))
    with plate("groups", 4):
        effect = sample("effect", dist.Normal(1.0, scale))
    b = sample("b", dist.TransformedDistribution(dist.Normal(), dist.transforms.AffineTransform(2.0, 3.0)))
    sample("y", dist.Normal(effect + b, 1.0).to_event(1), obs=y)


def many_observations(n, data=None):
    a = sample("a", dist.Normal())
    with plate("rows", n):
        sample("count", dist.Poisson(jnp.exp(a)), obs=None if data is None else data["count"])
        sample("hit", dist.Bernoulli(logits=a), obs=None if data is None else data["hit"])
    sample("share", dist.Dirichlet(jnp.exp(a) * jnp.ones(3)), obs=None if data is None else data["share"])
    sample("path", dist.MultivariateNormal(a * jnp.ones(2), jnp.eye(2)), obs=data["path"] if data else None)


def random_walk(n, y=None):
    scale = sample("scale", dist.HalfNormal(1.0))

    def step(x, y):
        x = sample("x", dist.Normal(x, scale))
        s = sample("s", dist.Gamma(2.0, 1.0))
        sample("y", dist.Normal(x, s), obs=y)
        return x, None

    scan(step, 0.0, y, length=n)


def lkj(group, x, y=None):
    corr = sample("corr", dist.LKJCholesky(2, 2.0))
    tau = sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    with plate("groups", 3):
        effect = sample("effect", dist.MultivariateNormal(jnp.zeros(2), scale_tril=tau[:, None] * corr))
    logits = (effect[group] * x).sum(-1)
    with plate("data", len(group)):
        sample("y", dist.Bernoulli(logits=logits), obs=y)


def gaussian_process(x, y=None):
    length = sample("length", dist.InverseGamma(3.0, 1.0))
    noise = sample("noise", dist.HalfNormal(1.0))
    gap = (x[:, None] - x) / length
    cov = jnp.exp(-0.5 * gap**2) + (noise**2 + 1e-3) * jnp.eye(len(x))
    sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), cov), obs=y)


def decay(t, y=None):
    rate = sample("rate", dist.LogNormal(0.0, 0.5))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, rate: -rate * x), diffrax.Heun(), t[0], t[-1], 0.1, 1.0, rate,
        saveat=diffrax.SaveAt(ts=t), stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3), max_steps=256,
    )  # fmt: skip
    sample("y", dist.LogNormal(jnp.log(solution.ys), 0.1).to_event(1), obs=y)


def autoregressive(y=None):
    a = sample("a", dist.Normal())
    first = sample("first", dist.Normal(a, 1.0), obs=None if y is None else y[0])
    late = sample("late", dist.Normal(first, 1.0))
    sample("second", dist.Normal(late, 1.0), obs=None if y is None else y[1])
    deterministic("residual", first - a)


def factored(y=None):
    a = sample("a", dist.Gamma(2.0, 1.0))
    numpyro.factor("penalty", -(a**2))
    sample("y", dist.Normal(a, 1.0), obs=y)


def flat(y=None):
    a = sample("a", dist.ImproperUniform(constraints.positive, (), event_shape=(2,)))
    sample("y", dist.Normal(a, 1.0).to_event(1), obs=y)


def pseudo(y=None):
    a = sample("a", dist.Normal().expand([2]).to_event(1))
    sample("balance", dist.Normal(0.0, 0.1), obs=a.sum())
    sample("y", dist.Normal(a, 1.0).to_event(1), obs=y)


def prior_only():
    sample("a", dist.Gamma(2.0, 1.0))


GROUP = np.array([0, 1, 2, 3, 0, 1])
MASK = np.array([True, False, True, True, False, True])
DATA = {
    "count": np.array([0, 3, 1, 2]),
    "hit": np.array([0, 1, 1, 0]),
    "share": np.array([0.2, 0.3, 0.5]),
    "path": np.array([0.1, -0.3]),
}
MODELS = {
    "hierarchical": (hierarchical, (GROUP,), np.linspace(-1.0, 2.0, 6)),
    "moving support": (moving_support, (), np.linspace(-1.0, 2.0, 5)),
    "masked, scaled": (masked_scaled, (MASK,), np.where(MASK, 1.5, np.nan)),
    "reparametrised": (reparametrised, (), np.linspace(-1.0, 2.0, 4)),
    "many observations": (many_observations, (4,), DATA),
    "random walk": (random_walk, (5,), np.linspace(-1.0, 2.0, 5)),
    "correlated effects": (lkj, (GROUP % 3, np.ones((6, 2))), np.array([0, 1, 1, 0, 1, 0])),
    "Gaussian process": (gaussian_process, (np.linspace(0.0, 1.0, 5),), np.linspace(-1.0, 1.0, 5)),
    "differential equation": (decay, (np.linspace(0.0, 1.0, 4),), np.linspace(1.0, 0.3, 4)),
    "latent after data": (autoregressive, (), np.array([0.5, -0.2])),
    "factor": (factored, (), np.array(1.0)),
    "flat": (flat, (), np.array([1.0, 2.0])),
    "pseudo-observation": (pseudo, (), np.array([1.0, 2.0])),
}
MODELS |= {f"support: {name}": (one_prior(prior), (), np.array(0.7)) for name, prior in PRIORS.items()}


@functools.cache
def problem_of(name):
    model, args, _ = MODELS[name]
    return from_numpyro(model, *args)


def unconstrained(problem, z):
    """Cut z into NumPyro's dictionary of unconstrained sites."""
    ends = np.cumsum([site.size for site in problem.latents])[:-1]
    return dict(zip([site.name for site in problem.latents], jnp.split(z, ends), strict=True))


def numpyro_points(model, args, y, problem, z):
    """The unconstrained sites in NumPyro's own shapes."""
    sites = problem.latent_sites(z)
    points = jax.eval_shape(lambda: unconstrain_fn(numpyro.handlers.seed(model, 0), (*args, y), {}, sites))
    flat = unconstrained(problem, z)
    return {name: flat[name].reshape(point.shape) for name, point in points.items()}


# -- densities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_log_joint_is_minus_potential_energy(name):
    model, args, data = MODELS[name]
    problem = problem_of(name)
    y = problem.read((*args, data), {})
    z = 0.5 * random.normal(KEY, (problem.dim,))

    @jax.jit
    def both(z):
        points = numpyro_points(model, args, data, problem, z)
        return problem.log_joint(z, y), -potential_energy(model, (*args, data), {}, points)

    ours, theirs = both(z)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)
    assert np.isfinite(ours)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_and_bijectors(name):
    model, args, data = MODELS[name]
    problem = problem_of(name)
    z = 0.5 * random.normal(KEY, (problem.dim,))

    @jax.jit
    def there_and_back(z):
        points = numpyro_points(model, args, data, problem, z)
        sites = constrain_fn(numpyro.handlers.seed(model, 0), (*args, data), {}, points, return_deterministic=True)
        return problem.latent_sites(z), problem.constrain(z), problem.unconstrain(problem.latent_sites(z)), sites

    latents, everything, back, theirs = there_and_back(z)
    np.testing.assert_allclose(back, z, rtol=1e-3, atol=1e-3)
    assert list(latents) == sorted(site.name for site in problem.latents)
    for site in problem.latents:
        assert latents[site.name].shape == site.shape
        assert latents[site.name].dtype == site.dtype
    for site, value in everything.items():
        np.testing.assert_allclose(value, theirs[site], rtol=1e-4, atol=1e-5)
    if name != "latent after data":  # its deterministic site is a function of the data
        assert everything.keys() == theirs.keys()


def test_pointwise_log_likelihood_sums_to_the_whole():
    model, args, data = MODELS["hierarchical"]
    problem = problem_of("hierarchical")
    y, z = problem.read((*args, data), {}), jnp.linspace(-1.0, 1.0, problem.dim)
    pointwise = problem.pointwise_log_likelihood(z, y)
    assert {name: term.shape for name, term in pointwise.items()} == {"y": (6,)}
    np.testing.assert_allclose(pointwise["y"].sum(), problem.log_likelihood(z, y), rtol=1e-5)
    assert problem.model is model


def test_gradient_and_batch():
    problem = problem_of("hierarchical")
    y = problem.read((GROUP, MODELS["hierarchical"][2]), {})
    z, _ = jax.vmap(problem.simulate)(random.split(KEY, 5))
    gradient = jax.jit(jax.vmap(jax.grad(problem.log_joint), in_axes=(0, None)))(z, y)
    step = 1e-2 * jnp.eye(problem.dim)
    slope = jax.vmap(lambda d: problem.log_joint(z[0] + d, y) - problem.log_joint(z[0] - d, y))(step) / 2e-2
    np.testing.assert_allclose(gradient[0], slope, rtol=2e-2, atol=2e-2)


def test_one_draw_at_a_time():
    problem = problem_of("hierarchical")
    with pytest.raises((ValueError, TypeError), match=r"one draw at a time|dim"):  # jaxtyping is first in tests
        problem.latent_sites(jnp.zeros((3, problem.dim)))
    with pytest.raises(ValueError, match="one draw at a time"):
        problem.latent_sites(jnp.zeros(problem.dim + 1))


# -- simulation -------------------------------------------------------------------------------------------------


def same_moments(a, b):
    """Means of two independent samples agree within five standard errors, entry by entry."""
    a, b = (np.asarray(x, float).reshape(len(x), -1) for x in (a, b))
    gap = a.mean(0) - b.mean(0)
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    return np.all(np.abs(gap) <= 5 * error + 1e-7)


@pytest.mark.parametrize(
    "name",
    ["hierarchical", "moving support", "reparametrised", "many observations", "random walk", "correlated effects"],
)
def test_simulations_are_numpyros(name):
    model, args, _ = MODELS[name]
    problem, num = problem_of(name), 4000
    z, y = jax.jit(jax.vmap(problem.simulate))(random.split(random.key(1), num))
    sites = jax.jit(jax.vmap(problem.latent_sites))(z) | y
    again = jax.jit(jax.vmap(problem.simulate_observation))(random.split(random.key(2), num), z)
    theirs = Predictive(model, num_samples=num)(random.key(3), *args)
    for site, value in sites.items():
        for moment in (np.tanh, np.abs):  # bounded or first, heavy tails spoil the rest
            if moment is np.tanh or np.var(theirs[site]) < 100:
                assert same_moments(moment(value), moment(theirs[site])), site
    for site, value in again.items():
        assert same_moments(np.tanh(value), np.tanh(y[site])), site
        assert value.dtype == y[site].dtype


def test_observation_follows_its_latents():
    problem = problem_of("hierarchical")
    z, _ = problem.simulate(KEY)
    y = jax.jit(jax.vmap(lambda key: problem.simulate_observation(key, z)))(random.split(KEY, 4000))["y"]
    effect = problem.latent_sites(z)["effect"][GROUP]
    np.testing.assert_allclose(y.mean(0), effect, atol=5 / np.sqrt(4000))


def test_masked_entries_are_constant():
    problem = problem_of("masked, scaled")
    _, y = jax.vmap(problem.simulate)(random.split(KEY, 50))
    read = problem.read((MASK, np.where(MASK, 1.5, np.nan)), {})
    assert np.all(y["y"][:, ~MASK] == read["y"][~MASK])
    assert np.all(np.std(y["y"][:, MASK], axis=0) > 0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("factor", "penalty is a `numpyro.factor`"),
        ("flat", "a has an improper prior"),
        ("pseudo-observation", "balance"),
    ],
)
def test_not_simulable(name, reason):
    problem = problem_of(name)
    assert problem.simulate is None
    assert problem.simulate_observation is None
    assert reason in problem.not_simulable


def test_latents_after_data_are_not_predicted_forward():
    problem = problem_of("latent after data")
    assert problem.simulate is not None
    assert problem.simulate_observation is None
    assert problem.constrain(jnp.zeros(2)).keys() == {"a", "late"}


def test_deterministic_sites_may_depend_on_the_data():
    def model(y=None):
        a = sample("a", dist.Normal())
        y = sample("y", dist.Normal(a, 1.0), obs=y)
        deterministic("double", 2 * a)
        deterministic("rest", y - a)

    problem = from_numpyro(model, y=3.0)
    assert problem.constrain(jnp.ones(1)).keys() == {"a", "double"}
    assert problem.sites(jnp.ones(1), {"y": jnp.array(5.0)}) == {"a": 1.0, "double": 2.0, "rest": 4.0}


def test_stochastic_simulator_has_no_density():
    def model(y=None):
        a = sample("a", dist.Normal())
        noise = random.normal(numpyro.prng_key())
        sample("y", dist.Normal(a + 0.7 * noise, 0.1), obs=y)

    problem = from_numpyro(model)
    assert not problem.has_density
    with pytest.raises(ValueError, match="prng_key"):
        problem.log_likelihood(jnp.zeros(1), {"y": jnp.zeros(())})
    np.testing.assert_allclose(problem.log_prior(jnp.zeros(1)), -0.5 * np.log(2 * np.pi), rtol=1e-5)
    y = jax.vmap(lambda key: problem.simulate_observation(key, jnp.zeros(1)))(random.split(KEY, 4000))["y"]
    assert abs(np.std(y) / np.sqrt(0.5) - 1) < 5 / np.sqrt(8000)
    assert "no log density" in str(check(model, file=io.StringIO()))


# -- which sites are observed -----------------------------------------------------------------------------------


def positional(t, y):
    a = sample("a", dist.Normal())
    sample("y", dist.Normal(a * t, 1.0), obs=y)


def keyword(t, *, y=None):
    positional(t, y)


def logarithm(y=None):
    a = sample("a", dist.Normal())
    sample("y", dist.Normal(a, 1.0).expand([3]).to_event(1), obs=None if y is None else jnp.log(y))


def columns(y=None):
    a = sample("a", dist.Normal().expand([2]).to_event(1))
    for i in range(2):
        sample(f"y{i}", dist.Normal(a[i], 1.0).expand([4]).to_event(1), obs=None if y is None else y[:, i])


def by_name(data):
    a = sample("a", dist.Normal())
    sample("y", dist.Normal(a, 1.0), obs=data["y"])


def by_get(data=None):
    a = sample("a", dist.Normal())
    sample("y", dist.Normal(a, 1.0), obs=(data or {}).get("y"))


def two(y=None, n=None):
    a = sample("a", dist.Gamma(2.0, 1.0))
    sample("y", dist.Normal(a, 1.0), obs=y)
    sample("n", dist.Poisson(a), obs=n)


def sized(y=None, num=7):
    a = sample("a", dist.Normal())
    num = num if y is None else y.shape[0]
    with plate("data", num):
        sample("y", dist.Normal(a, 1.0), obs=y)


def own_observed(t, observed=None):
    positional(t, observed)


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "names"),
    [
        (positional, (T := np.ones(3), None), {}, ["y"]),
        (keyword, (T,), {}, ["y"]),
        (keyword, (T,), {"y": None}, ["y"]),
        (logarithm, (), {}, ["y"]),
        (columns, (), {}, ["y0", "y1"]),
        (by_name, ({"y": None},), {}, ["y"]),
        (by_get, (), {}, ["y"]),
        (two, (), {}, ["y", "n"]),
        (two, (), {"y": 1.0}, ["y"]),
        (sized, (), {}, ["y"]),
        (functools.partial(positional, T), (None,), {}, ["y"]),
        (own_observed, (T,), {}, ["y"]),
        (own_observed, (T,), {"observed": T}, ["y"]),
        (numpyro.handlers.condition(one_prior(PRIORS["real"]), {"y": 1.0}), (), {}, ["y"]),
        (many_observations, (4,), {}, ["count", "hit", "share", "path"]),
        (hierarchical, (GROUP,), {}, ["y"]),
        (prior_only, (), {}, []),
    ],
)
def test_observed_sites_are_found(model, args, kwargs, names):
    if model is two and kwargs:  # a count that is not given is a discrete latent site, as for NumPyro
        with pytest.raises(UnsupportedModel, match="'n': is a discrete latent"):
            from_numpyro(model, *args, **kwargs)
    else:
        assert [site.name for site in from_numpyro(model, *args, **kwargs).observed] == names


def test_observed_sites_by_name():
    problem = from_numpyro(two, observed=("n", "y"))
    assert [site.name for site in problem.observed] == ["y", "n"]
    assert [site.name for site in from_numpyro(positional, T, None, observed=("y",)).observed] == ["y"]
    with pytest.raises(UnsupportedModel, match="'nope': is no sample site"):
        from_numpyro(two, observed=("n", "nope"))
    with pytest.raises(TypeError, match="tuple of site names"):
        from_numpyro(two, observed=3)
    with pytest.raises(UnsupportedModel, match="nothing to infer"):
        from_numpyro(prior_only, observed=("a",))


def test_no_data_posterior_is_prior():
    problem = from_numpyro(prior_only)
    z, y = problem.simulate(KEY)
    assert y == {} == problem.read((), {})
    assert problem.log_likelihood(z, y) == 0
    assert "the posterior is the prior" in str(check(prior_only, file=io.StringIO()))


def test_data_at_a_function_of_latents_are_named():
    """Residuals observed at zero: there is an observed site, and the posterior is not the prior."""

    def residuals(data):
        a = sample("a", dist.Normal(0.0, 1.0))
        sample("residual", dist.Normal(0.0, 0.5), obs=data - a)

    report = str(check(residuals, 1.0, file=io.StringIO()))
    assert "! residual is observed at a function of the latent sites" in report and "is the prior" not in report


def test_data_or_not_is_the_same_problem():
    model, args, data = MODELS["hierarchical"]
    without, given = problem_of("hierarchical"), from_numpyro(model, *args, y=data)
    assert without.latents == given.latents
    assert without.observed == given.observed
    z = random.normal(KEY, (without.dim,))
    y, y_ = without.read((*args, data), {}), given.read(args, {"y": data})
    np.testing.assert_array_equal(y["y"], y_["y"])
    np.testing.assert_allclose(without.log_joint(z, y), given.log_joint(z, y_), rtol=1e-6)
    np.testing.assert_allclose(without.simulate(KEY)[0], given.simulate(KEY)[0], rtol=1e-6)


def test_broad_observation_is_expanded():
    model = one_prior(PRIORS["real"])
    y = np.linspace(-1.0, 1.0, 4)
    problem = from_numpyro(model, y)
    assert problem.observed[0].shape == (4,)
    assert problem.simulate(KEY)[1]["y"].shape == (4,)
    z = jnp.array([0.3])
    theirs = -potential_energy(model, (y,), {}, {"x": z[0]})
    np.testing.assert_allclose(problem.log_joint(z, problem.read((y,), {})), theirs, rtol=1e-6)
    with pytest.raises(ValueError, match=r"must have shape \(\).*got \(4,\)"):
        from_numpyro(model).read((y,), {})
    with pytest.raises(ValueError, match=r"must have shape \(6,\).*got \(5,\)"):
        from_numpyro(hierarchical, GROUP, np.ones(5))


# -- reading data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("hierarchical", (GROUP,), "pass data for y"),
        ("hierarchical", (GROUP, np.zeros(5)), r"must have shape \(6,\).*got \(5,\)"),
        ("hierarchical", (GROUP[:5], np.zeros(5)), r"must have shape \(6,\).*got \(5,\)"),
        ("hierarchical", (GROUP, np.full(6, np.nan)), "has 6 NaN of 6"),
        ("hierarchical", (GROUP[::-1].copy(), np.zeros(6)), "give another model"),
        ("masked, scaled", (np.roll(MASK, 1), np.ones(6)), "give another model"),
        ("masked, scaled", (MASK, -np.ones(6)), "must lie in the support `positive`, but 4 of its 6"),
        ("correlated effects", (GROUP % 3, np.ones((6, 2)), np.full(6, 2)), "support `boolean`"),
        ("correlated effects", (GROUP % 3, np.ones((6, 2)) * 1.01, np.ones(6)), "give another model"),
        ("hierarchical", (GROUP, np.ma.array(np.zeros(6), mask=GROUP == 0)), "its masked entries are no data"),
        ("hierarchical", (GROUP, np.zeros(6) + 1j), "'y' must be real or whole numbers, got complex64"),
        ("masked, scaled", (np.roll(MASK, 1), np.ones(6)), "pass the mask as an argument of its own"),
        ("many observations", (4, DATA | {"count": np.array([0.5, 1, 2, 3])}), "nonnegative"),
        ("many observations", (4, DATA | {"share": np.array([0.5, 0.5, 0.5])}), "support `simplex`"),
        ("Gaussian process", (np.linspace(0.0, 1.1, 5), np.zeros(5)), "give another model"),
    ],
)
def test_unfit_arguments_are_refused(name, args, message):
    with pytest.raises(ValueError, match=message):
        problem_of(name).read(args, {})


def test_constants_belong_to_the_design():
    def model(noise, power, y=None):
        a = sample("a", dist.Normal())
        sample("y", dist.Normal(a**power, noise), obs=y)

    problem = from_numpyro(model, 0.5, 2)
    problem.read((0.5, 2, 1.0), {})
    for other in ((0.6, 2), (0.5, 3)):
        with pytest.raises(ValueError, match="give another model"):
            problem.read((*other, 1.0), {})


def test_data_that_are_covariates_belong_to_the_design():
    def model(y):
        a = sample("a", dist.Normal())
        sample("y", dist.Normal(a * y[:-1], 1.0).to_event(1), obs=y[1:])

    y = np.linspace(0.0, 1.0, 5)
    problem = from_numpyro(model, y)
    np.testing.assert_array_equal(problem.read((y,), {})["y"], y[1:].astype(np.float32))
    with pytest.raises(ValueError, match="give another model"):
        problem.read((y + 0.1,), {})


def test_model_that_needs_numpy_values():
    def model(group, y=None):
        a = sample("a", dist.Normal().expand([int(np.max(group)) + 1]).to_event(1))
        offset = 0.0 if y is None else 0.0 * float(np.mean(y))  # looks at the data outside JAX
        sample("y", dist.Normal(a[group] + offset, 1.0).to_event(1), obs=y)

    problem = from_numpyro(model, GROUP)
    for y in (np.zeros(6), np.ones(6)):
        np.testing.assert_array_equal(problem.read((GROUP, y), {})["y"], y)
    with pytest.raises(ValueError, match=r"must have shape|give another model"):
        problem.read((GROUP[::-1].copy(), np.ones(6)), {})


# Data that a model takes from elsewhere than its arguments; each can be changed afterwards.

OUTSIDE = np.array([0.5, 1.5, 2.5])
NEW = np.array([1.0, 3.0, 4.0])


class Holder:
    """A model that is a method of the object that holds its data."""

    def __init__(self, data, scale=1.0):
        self.data, self.scale = data, scale

    def __call__(self):
        a = sample("a", dist.Normal())
        sample("y", dist.Normal(a, self.scale).expand([3]).to_event(1), obs=self.data)

    def logged(self):
        a = sample("a", dist.Normal())
        sample("y", dist.Normal(a, 1.0).expand([3]).to_event(1), obs=jnp.log(jnp.asarray(self.data)))

    def walk(self):
        a = sample("a", dist.Normal())

        def step(last, data):
            return sample("y", dist.Normal(last, 1.0), obs=data), None

        scan(step, a, jnp.asarray(self.data))

    def number(self):
        a = sample("a", dist.Normal())
        sample("y", dist.Normal(a, 1.0), obs=self.data)


def rebind(holder):
    holder.data = NEW


def edit(holder):
    holder.data[:] = NEW


@pytest.mark.parametrize(
    ("name", "change"), [("__call__", rebind), ("__call__", edit), ("logged", rebind), ("walk", rebind)]
)
def test_data_outside_the_arguments_are_read_anew(name, change):
    holder = Holder(OUTSIDE.copy())
    problem = from_numpyro(getattr(holder, name))
    expected = np.log if name == "logged" else np.asarray
    np.testing.assert_allclose(problem.read((), {})["y"], expected(OUTSIDE), rtol=1e-6)
    change(holder)
    np.testing.assert_allclose(problem.read((), {})["y"], expected(NEW), rtol=1e-6)
    inside = jax.jit(lambda x: x + problem.read((), {})["y"])
    np.testing.assert_allclose(inside(0.0), expected(NEW), rtol=1e-6)


def test_numbers_outside_the_arguments_are_read_anew():
    holder = Holder(0.5)
    problem = from_numpyro(holder.number)
    for holder.data in (0.5, 1.5, np.float64(2.5), jnp.array(3.5)):
        assert problem.read((), {})["y"] == np.float32(holder.data)


def test_observed_values_inside_an_argument_are_read_anew():
    """An object that is no pytree, and an array that is edited in place."""

    def model(given):
        a = sample("a", dist.Normal())
        data = given.data if isinstance(given, Holder) else given
        sample("y", dist.Normal(a, 1.0).expand([3]).to_event(1), obs=data)

    for given in (Holder(OUTSIDE.copy()), OUTSIDE.copy()):
        problem = from_numpyro(model, given)
        np.testing.assert_allclose(problem.read((given,), {})["y"], OUTSIDE)
        edit(given) if isinstance(given, Holder) else given.__setitem__(slice(None), NEW)
        np.testing.assert_allclose(problem.read((given,), {})["y"], NEW)


def test_covariates_outside_the_arguments_belong_to_the_design():
    holder = Holder(OUTSIDE)
    problem = from_numpyro(holder)
    problem.read((), {})
    for holder.scale in (2.0, np.float32(1.5), jnp.array(3.0)):
        with pytest.raises(ValueError, match="give another model"):
            problem.read((), {})
    for holder.scale in (1.0, np.ones(3), jnp.ones(())):
        problem.read((), {})


def test_covariates_edited_in_place_do_not_reach_the_problem():
    def model(x, y=None):
        a = sample("a", dist.Normal())
        sample("y", dist.Normal(a * x, 1.0).to_event(1), obs=y)

    x, z = OUTSIDE.copy(), jnp.ones(1)
    problem = from_numpyro(model, x)
    y = problem.read((x, NEW), {})
    before = problem.log_joint(z, y)
    x[:] = NEW
    assert jax.jit(problem.log_joint)(z, y) == problem.log_joint(z, y) == before
    with pytest.raises(ValueError, match="give another model"):
        problem.read((x, NEW), {})
    problem.read((OUTSIDE, NEW), {})


def test_reading_under_jit_and_vmap():
    problem, (_, args, data) = problem_of("hierarchical"), MODELS["hierarchical"]
    batch = np.stack([data, 2 * data])
    for read in (
        jax.vmap(lambda y: problem.read((*args, y), {})["y"]),
        jax.jit(jax.vmap(lambda y: problem.read(args, {"y": y})["y"])),
    ):
        np.testing.assert_allclose(read(batch), batch, rtol=1e-6)
    with pytest.raises(ValueError, match="must have shape"):
        jax.jit(lambda y: problem.read((*args, y), {}))(data[:3])
    inside = jax.jit(lambda x: x + problem.read((*args, data), {})["y"])
    np.testing.assert_allclose(inside(0.0), data, rtol=1e-6)
    with pytest.raises(ValueError, match="NaN"):
        jax.jit(lambda x: x + problem.read((*args, np.nan * data), {})["y"])(0.0)


@pytest.mark.parametrize("name", ["hierarchical", pytest.param("differential equation", marks=pytest.mark.slow)])
def test_problem_made_inside_jit(name):
    model, args, data = MODELS[name]

    @jax.jit
    def log_joint(z):
        problem = from_numpyro(model, *args, data)
        return problem.log_joint(z, problem.read((*args, data), {}))

    problem = problem_of(name)
    z = jnp.linspace(-1.0, 1.0, problem.dim)
    np.testing.assert_allclose(log_joint(z), problem.log_joint(z, problem.read((*args, data), {})), rtol=1e-6)


COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: COMPILATIONS.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
)


@pytest.mark.parametrize("name", ["differential equation", "many observations", "random walk", "masked, scaled"])
def test_second_data_set_compiles_nothing(name):
    model, args, data = MODELS[name]
    problem = from_numpyro(model, *args)
    log_joint = jax.jit(problem.log_joint)
    z = jnp.zeros(problem.dim)

    def use(scale):
        new = jax.tree.map(lambda x: x * scale, data)
        y = problem.read((*args, new if name != "many observations" else data | {"path": data["path"] * scale}), {})
        return log_joint(z, y), problem.encode(y)

    first, _ = use(1)
    before = len(COMPILATIONS)
    second, _ = use(2)
    assert len(COMPILATIONS) == before
    assert first != second


@pytest.mark.parametrize("data", [None, np.zeros(20)])
def test_reading_compiles_no_random_numbers(data, monkeypatch):
    """Compiled, the random numbers of 150 sites take minutes: the model is traced thrice and compiled once."""
    runs, programs = {"traced": 0, "drawn": 0}, []

    def model(y=None):
        a = sample("a", dist.Normal())
        runs["traced" if isinstance(a, jax.core.Tracer) else "drawn"] += 1
        for i in range(20):
            sample(f"y{i}", dist.Normal(a, 1.0), obs=None if y is None else y[i])

    compiled = survey.compiled
    monkeypatch.setattr(survey, "compiled", lambda *args: programs.append(args) or compiled(*args))
    problem = from_numpyro(model, data)
    assert len(programs) == 1
    assert runs == ({"traced": 4, "drawn": 8} if data is None else {"traced": 3, "drawn": 11})
    runs["traced"] = 0
    problem.read((np.ones(20),), {})
    assert runs["traced"] <= 3


# -- encoding ---------------------------------------------------------------------------------------------------


def everything(data=None):
    a = sample("a", dist.Gamma(2.0, 1.0))
    for name, fn in {
        "real": dist.Normal(a, 1.0),
        "positive": dist.LogNormal(a, 1.0),
        "above": dist.Pareto(2.0, 1.0 + 0 * a),
        "proportion": dist.Beta(a, 2.0),
        "interval": dist.Uniform(-2.0, 3.0).mask(True),
        "count": dist.Poisson(a),
        "binary": dist.Bernoulli(logits=a),
        "binomial": dist.Binomial(10, logits=a),
        "class": dist.Categorical(logits=a * jnp.arange(3.0)),
        "share": dist.Dirichlet(a * jnp.ones(3)),
        "table": dist.Multinomial(5, jnp.ones(3) / 3),
        "angle": dist.VonMises(0.0, a),
        "matrix": dist.Wishart(4.0, jnp.eye(2)),
        "moving": dist.Uniform(0.0, a),
    }.items():
        sample(name, fn, obs=None if data is None else data[name])


def test_encoding():
    problem = from_numpyro(everything)
    _, y = jax.vmap(problem.simulate)(random.split(KEY, 200))
    encoded = jax.vmap(problem.encode)(y)
    shapes = {name: value.shape[1:] for name, value in encoded.items()}
    assert shapes == dict.fromkeys(shapes, ()) | {
        "class": (3,), "share": (2,), "table": (3,), "angle": (2,), "matrix": (3,),
    }  # fmt: skip
    for name, value in encoded.items():
        assert value.dtype == jnp.float32, name
        assert np.all(np.isfinite(value)), name
    np.testing.assert_allclose(encoded["positive"], np.log(y["positive"]), rtol=1e-6)
    np.testing.assert_allclose(encoded["count"], np.log1p(y["count"]), rtol=1e-6)
    np.testing.assert_array_equal(encoded["binary"], y["binary"])
    np.testing.assert_array_equal(encoded["real"], y["real"])
    np.testing.assert_array_equal(encoded["moving"], y["moving"])
    np.testing.assert_allclose(jax.nn.sigmoid(encoded["interval"]) * 5 - 2, y["interval"], rtol=1e-4, atol=1e-4)
    edges = jax.tree.map(lambda x: x[0], y) | {
        "positive": jnp.zeros(()),
        "proportion": jnp.ones(()),
        "share": jnp.array([0.0, 0.0, 1.0]),
        "binomial": jnp.array(10),
    }
    assert all(np.all(np.isfinite(value)) for value in problem.encode(edges).values())


# -- exchangeable plates ----------------------------------------------------------------------------------------


def iid(x, offset, y=None):
    a, b = sample("a", dist.Normal()), sample("b", dist.Gamma(2.0, 1.0))
    with plate("people", 5):
        sample("alike", dist.Normal(a, b), obs=y)
        sample("vectors", dist.Normal(a * jnp.ones(2), b).to_event(1))
        sample("counts", dist.Poisson(b))
        sample("regression", dist.Normal(a + x, b))
        sample("hits", dist.Bernoulli(logits=a + offset))
    with plate("people_", 5), plate("items", 2, dim=-2):
        sample("crossed", dist.Normal(a, b))


def test_exchangeable_axes():
    names = ("alike", "vectors", "counts", "regression", "hits", "crossed")
    x = np.arange(5.0)
    problem = from_numpyro(iid, x, np.zeros(5), observed=names)
    assert {site.name: site.exchangeable for site in problem.observed} == {
        "alike": 0, "vectors": 0, "counts": 0, "regression": None, "hits": 0, "crossed": None,
    }  # fmt: skip
    problem = from_numpyro(iid, 0 * x, x, observed=names)
    assert {site.name: site.exchangeable for site in problem.observed}["hits"] is None
    assert {site.name: site.exchangeable for site in problem.observed}["regression"] == 0
    assert problem_of("hierarchical").observed[0].exchangeable is None


# -- unsupported models -----------------------------------------------------------------------------------------


def bad_sites(y=None):
    n = sample("n", dist.Poisson(3.0))
    d = sample("d", dist.Delta(1.0))
    s = sample("s", dist.ProjectedNormal(jnp.ones(2)))
    with plate("batch", 10, subsample_size=5):
        sample("y", dist.Normal(n + d + s.sum(), 1.0), obs=y)


def imputed(y=None):
    a = sample("a", dist.Normal())
    mask = jnp.array([True, False])
    sample("y", dist.Normal(a, 1.0).expand([2]), obs=y, obs_mask=mask)


def branching(y=None):
    a = sample("a", dist.Normal())
    if a > 0:
        sample("b", dist.Normal())
    sample("y", dist.Normal(a, 1.0), obs=y)


def flickering():
    calls = iter(range(1000))

    def model(y=None):
        a = sample("a", dist.Normal())
        sample(f"b{next(calls) % 3}", dist.Normal())
        sample("y", dist.Normal(a, 1.0), obs=y)

    return model


@pytest.mark.parametrize(
    ("model", "args", "messages"),
    [
        (bad_sites, (np.zeros(5),), ["'n': is a discrete", "with a Delta", "'s': has support", "'batch': is a plate"]),
        (imputed, (np.zeros(2),), ["'y': is sampled with `obs_mask`", "handlers.mask"]),
        (branching, (1.0,), ["structure depends on values", "jnp.where"]),
        (flickering(), (1.0,), ["differs between two runs"]),
        (numpyro.handlers.seed(one_prior(PRIORS["real"]), 0), (1.0,), ["'x': is the same in every draw", "seed"]),
        (lambda y: sample("y", dist.Normal(), obs=y), (1.0,), ["no latent site"]),
    ],
)  # fmt: skip
def test_unsupported_models(model, args, messages):
    with pytest.raises(UnsupportedModel) as caught:
        from_numpyro(model, *args)
    report = check(model, *args, file=io.StringIO())
    assert not report
    assert report.problem is None
    for message in messages:
        assert message in str(caught.value)
        assert message in str(report)


# -- the report -------------------------------------------------------------------------------------------------


def test_report(capsys):
    report = check(hierarchical, GROUP, MODELS["hierarchical"][2])
    assert capsys.readouterr().out == f"{report}\n"
    assert report.ok
    assert [site.name for site in report.latents] == ["loc", "scale", "effect"]
    lines = str(report).splitlines()
    assert lines[2].split() == ["scale", "latent", "positive", "()", "float32", "1"]
    assert lines[4].split() == ["y", "observed", "real", "(6,)", "float32", "-"]
    assert lines[5] == "6 unconstrained dimensions"
    assert lines[-1] == "✓ verdict: usable"


def test_report_of_what_is_missing():
    text = str(check(factored, 1.0, file=io.StringIO()))
    assert "✗ no simulation (penalty is a `numpyro.factor`): no amortised training" in text
    assert "usable by its density only" in text
    assert "arguments that are None feed it: y" in str(check(hierarchical, GROUP, file=io.StringIO()))
    bad = check(hierarchical, GROUP, np.full(6, np.nan), file=io.StringIO())
    assert not bad
    assert "✗ data: Observed site 'y' has 6 NaN" in str(bad)
    broken = check(lambda y: 1 / 0, 1.0, file=io.StringIO())
    assert not broken
    assert "ZeroDivisionError" in str(broken)
    partly = str(check(lambda y=None, z=None: two_reals(y, z), 1.0, file=io.StringIO()))
    assert "latent, but data could be given for: z" in partly


def two_reals(y, z):
    a = sample("a", dist.Normal())
    sample("y", dist.Normal(a, 1.0), obs=y)
    sample("z", dist.Normal(a, 1.0), obs=z)


# -- precision, keys, parameters --------------------------------------------------------------------------------


def test_double_precision():
    model, args, data = MODELS["reparametrised"]
    with jax.enable_x64(True):
        problem = from_numpyro(model, *args)
        y = problem.read((*args, data), {})
        z, simulated = problem.simulate(random.key(0))
        assert z.dtype == y["y"].dtype == simulated["y"].dtype == problem.log_joint(z, y).dtype == jnp.float64
        points = numpyro_points(model, args, data, problem, z)
        theirs = -potential_energy(model, (*args, data), {}, points)
        np.testing.assert_allclose(problem.log_joint(z, y), theirs, rtol=1e-12)
        with pytest.raises(ValueError, match="NaN"):
            problem.read((*args, data * np.nan), {})


def test_single_precision_problem_in_double_precision():
    def model(x, y=None):
        a = sample("a", dist.Normal(0.0, 3.0))
        sample("y", dist.Normal(a * x, 0.3).to_event(1), obs=y)

    x, data = np.linspace(0.1, 2.0, 5), np.linspace(-1.0, 1.0, 5)
    problem = from_numpyro(model, x)
    with jax.enable_x64(True):
        y = problem.read((x, data), {})["y"]
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, data, rtol=1e-6)
        with pytest.raises(ValueError, match="give another model"):
            problem.read((1.01 * x, data), {})


def test_both_key_styles():
    problem = problem_of("many observations")
    old, new = problem.simulate(random.PRNGKey(3)), problem.simulate(random.key(3))
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_parameters_stay_at_their_initial_values():
    def model(y=None):
        scale = numpyro.param("scale", lambda key: random.uniform(key) + 0.5, constraint=constraints.positive)
        a = sample("a", dist.Normal(0.0, scale))
        sample("y", dist.Normal(a, 1.0), obs=y)

    problem = from_numpyro(model)
    assert problem.dim == 1
    assert problem.has_density
    assert problem.log_prior(jnp.ones(1)) == problem.log_prior(jnp.ones(1))
    assert "fixed at their initial values (`param`): scale" in str(check(model, file=io.StringIO()))


# -- gradients --------------------------------------------------------------------------------------------------


def cube_root(x):
    """Newton steps, as many as needed."""
    return jax.lax.while_loop(lambda c: jnp.abs(c**3 - x) > 1e-4 * x, lambda c: c - (c - x / c**2) / 3, x + 0.5)


def rooted(y=None):
    a = sample("a", dist.LogNormal(0.0, 0.5))
    sample("other", dist.Normal(a, 1.0))
    sample("y", dist.Normal(cube_root(a), 0.1), obs=y)


def unexposed(y=None):
    b = sample("b", dist.Normal())
    with plate("rows", 3):
        sample("y", dist.Poisson(np.array([0.0, 1.0, 2.0]) * jnp.exp(b)), obs=y)


def callback(y=None):
    a = sample("a", dist.Normal())
    shape = jax.ShapeDtypeStruct((), jnp.result_type(float))
    sample("y", dist.Normal(jax.pure_callback(lambda x: 2 * x, shape, a, vmap_method="expand_dims"), 1.0), obs=y)


def called_density(y=None):
    a = sample("a", dist.Normal())
    shape = jax.ShapeDtypeStruct((), jnp.result_type(float))
    numpyro.factor("f", -jax.pure_callback(lambda x: x**2, shape, a, vmap_method="expand_dims"))


LEARNS = "ScoreSDE(model), ...)` learns"


@pytest.mark.parametrize(
    ("model", "told", "kernels", "ok"),
    [
        (rooted, "! y: a gradient in forward mode only", True, True),
        (unexposed, "✗ y: the gradient is not finite at 8 of 8", False, True),
        (callback, "✗ the model: no gradient", False, True),
        (called_density, "cannot be used: no simulation and no gradient", False, False),
    ],
)
def test_gradients_are_looked_at(model, told, kernels, ok):
    report = check(model, file=io.StringIO())
    assert told in str(report)
    assert (LEARNS in str(report)) is kernels
    assert report.ok is ok
    assert "gradient" not in str(check(hierarchical, GROUP, file=io.StringIO()))


def test_densities_that_are_not_finite_are_named():
    def model(y=None):
        a = sample("a", dist.Normal())
        sample("y", dist.Normal(jnp.where(a > 0, a, jnp.nan), 1.0), obs=y)

    assert "! y: its log density is not finite at" in str(check(model, file=io.StringIO()))


# -- settings of JAX --------------------------------------------------------------------------------------------


def test_reading_where_jit_is_disabled():
    with jax.disable_jit():
        report = check(hierarchical, GROUP, MODELS["hierarchical"][2], file=io.StringIO())
        assert report.ok, report
        problem = from_numpyro(one_prior(PRIORS["real"]))
        y = problem.read((0.5,), {})
        # x ~ N(1, 2), y ~ N(x, 1)
        exact = -0.5 * (0.5**2 + 0.5**2) - np.log(2.0) - np.log(2 * np.pi)
        np.testing.assert_allclose(problem.log_joint(jnp.zeros(1), y), exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_double_precision_arrays_in_a_single_precision_session(dtype):
    """JAX warns of each operation on such an array, and warnings are errors here; NumPy's are quiet."""
    with jax.enable_x64(True):
        group, data = jnp.asarray(GROUP), jnp.linspace(-1.0, 2.0, 6).astype(dtype)
    problem = from_numpyro(hierarchical, group)
    assert problem.read((group, data), {})["y"].dtype == jnp.float32
    assert problem.read((GROUP, np.asarray(data)), {})["y"].dtype == jnp.float32
    assert check(hierarchical, group, data, file=io.StringIO()).ok


@pytest.mark.parametrize("setting", [lambda: jax.debug_nans(True), lambda: jax.numpy_rank_promotion("raise")])
def test_reading_under_strict_settings(setting):
    with setting():
        report = check(hierarchical, GROUP, MODELS["hierarchical"][2], file=io.StringIO())
        assert report.ok, report
