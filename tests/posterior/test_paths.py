"""Physics learned in reverse, end to end: the smoother, the evidence, bad input, and the kernel."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from scipy import stats

import scoreinfer as si
import scoreinfer.posterior.paths
from compilations import Compilations
from modes import heat, ornstein_uhlenbeck, ring
from scoreinfer.model import read_physics
from scoreinfer.montecarlo.weights import effective_sample_size
from scoreinfer.paths import linear_frame
from scoreinfer.paths.build import read_reversal
from scoreinfer.posterior import path_data
from scoreinfer.process import Physics
from scoreinfer.process.physics import hartley

MODES = ornstein_uhlenbeck()
SMALL = {"num_steps": 200, "width": 16, "depth": 1, "progress_bar": False}
END = jnp.array([-1.0, 0.5])


@pytest.fixture(scope="module")
def posterior():
    return si.SMDP(MODES.model, "x", **SMALL).fit(jax.random.key(0))


@pytest.mark.always
@pytest.mark.parametrize("known", [True, False], ids=["known end", "noisy end"])
def test_learned_reverse_gives_the_smoother(posterior, known):
    conditioned = posterior.condition_on_end(END) if known else posterior.condition(y=END)
    draws = conditioned.sample(jax.random.key(1), 4000)
    found = draws.certificate
    assert found.certified and found.ess > 0.9 * 4000, found
    assert abs(found.log_evidence - MODES.smoother(END, not known)[2]) < 5 * found.log_evidence_se + 2e-3
    assert MODES.disagreement(draws.sites["x"], draws.log_weight, END, not known) < 5.5
    assert draws.sites["x"].shape == (4000, 9, 2)


def test_linear_physics_trains_no_network(posterior):
    history = posterior.history
    assert (history.num_steps, history.stopped, history.share_steps) == (0, "good enough", (0,))
    assert history.shares[0] > 0.9


def test_share_that_is_too_small_trains_until_the_time_is_over():
    """Without a target all steps are taken; with no time left, none."""
    options = SMALL | {"num_steps": 4}
    whole = si.SMDP(MODES.model, "x", target_share=None, **options).fit(jax.random.key(0)).history
    assert (whole.num_steps, whole.stopped, whole.shares) == (4, "finished", ())
    none = si.SMDP(MODES.model, "x", target_share=0.9999, max_seconds=0.0, **options).fit(jax.random.key(0)).history
    assert (none.num_steps, none.stopped) == (0, "out of time")
    with pytest.raises(ValueError, match="between 0 and 1"):
        si.SMDP(MODES.model, "x", target_share=1.5)


def test_draws_do_not_depend_on_the_batch_size(posterior):
    conditioned = posterior.condition(y=END)
    one, two = (conditioned.sample(jax.random.key(1), 700, batch_size=size) for size in (512, 1024))
    np.testing.assert_allclose(one.unconstrained, two.unconstrained, atol=1e-5)


def test_all_paths_that_were_drawn_are_counted(posterior, monkeypatch):
    """Poor weights: single paths first, 32 particles for each path then, and the better of the two."""
    for shares, kept in (((0.01, 0.005), 1), ((0.01, 0.02), 32)):
        left = iter(shares)
        monkeypatch.setattr(scoreinfer.posterior.paths, "effective_sample_size", lambda _, left=left: 64 * next(left))
        info = posterior.condition(y=END).sample(jax.random.key(1), 64).info
        assert (info.num_particles, info.witnessed) == (kept, 0.0) and info.num_proposals == 64 * 33


def test_known_ends_have_no_pointwise_likelihood(posterior):
    draws = posterior.condition_on_end(END).sample(jax.random.key(1), 64)
    with pytest.raises(ValueError, match="needs a pointwise likelihood: this problem has none"):
        draws.to_arviz(jax.random.key(0), log_likelihood=True)


def test_predictions_are_those_of_the_last_state(posterior):
    """Ends to come, seen with fresh noise: the smoother's last state and that noise."""
    seen = np.asarray(posterior.condition(y=END).predict(jax.random.key(1), 2000)["y"], np.float64)
    mean, covariance, _ = MODES.smoother(END)
    sd = np.sqrt(covariance[:, -1, -1] + MODES.noise**2)
    assert seen.shape == (2000, 2)
    unit = (seen - mean[-1]) / sd
    assert np.abs(unit.mean(0)).max() < 5 * (2 / 2000) ** 0.5  # draws are weighted nearly equally, and resampled
    assert np.abs((unit**2).mean(0) - 1).max() < 5 * (2 * 2 / 2000) ** 0.5


