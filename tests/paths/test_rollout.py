"""Losses of physics in reverse.

The multi-step loss: one step of it is the one-step loss, gradients pass through the window, memory stays flat. Score
losses: stationary at the exact score.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scoreinfer as si
from modes import ornstein_uhlenbeck
from scoreinfer.montecarlo.langevin import colour
from scoreinfer.nets import ConditionalMLP
from scoreinfer.paths import Frame, LearnedBackward, LearnedScore, elapsed, heads, linear_frame, through_time
from scoreinfer.paths.losses import (
    PathBatch,
    Transitions,
    Windows,
    check_windows,
    multistep_loss,
    rollout_loss,
    transition_loss,
)
from scoreinfer.paths.score_losses import implicit_score_loss, transition_denoising_loss

MODES = ornstein_uhlenbeck(32)


@pytest.fixture(scope="module")
def setting():
    process = dataclasses.replace(MODES.process(False), retreat=lambda t0, t1, x: x)
    paths = MODES.path().sample(jax.random.key(0), (16,))
    network = ConditionalMLP(jax.random.key(1), 2, 1, 4, width=16, depth=1)
    weight = 0.3 * jax.random.normal(jax.random.key(2), network.last.weight.shape)
    network = eqx.tree_at(lambda net: net.last.weight, network, weight)
    return LearnedBackward(process, linear_frame(process, paths), network), paths


def test_one_step_is_the_squared_residual(setting):
    """All windows of one step, each by hand."""
    backward, paths = setting
    steps = jnp.arange(32)
    means = jax.vmap(lambda path: jax.vmap(backward)(steps, path[1:]).mean)(paths)
    residual = np.asarray((paths[:, :-1] - means) / backward.process.scale) ** 2
    loss = jax.jit(lambda key: rollout_loss(backward.network, paths, key, backward=backward, window=1, num_windows=64))
    losses = [loss(jax.random.key(i)) for i in range(8)]
    assert abs(np.mean(losses) - residual.mean()) < 5 * residual.std() / np.sqrt(8 * 16 * 64)


def test_noise_on_the_way_is_the_kernels_own_and_has_no_gradient(setting):
    """One step: squared errors grow by the kernels' variances; log scales, which it alone brings in, stay unmoved."""
    backward, paths = setting
    steps = jnp.arange(32)
    scales = jax.vmap(lambda path: jax.vmap(backward)(steps, path[1:]).scale)(paths)
    added = np.asarray((scales / backward.process.scale) ** 2)

    def loss(network, key, noisy):
        options = {"backward": backward, "window": 1, "num_windows": 64, "how": Windows(noisy=noisy)}
        return rollout_loss(network, paths, key, **options)

    pairs = [[jax.jit(loss, static_argnums=2)(backward.network, jax.random.key(i), noisy) for noisy in (True, False)]
             for i in range(8)]  # fmt: skip
    more = np.diff(np.array(pairs)[:, ::-1])[:, 0]
    assert abs(more.mean() - added.mean()) < 5 * more.std() / np.sqrt(8 - 1)
    assert added.mean() > 10 * more.std() / np.sqrt(8 - 1)
    gradient = jax.jit(jax.grad(loss), static_argnums=2)(backward.network, jax.random.key(0), True).last.weight
    assert gradient[:2].any() and not gradient[2:].any()


def test_multistep_loss_is_both_parts_with_their_share(setting):
    backward, paths = setting
    batch = PathBatch(Transitions(paths[:, 1:], paths[:, :-1], jnp.zeros((16, 0)), jnp.zeros_like(paths[:, 1:])), paths)
    single = {"times": through_time(backward.process), "num_pairs": 8, "penalty": 0.1}
    how, key = Windows((4,), share=0.3), jax.random.key(5)
    for_pairs, for_windows = jax.random.split(key)
    found = multistep_loss(backward.network, batch, key, **single, backward=backward, window=4, how=how)
    parts = (
        transition_loss(backward.network, batch.transitions, for_pairs, **single),
        rollout_loss(backward.network, paths, for_windows, backward=backward, window=4, num_windows=2, how=how),
    )
    np.testing.assert_allclose(found, parts[0] + 0.3 * parts[1], rtol=1e-5)


@pytest.mark.slow
def test_windows_are_unrolled_from_their_true_end(setting):
    """The whole path in one window, against a loop in Python."""
    backward, paths = setting
    errors, x = [], paths[:, -1]
    mean = jax.jit(jax.vmap(lambda k, x: backward(k, x).mean, in_axes=(None, 0)))
    for k in jnp.arange(31, -1, -1):
        x = mean(k, x)
        errors.append(np.asarray((x - paths[:, k]) / backward.process.scale[k]) ** 2)
    found = rollout_loss(backward.network, paths, jax.random.key(0), backward=backward, window=32, num_windows=1)
    np.testing.assert_allclose(found, np.mean(errors), rtol=1e-4)


@pytest.mark.slow
def test_gradients_pass_through_the_window_unless_truncated(setting):
    backward, paths = setting

    def gradient(how):
        loss = lambda net: rollout_loss(  # noqa: E731
            net, paths, jax.random.key(0), backward=backward, window=32, num_windows=1, how=how
        )
        return jax.flatten_util.ravel_pytree(eqx.filter_grad(loss)(backward.network))[0]

    full, cut = gradient(Windows()), gradient(Windows(truncate=1))
    for same in (Windows(truncate=64), Windows(kept=3), Windows(kept=8)):
        np.testing.assert_allclose(full, gradient(same), rtol=1e-4, atol=1e-6)
    assert jnp.linalg.norm(full - cut) > 0.1 * jnp.linalg.norm(full)


