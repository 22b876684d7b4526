"""Physics as the forward process: the distribution of paths, and reading it from a model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from scipy.stats import multivariate_normal

import scoreinfer as si
from scoreinfer.model import read_physics
from scoreinfer.process import Physics
from scoreinfer.process.physics import add_noise_stage

TS = jnp.array([0.0, 0.1, 0.3, 0.35, 0.6])
RATES = np.array([0.7, 2.0])


def decay(t0, t1, x):
    """The exact step of dx = - rate x dt."""
    return x * jnp.exp(-jnp.asarray(RATES) * (t1 - t0))


def joint_gaussian(ts, factors, scales, variance):
    """Covariance of one component's path: x_{k+1} = factor_k x_k + scale_k e, Var[x_0] = variance."""
    covariance = np.zeros((len(ts), len(ts)))
    covariance[0, 0] = variance
    for k, (factor, scale) in enumerate(zip(factors, scales, strict=True)):
        covariance[k + 1, : k + 1] = covariance[: k + 1, k + 1] = factor * covariance[k, : k + 1]
        covariance[k + 1, k + 1] = factor**2 * covariance[k, k] + scale**2
    return covariance


def normal(*shape):
    return dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape))


@pytest.mark.parametrize("noise", [0.3, np.array([0.2, 0.5]), np.linspace(0.1, 0.8, 8).reshape(4, 2)])
def test_path_density_and_draws_are_those_of_the_joint_gaussian(noise):
    """A number, one per component, or changing in time: the density of a linear path is known in closed form."""
    path = si.PhysicsPath(decay, noise, TS, normal(2))
    scales = np.broadcast_to(noise, (4, 2))
    factors = np.exp(-RATES * np.diff(TS)[:, None])
    truth = [joint_gaussian(TS, factors[:, i], scales[:, i], 1.0) for i in range(2)]
    draws = path.sample(jax.random.key(0), (50, 200))
    assert draws.shape == (50, 200, 5, 2)
    values = np.asarray(draws, np.float64).reshape(-1, 5, 2)
    expected = sum(multivariate_normal(np.zeros(5), truth[i]).logpdf(values[:9, :, i]) for i in range(2))
    np.testing.assert_allclose(path.log_prob(draws).reshape(-1)[:9], expected, rtol=2e-4, atol=2e-4)
    for i in range(2):
        sd = np.sqrt(np.diag(truth[i]))
        error = (values[:, :, i].T @ values[:, :, i] / len(values) - truth[i]) / np.outer(sd, sd)
        assert np.abs(error).max() < 5 * np.sqrt(2 / len(values))


@pytest.mark.parametrize("euler", [False, True], ids=["path", "Euler-Maruyama"])
def test_physics_of_other_parameters_than_it_was_read_with(euler):
    """Steps and noise; that of an observation of the end stays what it is."""

    def model():
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        noise = numpyro.sample("noise", dist.LogNormal(0.0, 1.0))
        step = lambda t0, t1, x: x - (t1 - t0) * rate * x  # noqa: E731
        path = si.PhysicsPath(step, noise * jnp.diff(TS)[:, None] ** 0.5, TS, normal(2))
        numpyro.sample("x", dist.EulerMaruyama(TS, lambda x, t: (-rate * x, noise), normal(2)) if euler else path)

    process = add_noise_stage(read_physics(Physics("x"), model), jnp.full(2, 0.3))

    @jax.jit
    def steps(values):
        other = process.given(values)
        return other.scale, other.forward(1, jnp.ones(2)), other.forward(4, jnp.ones(2))

    scale, moved, observed = steps({"rate": 2.0, "noise": 0.5})
    np.testing.assert_allclose(scale[:-1], 0.5 * np.diff(TS)[:, None] ** 0.5 * np.ones(2), rtol=1e-5)
    np.testing.assert_allclose(scale[-1], 0.3, rtol=1e-5)
    np.testing.assert_allclose(moved, 1 - 0.2 * 2.0, rtol=1e-5)
    np.testing.assert_allclose(observed, 1.0)


def test_path_of_euler_steps_is_euler_maruyama():
    def sde(x, t):
        return jnp.sin(x) - t * x, 0.4

    theirs = dist.EulerMaruyama(TS, sde, normal(3))
    noise = 0.4 * jnp.sqrt(jnp.diff(TS))[:, None]
    ours = si.PhysicsPath(lambda t0, t1, x: x + (t1 - t0) * sde(x, t0)[0], noise, TS, normal(3))
    paths = theirs.sample(jax.random.key(1), (6,))
    np.testing.assert_allclose(ours.log_prob(paths), theirs.log_prob(paths), rtol=1e-5)


@pytest.mark.slow
def test_nuts_runs_on_a_path():
    def model(y=None):
        x = numpyro.sample("x", si.PhysicsPath(decay, 0.3, TS, normal(2)))
        numpyro.sample("y", dist.Normal(x[-1], 0.1).to_event(1), obs=y)

    mcmc = MCMC(NUTS(model), num_warmup=50, num_samples=50, progress_bar=False)
    mcmc.run(jax.random.key(2), y=jnp.array([0.3, -0.5]))
    end = mcmc.get_samples()["x"][:, -1]
    assert np.all(np.abs(end.mean(0) - jnp.array([0.3, -0.5])) < 0.2)


# --- reading -----------------------------------------------------------------------------------------------------


def field_model(y=None, g=0.5):
    ts = jnp.linspace(0.0, 1.0, 6)
    x = numpyro.sample("x", dist.EulerMaruyama(ts, lambda x, t: (-x - t, g * jnp.ones(3)), normal(2, 3)))
    numpyro.sample("y", dist.Normal(x[-1], 0.1).to_event(2), obs=y)


