"""Training in legs: what ends it, what the judge sees, and which weights are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compilations import Compilations
from scoreinfer.training.loop import LEAST_FALL, Budget, train

BUDGET = Budget(320, 8, 10, 0.05, num_legs=5)


def loss(weight, batch, key):
    return jnp.mean((weight - batch) ** 2)


def run(judge=None, budget=BUDGET, noise=0.0, **options):
    def pools(key):
        return 1.0 + noise * jax.random.normal(key, (64,))

    weight, history = train(
        jax.random.key(0), jnp.zeros(()), loss, pools, jnp.ones(8), budget, judge=judge, progress_bar=False, **options
    )
    return float(weight), history


def scripted(*shares):
    """Make a judge that says these shares in turn; it notes what it is asked about."""
    left, seen = list(shares), []

    def judge(key, weight):
        seen.append((jax.random.key_data(key).tolist(), float(weight)))
        return left.pop(0)

    return judge, seen


@pytest.mark.parametrize(
    ("shares", "stopped", "steps"),
    [
        ((0.9,), "good enough", 0),
        ((0.1, 0.2, 0.9), "good enough", 40),
        ((0.1, 0.1, 0.5, 0.51, 0.52), "flat", 160),
        ((0.1, 0.2, 0.1, 0.1, 0.1), "flat", 160),
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), "finished", 320),
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.5), "flat", 320),
        ((float("nan"), 0.0, 0.9), "good enough", 40),
    ],
)
def test_the_judge_ends_training(shares, stopped, steps):
    judge, seen = scripted(*shares)
    weight, history = run(judge)
    assert (history.stopped, history.num_steps) == (stopped, steps)
    assert history.shares == tuple(np.nan_to_num(shares)) and len({key[0] for key in map(str, seen)}) == 1
    assert history.share_steps == (0, 20, 40, 80, 160, 320)[: len(shares)]
    assert list(history.share_seconds) == sorted(history.share_seconds)
    assert weight == seen[int(np.argmax(np.nan_to_num(shares)))][1]


def test_a_smaller_loss_goes_on_where_the_share_is_flat():
    """Shares say little where they are very small; among equal ones the later weights are kept."""
    judge, seen = scripted(0.1, 0.1, 0.1, 0.099, 0.09)
    weight, history = run(judge)
    assert history.stopped == "flat" and history.validation[3] - history.validation[7] > LEAST_FALL
    assert weight == seen[3][1]


def test_without_a_judge_a_flat_loss_ends_training():
    weight, history = run(noise=0.1)
    assert history.stopped == "flat" and history.num_steps < 320 and abs(weight - 1.0) < 0.05
    assert run(budget=BUDGET._replace(num_legs=1))[1].stopped == "finished"


def test_time_ends_training():
    weight, history = run(budget=BUDGET._replace(max_seconds=0.0))
    assert (history.stopped, history.num_steps) == ("out of time", 10) and weight > 0
    judge, seen = scripted(0.1, 0.2)
    weight, history = run(judge, BUDGET._replace(max_seconds=0.0))
    assert history.shares == (0.1, 0.2) and weight == seen[-1][1]


def test_another_length_compiles_nothing():
    run()
    with Compilations() as compilations:
        run(budget=BUDGET._replace(num_steps=170, learning_rate=0.01, num_legs=3))
    assert compilations.count == 0


def test_interrupted_legs_go_on_to_the_same_weights(tmp_path):
    """A run whose judge is interrupted ends as one that was not."""
    shares = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    expected = run(scripted(*shares)[0], noise=0.1)

    path = tmp_path / "run.safetensors"
    for number in range(len(shares)):
        asked = []

        def judge(key, weight, number=number, asked=asked):
            asked.append(weight)
            if len(asked) > 1:
                raise KeyboardInterrupt
            return shares[number]

        try:
            weight, history = run(judge, noise=0.1, checkpoint=path)
        except KeyboardInterrupt:
            continue
    assert (weight, history.shares, history.share_steps) == (expected[0], shares, expected[1].share_steps)
    assert np.array_equal(history.loss, expected[1].loss)
