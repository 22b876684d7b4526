"""The toy process of Holzschuh, Vegetti and Thuerey (2023): which of two states did a decayed signal come from?

    python examples/toy_process_holzschuh2023.py                     # two minutes on one core
    python examples/toy_process_holzschuh2023.py --num 25            # trajectories to learn from: 2500, 250 or 25
    python examples/toy_process_holzschuh2023.py --num 25 --resimulate   # from their first states, by the known physics
    python examples/toy_process_holzschuh2023.py --figure toy.png    # paths back, P(+1) beside the exact one
    python examples/toy_process_holzschuh2023.py --implicit          # the baseline: a score by implicit score matching
    python examples/toy_process_holzschuh2023.py --smoke             # half a minute, nearly all compilation

dx = -7 sign(x) x^2 dt + 0.03 dW on t in [0, 10] in 500 steps, from +1 or -1 with equal probability. At the end hardly
a trace is left of the start: P(+1 | x_T) runs from .50 at x_T = 0 to .61 at x_T = 0.1. Score matching via
differentiable physics learns the reverse SDE from simulated trajectories; here its draws are weighed with the model's
own density of paths, and held against the exact answer on a grid.

The published figure Q is no test of a posterior (any symmetric sampler scores 1), so the error of P(+1 | x_T) stands
beside it. The start is blurred by 0.01, so that it has a density. As published, trajectories start from +1 and -1 in
turn: what is learned from N of them can be no surer of the sign than the share of +1 among them, of which 25 random
starts would leave an error of 0.1.

Reference: Holzschuh et al. 2023, arXiv 2301.10250, section 4.1.
"""

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import scoreinfer as si
from scoreinfer.model import read_physics
from scoreinfer.nets import ConditionalMLP
from scoreinfer.paths import LearnedScore, ReverseEuler, draw_path, linear_frame, probability_flow
from scoreinfer.paths.score_losses import implicit_score_loss
from scoreinfer.process import Physics
from scoreinfer.training.loop import Budget, train

RATE, NOISE, BLUR = 7.0, 0.03, 0.01
TS = np.linspace(0.0, 10.0, 501)
STEP = TS[1] - TS[0]
ENDS = (0.0, 0.02, 0.05, 0.1)
"""End states at which the posterior is compared with the exact one."""
PUBLISHED = {2500: (0.97, 0.99), 250: (0.91, 0.94), 25: (0.81, 0.85)}
"""Published Q (multi-step training): probability flow, reverse SDE."""


def decay(t0, t1, x):
    """Take one Euler step of the drift."""
    return x - (t1 - t0) * RATE * jnp.sign(x) * x**2


def grow(t0, t1, x):
    """Invert the step (a quadratic equation; bounded where there is no solution)."""
    h = (t1 - t0) * RATE
    size = jnp.minimum(jnp.abs(x), 0.2 / h)
    return jnp.sign(x) * 2 * size / (1 + jnp.sqrt(1 - 4 * h * size))


def path():
    """Make the distribution of paths: two possible starts, then 500 noisy steps."""
    start = dist.MixtureSameFamily(dist.Categorical(probs=jnp.ones(2) / 2), dist.Normal(jnp.array([-1.0, 1.0]), BLUR))
    return si.PhysicsPath(decay, NOISE * np.sqrt(STEP), TS, start)


def model():
    """Observe nothing: ends are given as they are."""
    numpyro.sample("x", path())


def simulate(key, num):
    """Simulate trajectories from +1 and -1 in turn: those from -1 mirror others from +1, the physics being odd."""
    from_plus = si.PhysicsPath(decay, NOISE * np.sqrt(STEP), TS, dist.Normal(1.0, BLUR))
    return jax.jit(lambda key: from_plus.sample(key, (num,)))(key) * (-1.0) ** jnp.arange(num)[:, None]


class Exact(NamedTuple):
    """The answer on a grid: densities of x_k, given a start at +1, at every time."""

    grid: np.ndarray
    density: np.ndarray

    def at(self, x, k=-1):
        """Return the density of x_k given +1, and given -1 (its mirror image)."""
        return np.interp(x, self.grid, self.density[k]), np.interp(-np.asarray(x), self.grid, self.density[k])

    def probability(self, end):
        """Compute P(+1 | x_T)."""
        plus, minus = self.at(end)
        return plus / (plus + minus)

    def log_evidence(self, end):
        """Compute log p(x_T)."""
        return np.log(0.5 * sum(self.at(end)))

    def score(self, k):
        """Compute grid, density and grad log p of x_k."""
        both = 0.5 * (self.density[k] + self.density[k][::-1])
        return self.grid, both, np.gradient(np.log(np.maximum(both, 1e-300)), self.grid)


