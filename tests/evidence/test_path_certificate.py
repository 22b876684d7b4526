"""Certificates of paths on made-up chains: agreement is certified, every kind of disagreement is refused."""

import numpy as np
import pytest

from scoreinfer.evidence.paths import certify_paths, find_lobes, unfinished

CHAINS, STEPS, SEEN = 96, 40, 6


def chains(seed=0):
    return np.random.default_rng(seed).normal(size=(CHAINS, STEPS, SEEN))


def judged(trace, num=64):
    return certify_paths(trace, num, 2 * STEPS, 0.8, "particles")


def test_chains_that_agree_are_certified():
    found = judged(chains())
    assert found.certified and "agree after 80 steps" in found.reason and found.shares == (1.0,)
    assert found.ess == pytest.approx(64 * STEPS, rel=0.5) and abs(found.drift) < 0.1
    assert "R-hat 1.0" in str(found) and str(unfinished(3)).startswith("not certified: unfinished")


def test_slow_chains_are_refused():
    trace = chains() * 0.5 + np.random.default_rng(1).normal(size=(CHAINS, 1, SEEN))
    found = judged(trace)
    assert not found.certified and "too short" in found.reason and len(found.shares) == 1


def test_starts_that_disagree_are_refused():
    trace = chains()
    trace[64:, :, 3] += 0.3
    assert "disagree" in judged(trace).reason


def test_drift_is_refused():
    trace = chains()
    trace[..., 0] += np.linspace(-1.0, 1.0, STEPS)
    found = judged(trace)
    assert not found.certified and "drifts" in found.reason and found.drift > 0.25


def test_densities_that_are_not_finite_are_refused():
    trace = chains()
    trace[3, 5, 0] = np.nan
    assert "1 of 96 chains" in judged(trace).reason


@pytest.mark.parametrize(
    ("mine", "theirs", "certified"), [(0.5, 0.5, True), (0.5, 0.3, False), (1.0, 0.5, False), (0.5, 0.0, False)]
)
def test_lobes_need_the_same_shares(mine, theirs, certified):
    trace = np.concatenate([chains(seed) for seed in range(20)])
    side = np.concatenate([np.arange(960) < mine * 960, np.arange(960) < theirs * 960])
    trace[..., 2:] += np.where(side, 8.0, -8.0)[:, None, None]
    found = judged(trace, 960)
    assert len(found.shares) == 2 and found.certified == certified
    assert certified or "lobes" in found.reason
    assert sorted(found.shares) == pytest.approx(sorted([mine, 1 - mine]))


def test_few_draws_cannot_tell_the_shares():
    trace = chains()
    trace[..., 2:] += np.where(np.arange(CHAINS) % 2, 8.0, -8.0)[:, None, None]
    found = judged(trace)
    assert found.shares == (0.5, 0.5) and not found.certified and "Use more draws" in found.reason


def test_lobes_are_numbered():
    centres = np.repeat([-20.0, 0.0, 20.0], 32)
    labels = find_lobes(chains() + centres[:, None, None])
    assert len(set(labels)) == 3 and all(len(set(labels[32 * k : 32 * k + 32])) == 1 for k in range(3))
    assert (find_lobes(chains()) == 0).all()
