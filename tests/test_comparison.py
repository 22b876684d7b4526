"""The same model under several kernels."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from numpyro.infer import NUTS

from doubles import Y1, fake_posterior, grid_moments, location_scale
from scoreinfer.comparison import Comparison, compare
from scoreinfer.mcmc import MALA, ScoreSDE


@pytest.fixture(scope="module")
def comparison():
    kernels = {
        "nuts": NUTS(location_scale),
        "mala": MALA(location_scale),
        "score": ScoreSDE(location_scale, posterior=fake_posterior(), num_local_steps=1),
    }
    mean, sd = grid_moments(Y1)["mu"]
    reference = {"mu": mean + sd * np.random.default_rng(0).normal(size=20_000)}
    return Comparison(
        location_scale, kernels, num_warmup=200, num_samples=400, num_chains=2, reference=reference,
        modes=lambda sites: (sites["mu"] > 0).astype(int),
    ).run(random.key(0), Y1)  # fmt: skip


def test_every_kernel_is_measured(comparison):
    assert list(comparison.results) == ["nuts", "mala", "score"]
    for name, result in comparison.results.items():
        assert result.mean_error < 0.4 and result.sd_error < 0.4, name
        assert 20 < result.bulk_ess < 2000 and result.tail_ess > 20 and 0.99 < result.r_hat < 1.1
        assert result.compile_seconds > 0 and result.sampling_seconds > 0 and result.cpu_seconds > 0
        assert sum(result.modes.values()) == pytest.approx(1.0)
        assert result.ess_per_evaluation == pytest.approx(result.bulk_ess / result.num_evaluations)


def test_evaluations_are_counted(comparison):
    found = {name: result.num_evaluations for name, result in comparison.results.items()}
    assert found["mala"] == 2 * 600
    assert found["score"] == 2 * 600 * (1 + 3)
    assert found["nuts"] > 2 * 600  # at least one leapfrog step an iteration, in warm-up too
    assert np.isfinite(comparison.results["nuts"].num_divergences)
    assert np.isnan(comparison.results["mala"].log_evidence)


class ScriptedClock:
    """A clock that shows what it is told: warm-up takes 1 s, a run to measure by a quarter of one."""

    walls = iter(())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wall, self.compile, self.cpu = next(self.walls), 0.0, 1.0


def test_same_seconds_for_all(monkeypatch):
    """A kernel that is done early goes on, thinned to as many draws; a longer run is measured by a longer one."""
    monkeypatch.setattr(ScriptedClock, "walls", iter([1.0, 0.2, 0.1, 0.25, 3.0]))
    monkeypatch.setattr("scoreinfer.comparison._Clock", ScriptedClock)
    kernels = {"mala": MALA(location_scale)}
    plan = Comparison(location_scale, kernels, num_warmup=50, num_samples=50, num_chains=2, seconds=4.0)
    compared = plan.run(random.key(0), Y1)
    result, mcmc = compared.results["mala"], compared.mcmc["mala"]
    assert mcmc.thinning == 3 * (4 - 1) / 0.25  # measured thinned by 3: a tenth of thirty runs of 0.1 s
    assert mcmc.get_samples()["mu"].shape == (100,)
    assert result.num_evaluations == 2 * (50 + 50 * mcmc.thinning)
    assert result.warmup_seconds + result.sampling_seconds == 4.0
    assert "4 s each" in str(compared)


def test_table_plot_and_arviz(comparison):
    text = str(comparison)
    assert all(word in text for word in ("nuts", "bulk_ess", "200 + 400 iterations", "score: "))
    frame = comparison.to_dataframe()
    assert frame.shape[0] == 3 and "ess_per_second" in frame and "mode 1" in frame
    assert all("mu" in data["posterior"] for data in comparison.to_arviz().values())
    comparison.plot(var_names=["mu"])


def test_bare_densities_are_compared():
    """A normal density of mean 3 and standard deviation 2: its draws are called z."""
    kernels = {"mala": MALA(potential_fn=lambda x: 0.125 * ((x - 3.0) ** 2).sum())}
    reference = {"z": 3.0 + 2.0 * np.random.default_rng(0).normal(size=(20_000, 1))}
    compared = Comparison(
        None, kernels, init_params=jnp.ones((2, 1)), num_warmup=200, num_samples=400, num_chains=2,
        reference=reference, modes=lambda draws: (draws["z"][:, 0] > 3.0).astype(int),
    ).run(random.key(0))  # fmt: skip
    result = compared.results["mala"]
    bound = 5 / np.sqrt(result.bulk_ess)
    assert result.bulk_ess > 100 and result.mean_error < bound and result.sd_error < bound
    assert abs(result.modes[1] - 0.5) < 0.5 * bound


def test_other_model_is_refused():
    with pytest.raises(ValueError, match="another model"):
        compare(random.key(0), location_scale, {"nuts": NUTS(lambda: jnp.zeros(()))}, Y1)