def test_learned_score_is_grad_log_p(posterior):
    """In units of the state's own spread, at all times: not half of it, not g^2 times it."""
    exact, ts = MODES.score(), posterior.process.ts[1:]
    sd = np.sqrt(MODES.covariances().diagonal(axis1=1, axis2=2))[:, 1:].T
    x = jnp.asarray(sd * np.array([-1.0, 0.7]), jnp.float32)
    learned = jax.vmap(posterior.backward.score)(ts, x)
    error = np.asarray((learned - jax.vmap(exact)(ts, x)) * sd)
    assert np.abs(error).max() < 0.4 and np.sqrt((error**2).mean()) < 0.12


def test_flow_has_the_spread_of_the_process(posterior):
    """Ends at one standard deviation flow back to one; the whole score, or none, would miss by a factor."""
    sd = np.sqrt(MODES.covariances(False).diagonal(axis1=1, axis2=2))
    path = posterior.probability_flow(np.stack([sd[:, -1], -sd[:, -1]]))
    assert path.shape == (2, 9, 2)
    assert np.abs(np.log(np.abs(path[:, 0]) / sd[:, 0])).max() < 0.15  # of 8 steps; 0.07 with the exact kernels


@pytest.mark.slow
def test_learned_flow_has_the_spectrum_of_the_process():
    """Heat in Fourier modes, stiff ones too: ends at one standard deviation flow back to about one.

    Taking the whole score, or none, changes the variance of most modes several times over.
    """
    modes = heat(32, 16)
    posterior = si.SMDP(modes.path_model, "x", reverse=lambda t0, t1, x: x, **SMALL).fit(jax.random.key(0))
    sd = np.sqrt(modes.covariances(False).diagonal(axis1=1, axis2=2))
    path = posterior.probability_flow(np.stack([sd[:, -1], -sd[:, -1]]))
    assert path.shape == (2, 33, 16)
    log_ratio = np.log(np.abs(path[:, 0]) / sd[:, 0])
    assert np.abs(log_ratio).max() < 0.25  # of 32 steps; 0.18 with the exact kernels


def test_kernel_draws_whole_paths(posterior):
    """The learned sampler in MCMC: chains of paths with the smoother's moments."""
    mcmc = MCMC(
        si.ScoreSDE(posterior=posterior), num_warmup=0, num_samples=1000, num_chains=2, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(2), y=END, extra_fields=("accept_prob",))
    paths = np.asarray(mcmc.get_samples()["x"])
    assert mcmc.get_extra_fields()["accept_prob"].mean() > 0.9
    assert MODES.disagreement(paths, np.zeros(2000), END) < 5.5 / 0.9**0.5
    copy = pickle.loads(pickle.dumps(mcmc))
    np.testing.assert_array_equal(copy.get_samples()["x"], paths)
    copy.run(jax.random.key(2), y=END)  # the physics is read from the model again
    np.testing.assert_allclose(copy.get_samples()["x"], paths, atol=1e-5)


@pytest.mark.slow
def test_few_trajectories_still_give_exact_weights():
    """Learned from two hundred recorded paths alone: far from right, and unbiased."""
    paths = MODES.path().sample(jax.random.key(3), (200,))
    posterior = si.SMDP(MODES.model, "x", trajectories=paths, **SMALL).fit(jax.random.key(0))
    draws = posterior.sample(jax.random.key(1), 10_000, y=END)
    assert effective_sample_size(draws.log_weight) < 0.9 * 10_000, "it should not be right"
    assert abs(draws.certificate.log_evidence - MODES.smoother(END)[2]) < 5 * draws.certificate.log_evidence_se < 0.5
    assert MODES.disagreement(draws.sites["x"], draws.log_weight, END) < 5.5


