"""One fit for many designs: exact weights for every mask, nothing learned from what is missing, designs in range."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import stats

import scoreinfer as si
from compilations import Compilations
from scoreinfer.montecarlo.weights import effective_sample_size
from scoreinfer.posterior.rows import default_embedding

ROWS = 12
SMALL = {"width": 8, "depth": 1, "num_steps": 250, "batch_size": 128, "progress_bar": False, "target_score": False}
DATA = np.random.default_rng(0).normal(0.5, 1.0, ROWS).astype(np.float32)


def designs(key):
    for_num, for_gaps = jax.random.split(key)
    there = jnp.arange(ROWS) < jax.random.randint(for_num, (), 2, ROWS + 1)
    return {"present": there & jax.random.bernoulli(for_gaps, 0.7, (ROWS,)).at[0].set(True)}


def model(present, y=None):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    numpyro.deterministic("total", mean * present.sum())
    with numpyro.plate("rows", ROWS), numpyro.handlers.mask(mask=present):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def plain(y=None):
    """The same model without a word about missing entries."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", ROWS):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def truth(present, y):
    """Mean and sd of the posterior, and the log evidence, in closed form."""
    seen = np.asarray(y, float)[present]
    sd = (1 + len(seen)) ** -0.5
    covariance = np.eye(len(seen)) + 1.0
    return sd**2 * seen.sum(), sd, stats.multivariate_normal(np.zeros(len(seen)), covariance).logpdf(seen)


@pytest.fixture(scope="module")
def posterior():
    return si.NPSE(model, designs=designs, **SMALL).fit(jax.random.key(0))


MASKS = {"two": [0, 3], "gaps": [0, 1, 4, 5, 8], "all": range(ROWS)}


@pytest.mark.always
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
def test_every_mask_has_its_own_answer(posterior, rows):
    """Weighted draws and evidence agree with the closed form."""
    present = np.isin(np.arange(ROWS), list(rows))
    draws = posterior.sample(jax.random.key(1), 4000, present, y=DATA)
    mean, sd, log_evidence = truth(present, DATA)
    share = effective_sample_size(draws.log_weight) / draws.num
    weights = np.exp(np.asarray(draws.log_weight, float) - np.max(draws.log_weight))
    own = np.average(draws.sites["mean"], weights=weights)
    assert draws.certificate.certified and share > 0.3
    np.testing.assert_allclose(draws.sites["total"], draws.sites["mean"] * present.sum(), rtol=1e-6)
    assert abs(own - mean) < 5 * sd / np.sqrt(share * draws.num)
    assert abs(draws.certificate.log_evidence - log_evidence) < 5 * draws.certificate.log_evidence_se


def test_nothing_is_learned_from_what_is_missing(posterior):
    """Any numbers under the mask, NaN included, give the same draws and weights to the bit; no second compilation."""
    present = np.isin(np.arange(ROWS), [0, 2, 7])
    first = posterior.sample(jax.random.key(1), 500, present, y=DATA)
    with Compilations() as compilations:
        for garbage in (np.nan, 1e30, -np.inf):
            other = posterior.sample(jax.random.key(1), 500, present, y=np.where(present, DATA, garbage))
            np.testing.assert_array_equal(first.unconstrained, other.unconstrained)
            np.testing.assert_array_equal(first.log_weight, other.log_weight)
        posterior.sample(jax.random.key(1), 500, ~present | (np.arange(ROWS) == 0), y=DATA)
    assert compilations.count == 0


def test_other_designs_are_refused(posterior):
    with pytest.raises(ValueError, match=r"the number of entries of `y` is 0, 1 to 12 in training"):
        posterior.condition(np.zeros(ROWS, bool), y=DATA)
    with pytest.raises(ValueError, match="must have shape"):
        posterior.condition(np.ones(3, bool), y=DATA)


def test_odd_data_are_seen_within_their_design(posterior):
    """Data are compared with simulations of their own design."""
    few, many = np.isin(np.arange(ROWS), [0, 1]), np.ones(ROWS, bool)
    usual = posterior.sample(jax.random.key(1), 200, few, y=DATA).certificate.distance_rank
    with pytest.warns(si.errors.MisspecificationWarning):
        odd = posterior.sample(
            jax.random.key(1), 200, many, y=7.0 * (-1.0) ** np.arange(ROWS)
        ).certificate.distance_rank
    assert odd < 0.01 < 0.02 < usual


def test_predictions_keep_the_design(posterior):
    present = np.isin(np.arange(ROWS), [0, 2, 7])
    given = posterior.condition(present, y=DATA)
    predicted = given.predict(jax.random.key(2), 10)
    assert (np.asarray(predicted["y"])[:, ~present] == 0).all() and np.abs(predicted["y"])[:, present].min() > 0
    data = given.sample(jax.random.key(1), 100).to_arviz(jax.random.key(2), predictive=True, prior=20)
    assert "present" in data["constant_data"] and "present" not in data["observed_data"]


def test_saved_posteriors_know_their_designs(posterior, tmp_path):
    posterior.save(tmp_path / "p")
    loaded = si.load(tmp_path / "p", model, designs=designs)
    present = np.isin(np.arange(ROWS), [0, 2, 7])
    first, again = (p.sample(jax.random.key(1), 200, present, y=DATA) for p in (posterior, loaded))
    np.testing.assert_array_equal(first.log_weight, again.log_weight)
    with pytest.raises(ValueError, match="the number of entries"):
        loaded.condition(np.zeros(ROWS, bool), y=DATA)


