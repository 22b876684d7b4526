"""Control variates of paths: mean zero given the next state, less noise, the same kernels learned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from modes import ornstein_uhlenbeck
from scoreinfer.model import read_physics
from scoreinfer.paths import linear_frame, path_controls
from scoreinfer.paths.controls import _share
from scoreinfer.paths.losses import Transitions, transition_loss
from scoreinfer.process import Physics

MODES, NUM = ornstein_uhlenbeck(32), 4000
TS = np.linspace(0.0, 1.0, 41)


@pytest.fixture(scope="module")
def linear():
    """An Ornstein-Uhlenbeck process, learned from the identity; paths, and the exact kernels' slopes and variances."""
    process = dataclasses.replace(MODES.process(False), retreat=lambda t0, t1, x: x)
    variance = MODES.covariances(False).diagonal(axis1=1, axis2=2).T
    slope = MODES.factors * variance[:-1] / variance[1:]
    left = variance[:-1] - slope**2 * variance[1:]
    paths = MODES.path().sample(jax.random.key(0), (NUM,))
    return process, paths, np.asarray(path_controls(process, paths)), slope, left


def bent(x):
    """Two components, each pulled towards where the other's sine is: Jacobians that mix and change."""
    return -x - x**3 + 2 * jnp.sin(2 * x[..., ::-1])


def model(step=lambda t0, t1, x: x + (t1 - t0) * bent(x)):
    start = dist.Normal(jnp.array([1.0, -0.5]), 0.3).to_event(1)
    numpyro.sample("x", si.PhysicsPath(step, np.array([0.1, 0.2]), TS, start))


def simulate(process, num):
    start = jnp.array([1.0, -0.5]) + 0.3 * jax.random.normal(jax.random.key(1), (num, 2))
    return jax.jit(jax.vmap(process.simulate))(jax.random.split(jax.random.key(2), num), start)


def in_errors(known, new):
    """Means of products with functions of the next state, in standard errors, at every step but the first."""
    functions = np.stack([np.ones_like(new), new, new[..., ::-1], new**2, np.cos(3 * new)])
    product = (known * functions)[:, :, 1:]
    return product.mean(1) / product.std(1) * np.sqrt(product.shape[1])


def test_controls_have_mean_zero_given_the_next_state(linear):
    process = read_physics(Physics("x"), model)
    curved = simulate(process, 20_000)
    for paths, known in ((curved, np.asarray(path_controls(process, curved))), linear[1:3]):
        assert not known[:, 0].any()
        errors = in_errors(known, np.asarray(paths)[:, 1:])
        assert np.abs(errors).max() < 5
        assert abs(np.sqrt(np.mean(errors**2)) - 1) < 0.2


def test_controls_take_the_noise_away(linear):
    """What is left of the noise around the exact mean: in the second half a tenth of its variance or less."""
    _, paths, known, slope, left = linear
    off = np.asarray(paths)[:, :-1] - slope * np.asarray(paths)[:, 1:]
    shares = ((off + known) ** 2).mean(0) / left
    assert (shares < 1.05).all()
    assert shares[16:].max() < 0.1


def test_controls_of_one_path_are_none_and_of_few_are_finite(linear):
    process, paths = linear[:2]
    assert not path_controls(process, paths[:1]).any()
    assert np.isfinite(path_controls(process, paths[:3])).all()


def test_shares_of_a_path_are_found_on_the_others():
    x, control = jax.random.normal(jax.random.key(0), (2, 5, 3))
    for i, found in enumerate(_share(x, control)):
        others = [np.delete(np.asarray(v), i, axis=0) for v in (x * control, control**2)]
        np.testing.assert_allclose(found, others[0].sum(0) / others[1].sum(0), rtol=1e-4)


def test_transition_loss_is_stationary_at_the_exact_kernels_with_less_noise(linear):
    """Moves c times the exact ones, later half: the minimum is at 1 with controls and without, twice as surely."""
    process, paths, known, slope, left = linear
    sd, factor = np.asarray(paths)[:, 1:].std(0), np.sqrt(left)
    new = np.asarray(paths)[:, 1:]
    gain = jnp.asarray((slope - 1) * sd / factor, jnp.float32)
    steps = jnp.arange(16.0, process.num_steps)
    times = steps, jnp.zeros((16, 1))

    def network(c):
        def move(v, step, context):
            exact = gain[step.astype(int)] * v
            return jnp.concatenate([c * exact, jnp.zeros_like(exact)])

        return move

    def slopes(known):
        rest = (paths[:, :-1] - paths[:, 1:]) / factor
        rows = Transitions(jnp.asarray(new / sd), rest, jnp.zeros((NUM, 0)), known / factor)
        rows = jax.tree.map(lambda x: x.reshape(40, NUM // 40, *x.shape[1:])[:, :, -16:], rows)

        def loss(c, rows, key):
            return transition_loss(network(c), rows, key, times=times, num_pairs=32, far_out=0.5)

        return jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(1.0, rows, jax.random.split(jax.random.key(3), 40))

    with_controls, without = (np.asarray(jax.jit(slopes)(x)) for x in (jnp.asarray(known), jnp.zeros_like(known)))
    for found in (with_controls, without):
        assert abs(found.mean()) < 5 * found.std() / np.sqrt(40)
    assert with_controls.std() < without.std() / 2


def test_regression_has_less_noise_with_controls(linear):
    process, paths, known, slope, left = linear
    sd = np.asarray(paths)[:, 1:].std(0)
    errors = []
    for controls in (None, jnp.asarray(known)):
        frame = linear_frame(process, paths, known=controls)
        found = 1 + np.asarray(frame.slope).diagonal(axis1=1, axis2=2) / sd
        errors.append((((found - slope) * sd / np.sqrt(left))[16:] ** 2).mean())
    assert errors[1] < errors[0] / 3


SMALL = {"num_steps": 1, "width": 8, "depth": 1, "progress_bar": False}


@jax.custom_vjp
def opaque(x):
    """A drift whose derivative must not be asked for."""
    return -x - x**3


def refuse(*_):
    raise RuntimeError("differentiated")


opaque.defvjp(refuse, refuse)


def called_back(x):
    """A simulator outside JAX."""
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x: np.asarray(-x - x**3), out, x, vmap_method="broadcast_all")


@pytest.mark.parametrize("drift", [called_back, opaque], ids=["without derivatives", "recorded"])
def test_controls_are_left_out(drift):
    """Of physics without derivatives, and where recorded states are all there is to learn from."""

    def step(t0, t1, x):
        return x + (t1 - t0) * drift(x)

    given = {"num_simulations": 40}
    if drift is opaque:
        given = {"trajectories": simulate(read_physics(Physics("x"), model, step), 40)}
    posterior = si.SMDP(model, "x", **given, **SMALL).fit(jax.random.key(0), step)
    assert np.isfinite(posterior.history.loss).all()