def test_reading_euler_maruyama():
    process = read_physics(Physics("x"), field_model)
    assert process.shape == (2, 3) and process.dim == 6 and process.num_steps == 5
    np.testing.assert_allclose(process.scale, 0.5 * np.sqrt(0.2), rtol=1e-5)
    x = jnp.arange(6.0)
    np.testing.assert_allclose(process.forward(2, x), x + 0.2 * (-x - 0.4), rtol=1e-5)
    np.testing.assert_allclose(process.reverse(2, x), x - 0.2 * (-x - 0.4), rtol=1e-5)
    t = jnp.float32(0.45)
    np.testing.assert_allclose(process.drift(t, x), -x - 0.4, rtol=1e-4)
    np.testing.assert_allclose(process.diffusion(t), 0.5, rtol=1e-5)
    step = process.step(process.ts[2], process.ts[3], x)
    np.testing.assert_allclose(step.mean, process.forward(2, x), rtol=1e-6)
    np.testing.assert_allclose(step.factor, process.scale[2], rtol=1e-5)


def test_reading_a_path_with_a_reverse_of_its_own():
    def model():
        numpyro.sample("x", si.PhysicsPath(decay, jnp.array([0.2, 0.3]), TS, normal(2)))

    backwards = lambda t0, t1, x: decay(t1, t0, x)  # noqa: E731
    process = read_physics(Physics("x", backwards), model)
    x = jnp.array([1.0, -2.0])
    np.testing.assert_allclose(process.reverse(1, process.forward(1, x)), x, rtol=1e-5)
    np.testing.assert_allclose(process.scale, np.broadcast_to([0.2, 0.3], (4, 2)))


def test_simulated_paths_have_the_density_of_the_model():
    """The process read from a model simulates what the model simulates."""
    process = read_physics(Physics("x"), field_model)
    starts = jax.random.normal(jax.random.key(3), (4000, 6))
    paths = jax.vmap(process.simulate)(jax.random.split(jax.random.key(4), 4000), starts)
    theirs = dist.EulerMaruyama(process.ts, lambda x, t: (-x - t, 0.5), normal(6)).sample(jax.random.key(5), (4000,))
    for moment in (lambda p: p, lambda p: p**2, lambda p: p[:, :1] * p):
        a, b = moment(np.asarray(paths, np.float64)), moment(np.asarray(theirs, np.float64))
        error = np.sqrt((a.var(0) + b.var(0)) / 4000)
        assert np.abs((a.mean(0) - b.mean(0)) / error).max() < 5


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ts": jnp.array([0.0, 0.2, 0.2])}, "number 1 is 0.2 and the next 0.2"),
        ({"ts": jnp.float32(0.0)}, "a vector of at least two"),
        ({"noise_scale": 0.0}, "must be positive and finite everywhere"),
        ({"noise_scale": jnp.array([0.1, 0.0])}, "1 of its 2 entries"),
        ({"noise_scale": jnp.ones(3)}, r"must broadcast to \(steps, \*state\) = \(4, 2\), got \(3,\)"),
        ({"init_dist": dist.Normal(jnp.zeros(2), 1.0)}, r"no batch shape, got \(2,\)"),
    ],
)
def test_bad_paths_are_refused(change, message):
    good = {"step": decay, "noise_scale": 0.1, "ts": TS, "init_dist": normal(2)}
    with pytest.raises(ValueError, match=message):
        si.PhysicsPath(**good | change)
    with pytest.raises(TypeError, match="must be a NumPyro distribution, got float"):
        si.PhysicsPath(decay, 0.1, TS, 1.0)


def em(sde, ts=TS, init_dist=normal(2)):
    def model():
        numpyro.sample("x", dist.EulerMaruyama(ts, sde, init_dist, validate_args=False))

    return model


def batched(x, t0):
    return x[None], 0.1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (em(lambda x, t: (-x, 0.0)), "noise of `Physics` must be positive"),
        (em(lambda x, t: (-x, 0.1), jnp.array([0.0, 0.2, 0.1])), "must increase"),
        (em(lambda x, t: (-x, 0.1 * x)), "depends on the state"),
        (em(lambda x, t: (jnp.where(t > 0.2, jnp.log(-1.0 - x**2), -x), 0.1)), "step 2, from t = 0.3, returns numbers"),
        (lambda: numpyro.sample("z", dist.Normal()), "'x': is no sample site of this model, which has 'z'"),
        (lambda: numpyro.sample("x", dist.Normal()), "'x': is a Normal, no process in time"),
        (
            lambda: numpyro.sample("x", dist.EulerMaruyama(TS, lambda x, t: (x, 0.1), dist.Normal(jnp.zeros(3)))),
            "batch",
        ),
    ],
)
def test_bad_physics_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        read_physics(Physics("x"), model)


def test_wrong_shapes_are_named():
    def model():
        numpyro.sample("x", si.PhysicsPath(lambda t0, t1, x: x[None], 0.1, TS, normal(2)))

    with pytest.raises(ValueError, match=r"step must return shape \(2,\) like the state, got \(1, 2\)"):
        read_physics(Physics("x"), model)
    good = lambda: numpyro.sample("x", si.PhysicsPath(decay, 0.1, TS, normal(2)))  # noqa: E731
    with pytest.raises(ValueError, match=r"reverse must return shape \(2,\) like the state, got \(\)"):
        read_physics(Physics("x", lambda t0, t1, x: x.sum()), good).reverse(0, jnp.zeros(2))
