"""Calibration: uniform ranks for what is exact, and none for what is not."""

import html.parser
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import HMCECS, MCMC, NUTS
from scipy import stats

import scoreinfer as si
from compilations import Compilations
from doubles import Y1, location_scale
from oracles import oracles
from scoreinfer.calibration.uniformity import chi_squared_p, rank_test
from scoreinfer.samplers.base import AbstractDensityProposal

ARTEFACT = Path(__file__).parents[1] / "artefacts" / "location_scale"
QUIET = {"progress_bar": False}


def linear(y=None):
    """Two independent conjugate Gaussians."""
    a = numpyro.sample("a", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(a, 0.5).to_event(1), obs=y)


class SabotagedProposal(AbstractDensityProposal):
    """The exact posterior of ``linear``, stretched and shifted in units of its standard deviation; or the prior."""

    stretch: jax.Array = eqx.field(default=1.0, converter=jnp.float32)
    shift: jax.Array = eqx.field(default=0.0, converter=jnp.float32)
    ignores_data: bool = eqx.field(static=True, default=False)

    def context(self, target):
        mean, sd = (jnp.zeros(2), jnp.ones(())) if self.ignores_data else (0.8 * target.y["y"], jnp.sqrt(0.2))
        return mean + self.shift * sd, self.stretch * sd

    def propose(self, key, context):
        z = context[0] + context[1] * jax.random.normal(key, (2,))
        return z, self.log_q(key, context, z)

    def log_q(self, key, context, z):
        return jax.scipy.stats.norm.logpdf(z, *context).sum()


class Sabotaged:
    """The posterior of such a proposal, as far as calibration looks at one."""

    def __init__(self, problem, *args, **kwargs):
        self.problem, self.proposal = problem, SabotagedProposal(*args, **kwargs)


@pytest.fixture(scope="module")
def problem():
    return si.from_numpyro(linear)


@pytest.fixture(scope="module")
def learned():
    return si.load(ARTEFACT, location_scale)


def uniform(result):
    return all(0.005 < row.p_value < 0.995 for row in result.rows())


SABOTAGE = {
    "too narrow": {"stretch": 0.6},
    "too wide": {"stretch": 1.6},
    "too high": {"shift": 0.5},
    "too low": {"shift": -0.5},
}


def test_exact_posterior_is_calibrated(problem):
    result = si.calibration.sbc(jax.random.key(0), Sabotaged(problem), 200, corrected=False, **QUIET)
    assert uniform(result) and result.calibrated
    assert result.ranks["a"].shape == (200, 2)
    assert result.ranks["a"].min() >= 0 and result.ranks["a"].max() <= 63
    assert not any(row.finding for row in result.rows())


@pytest.mark.parametrize("fault", SABOTAGE)
def test_faults_are_found_and_named_and_weights_repair_them(problem, fault):
    """200 simulations reject; the same proposals, corrected, are calibrated."""
    posterior = Sabotaged(problem, **SABOTAGE[fault])
    raw = si.calibration.sbc(jax.random.key(1), posterior, 200, corrected=False, **QUIET)
    assert not raw.calibrated
    assert all(fault in row.finding for row in raw.rows() if row.name.startswith("a["))
    corrected = si.calibration.sbc(jax.random.key(1), posterior, 200, num_proposals=1024, **QUIET)
    assert uniform(corrected) and corrected.calibrated, corrected
    assert np.all(corrected.effective_share < 1.0)


def test_posterior_that_ignores_its_data_is_found_by_the_joint_quantities(problem):
    """Its components are calibrated to the letter: it is the prior."""
    result = si.calibration.sbc(jax.random.key(2), Sabotaged(problem, ignores_data=True), 200, corrected=False, **QUIET)
    rows = {row.name: row for row in result.rows()}
    assert rows["a[0]"].p_value > 0.005 and rows["a[1]"].p_value > 0.005
    assert rows["log_joint"].p_value < 1e-6 and rows["log_joint"].finding == "true parameters lie too far in"
    assert rows["tarp"].p_value < 1e-3
    assert not result.calibrated


@pytest.mark.slow
def test_calibrated_posteriors_pass_at_the_stated_rate(problem):
    """At most 1 % are refused; the p-value is conservative (Bonferroni)."""
    refused = [
        not si.calibration.sbc(jax.random.key(i), Sabotaged(problem), 100, corrected=False, **QUIET).calibrated
        for i in range(100)
    ]
    assert np.sum(refused) <= 1 + 5 * np.sqrt(0.99)