def exact(spacing=0.001, edge=1.2):
    """Propagate the density of paths from +1 by the model's own transitions."""
    grid = np.arange(-edge, edge + spacing / 2, spacing)
    scale = NOISE * np.sqrt(STEP)
    mean = grid - STEP * RATE * np.sign(grid) * grid**2
    kernel = np.exp(-0.5 * ((grid[:, None] - mean) / scale) ** 2) * spacing / (scale * np.sqrt(2 * np.pi))
    density = [np.exp(-0.5 * ((grid - 1.0) / BLUR) ** 2) / (BLUR * np.sqrt(2 * np.pi))]
    for _ in TS[1:]:
        density.append(kernel @ density[-1])
    return Exact(grid, np.array(density))


def q_metric(starts):
    """Compute the published Q: 2 min(fraction within 10 % of +1, fraction within 10 % of -1)."""
    return 2 * min(np.mean(np.abs(starts - 1) < 0.1), np.mean(np.abs(starts + 1) < 0.1))


def q_of_draws(key, ends, reverse, rounds):
    """Compute the Q of 16 draws from every end, ``rounds`` times over.

    Chance takes .026 off the Q of 1 draw from every end where the draws are exact, .006 of 16, .002 of 128.
    """
    starts = [np.asarray(reverse(key, jnp.tile(ends, 16))) for key in jax.random.split(key, rounds)]
    return q_metric(np.concatenate(starts))


def learn(key, num, num_steps=None, progress_bar=False, resimulate=False):
    """Learn the reverse SDE from ``num`` trajectories, or from their first states and the model's own physics."""
    for_paths, for_training = jax.random.split(key)
    width, depth, learning_rate = (32, 2, 3e-3) if num > 100 or resimulate else (16, 1, 1e-3)
    return si.SMDP(
        model, "x", reverse=grow, trajectories=simulate(for_paths, num), resimulate=resimulate,
        num_steps=num_steps or (4000 if resimulate else 6000), target_share=None, learning_rate=learning_rate,
        width=width, depth=depth, progress_bar=progress_bar,
    ).fit(for_training)  # fmt: skip


