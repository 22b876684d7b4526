"""Plots return axes that hold the numbers, and show nothing."""

import matplotlib as mpl

mpl.use("Agg")

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import scoreinfer as si
from scoreinfer.evidence.certificate import ForwardCheck, certify_weights
from scoreinfer.figures import BAD, GOOD
from scoreinfer.training.loop import History, TrainingHistory


@pytest.fixture(autouse=True)
def _nothing_is_shown(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: pytest.fail("show was called"))
    yield
    plt.close("all")


def lines(axes):
    return {line.get_label(): np.stack(line.get_data()) for line in axes.get_lines()}


@pytest.fixture(scope="module")
def draws():
    """A standard normal weighted to N(1, 1): equally weighted draws have mean 1."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=4000), jnp.float32)
    sites = {"net/a": z, "b": jnp.stack([z, -z], axis=1)}
    return si.Draws(sites, z[:, None], z - 0.5, -0.5 * z**2, -0.5 * (z - 1) ** 2, {})


def test_marginals_are_of_the_weighted_draws(draws):
    axes = draws.plot(sites=["net/a"])
    assert axes.shape == (1,)
    density = max((np.stack(line.get_data()) for line in axes[0].get_lines()), key=lambda data: data.shape[1])
    ess = si.evidence.certificate.certify_weights(draws.log_weight).ess
    assert np.average(density[0], weights=density[1]) == pytest.approx(1.0, abs=5 / np.sqrt(ess) + 0.02)


def test_pairs_are_a_matrix(draws):
    assert draws.plot(pairs=True).shape == (3, 3)


def test_unknown_sites_are_named(draws):
    with pytest.raises(ValueError, match="among net/a, b, got c"):
        draws.plot(sites=["c"])


def test_certificate_shows_the_tail_and_the_evidence():
    """A Pareto tail of shape 0.9 is refused; a tenth of the witnesses lies where no draw goes."""
    rng = np.random.default_rng(1)
    log_weight = 0.9 * rng.exponential(size=4000)
    check = ForwardCheck(np.where(np.arange(100) < 10, 50.0, 0.0), source="witnesses", num_informative=100.0)
    certificate = certify_weights(log_weight, check)
    tail, evidence, criteria = certificate.plot()
    x, y = lines(tail)["largest weights"]
    assert x.size == 190  # 3 sqrt(4000)
    assert y[0] == pytest.approx(np.exp(log_weight).max() / np.exp(log_weight).mean())
    slope = np.polyfit(*np.log(lines(tail)[f"tail of shape {certificate.k_hat:.2f}"]), 1)[0]
    assert slope == pytest.approx(-certificate.k_hat)
    places, unseen = lines(evidence)["100 of witnesses"], lines(evidence)["missed, right of here"][0, 0]
    assert np.mean(places[0] > unseen) == certificate.missed == 0.1
    colours = [bar.get_facecolor() for bar in criteria.patches]
    red, green = (mpl.colors.to_rgba(colour) for colour in (BAD, GOOD))
    names = [label.get_text() for label in criteria.get_yticklabels()]
    told = dict(zip(names, colours, strict=True))
    assert told == {"k-hat": red, "ESS": told["ESS"], "missed share": red, "unseen mass": green}
    assert told["ESS"] == (green if certificate.ess >= 400 else red)


def test_certificate_without_weights_says_so():
    with pytest.raises(ValueError, match="uncertified: no density"):
        certify_weights(None).plot()


def test_history_shows_losses_and_shares():
    first = History(np.array([2.0, 1.0]), np.array([2.5, 1.5]), 500, 10, 4.0, "flat", (0.2, 0.5), (0, 500), (0.0, 4.0))
    second = History(np.array([1.0]), np.array([0.9]), 250, 10, 2.0, "good enough", (0.9,), (250,), (2.0,))
    losses, shares = TrainingHistory(first, second).plot()
    assert lines(losses)["whitening, validation"].tolist() == [[250.0, 500.0], [2.5, 1.5]]
    assert lines(shares)["score"].tolist() == [[6.0], [0.9]]  # the seconds of the whitening map before
    assert lines(first.plot()[1])["training"].tolist() == [[0.0, 4.0], [0.2, 0.5]]


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'scoreinfer\[plot\]'"):
        certify_weights(np.zeros(1000)).plot()