@pytest.mark.slow
def test_learned_posterior_is_calibrated_once_corrected(learned):
    raw = si.calibration.sbc(jax.random.key(3), learned, 200, corrected=False, **QUIET)
    corrected = si.calibration.sbc(jax.random.key(3), learned, 200, num_proposals=512, **QUIET)
    assert not raw.calibrated  # trained for 300 steps
    assert uniform(corrected) and corrected.calibrated
    assert raw.ranks.keys() == {"mu", "sigma"}


def test_simulations_are_tied_to_the_key_and_cost_no_new_program(problem):
    first = si.calibration.sbc(jax.random.key(0), Sabotaged(problem), 200, **QUIET)
    with Compilations() as compilations:
        second = si.calibration.sbc(jax.random.key(1), Sabotaged(problem, 1.2), 200, **QUIET)
    assert compilations.count == 0
    fewer = si.calibration.sbc(jax.random.key(0), Sabotaged(problem), 100, **QUIET)
    assert np.array_equal(first.ranks["a"][:100], fewer.ranks["a"])
    assert not np.array_equal(first.ranks["a"], second.ranks["a"])


CHAIN = {"num_draws": 31, "num_warmup": 200, "thinning": 5, **QUIET}


def test_kernels_are_calibrated_where_they_are_exact(problem):
    result = si.calibration.sbc(jax.random.key(4), si.mcmc.MALA(linear), 100, **CHAIN)
    assert uniform(result) and result.calibrated, result
    wild = si.mcmc.ULA(linear, step_size=0.9, adapt_step_size=False, adapt_mass_matrix=False)
    biased = si.calibration.sbc(jax.random.key(4), wild, 100, **CHAIN)
    assert not biased.calibrated and any(row.finding for row in biased.rows()), biased
    bare = NUTS(potential_fn=lambda z: 0.5 * z**2)
    for data in ({}, {"problem": problem}):
        with pytest.raises(ValueError, match="no `model`"):
            si.calibration.sbc(jax.random.key(4), bare, 10, **data, **CHAIN)


@pytest.mark.slow
def test_more_kernels_are_calibrated(problem, learned):
    """One that learned before, one that learns from every data set, and NumPyro's own, used before."""
    used = NUTS(linear)
    MCMC(used, num_warmup=5, num_samples=5, progress_bar=False).run(jax.random.key(0), y=np.full(2, 9.0))
    with pytest.raises(ValueError, match="runs another kernel"):
        si.calibration.sbc(jax.random.key(4), HMCECS(NUTS(linear)), 10, **CHAIN)
    cases = (
        (used, problem, 100), (si.ScoreSDE(posterior=learned), learned.problem, 100),
        (si.ScoreSDE(linear, **QUIET), problem, 10),
    )  # fmt: skip
    for kernel, problem, num in cases:
        result = si.calibration.sbc(jax.random.key(4), kernel, num, problem=problem, **CHAIN)
        assert (uniform(result) or num < 100) and result.calibrated, result


@pytest.mark.slow
@pytest.mark.parametrize("oracle", oracles(), ids=lambda oracle: oracle.name)
def test_trained_posteriors_and_nuts_are_calibrated_on_every_oracle(oracle):
    """(NUTS where there is one mode.)"""
    posterior = si.NPSE(oracle.model, width=32, depth=2, num_steps=1500, **QUIET).fit(jax.random.key(0))
    result = si.calibration.sbc(jax.random.key(5), posterior, 400, num_proposals=512, **QUIET)
    assert uniform(result) and result.calibrated, result
    if oracle.name != "gaussian_mixture":
        chains = si.calibration.sbc(jax.random.key(5), NUTS(oracle.model), 200, num_draws=31, **QUIET)
        assert uniform(chains) and chains.calibrated, chains