def memory(backward, paths, window, kept=None):
    """Bytes that the compiled gradient needs."""

    def loss(net):
        options = {"backward": backward, "window": window, "num_windows": 8, "how": Windows(kept=kept)}
        return rollout_loss(net, paths, jax.random.key(0), **options)

    return jax.jit(jax.grad(loss)).lower(backward.network).compile().memory_analysis().temp_size_in_bytes


STATE = 4 * 2 * 16 * 8
"""Bytes of the states of all windows: float32, components, paths, windows."""


def test_memory_does_not_grow_with_the_network_along_the_window(setting):
    """From 4 to 32 steps the gradient keeps 28 more states, not 28 more sets of activations."""
    assert memory(*setting, 32) - memory(*setting, 4) < 28 * 8 * STATE


@pytest.mark.slow
def test_memory_is_that_of_the_states_kept(setting):
    """From 8 to 512 steps: with every state kept 504 more; with eight at every level, three levels instead of one."""
    modes = ornstein_uhlenbeck(512)
    process = dataclasses.replace(modes.process(False), retreat=lambda t0, t1, x: x)
    paths = modes.path().sample(jax.random.key(0), (16,))
    backward = LearnedBackward(process, linear_frame(process, paths), setting[0].network)
    short = memory(backward, paths, 8)
    assert memory(backward, paths, 512) - short > 504 * STATE
    assert memory(backward, paths, 512, kept=8) - short < 3 * 8 * 8 * STATE


def test_bad_windows_are_refused():
    assert check_windows((2, 4), 8) == check_windows(Windows((2, 4)), 8)
    for windows, message in (
        ((2, 10), "not be longer than the process, 9 steps"),
        ((0,), "at least one step"),
        (Windows((2,), kept=1), "`kept` of `Windows` must be None or at least 2, got 1"),
        (Windows((2,), truncate=0), "`truncate` of `Windows` must be None or at least 1, got 0"),
        (Windows((2,), share=0.0), "positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_windows(windows, 9)


@pytest.mark.parametrize(
    "sliced",
    [
        pytest.param(None, id="denoising"),
        pytest.param(False, id="implicit"),
        pytest.param(True, id="sliced", marks=pytest.mark.slow),
    ],
)
def test_score_losses_are_stationary_at_the_exact_score(sliced):
    """Scores c times the exact one: the loss is a parabola in c with its minimum at 1, not at 2 or at one half."""
    modes = ornstein_uhlenbeck()
    process, batches = modes.process(False), 64
    sd = jnp.asarray(np.sqrt(modes.covariances(False).diagonal(axis1=1, axis2=2))[:, 1:].T, jnp.float32)
    none = jnp.zeros_like(sd)
    score = LearnedScore(process, Frame(none, sd, none, none, process.scale), lambda v, *_: v)

    def slope(key):
        for_paths, for_loss = jax.random.split(key)
        paths = modes.path().sample(for_paths, (64,))
        options = {"score": score, "num_pairs": 8}

        def loss(c):
            network = jax.tree_util.Partial(lambda c, v, *_: (1 - c) * v, c)
            if sliced is None:
                return transition_denoising_loss(network, paths, for_loss, **options)
            return implicit_score_loss(network, paths, for_loss, sliced=sliced, **options)

        return jax.grad(loss)(1.0), jax.grad(jax.grad(loss))(1.0)

    first, second = map(np.asarray, jax.jit(jax.vmap(slope))(jax.random.split(jax.random.key(4), batches)))
    distance, error = first.mean() / second.mean(), first.std() / second.mean() / batches**0.5
    assert error < 0.05 and second.mean() > 0
    assert abs(distance) < 5 * error


def test_separate_updates_see_what_the_physics_has_led_to(setting):
    """The network sees the state after the step back; physics and regression around it are the same."""
    joint = dataclasses.replace(setting[0], process=MODES.process(False))
    separate, x = dataclasses.replace(joint, separate=True), jnp.array([0.4, -0.3])
    k = jnp.asarray(3)
    before = joint.process.reverse(k, x)
    assert not jnp.allclose(before, x, atol=1e-3)
    np.testing.assert_array_equal(separate.features(k, x), joint.features(k, before))
    move = heads(joint.network, joint.features(k, before), *elapsed(joint.process, k))[0]
    mean = joint.frame.mean(joint.process, k, x, jnp.zeros(0)) + colour(joint.frame.factor[k], move)
    np.testing.assert_allclose(separate(k, x).mean, mean, atol=1e-6)
    assert not jnp.allclose(joint(k, x).mean, mean, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_learning_with_windows_keeps_the_weights_exact(separate):
    options = {"num_steps": 300, "width": 16, "depth": 1, "progress_bar": False}
    options["windows"] = si.paths.Windows((2, 4), kept=2)
    modes = ornstein_uhlenbeck()
    posterior = si.SMDP(modes.model, "x", separate=separate, **options).fit(jax.random.key(0))
    end = jnp.array([-1.0, 0.5])
    draws = posterior.sample(jax.random.key(1), 4000, y=end)
    assert draws.certificate.ess > 0.9 * 4000
    assert abs(draws.certificate.log_evidence - modes.smoother(end)[2]) < 5 * draws.certificate.log_evidence_se + 2e-3
