"""Cost of physics in reverse against number of steps, state size and window length: seconds and compiled memory.

    python benchmarks/cost.py            # minutes on one core

A ring of points under noisy diffusion and a small convolutional network. Memory is what the compiled programs ask for
beside arguments and results, so that it does not depend on the machine's mood; seconds are the best of three. How
memory grows is held against bounds by ``python benchmarks/accuracy.py --suite cost``.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import scoreinfer as si
from scoreinfer.model import read_physics
from scoreinfer.paths import LearnedBackward, draw_path, linear_frame, through_time
from scoreinfer.paths.losses import Transitions, Windows, rollout_loss, transition_loss
from scoreinfer.process import Physics

NUM_PATHS, NUM_DRAWS = 16, 256


def setting(size, num_steps):
    """Make untrained kernels of a ring of ``size`` points, and paths."""

    def step(t0, t1, x):
        return x + 0.2 * (jnp.roll(x, 1) - 2 * x + jnp.roll(x, -1))

    ts = np.linspace(0.0, 1.0, num_steps + 1)
    path = si.PhysicsPath(step, 0.1, ts, dist.Normal(jnp.zeros(size)).to_event(1))
    process = read_physics(Physics("x"), lambda: numpyro.sample("x", path))
    paths = path.sample(jax.random.key(0), (NUM_PATHS,))
    network = si.nets.ConvNet(jax.random.key(1), (size,), width=16, dilations=(1, 2), physics=False)
    return LearnedBackward(process, linear_frame(process, paths), network), paths


def cost(function, *args):
    """Compile, then compute seconds and bytes of temporary memory."""
    compiled = jax.jit(function).lower(*args).compile()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - began)
    return min(seconds), compiled.memory_analysis().temp_size_in_bytes


def training(backward, paths):
    """Compute the cost of a gradient of single transitions, eight of each path."""
    batch = Transitions(paths[:, 1:], paths[:, :-1], jnp.zeros((len(paths), 0)), jnp.zeros_like(paths[:, 1:]))
    loss = partial(transition_loss, times=through_time(backward.process), num_pairs=8)
    return cost(jax.grad(lambda network: loss(network, batch, jax.random.key(0))), backward.network)


def rollout(backward, paths, window, kept):
    """Compute the cost of a gradient of the multi-step loss, one window of each path."""
    loss = partial(rollout_loss, backward=backward, window=window, num_windows=1, how=Windows(kept=kept))
    return cost(jax.grad(lambda network: loss(network, paths, jax.random.key(0))), backward.network)


def sampling(backward, end):
    """Compute the cost of drawing paths."""
    draw = jax.vmap(lambda key: draw_path(key, backward, end)[0][0])
    return cost(draw, jax.random.split(jax.random.key(0), NUM_DRAWS))


def growth():
    """Compute how many times as much memory is needed for windows, paths and states so many times as long."""
    short, long, small, large = setting(32, 16), setting(32, 256), setting(128, 16), setting(512, 16)

    def ratio(more, less):
        return more[1] / less[1]

    return {
        "window_64_times": ratio(rollout(*long, 256, 4), rollout(*long, 4, 4)),
        "window_64_times_all_kept": ratio(rollout(*long, 256, None), rollout(*long, 4, None)),
        "steps_16_times_training": ratio(training(*long), training(*short)),
        "size_4_times_training": ratio(training(*large), training(*small)),
        "size_4_times_drawing": ratio(sampling(large[0], large[1][0, -1]), sampling(small[0], small[1][0, -1])),
    }


def line(label, found):
    """Print one row."""
    seconds, memory = found
    print(f"{label:52s} {1000 * seconds:10.1f} ms {memory / 2**20:10.2f} MiB", flush=True)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="the smallest of everything")
    args = parser.parse_args()
    few = slice(1 if args.smoke else None)
    shapes = [(32, n) for n in (16, 64, 256)[few]] + [(n, 16) for n in (128, 512)[few]]
    for size, num_steps in shapes:
        backward, paths = setting(size, num_steps)
        line(f"training step, {size} points, {num_steps} steps", training(backward, paths))
        line(f"{NUM_DRAWS} draws, {size} points, {num_steps} steps", sampling(backward, paths[0, -1]))
    backward, paths = setting(32, 256)
    for window in (4, 16, 64, 256)[few]:
        for kept in (None, 4):
            label = f"window of {window} steps, {'every state' if kept is None else f'{kept} states a level'} kept"
            line(label, rollout(backward, paths, window, kept))


if __name__ == "__main__":
    main()