def test_calibration_draws_designs_and_is_stratified(posterior):
    report = si.calibrate(
        jax.random.key(3),
        posterior,
        200,
        label=lambda y: y["present"].sum() > 4,
        num_proposals=64,
        num_draws=19,
        progress_bar=False,
    )
    assert report.trusted and set(report.sbc.strata()) == {0, 1}
    assert sum(part.num_simulations for part in report.sbc.strata().values()) == 200


def test_nan_stands_for_missing_entries():
    """Opt-in: then NaN in the data is a mask, for a model that knows of none."""
    both = si.from_numpyro(plain, designs=lambda key: {"y": designs(key)["present"]}, missing=("y",))
    masked = si.from_numpyro(model, designs=designs)
    present = np.isin(np.arange(ROWS), [0, 2, 7])
    y, own = both.read((), {"y": np.where(present, DATA, np.nan)}), masked.read((present,), {"y": DATA})
    z = jnp.array([0.3])
    assert both.log_likelihood(z, y) == masked.log_likelihood(z, own)
    np.testing.assert_array_equal(y["y_present"], present)
    with pytest.raises(ValueError, match="NaN"):
        si.from_numpyro(plain).read((), {"y": np.where(present, DATA, np.nan)})
    with pytest.raises(ValueError, match="needs `designs`"):
        si.from_numpyro(plain, missing=("y",))


def test_single_components_may_be_missing():
    """Independent components of an event have masks of their own; those of a vector with one density have not."""

    def event(y=None):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mean, 1.0).expand([ROWS]).to_event(1), obs=y)

    def vector(y=None):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.MultivariateNormal(mean * jnp.ones(3), jnp.eye(3)), obs=y)

    present = np.isin(np.arange(ROWS), [0, 2, 7])
    problem = si.from_numpyro(event, designs=lambda key: {"y": designs(key)["present"]}, missing=("y",))
    y = problem.read((), {"y": np.where(present, DATA, np.nan)})
    assert np.isclose(problem.log_likelihood(jnp.zeros(1), y), stats.norm.logpdf(DATA[present]).sum())
    whole = si.from_numpyro(vector, designs=lambda key: {"y": jax.random.bernoulli(key)}, missing=("y",))
    assert float(whole.log_likelihood(jnp.zeros(1), whole.read((), {"y": np.full(3, np.nan)}))) == 0
    with pytest.raises(ValueError, match="expected all or none"):
        whole.read((), {"y": np.array([0.0, np.nan, 0.0])})


def test_informative_masks_are_sites_of_the_model():
    def selected(y=None, present=None):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        present = numpyro.sample("present", dist.Bernoulli(logits=mean).expand([ROWS]), obs=present)
        numpyro.sample("y", dist.Normal(mean, 1.0).expand([ROWS]).mask(present.astype(bool)), obs=y)

    with pytest.raises(ValueError, match="informative"):
        si.from_numpyro(selected, designs=designs)
    with pytest.raises(ValueError, match="`designs` must give arguments of the model"):
        si.from_numpyro(plain, designs=designs)
    with pytest.raises(TypeError, match="a dictionary of arrays"):
        si.from_numpyro(model, designs=lambda key: jnp.zeros(3))


def test_check_says_what_the_designs_are():
    out = io.StringIO()
    assert si.check(model, designs=designs, file=out)
    assert "designs, drawn with every simulation and without density: present" in out.getvalue()
    assert si.check(model, np.ones(ROWS, bool), y=DATA, designs=designs, file=out)


def series(t, present, y=None):
    """An Ornstein-Uhlenbeck process around a level, at irregular times."""
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))

    def step(last, row):
        gap, here, value = row
        decay = jnp.exp(-gap)
        mean, scale = level + (last - level) * decay, jnp.sqrt(1 - decay**2)
        new = numpyro.sample("y", dist.Normal(mean, scale).mask(here), obs=value)
        return jnp.where(here, new, last), None

    scan(step, level, (jnp.diff(t, prepend=t[:1] - 1e3), present, y))


def some_times(key):
    gaps = jax.random.uniform(key, (ROWS,), minval=0.1, maxval=2.0)
    return {"t": jnp.cumsum(gaps), **designs(key)}


@pytest.mark.parametrize(
    ("of", "draw", "window"), [(model, designs, 1), (series, some_times, 2)], ids=["set", "series"]
)
def test_embeddings_are_chosen_by_the_rows(of, draw, window):
    """A set, if the order of the rows does not matter; else a series. Missing rows change no number."""
    problem = si.from_numpyro(of, designs=draw)
    embedding = default_embedding(jax.random.key(0), problem)
    assert isinstance(embedding, si.nets.MaskedRows) and embedding.window == window
    y = problem.simulate(jax.random.key(1))[1]
    x = {name: jnp.asarray(value, jnp.float32) for name, value in problem.encode(y).items()}
    gone = x["y present"] == 0
    dirty = x | {"y": jnp.where(gone, 7.0, x["y"])}
    np.testing.assert_array_equal(embedding(x), embedding(dirty))
    turned = {name: value[::-1] for name, value in x.items()}
    assert np.allclose(embedding(x), embedding(turned), atol=1e-4) == (window == 1)
