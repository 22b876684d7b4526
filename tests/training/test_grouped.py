"""Groups of rows: tokens that know what is missing, and whitening that leaves groups independent of each other."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from scoreinfer.nets import Concatenate, MaskedGroups
from scoreinfer.posterior.rows import default_embedding
from scoreinfer.samplers.amortised import Architecture, Size, default_sampler, untrained
from scoreinfer.training.grouped import GroupWhitening, local_latents

GROUPS, ROWS = 4, 3
ORDER = np.array([2, 0, 3, 1])


def designs(key):
    sizes = jax.random.randint(key, (GROUPS, 1), 0, ROWS + 1).at[0].set(2)
    return {"present": jnp.arange(ROWS) < sizes}


def model(present, y=None):
    """The latents of a group stand between those that all share."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", GROUPS):
        own = numpyro.sample("own", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.3))
    law = dist.Normal((mean + own[:, 0])[:, None], noise * jnp.exp(own[:, 1])[:, None]).expand([GROUPS, ROWS])
    numpyro.sample("y", law.mask(present), obs=y)


@pytest.fixture(scope="module")
def problem():
    return si.from_numpyro(model, designs=designs)


@pytest.fixture(scope="module")
def whitening(problem):
    """Of random networks: the last layers of untrained ones are zero."""
    embedding = default_embedding(jax.random.key(0), problem)
    assert isinstance(embedding, MaskedGroups)
    architecture = Architecture(Size(16, 1), Size(8, 1), default_sampler(problem.dim, weighed=True))
    made = untrained(jax.random.key(1), jax.random.key(2), problem, architecture, embedding).whitening
    leaves, tree = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    made = jax.tree.unflatten(tree, noisy)
    alike = jnp.ones(problem.dim)  # groups start from the same prior
    return GroupWhitening(0 * alike, alike, made.embedding, made.network, made.each, made.local)


@pytest.fixture(scope="module")
def x(problem):
    y = problem.simulate(jax.random.key(4))[1]
    return {name: jnp.asarray(value, jnp.float32) for name, value in problem.encode(y).items()}


def test_latents_of_groups_are_found(problem):
    assert local_latents(problem, GROUPS) == ((1, 2), (3, 4), (5, 6), (7, 8))


def test_groups_are_independent_given_what_they_share(whitening, x):
    """No group depends on another one, nor on what is sampled after it; missing entries change nothing."""
    affine = whitening(x)
    factor = np.asarray(affine.factor)
    own = np.asarray(whitening.local)
    for g in range(GROUPS):
        for h in range(GROUPS):
            assert (g == h) == (np.abs(factor[np.ix_(own[g], own[h])]).max() > 0)
    assert np.abs(factor[own, 0]).min() > 0 and np.all(factor[own, 9] == 0) and np.all(np.triu(factor, 1) == 0)
    dirty = whitening(x | {"y": jnp.where(x["y present"] == 0, 7.0, x["y"])})
    np.testing.assert_array_equal(affine.mean, dirty.mean)
    np.testing.assert_array_equal(affine.factor, dirty.factor)
    u = jax.random.normal(jax.random.key(5), (10,))
    assert np.allclose(affine.inverse(affine.forward(u)), u, atol=1e-4)


def test_groups_change_places_with_their_latents(whitening, x):
    own = np.asarray(whitening.local)
    affine, moved = whitening(x), whitening({name: value[ORDER] for name, value in x.items()})
    assert np.allclose(moved.mean[own], affine.mean[own[ORDER]], atol=1e-4)
    assert np.allclose(moved.factor[own, own], affine.factor[own[ORDER], own[ORDER]], atol=1e-4)
    assert not np.allclose(moved.mean[own], affine.mean[own], atol=1e-3)


def test_groups_with_different_likelihoods_are_no_set():
    def different(present, y=None):
        own = numpyro.sample("own", dist.Normal(0.0, 1.0).expand([GROUPS]))
        law = dist.Normal((own * jnp.arange(1.0, GROUPS + 1))[:, None], 1.0).expand([GROUPS, ROWS])
        numpyro.sample("y", law.mask(present), obs=y)

    problem = si.from_numpyro(different, designs=designs)
    assert isinstance(default_embedding(jax.random.key(0), problem), Concatenate)


def test_posteriors_of_groups_are_exact_and_can_be_saved(tmp_path):
    """After no training worth the name: two groups with rows, two without, which keep their prior."""

    def simple(present, y=None):
        own = numpyro.sample("own", dist.Normal(0.0, 1.0).expand([GROUPS]))
        numpyro.sample("y", dist.Normal(own[:, None], 1.0).expand([GROUPS, ROWS]).mask(present), obs=y)

    options = {"width": 8, "depth": 1, "num_steps": 20, "batch_size": 64, "target_share": 0.01, "progress_bar": False}
    posterior = si.NPSE(simple, designs=designs, target_score=False, **options).fit(jax.random.key(0))
    present = np.arange(ROWS) < np.array([[2], [3], [0], [0]])
    y = np.linspace(-1.0, 1.0, GROUPS * ROWS).reshape(GROUPS, ROWS)
    draws = posterior.sample(jax.random.key(1), 4000, present, y=y)
    sizes = present.sum(1)
    weight = np.exp(np.asarray(draws.log_weight) - np.max(draws.log_weight))
    weight /= weight.sum()
    mean = weight @ np.asarray(draws.sites["own"])
    error = 5 * np.sqrt((weight**2).sum() / (1 + sizes))
    assert np.all(np.abs(mean - np.where(present, y, 0.0).sum(1) / (1 + sizes)) < error)
    posterior.save(tmp_path / "p")
    again = si.load(tmp_path / "p", simple, designs=designs).sample(jax.random.key(1), 4000, present, y=y)
    np.testing.assert_array_equal(draws.log_weight, again.log_weight)
