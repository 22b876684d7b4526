"""Sites that are trees of arrays, and sites whose names no file can hold: the same in every kernel, arrays in ArviZ."""

import io

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

import scoreinfer as si
from scoreinfer.arviz import in_file_names, to_prior_sbc

X = np.linspace(-1.0, 1.0, 5)
Y = 0.5 * X
QUIET = {"progress_bar": False}


def network(x, y=None):
    """As random modules do: weights are sites, and together a dictionary."""
    weight = numpyro.sample("net/weight", dist.Normal(0.0, 1.0))
    bias = numpyro.sample("net/bias", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.deterministic("net$params", {"w": weight, "layers": [bias, 2.0 * bias]})
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(weight * x + bias.sum(), 0.5), obs=y)


scoped = numpyro.handlers.scope(network, prefix="left")


@pytest.fixture(scope="module")
def posterior():
    return si.NPSE(scoped, num_steps=30, width=8, depth=1, batch_size=64, **QUIET).fit(jax.random.key(0), X)


@pytest.fixture(scope="module")
def draws(posterior):
    return posterior.sample(jax.random.key(1), 600, X, y=Y)


def test_trees_are_read_and_kept(draws):
    assert si.check(network, X, y=Y, file=io.StringIO())
    tree = draws.sites["left/net$params"]
    assert np.array_equal(tree["w"], draws.sites["left/net/weight"])
    assert np.array_equal(tree["layers"][1], 2.0 * draws.sites["left/net/bias"]) and tree["layers"][1].shape == (600, 2)
    resampled = draws.resample(jax.random.key(2), 50)
    assert np.array_equal(resampled["left/net$params"]["w"], resampled["left/net/weight"])


def test_a_tree_that_depends_on_data_is_left_out():
    def model(y=None):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        y = numpyro.sample("y", dist.Normal(a, 1.0), obs=y)
        numpyro.deterministic("rest", {"residual": y - a})
        numpyro.deterministic("own", {"a": a})

    assert si.from_numpyro(model).constrain(jnp.ones(1)).keys() == {"a", "own"}


@pytest.mark.parametrize("make", [lambda p: si.mcmc.MALA(network), lambda p: si.ScoreSDE(scoped, posterior=p, **QUIET)])
def test_kernels_report_trees_as_nuts_does(posterior, make):
    kernel = make(posterior)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=30, num_chains=2, chain_method="vectorized", **QUIET)
    mcmc.run(jax.random.key(0), X, y=Y)
    theirs = MCMC(NUTS(kernel.model), num_warmup=5, num_samples=30, num_chains=2, chain_method="vectorized", **QUIET)
    theirs.run(jax.random.key(0), X, y=Y)
    shapes = [jax.tree.map(jnp.shape, m.get_samples(group_by_chain=True)) for m in (mcmc, theirs)]
    assert shapes[0] == shapes[1]


def test_arviz_has_arrays_under_names_that_files_hold(posterior, draws, tmp_path):
    data = si.to_arviz(
        jax.random.key(2),
        draws,
        log_likelihood=True,
        predictive=True,
        prior=10,
        coords={"row": X},
        dims={"left/y": ["row"]},
    )
    weights = ["left.net.weight", "left.net.bias", "left.net$params.w"]
    layers = ["left.net$params.layers.0", "left.net$params.layers.1"]
    data.to_netcdf(tmp_path / "draws.nc")
    back = az.from_netcdf(tmp_path / "draws.nc")
    for group in ("posterior", "prior"):
        assert set(back[group].data_vars) == {*weights, *layers}
        assert np.array_equal(back[group][layers[1]], 2.0 * back[group]["left.net.bias"])
    for group in ("observed_data", "log_likelihood", "posterior_predictive", "prior_predictive"):
        assert list(back[group].data_vars) == ["left.y"]
    assert back["observed_data"]["left.y"].dims == ("row",)
    renamed = back["posterior"].attrs["renamed"]
    assert "left/net/weight is left.net.weight" in renamed and "left/y is left.y" in renamed
    plain = draws._replace(sites={"a": draws.unconstrained}, observed={"y": Y})
    assert "renamed" not in si.to_arviz(jax.random.key(0), plain, resample=False)["posterior"].attrs


def test_names_stay_apart():
    assert in_file_names({"a/b": 1, "a.b": 2, "a": 3}) == {"a.b_": 1, "a.b": 2, "a": 3}
    assert list(to_prior_sbc({"left/a": np.arange(3)})["prior_sbc"].data_vars) == ["left.a"]


def test_compared_kernels_go_to_files(tmp_path):
    kernels = {"mala": si.mcmc.MALA(scoped), "nuts": NUTS(scoped)}
    compared = si.Comparison(scoped, kernels, num_warmup=20, num_samples=30, num_chains=2).run(
        jax.random.key(0), X, y=Y
    )
    for name, data in compared.to_arviz().items():
        data.to_netcdf(tmp_path / f"{name}.nc")
        back = az.from_netcdf(tmp_path / f"{name}.nc")
        assert {"left.net.weight", "left.net$params.w"} <= set(back["posterior"].data_vars)
        assert back["observed_data"]["left.y"].dims == ("left.rows",)
        assert np.array_equal(back["posterior"]["left.net$params.w"], back["posterior"]["left.net.weight"])


def test_simulators_are_given_the_arrays_of_trees(draws, tmp_path):
    def simulator(parameters, seed):
        return {"same": parameters["left/net$params.w"] - parameters["left/net/weight"]}

    rows = si.simulators.simulate(jax.random.key(0), draws, simulator, 3, store=tmp_path, **QUIET).read()
    assert rows.valid.all() and not rows.outputs["same"].any()