def learn_score(key, num, num_steps=6000, progress_bar=False):
    """Learn a score from single states by implicit score matching (of one component: sliced, too)."""
    for_paths, for_net, for_training = jax.random.split(key, 3)
    process = read_physics(Physics("x", grow), model)
    paths = process.flatten(simulate(for_paths, num))
    held_out = max(num // 10, 1)
    network = ConditionalMLP(for_net, 1, 1, 1, width=32, depth=2)
    score = LearnedScore(process, linear_frame(process, paths), network)
    batch_size = min(256, num - held_out)
    loss = partial(implicit_score_loss, score=score, num_pairs=2048 // batch_size)
    budget = Budget(num_steps, batch_size, min(250, num_steps), 1e-3)
    network, _ = train(
        for_training, network, loss, lambda key: paths[held_out:], paths[:held_out], budget, progress_bar=progress_bar
    )
    return ReverseEuler(process, dataclasses.replace(score, network=network))


def measure_score(key, backward, truth, num=40_000, rounds=8):
    """Compute what `measure` does, but for weights."""
    one = jax.jit(jax.vmap(lambda key, end: draw_path(key, backward, end[None])[0][0, 0]))

    def reverse(key, ends):
        return one(jax.random.split(key, ends.size), ends)

    flow = jax.jit(jax.vmap(lambda end: probability_flow(backward, end[None])[0, 0]))
    ends = jnp.linspace(-0.1, 0.1, 1000)
    many = jnp.repeat(jnp.array(ENDS), num // len(ENDS))
    for_q, for_draws = jax.random.split(key)
    plus = np.asarray(reverse(for_draws, many)).reshape(len(ENDS), -1) > 0
    return {
        "q_sde": q_of_draws(for_q, ends, reverse, rounds),
        "q_ode": q_metric(np.asarray(flow(ends))),
        "score_error": score_error(backward, truth),
        "raw_error": float(np.abs(plus.mean(1) - [truth.probability(end) for end in ENDS]).max()),
    }


def score_error(backward, truth, steps=(25, 100, 250, 499)):
    """Compute the error of the learned score relative to the exact one, weighted by the exact density."""
    learned = jax.jit(jax.vmap(backward.score, in_axes=(None, 0)))
    errors = []
    for k in steps:
        grid, density, score = truth.score(k)
        keep = density > 1e-6 * density.max()
        found = np.asarray(learned(backward.process.ts[k], jnp.asarray(grid[keep, None], jnp.float32)))[:, 0]
        errors.append(density[keep] @ (found - score[keep]) ** 2 / (density[keep] @ score[keep] ** 2))
    return float(np.sqrt(np.mean(errors)))


def exact_flow(truth, ends):
    """Transport ends along the exact flow, which keeps every path at its quantile."""
    below = np.cumsum(truth.density + truth.density[:, ::-1], axis=1)
    below /= below[:, -1:]
    return np.interp(np.interp(ends, truth.grid, below[-1]), below[0], truth.grid)


def measure(key, posterior, truth, num=40_000, rounds=8):
    """Compute Q of both ways back, and the errors of P(+1 | x_T) and log evidence, raw and weighted."""
    for_q, for_draws = jax.random.split(key)
    ends = jnp.linspace(-0.1, 0.1, 1000)
    figures = {
        "q_sde": q_of_draws(for_q, ends, lambda key, ends: posterior.reverse_sde(key, ends)[:, 0], rounds),
        "q_ode": q_metric(np.asarray(posterior.probability_flow(ends))[:, 0]),
        "q_ode_exact": q_metric(exact_flow(truth, ends)),
        "score_error": score_error(posterior.backward, truth),
    }
    raw, weighted, evidence, shares = [], [], [], []
    single = posterior.resampled(1)  # however poor the weights, not again
    for end in ENDS:
        draws = single.condition_on_end(end).sample(for_draws, num)
        plus = np.asarray(draws.sites["x"])[:, 0] > 0
        weight = np.exp(np.asarray(draws.log_weight, np.float64) - np.max(draws.log_weight))
        raw.append(plus.mean() - truth.probability(end))
        weighted.append(weight @ plus / weight.sum() - truth.probability(end))
        evidence.append(draws.certificate.log_evidence - truth.log_evidence(end))
        shares.append(draws.certificate.ess / num)
    worst = {"raw_error": raw, "weighted_error": weighted, "log_evidence_error": evidence}
    return figures | {name: float(np.abs(x).max()) for name, x in worst.items()} | {"ess_share": float(min(shares))}


def plot(path, posterior, truth, key, num=40):
    """Plot paths back from three ends, and the probability of a start at +1 beside the exact one."""
    import matplotlib.pyplot as plt

    figure, (paths, starts) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    times = np.linspace(0.0, 10.0, 501)
    for i, end in enumerate((-0.1, 0.0, 0.1)):
        drawn = np.asarray(posterior.reverse_sde(key, jnp.full(num, end)))
        paths.plot(times, drawn.reshape(num, -1).T, color=f"C{i}", linewidth=0.5, alpha=0.6)
    paths.set(title="which start did the end come from?", xlabel="time", ylabel="signal")
    ends = np.linspace(-0.1, 0.1, 9)
    found, error = [], []
    for end in ends:
        draws = posterior.condition_on_end(end).sample(key, 2000)
        found.append((draws.resample(key, draws.num)["x"][:, 0] > 0).mean())
        error.append(2 * (0.25 / draws.certificate.ess) ** 0.5)
    starts.plot(ends, [truth.probability(end) for end in ends], "k", label="exact")
    starts.errorbar(ends, found, error, fmt="o", label="weighted draws, 2 standard errors")
    starts.set(title="P(start at +1)", xlabel="end")
    starts.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    """Learn, draw, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=2500, help="trajectories to learn from")
    parser.add_argument("--num-steps", type=int, help="optimiser steps")
    parser.add_argument("--resimulate", action="store_true", help="learn from the first states and the known physics")
    parser.add_argument("--implicit", action="store_true", help="learn a score by implicit score matching instead")
    parser.add_argument("--figure", type=Path, help="where to save a figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="everything runs, little is learned")
    args = parser.parse_args()
    key, num_steps = jax.random.key(args.seed), 100 if args.smoke else args.num_steps
    options = {"progress_bar": True} | ({} if num_steps is None else {"num_steps": num_steps})
    truth, budget = exact(0.002 if args.smoke else 0.001), (500, 1) if args.smoke else (40_000, 8)
    start = time.perf_counter()
    if args.implicit:
        backward = learn_score(key, args.num, **options)
        print(f"trained on {args.num} trajectories in {time.perf_counter() - start:.0f} s")
        for name, value in measure_score(key, backward, truth, *budget).items():
            print(f"  {name:20s} {value:8.4f}")
        return
    posterior = learn(key, args.num, resimulate=args.resimulate, **options)
    print(f"trained on {args.num} trajectories in {time.perf_counter() - start:.0f} s")
    if args.figure:
        plot(args.figure, posterior, truth, jax.random.fold_in(key, 2))
    figures = measure(jax.random.fold_in(key, 1), posterior, truth, *budget)
    published = dict(zip(("q_ode", "q_sde"), PUBLISHED.get(args.num, ()), strict=False))
    for name, value in figures.items():
        print(f"  {name:20s} {value:8.4f}" + (f"   (published {published[name]})" if name in published else ""))
    for end in ENDS:
        draws = posterior.condition_on_end(end).sample(key, 500 if args.smoke else 4000)
        plus = (draws.resample(key, draws.num)["x"][:, 0] > 0).mean()
        print(f"P(+1 | x_T = {end:4.2f}) = {plus:.3f}, exact {truth.probability(end):.3f}; {draws.certificate}")


if __name__ == "__main__":
    main()
