"""Backbones and embeddings: what they promise about symmetry, shape and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from scoreinfer.nets import Concatenate, ConditionalMLP, ResidualMLP


def test_deep_set_does_not_see_the_order():
    net = si.DeepSet(jax.random.key(0), 3)
    sites = {"a": jax.random.normal(jax.random.key(1), (7, 2)), "b": jax.random.normal(jax.random.key(2), (7,))}
    shuffled = jax.tree.map(lambda leaf: leaf[jnp.array([3, 0, 6, 2, 5, 1, 4])], sites)
    other = sites | {"b": sites["b"][::-1]}
    assert np.allclose(net(sites), net(shuffled), atol=1e-5)
    assert not np.allclose(net(sites), net(other), atol=1e-3)


@pytest.mark.parametrize("length", [5, 40])
def test_series_embeds_any_length(length):
    net = si.Series(jax.random.key(0), length, 2)
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

    posterior = si.fit(
        jax.random.key(0), model, embedding=si.DeepSet(jax.random.key(1), 1, width=16, num_out=16), num_steps=300,
        width=32, depth=2, progress_bar=False,
    )  # fmt: skip
    y = np.array([0.3, 0.9, -0.2, 0.6, 0.1, 0.5], np.float32)
    draws = posterior.sample(jax.random.key(2), 4000, y=y)
    precision = 1.0 + 6 / 0.25
    weight = np.exp(np.asarray(draws.log_weight, np.float64) - float(draws.log_weight.max()))
    weight /= weight.sum()
    error = weight @ np.asarray(draws.sites["mean"], np.float64) - y.sum() / 0.25 / precision
    assert draws.certificate.certified
    assert abs(error) < 5 / np.sqrt(precision * draws.certificate.ess)
