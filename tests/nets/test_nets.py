"""Backbones and embeddings: what they promise about symmetry, shape and precision."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from modes import ring
from scoreinfer.nets import Concatenate, ConditionalMLP, ResidualMLP
from scoreinfer.paths import OnWaves
from scoreinfer.process.physics import hartley


def test_deep_set_does_not_see_the_order():
    net = si.nets.DeepSet(jax.random.key(0), 3)
    sites = {"a": jax.random.normal(jax.random.key(1), (7, 2)), "b": jax.random.normal(jax.random.key(2), (7,))}
    shuffled = jax.tree.map(lambda leaf: leaf[jnp.array([3, 0, 6, 2, 5, 1, 4])], sites)
    other = sites | {"b": sites["b"][::-1]}
    assert np.allclose(net(sites), net(shuffled), atol=1e-5)
    assert not np.allclose(net(sites), net(other), atol=1e-3)


@pytest.mark.parametrize("length", [5, 40])
def test_series_embeds_any_length(length):
    net = si.nets.Series(jax.random.key(0), length, 2)
    sites = {"y": jax.random.normal(jax.random.key(1), (length, 2))}
    assert net(sites).shape == (64,)
    assert not np.allclose(net(sites), net(jax.tree.map(lambda leaf: leaf[::-1], sites)))


def test_networks_start_at_zero_and_in_float32():
    plain = ResidualMLP(jax.random.key(0), 3, 2, width=8, depth=1)
    conditional = ConditionalMLP(jax.random.key(0), 3, 4, 2, width=8, depth=1)
    assert np.all(plain(jnp.ones(3)) == 0.0)
    assert np.all(conditional(jnp.ones(3), jnp.float32(0.0), jnp.ones(4)) == 0.0)
    for leaf in jax.tree.leaves((plain, conditional)):
        assert not hasattr(leaf, "dtype") or leaf.dtype == jnp.float32


def test_waves_fade_by_what_noise_leaves_of_them():
    """The mean of cos(w c_in s e) over noise e is the factor by which the wave is faded."""
    net = ConditionalMLP(jax.random.key(0), 1, 0, 1, width=8, depth=1, octaves=(3,))
    level = 0.4
    noise = level / np.sqrt(1 + level**2) * np.random.default_rng(0).normal(size=100_000)
    waves = net._faded_waves(jnp.zeros(1), jnp.log(jnp.float32(level)))
    assert np.allclose(waves[:3], 0.0)
    for octave, wave in zip((2.0, 4.0, 8.0), waves[3:], strict=True):
        assert abs(wave - np.cos(octave * noise).mean()) < 4 / np.sqrt(noise.size)
    assert np.all(net(jnp.ones(1), jnp.log(jnp.float32(level)), jnp.zeros(0)) == 0.0)


def test_concatenate_goes_by_name():
    assert np.allclose(Concatenate()({"b": jnp.ones(2), "a": jnp.zeros((1, 1))}), [0.0, 1.0, 1.0])


@pytest.mark.slow
def test_posterior_with_an_embedding_of_sets():
    """Unknown mean and scale of exchangeable data, seen through the permutation-invariant embedding."""

    def model(y=None):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", 6):
            numpyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    posterior = si.NPSE(
        model,
        embedding=si.nets.DeepSet(jax.random.key(1), 1, width=16, num_out=16),
        num_steps=300,
        width=32,
        depth=2,
        progress_bar=False,
    ).fit(jax.random.key(0))
    y = np.array([0.3, 0.9, -0.2, 0.6, 0.1, 0.5], np.float32)
    draws = posterior.sample(jax.random.key(2), 4000, y=y)
    precision = 1.0 + 6 / 0.25
    weight = np.exp(np.asarray(draws.log_weight, np.float64) - float(draws.log_weight.max()))
    weight /= weight.sum()
    error = weight @ np.asarray(draws.sites["mean"], np.float64) - y.sum() / 0.25 / precision
    assert draws.certificate.certified
    assert abs(error) < 5 / np.sqrt(precision * draws.certificate.ess)


# --- fields ------------------------------------------------------------------------------------------------------


def field_net(shape, **options):
    """A small network of fields whose last layer is not zero."""
    net = si.nets.ConvNet(jax.random.key(0), shape, **{"width": 8, "dilations": (1, 2), "kernel_size": 3} | options)
    weight = 0.1 * jax.random.normal(jax.random.key(1), net.last.weight.shape)
    return eqx.tree_at(lambda net: net.last.weight, net, weight)


@eqx.filter_jit
def on_fields(net, x, shape):
    return net(x.ravel(), jnp.float32(-0.3), jnp.full(1, 0.2)).reshape(-1, *shape)


@pytest.mark.parametrize(
    ("shape", "num_space", "levels", "steps"),
    [((12,), 1, 1, (2,)), ((2, 5, 6), 2, 1, (2, -1)), ((12,), 1, 3, (4,)), ((2, 4, 6), 2, 2, (2, -4))],
)
def test_periodic_convolutions_commute_with_shifts(shape, num_space, levels, steps):
    x, axes = jax.random.normal(jax.random.key(2), shape), tuple(range(-num_space, 0))
    shift = lambda x: jnp.roll(x, steps, axes)  # noqa: E731
    found = {}
    for padding in ("periodic", "dirichlet", "neumann"):
        net = field_net(shape, num_space=num_space, padding=padding, physics=False, levels=levels)
        there, back = shift(on_fields(net, x, shape)), on_fields(net, shift(x), shape)
        assert there.shape == (2, *shape)
        found[padding] = float(jnp.abs(there - back).max() / jnp.abs(there).max())
    assert found["periodic"] < 1e-5
    assert min(found["dirichlet"], found["neumann"]) > 0.01


def test_edges_are_those_of_the_padding():
    """A constant field has no edge under periodic and Neumann padding, and one under Dirichlet padding."""
    shape = (6, 12)
    cases = (("periodic", 1, True), ("neumann", 1, True), ("dirichlet", 1, False), ("neumann", 2, True))
    for padding, levels, flat in cases:
        field = on_fields(field_net(shape, padding=padding, physics=False, levels=levels), jnp.ones(shape), shape)
        spread = float(jnp.abs(field - field.mean(tuple(range(1, field.ndim)), keepdims=True)).max())
        assert (spread < 1e-5) == flat


def test_coarser_grids_reach_further():
    """Blocks of three points: seven points off on one grid (two blocks, first and last layer), anywhere on three."""
    reach = {}
    for levels in (1, 3):
        net = field_net((32,), physics=False, dilations=(1, 1), padding="neumann", levels=levels)
        slope = jax.jacobian(lambda x, net=net: on_fields(net, x, (32,))[0, 16])(jnp.sin(jnp.arange(32.0)))
        reach[levels] = np.abs(np.flatnonzero(slope) - 16).max()
    assert reach[1] == 4 and reach[3] >= 12


@pytest.mark.parametrize(("shape", "levels"), [((6, 5), 1), ((6,), 2)])
def test_all_weights_of_a_field_network_have_gradients(shape, levels):
    net, x = field_net(shape, levels=levels), jax.random.normal(jax.random.key(3), (3 * np.prod(shape),))
    assert {leaf.dtype for leaf in jax.tree.leaves(eqx.filter(net, eqx.is_array))} == {jnp.dtype("float32")}
    gradient = eqx.filter_grad(lambda net: (on_fields(net, x, shape) ** 2).sum())(net)
    gradient = eqx.tree_at(lambda net: net.frequencies, gradient, jnp.ones(1))  # fixed
    for leaf in jax.tree.leaves(eqx.filter(gradient, eqx.is_array)):
        assert jnp.abs(leaf).max() > 0
    assert (jnp.abs(gradient.modulations.weight).max(1) > 0).all()  # every shift, every scale


def test_field_networks_are_told_level_and_context():
    net, x = field_net((6,), physics=False), jnp.sin(jnp.arange(6.0))
    told = eqx.filter_jit(net)
    one = told(x, jnp.float32(-0.3), jnp.full(1, 0.2))
    for level, context in ((-2.0, 0.2), (-0.3, 0.9)):
        assert jnp.abs(told(x, jnp.float32(level), jnp.full(1, context)) - one).max() > 1e-3


def test_networks_on_waves_move_fields():
    net = field_net((12,), physics=False)
    on_waves = OnWaves(net, ResidualMLP(jax.random.key(4), 2, 12, width=4, depth=1), (12,))
    x, time = jax.random.normal(jax.random.key(2), (12,)), jnp.full(1, 0.2)
    moved = on_waves(hartley(x, 1), jnp.float32(-0.3), time)
    assert np.allclose(hartley(moved[:12], 1), on_fields(net, x, (12,))[0], atol=1e-5)
    assert np.all(moved[12:] == 0.0)


def test_bad_field_networks_are_refused():
    for options, message in (
        ({"padding": "open"}, "one of periodic, dirichlet, neumann, got 'open'"),
        ({"kernel_size": 4}, "odd and positive, got 4"),
        ({"levels": 2}, r"divisible by 2\^\(levels - 1\), got `levels` 2 for shape \(5, 6\)"),
        ({"levels": 0}, "at least 1"),
        ({"num_space": 3}, r"`num_space` must be .* number of axes of `shape`, got 3 for \(5, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            si.nets.ConvNet(jax.random.key(0), (5, 6), **options)
    model = ring(6, 2).path_model
    net = si.nets.ConvNet(jax.random.key(0), (5,))
    with pytest.raises(ValueError, match=r"a vector of 12 numbers, two for each component.*state's shape \(6,\)"):
        si.SMDP(model, "x", net=net, num_simulations=20).fit(jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize(("dilations", "levels"), [((1, 2), 1), ((1,), 2)], ids=["dilated", "U-Net"])
def test_convolutions_learn_a_linear_field(dilations, levels):
    """Heat on a ring in pixels, from few simulations, without regression, against the smoother; ESS/N .69 reached."""
    field = ring(8, 4, smoothness=0.0, end_time=0.05)
    net = si.nets.ConvNet(jax.random.key(5), (8,), width=8, dilations=dilations, kernel_size=3, levels=levels)
    physics = {"reverse": lambda t0, t1, x: x}
    options = {"num_simulations": 2000, "num_steps": 500, "progress_bar": False}
    posterior = si.SMDP(field.model, "x", **physics, net=net, **options).fit(jax.random.key(0))
    y = 0.4 * jnp.sin(jnp.arange(8.0))
    draws = posterior.sample(jax.random.key(1), 4000, y=y)
    found, end = draws.certificate, np.asarray(hartley(y, 1))
    assert found.ess > 0.5 * 4000  # kernels without the network are 4.8 nats off: one in a hundred draws would count
    assert abs(found.log_evidence - field.modes.smoother(end)[2]) < 5 * found.log_evidence_se + 2e-3
    assert field.modes.disagreement(hartley(draws.sites["x"], 1), draws.log_weight, end) < 5.5
