"""What the examples hold their draws against."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from scipy.stats import multivariate_normal, norm

import scoreinfer as si

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import coal_disasters
import interferometer
import k2_24_velocities as k2_24
import layered_ground
import lorenz96_filter as lorenz96
import rainfall_runoff
import toy_process_holzschuh2023 as toy


@pytest.mark.parametrize("num_planets", [1, 2])
def test_linear_parameters_are_integrated_out(num_planets):
    """The log likelihood of a period grid is that of the Gaussian which amplitudes and offset leave behind."""
    time, velocity, error = k2_24.read()
    phase = 2 * np.pi * time[:, None] / np.array([20.9, 42.4])[:num_planets]
    basis = np.concatenate([np.ones((32, 1)), np.cos(phase), np.sin(phase)], axis=1)
    covariance = np.diag(error**2 + 2.5**2) + k2_24.AMPLITUDE**2 * basis @ basis.T
    expected = multivariate_normal(np.zeros(32), covariance).logpdf(velocity)
    found = k2_24.marginal_likelihood(basis[None], velocity, error, 2.5)
    assert found == pytest.approx([expected], rel=1e-6)


def test_linear_parameters_are_drawn_from_what_the_likelihood_leaves():
    """The model's joint density is that of amplitudes and offset beside the data, in other coordinates."""
    time, velocity, error = (jnp.asarray(column, jnp.float32) for column in k2_24.read())
    ratio, jitter, unit = jnp.array([0.75, 0.8]), jnp.array(2.5), jnp.linspace(-1.0, 1.5, 5)

    def run(unit):
        model = handlers.substitute(k2_24.model, {"ratio": ratio, "jitter": jitter, "unit": unit})
        return handlers.trace(model).get_trace(time, error, velocity, 2)

    def linear(sites):
        size, angle = sites["semi_amplitude"]["value"], sites["phase"]["value"]
        offset = sites["offset"]["value"][None]
        return jnp.concatenate([offset, size * jnp.cos(angle), size * jnp.sin(angle)])

    @jax.jit
    def log_densities(unit):
        sites = run(unit)
        found = sum(sites[name]["fn"].log_prob(sites[name]["value"]) for name in ("velocity", "unit"))
        angle = 2 * jnp.pi * time[:, None] / sites["period"]["value"]
        mean = jnp.concatenate([jnp.ones((32, 1)), jnp.cos(angle), jnp.sin(angle)], axis=1) @ linear(sites)
        expected = dist.Normal(mean, jnp.hypot(error, jitter)).log_prob(velocity).sum()
        expected += dist.Normal(0.0, k2_24.AMPLITUDE).log_prob(linear(sites)).sum()
        return found, expected + jnp.linalg.slogdet(jax.jacfwd(lambda unit: linear(run(unit)))(unit))[1]

    found, expected = log_densities(unit)
    assert float(found) == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("num_planets", [1, 2])
def test_the_grid_of_periods_covers_the_prior_once(num_planets, monkeypatch):
    """Without data, the evidence is the prior's share of the grid: all periods, and jitters from 0.3 to 30 m/s."""
    monkeypatch.setattr(k2_24, "marginal_likelihood", lambda basis, velocity, error, jitter: np.zeros(len(basis)))
    sd = np.log(10.0)  # the jitter's prior is normal in its logarithm, around log 3
    assert k2_24.exact(num_planets, 40)[3] == pytest.approx(np.log(2 * norm.cdf(sd) - 1), abs=1e-3)


def test_aliases_do_not_see_the_planets_order():
    aliases = k2_24.Aliases(*k2_24.exact(2, 60)[:3])
    assert aliases.shares.sum() == pytest.approx(1.0)
    pairs = np.array([[20.9, 42.4], [42.4, 20.9], [5.0, 5.1]])
    first, second, third = aliases.of(pairs)
    assert first == second != third
    assert " and " in aliases.name(first)