def test_chi_squared_is_that_of_scipy():
    ranks = np.random.default_rng(0).binomial(63, 0.5, 300)
    counts = np.bincount(ranks // 4, minlength=16)
    assert np.isclose(chi_squared_p(ranks, 63), stats.chisquare(counts).pvalue, rtol=1e-3, atol=1e-12)
    mild = np.random.default_rng(1).integers(0, 64, 300)
    assert np.isclose(chi_squared_p(mild, 63), stats.chisquare(np.bincount(mild // 4, minlength=16)).pvalue, rtol=1e-4)
    with pytest.raises(ValueError, match="at least 10 simulations"):
        chi_squared_p(ranks[:8], 63)


def test_coverage_of_uniform_ranks_is_nominal():
    ranks = np.arange(100_000) % 1000
    for kind in ("", "log_joint", "tarp"):
        assert np.allclose(rank_test("a", ranks, 999, kind).coverage, (0.5, 0.8, 0.95), atol=2e-3)


def test_classifier_tells_samples_apart_as_far_as_they_can_be():
    """Shifted by one sd the best accuracy is Phi(1 / 2); in another dimension's sites the same."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    reference, same = (rng.normal(5.0, 3.0, (1000, 2)) for _ in range(2))
    shifted = {"a": same[:, :1] + 3.0, "b": same[:, 1]}
    bound = 5 * 0.5 / np.sqrt(2000)
    assert abs(si.calibration.c2st(jax.random.key(0), reference, same) - 0.5) < bound
    found = si.calibration.c2st(jax.random.key(0), {"a": reference[:, :1], "b": reference[:, 1]}, shifted)
    assert abs(found - stats.norm.cdf(0.5)) < bound + 0.02
    with pytest.raises(ValueError, match=r"got shapes \(1000, 2\) and \(1000, 1\)"):
        si.calibration.c2st(jax.random.key(0), reference, same[:, :1])
    with pytest.raises(ValueError, match="NaN or infinity"):
        si.calibration.c2st(jax.random.key(0), reference, np.full_like(same, np.nan))


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(ImportError, match=r"scoreinfer\[calibration\]"):
        si.calibration.c2st(jax.random.key(0), np.zeros((9, 1)), np.ones((9, 1)))


def test_ranks_go_to_arviz(problem):
    result = si.calibration.sbc(jax.random.key(0), Sabotaged(problem), 100, corrected=False, **QUIET)
    group = result.to_arviz()["prior_sbc"]
    assert group["a"].dims[:2] == ("chain", "draw") and group["a"].shape == (1, 100, 2)
    assert np.array_equal(group["a"].values[0], result.ranks["a"])
    assert np.issubdtype(group["a"].dtype, np.integer)
    plots = pytest.importorskip("arviz_plots", reason="ArviZ 1.x")
    plots.plot_ecdf_pit(result.to_arviz(), backend="none")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("stretch", "fine"), [(1.0, True), (0.6, False)])
def test_simuk_says_the_same(stretch, fine, monkeypatch):
    """The other implementation, given the same sampler, has ranks of the same kind and comes to the same verdict."""
    simuk = pytest.importorskip("simuk", reason="on Python 3.12 and later")
    from arviz_base import from_dict

    rng = np.random.default_rng(0)

    def sample(self, drawn):
        y = np.asarray(drawn["y"])
        return from_dict({"posterior": {"a": 0.8 * y + stretch * np.sqrt(0.2) * rng.normal(size=(1, 63, 2))}})[
            "posterior"
        ]

    monkeypatch.setattr(simuk.SBC, "_get_posterior_samples_numpyro", sample)
    settings = {"num_simulations": 200, "data_dir": {"y": np.zeros(2)}, "seed": 1, "progress_bar": False}
    theirs = simuk.SBC(NUTS(linear), **settings)
    theirs.run_simulations()
    ranks = theirs.simulations["prior_sbc"]["a"].values
    problem = si.from_numpyro(linear)
    ours = si.calibration.sbc(jax.random.key(1), Sabotaged(problem, stretch), 200, corrected=False, **QUIET)
    assert ranks.shape == ours.to_arviz()["prior_sbc"]["a"].values.shape
    for i in range(2):
        verdicts = [chi_squared_p(r, 63) > 0.005 for r in (ranks[0, :, i].astype(int), ours.ranks["a"][:, i])]
        assert verdicts == [fine, fine]


def test_predictive_check_finds_data_the_model_does_not_make(learned):
    fine = learned.sample(jax.random.key(6), 2000, Y1)
    rows = {row.name: row for row in si.calibration.predictive_check(jax.random.key(7), fine)}
    assert rows.keys() == {"y mean", "y sd", "y min", "y max"}
    assert all(row.p_value > 0.05 and row.low < row.observed < row.high for row in rows.values())
    assert np.isclose(rows["y sd"].observed, Y1.std())
    spiked = fine._replace(observed={"y": jnp.asarray([0.3, 0.9, 60.0, 0.1, 0.8])})  # draws of other data
    rows = {row.name: row for row in si.calibration.predictive_check(jax.random.key(7), spiked)}
    assert rows["y max"].p_value < 0.01 < rows["y min"].p_value


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-component-update",
    "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1000,1500",
)  # fmt: skip


def photograph(page: Path) -> np.ndarray:
    """Open a page in a browser without a network: the red, green and blue (0 to 255) of every pixel it shows."""
    shot = page.with_suffix(".png")
    own = f"--user-data-dir={page.parent / 'profile'}", f"--screenshot={shot}"
    subprocess.run([BROWSER, *OPTIONS, *own, page.as_uri()], check=True, timeout=60, capture_output=True)
    return np.round(255 * plt.imread(shot)[..., :3]).astype(int)


class Page(html.parser.HTMLParser):
    """Collects the tags that are open, and everything a page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(learned):
    draws = learned.sample(jax.random.key(6), 2000, Y1)
    return si.calibrate(jax.random.key(8), learned, 200, draws=draws, **QUIET)


def test_report_is_one_page_that_loads_nothing(report, tmp_path):
    assert report.trusted, report
    assert "contained the true parameters as often as it claims" in report.verdict[0]
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open and not page.loads and "http" not in text and "url(" not in text and "<script" not in text
    assert text.count("<svg") == 4 and "y max" in text and "Trusted" in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("trusted", [True, False])
def test_report_in_a_browser(report, tmp_path, trusted):
    report._replace(trusted=trusted).save(tmp_path / "report.html")
    pixels = photograph(tmp_path / "report.html")

    def shown(*colour):
        return np.argwhere((pixels == colour).all(-1))

    verdict, other = shown(0x22, 0xAA, 0x77), shown(0xCC, 0x33, 0x33)
    verdict, other = (verdict, other) if trusted else (other, verdict)
    assert len(verdict) > 500 and not len(other)  # the bar beside the verdict, tall and in its colour
    bands = shown(0xE4, 0xEC, 0xF7)
    assert len(bands) > 4 * 240 * 60 and np.ptp(bands[:, 1]) > 600  # four bands, beside each other
    assert len(shown(0x11, 0x22, 0x44)) > 400  # curves, but for their soft edges
    assert verdict[:, 0].max() < bands[:, 0].min() and bands[:, 0].max() < 1400  # in this order, nothing pushed out


def test_report_on_a_bad_posterior_says_what_is_wrong(problem, tmp_path):
    posterior = Sabotaged(problem, 0.6)
    report = si.calibrate(jax.random.key(9), posterior, 200, corrected=False, **QUIET)
    assert not report.trusted and "a[0] (too narrow)" in report.verdict[0]
    named = report._replace(verdict=("<script>alert(1)</script>",))
    named.save(tmp_path / "report.html")
    assert "<script" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_report_on_outlying_data_is_not_trusted(learned):
    with pytest.warns(si.errors.MisspecificationWarning):
        draws = learned.sample(jax.random.key(6), 512, 400.0 * Y1)
    report = si.calibrate(jax.random.key(8), learned, 100, draws=draws, **QUIET)
    assert not report.trusted and any("unlike the model's" in line for line in report.verdict)


def test_model_without_simulator_is_refused(learned):
    def improper(y=None):
        a = numpyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(a, 1.0), obs=y)

    with pytest.raises(si.errors.UnsupportedModel, match="improper"):
        si.calibration.sbc(jax.random.key(0), learned, 10, problem=si.from_numpyro(improper, y=1.0), **QUIET)


@pytest.mark.parametrize("given", [{"model_args": (Y1,)}, {"model_kwargs": {"y": Y1}}])
@pytest.mark.parametrize("check", [si.calibration.sbc, si.calibrate])
def test_posterior_knows_its_problem(learned, check, given):
    """Arguments of a model say nothing beside it."""
    with pytest.raises(TypeError, match="a fitted posterior, which contains its problem"):
        check(jax.random.key(0), learned, 10, **given, **QUIET)