def test_resimulated_trajectories_need_their_first_states_alone():
    """A hundred recorded beginnings; everything after them is the physics' own, and its noise fresh."""
    paths = np.array(MODES.path().sample(jax.random.key(3), (100,)))
    paths[:, 1:] = 7.0
    options = SMALL | {"num_steps": 0}
    posterior = si.SMDP(MODES.model, "x", trajectories=paths, resimulate=True, **options).fit(jax.random.key(0))
    draws = posterior.sample(jax.random.key(1), 4000, y=END)
    found = draws.certificate
    assert found.certified and found.ess > 0.8 * 4000, found
    assert abs(found.log_evidence - MODES.smoother(END)[2]) < 5 * found.log_evidence_se + 1e-3
    assert MODES.disagreement(draws.sites["x"], draws.log_weight, END) < 5.5
    with pytest.raises(ValueError, match="there are none"):
        si.SMDP(MODES.model, "x", resimulate=True, **options)


@pytest.mark.parametrize("resimulate", [False, True], ids=["simulated", "resimulated"])
def test_fresh_paths_of_a_second_epoch_cost_no_compilation(resimulate):
    """The physics is static data of compiled functions, so it has to be the same object in every epoch."""
    paths = MODES.path().sample(jax.random.key(3), (100,)) if resimulate else None
    options = si.SMDP(MODES.model, "x", trajectories=paths, resimulate=resimulate, **SMALL)
    draw = path_data.read_source(read_reversal(options.physics, MODES.model), paths, resimulate, None, 1).draw
    draw(jax.random.key(0), 64)
    with Compilations() as compilations:
        draw(jax.random.key(1), 64)
    assert compilations.count == 0


@pytest.mark.slow
def test_fields_keep_their_shape():
    def model(y=None):
        field = dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(2)
        x = numpyro.sample("x", dist.EulerMaruyama(jnp.linspace(0.0, 1.0, 5), lambda x, t: (-x, 0.5), field))
        numpyro.deterministic("mean", x.mean((-2, -1)))
        numpyro.sample("y", dist.Normal(x[-1], 0.2).to_event(2), obs=y)

    posterior = si.SMDP(model, "x", **SMALL | {"num_steps": 20}).fit(jax.random.key(0))
    draws = posterior.sample(jax.random.key(1), 600, y=0.5 * jnp.ones((2, 3)))
    assert draws.sites["x"].shape == (600, 5, 2, 3) and draws.sites["mean"].shape == (600, 5)
    assert draws.certificate.ess > 0.8 * 600
    assert posterior.probability_flow(jnp.ones((4, 2, 3))).shape == (4, 5, 2, 3)


@pytest.mark.slow
def test_double_well_seen_through_its_square():
    """Nonlinear physics, an observation that leaves two signs open: against transfer matrices on a grid."""
    ts, y, noise, sd = np.linspace(0.0, 1.0, 21), 0.8, 0.2, 0.6

    def well(t0, t1, x):
        return x + (t1 - t0) * 4 * (x - x**3)

    def model(y=None):
        x = numpyro.sample("x", si.PhysicsPath(well, 0.7 * np.sqrt(0.05), ts, dist.Normal(0.3, sd)))
        numpyro.sample("y", dist.Normal(x[-1] ** 2, noise), obs=y)

    grid = np.linspace(-3.0, 3.0, 1201)
    h, scale = grid[1] - grid[0], 0.7 * np.sqrt(0.05)
    kernel = stats.norm(well(0.0, 0.05, grid), scale).pdf(grid[:, None]) * h
    likelihood = stats.norm(grid**2, noise).pdf(y)
    backward = np.linalg.matrix_power(kernel.T, 20) @ likelihood  # p(y | x_0)
    density = stats.norm(0.3, sd).pdf(grid) * h
    evidence = density @ backward
    first = density * backward / evidence
    last = np.linalg.matrix_power(kernel, 20) @ density * likelihood / evidence
    options = {"num_steps": 1000, "width": 32, "depth": 2, "progress_bar": False}
    posterior = si.SMDP(model, "x", **options).fit(jax.random.key(0))
    draws = posterior.sample(jax.random.key(1), 8000, y=y)
    found = draws.certificate
    assert found.certified and found.ess > 0.3 * 8000, found
    assert abs(found.log_evidence - np.log(evidence)) < 5 * found.log_evidence_se < 0.1
    paths = np.asarray(draws.sites["x"], np.float64)
    weight = np.exp(np.asarray(draws.log_weight, np.float64))
    weight /= weight.sum()
    for k, exact in ((0, first), (-1, last)):
        for f in (lambda x: x > 0, lambda x: x, lambda x: x**2):
            truth = exact @ f(grid)
            spread = np.sqrt(exact @ (f(grid) - truth) ** 2)
            assert abs(weight @ f(paths[:, k]) - truth) < 5 * spread / np.sqrt(found.ess)
    assert posterior.paths.start.adjustment.mean.shape == (1,)  # the last state, which the square leaves open