def test_toy_process_has_its_published_answers():
    """P(+1 | x_T) on the grid, as computed elsewhere by Fokker-Planck (.533, .571, .606), of Euler steps here."""
    truth = toy.exact(0.002)
    assert truth.density.sum(1) * 0.002 == pytest.approx(np.ones(501), abs=1e-6)
    found = [truth.probability(end) for end in (0.0, *toy.ENDS[1:])]
    assert found == pytest.approx([0.5, 0.533, 0.571, 0.606], abs=0.003)
    x = np.linspace(-1.1, 1.1, 12)
    assert np.asarray(toy.grow(0.0, toy.STEP, toy.decay(0.0, toy.STEP, x))) == pytest.approx(x, abs=1e-5)
    assert toy.q_metric(np.array([1.0, -1.05, 0.5, 0.95])) == 0.5


# --- the interferometer


def test_fringes_are_whole_turns_apart():
    """Moved by lattice vectors, a position sees the same and is numbered as many fringes on."""
    place, turns = np.array([0.3, -0.2]), np.array([[1, 0], [0, 1], [-2, 3]])
    moved = place + 2 * np.pi * turns @ np.linalg.inv(interferometer.BASELINES).T
    seen = np.asarray(interferometer.visibility(place))
    assert np.asarray(jax.vmap(interferometer.visibility)(moved)) == pytest.approx(np.tile(seen, (3, 1)), abs=1e-5)
    assert (interferometer.fringe(moved, seen) - interferometer.fringe(place, seen) == turns).all()


def test_the_grid_of_positions_is_exact():
    """Evidence and shares agree with 400,000 prior draws, weighed by the likelihood, within five standard errors."""
    y = np.asarray(interferometer.visibility(interferometer.SOURCE)) + np.array([0.1, -0.2, 0.15, 0.05])
    truth = interferometer.exact(y, 501)
    draws = np.random.default_rng(0).normal(size=(400_000, 2))
    phase = draws @ interferometer.BASELINES.T
    likelihood = norm.pdf(y, np.concatenate([np.cos(phase), np.sin(phase)], 1), interferometer.NOISE).prod(1)
    error = likelihood.std() / likelihood.mean() / np.sqrt(len(draws))
    assert truth.log_evidence == pytest.approx(np.log(likelihood.mean()), abs=5 * error)
    numbers, ess = interferometer.fringe(draws, y), likelihood.sum() ** 2 / (likelihood**2).sum()
    for number, share in truth.shares.items():
        found = likelihood[(numbers == number).all(1)].sum() / likelihood.sum()
        assert found == pytest.approx(share, abs=5 * np.sqrt((share * (1 - share) + 1e-6) / ess) + 1e-3)


def test_the_grid_of_rates_agrees_with_particles():
    """Log evidence of the counts, and the filtered mean of the last year, which is the smoothed one too."""
    log_evidence, mean, sd = coal_disasters.exact(coal_disasters.COUNTS, 0.2)
    run = si.filter(
        jax.random.key(0), coal_disasters.model, "level", coal_disasters.COUNTS, 0.2,
        method=si.filters.GuidedFilter(), num_members=4000,
    )  # fmt: skip
    assert float(run.log_evidence) == pytest.approx(log_evidence, abs=0.25)
    assert float(run.mean()[-1]) == pytest.approx(mean[-1], abs=0.1 * sd[-1])


# --- rainfall and runoff


