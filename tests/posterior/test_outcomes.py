"""Budgets by outcome: what ends the training of an amortised posterior, and what is chosen after it."""

import dataclasses

import equinox as eqx
import jax
import numpy as np
import pytest

import scoreinfer as si
import scoreinfer.samplers.judge
from compilations import Compilations
from oracles import gaussian_mixture, linear_gaussian
from scoreinfer.nets import Concatenate
from scoreinfer.samplers.amortised import Architecture, Size, untrained
from scoreinfer.samplers.diffusion import ProbabilityFlow
from scoreinfer.samplers.judge import FEWER_STEPS, Judge, _typical_share
from scoreinfer.samplers.tuned import TunedProposal
from scoreinfer.training.simulations import simulate_with_data, standardiser
from scoreinfer.training.whitening import regressed

CHEAP = {"num_steps": 40, "batch_size": 64, "progress_bar": False, "sampler": si.samplers.ReverseSDE(num_steps=4)}


def bits(posterior):
    return b"".join(
        np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(eqx.filter(posterior.proposal, eqx.is_array))
    )


@pytest.fixture(scope="module")
def easy():
    """A Gaussian posterior, its judge, and the proposal that the regression is."""
    problem = si.from_numpyro(linear_gaussian(2).model)
    simulations, y = simulate_with_data(jax.random.key(0), problem, 4096)
    scale = standardiser(simulations.x)
    key, size = jax.random.key(1), Size(8, 1)
    proposal = untrained(key, key, problem, Architecture(size, size, ProbabilityFlow(num_steps=8)), Concatenate())
    whitening = regressed(proposal.whitening, simulations.z, jax.vmap(scale)(simulations.x))
    judge = Judge(jax.random.key(2), problem, jax.tree.map(lambda leaf: leaf[:32], y), 32, simulations.z[:32])
    return judge, dataclasses.replace(proposal, standardiser=scale, whitening=whitening)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
def test_the_judge_knows_the_share(easy, shift):
    """N(0, I) for N(d, I): the weights' second moment is exp(|d|^2), the share its inverse."""
    judge, proposal = easy
    whitening = proposal.whitening
    moved = whitening.intercept + shift * whitening.residual[:, 0]
    share = judge.share(dataclasses.replace(proposal, whitening=dataclasses.replace(whitening, intercept=moved)))
    # Of 64 draws the estimated share is about 1 / (1 + (exp(d^2) - 1) (1 - 1/64)); its error over 32 observations.
    errors = {0.0: 0.01, 0.5: 5 * 0.013, 1.0: 5 * 0.03}
    assert abs(share - np.exp(-(shift**2))) < errors[shift]


@pytest.mark.parametrize(("spread", "good"), [(2.5, True), (0.2, False)], ids=["both modes", "one mode"])
def test_a_tuned_proposal_that_misses_a_mode_is_worth_nothing(spread, good):
    """Its own draws are even, as they never come to the other mode; a third of the true parameters lie there."""
    problem = si.from_numpyro(gaussian_mixture().model)
    simulations, y = simulate_with_data(jax.random.key(0), problem, 32)
    judge = Judge(jax.random.key(2), problem, y, 32, simulations.z)
    key, size = jax.random.key(1), Size(8, 1)
    start = untrained(key, key, problem, Architecture(size, size, ProbabilityFlow()), Concatenate())
    centre = np.array([0.0 if good else -2.5, 0.0], np.float32)
    whitening = dataclasses.replace(start.whitening, intercept=centre, residual=spread * np.eye(2, dtype=np.float32))
    tuned = TunedProposal(dataclasses.replace(start, whitening=whitening), jax.random.key_data(jax.random.key(4)))
    assert _typical_share(judge, tuned, None, True)[0] > 0.4
    assert (judge.tuned_share(tuned) > 0) == good