def test_covariances_stay_positive_where_entries_are_left_out():
    """A smooth field: what is certain of its covariance is no covariance."""
    field = ring(16, 2, smoothness=3.0)
    process = read_physics(Physics("x", lambda t0, t1, x: x), field.path_model)
    frame = linear_frame(process, field.path().sample(jax.random.key(0), (4200,)))
    assert frame.factor.shape == (2, 16, 16) and np.isfinite(frame.factor).all()


@pytest.mark.slow
def test_linear_fields_need_regression_alone():
    """Heat on a ring of 12 points, in pixels."""
    field = ring(12)
    modes = field.modes
    physics = {"reverse": lambda t0, t1, x: x, "waves": True}
    posterior = si.SMDP(field.model, "x", **physics, num_steps=0).fit(jax.random.key(0))
    y = 0.4 * jnp.sin(jnp.arange(12.0))
    for conditioned, noisy in ((posterior.condition(y=y), True), (posterior.condition_on_end(y), False)):
        draws = conditioned.sample(jax.random.key(1), 4000)
        end = np.asarray(hartley(y, 1))
        assert draws.certificate.ess > 0.85 * 4000
        error = 5 * draws.certificate.log_evidence_se + 5e-3
        assert abs(draws.certificate.log_evidence - modes.smoother(end, noisy)[2]) < error
        assert modes.disagreement(hartley(draws.sites["x"], 1), draws.log_weight, end, noisy) < 5.5
    path = si.PhysicsPath(
        field.path().step, jnp.linspace(0.1, 0.2, 12), modes.ts, dist.Normal(jnp.zeros(12)).to_event(1)
    )
    uneven = lambda: numpyro.sample("x", path)  # noqa: E731
    with pytest.raises(ValueError, match="the same noise"):
        si.SMDP(uneven, "x", **physics, num_steps=0).fit(jax.random.key(0))


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_far_ends_are_refused_with_a_number(posterior):
    with pytest.warns(si.errors.MisspecificationWarning, match=r"further from the model's simulations than 100\.0%"):
        draws = posterior.condition_on_end(jnp.array([10.0, 0.0])).sample(jax.random.key(1), 600)
    assert not draws.certificate.certified


def test_bad_ends_are_refused(posterior):
    with pytest.raises(ValueError, match=r"state's shape \(2,\), got \(3,\)"):
        posterior.condition_on_end(jnp.zeros(3))
    with pytest.raises(ValueError, match="must be finite, but 1 of its numbers"):
        posterior.condition_on_end(jnp.array([0.0, jnp.nan]))
    with pytest.raises(ValueError, match="must be finite, but 1 of its numbers"):
        posterior.condition_on_end(np.ma.array([0.0, 1.0], mask=[False, True]))
    with pytest.raises(ValueError, match="Expected data for every observed site"):
        posterior.condition()


def test_bad_trajectories_are_refused():
    paths = np.array(MODES.path().sample(jax.random.key(3), (20,)))
    with pytest.raises(ValueError, match=r"\(2 or more, 9, 2\), got \(20, 8, 2\)"):
        si.SMDP(MODES.model, "x", trajectories=paths[:, :8], **SMALL).fit(jax.random.key(0))
    paths[3, 2] = np.nan
    with pytest.raises(ValueError, match="must be finite, but 1 of the 20 hold numbers that are not, first number 3"):
        si.SMDP(MODES.model, "x", trajectories=paths, **SMALL).fit(jax.random.key(0))
    masked = np.ma.array(np.nan_to_num(paths), mask=np.isnan(paths))
    with pytest.raises(ValueError, match="must be finite, but 1 of the 20"):
        si.SMDP(MODES.model, "x", trajectories=masked, **SMALL).fit(jax.random.key(0))
    with pytest.raises(ValueError, match="recorded paths are the whole budget"):
        si.SMDP(MODES.model, "x", trajectories=paths, num_simulations=20)
    with pytest.raises(TypeError, match="target_score"):
        si.SMDP(MODES.model, "x", target_score=True)
    with pytest.raises(ValueError, match="expected the model, got a `Problem`"):
        si.SMDP(si.from_numpyro(MODES.model), "x")