@pytest.fixture(scope="module")
def catchment(tmp_path_factory):
    """The compiled program, fed with made-up weather."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("hymod")
    weather = rainfall_runoff.make_weather()
    np.savetxt(folder / "forcing.txt", np.stack([weather.rain, weather.evaporation], axis=1))
    return rainfall_runoff.Catchment(rainfall_runoff.compile_program(folder), folder / "forcing.txt"), weather


def hymod(weather, cmax, bexp, alpha, ks, kq):
    """The same model in integrals: runoff is the rain on that part of the catchment whose soil is full."""
    soil, stores, flows = 0.0, np.zeros(4), []
    for rain, evaporation in zip(weather.rain, weather.evaporation, strict=True):
        level = cmax * (1 - (1 - soil * (bexp + 1) / cmax) ** (1 / (bexp + 1)))
        depth = np.linspace(level, level + rain, 200)
        dry = np.clip(1 - depth / cmax, 0, 1) ** bexp
        taken = np.trapezoid(dry, depth)
        soil = max((soil + taken) * (1 - evaporation * (bexp + 1) / cmax), 0.0)
        quick, slow = alpha * (rain - taken), (1 - alpha) * (rain - taken)
        for i in range(3):
            stores[i] += quick
            quick = kq * stores[i]
            stores[i] -= quick
        stores[3] = (1 - ks) * (stores[3] + slow)
        flows.append(quick + ks / (1 - ks) * stores[3])
    return rainfall_runoff.monthly(np.array(flows))


def test_program_is_hymod(catchment):
    program, weather = catchment
    truth = rainfall_runoff.TRUTH
    assert program(truth, 0)["flow"] == pytest.approx(hymod(weather, **truth), rel=1e-3)
    with pytest.raises(RuntimeError, match="ended with 3: soil moisture did not converge"):
        program(truth | {"cmax": 50.0, "bexp": 1.0}, 0)


def test_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(SystemExit, match="needs a C compiler, and there is no `no-such-compiler`"):
        rainfall_runoff.compile_program(tmp_path)


@pytest.mark.slow
def test_rainfall_runoff_runs(tmp_path, catchment):
    """Killed, resumed, learned, weighed, calibrated, reported."""
    pytest.importorskip("matplotlib")
    script = Path(rainfall_runoff.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--smoke", "--output-dir", str(tmp_path)], capture_output=True, text=True,
        check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "resumed: 1500 of 1500" in done.stdout
    for name in ("report.html", "posterior.nc", "hydrograph.png", "parameters.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_lorenz96_errors_grow_as_they_should():
    """Nearby states of Lorenz-96 with 40 variables part at the known rate: largest Lyapunov exponent 1.68."""
    x = jax.lax.fori_loop(0, 2000, lambda _, x: lorenz96.advance(x), 3.0 * jax.random.normal(jax.random.key(0), (40,)))
    v = jax.random.normal(jax.random.key(1), (40,))

    def step(state, _):
        x, v = jax.jvp(lorenz96.advance, state[:1], state[1:])
        size = jnp.linalg.norm(v)
        return (x, v / size), jnp.log(size)

    (_, growth) = jax.lax.scan(step, (x, v / jnp.linalg.norm(v)), length=20_000)
    assert growth[1000:].mean() / lorenz96.STEP == pytest.approx(1.68, abs=0.15)


@pytest.mark.slow
def test_lorenz96_runs(tmp_path):
    """Filtered three times, tried on twins, certified, drawn."""
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, lorenz96.__file__, "--smoke", "--figure", str(tmp_path / "filter.png")], capture_output=True,
        text=True, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "ScoreFilter: " in done.stdout and (tmp_path / "filter.png").stat().st_size > 1000


def test_layers_in_series_share_the_head_by_their_resistance():
    """An even column has a linear head; over two kinds of ground the drops are in proportion to the resistances."""
    even = layered_ground.heads(jnp.full(layered_ground.NUM_CELLS, 0.7))
    np.testing.assert_allclose(even, 1 - (layered_ground.WELLS + 1) / layered_ground.NUM_CELLS, rtol=1e-5)
    half = layered_ground.NUM_CELLS // 2
    two = layered_ground.heads(jnp.log(jnp.where(jnp.arange(2 * half) < half, 1.0, 0.25)))
    drops = np.diff(two) / np.diff(layered_ground.WELLS)
    assert drops[-1] / drops[0] == pytest.approx(4.0, rel=1e-4)