def test_all_numbers_of_steps_share_one_program(easy, monkeypatch):
    """And it draws as a flow of so many steps draws."""
    judge, proposal = easy
    proposal = dataclasses.replace(proposal, score=_disturbed(proposal.score))
    flows = [dataclasses.replace(proposal, sampler=ProbabilityFlow(num_steps=number)) for number in (2, 16)]
    judge.share(proposal)
    with Compilations() as compilations:
        shares = [judge.share(flow) for flow in flows]
    assert compilations.count == 0 and abs(shares[0] - shares[1]) > 0.002
    monkeypatch.setattr(scoreinfer.samplers.judge, "FEWER_STEPS", (0,))  # every flow is one of its own
    assert [judge.share(flow) for flow in flows] == pytest.approx(shares, rel=1e-3)


def _disturbed(tree):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noise = [0.1 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, [leaf + extra for leaf, extra in zip(leaves, noise, strict=True)])


@pytest.mark.parametrize(
    ("shares", "chosen"),
    [
        ({16: 0.9, 8: 0.89, 4: 0.87, 2: 0.7, 1: 0.9}, 4),
        ({16: 0.9, 8: 0.5, 4: 0.9, 2: 0.9, 1: 0.9}, 16),
        ({16: 0.4, 8: 0.5, 4: 0.49, 2: 0.48, 1: 0.478}, 1),
    ],
)
def test_the_fewest_steps_that_keep_the_share(easy, monkeypatch, shares, chosen):
    judge, proposal = easy
    monkeypatch.setattr(Judge, "share", lambda self, proposal: shares[proposal.sampler.num_steps])
    sampler = judge.fewest_steps(proposal).sampler
    assert sampler.num_steps == chosen and set(shares) == set(FEWER_STEPS)
    assert judge.fewest_steps(dataclasses.replace(proposal, sampler=CHEAP["sampler"])).sampler is CHEAP["sampler"]


def test_a_linear_gaussian_model_trains_nothing():
    """The regression is the answer, and one step of the flow draws from it."""
    oracle = linear_gaussian(3)
    posterior = si.NPSE(oracle.model, progress_bar=False).fit(jax.random.key(0))
    history = posterior.history
    assert history.whitening.num_steps == history.score.num_steps == 0 and history.smaller is None
    assert history.whitening.stopped == history.score.stopped == "good enough"
    assert "good enough after 0 steps" in str(history)
    assert posterior.proposal.sampler.num_steps == 1
    draws = posterior.sample(jax.random.key(1), 4000, **oracle.data)
    assert draws.certificate.certified and draws.certificate.ess > 3600


def test_the_ladder_is_climbed_where_the_small_network_falls_short():
    """No share is enough: both networks are trained, and the better one is kept; its size is saved."""
    model = gaussian_mixture().model
    first, again = (
        si.NPSE(model, width=40, depth=1, target_share=1.1, **CHEAP).fit(jax.random.key(0)) for _ in range(2)
    )
    history = first.history
    assert [run.num_steps for run in (history.whitening, history.smaller, history.score)] == [40, 40, 40]
    better = history.score if history.score.share > history.smaller.share else history.smaller
    assert first.proposal.score.network.width == (40 if better is history.score else 32)
    assert better.share >= history.whitening.share > 0
    assert bits(first) == bits(again)


def test_a_small_network_is_enough_where_the_share_is_reached():
    options = CHEAP | {"num_steps": 1000, "sampler": None, "target_share": 0.5}
    posterior = si.NPSE(gaussian_mixture().model, width=40, depth=1, **options).fit(jax.random.key(0))
    history = posterior.history
    assert history.smaller is None and history.score.stopped == "good enough", history
    assert history.whitening.share < 0.5 <= history.score.share
    assert posterior.proposal.score.network.width == 32


def test_seconds_end_the_training():
    options = CHEAP | {"num_steps": 20_000}
    posterior = si.NPSE(gaussian_mixture().model, width=8, depth=1, max_seconds=0.0, **options).fit(jax.random.key(0))
    runs = posterior.history.whitening, posterior.history.score
    assert [(run.stopped, run.num_steps) for run in runs] == [("out of time", 250)] * 2
