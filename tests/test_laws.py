"""Every proposer and every kernel keeps its laws, whatever the networks say; see `laws`."""

import dataclasses

import jax
import numpy as np
import pytest

import laws
from scoreinfer.samplers.focused import FocusedProposal, _mix

SIGMAS = 5


def one_key(self, key, context, z):
    """Compute the mixture's ``log_q`` wrongly: over the same noise for the paths of both components."""
    return _mix(*(self.original.log_q(key, part, z) for part in context))


@pytest.mark.slow
def test_components_must_not_share_the_noise_of_their_paths(monkeypatch):
    """A sampler of three steps in one dimension: E[1 / (1 + w / Z)] over the posterior is about .22, not .20."""
    target = laws.two_counts()
    target = target._replace(problem=dataclasses.replace(target.problem))  # programs of its own
    case = laws.Case(target, laws.focused(target, laws.SDE), num=100_000)
    assert laws.disagreement(case) < SIGMAS
    jax.clear_caches()
    monkeypatch.setattr(FocusedProposal, "log_q", one_key)
    assert laws.disagreement(case) > 2 * SIGMAS
    jax.clear_caches()


@pytest.fixture(scope="module", params=laws.proposers())
def case(request):
    return laws.proposers()[request.param]()


def test_weights_of_draws_are_those_of_the_posterior(case):
    """The proposer's draws, tilted by their weights, are the posterior's, weighed over fresh paths."""
    assert laws.disagreement(case) < SIGMAS


def test_a_draw_depends_on_its_row_alone(case):
    """The same key gives the same draws, wherever in a batch they stand."""
    whole, moved = case.draw(), case.draw(first=case.num // 3)
    both = slice(case.num // 3, None), slice(case.num - case.num // 3)
    for one, other in zip(whole, moved, strict=True):
        np.testing.assert_allclose(one[both[0]], other[both[1]], rtol=1e-3, atol=1e-3)


def test_density_of_a_draw_is_that_of_the_same_point_given(case):
    """Where no path is drawn; elsewhere another path gives another weight."""
    drawn = case.draw()
    given = case.weigh(drawn.z)
    found = np.isfinite(given.log_q) & np.isfinite(drawn.log_q)
    assert found.mean() > 0.98
    assert (np.abs(given.log_q - drawn.log_q)[found] < 0.02).mean() == pytest.approx(1.0 - case.paths, abs=0.2)


SLOW = ("resampled paths",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in laws.kernels()]
)
def test_kernels_leave_the_posterior_where_it_is(name):
    """Chains that start from exact draws, with exact weights, still have them after some iterations."""
    assert laws.drift(laws.kernels()[name]()) < SIGMAS
