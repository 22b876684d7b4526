"""Lorenz-96 under shocks: three filters with twenty members follow a hundred variables that are seen through an arctan.

    python examples/lorenz96_filter.py                       # two minutes on one core
    python examples/lorenz96_filter.py --figure filter.png   # truth, errors in space and time, error against spread
    python examples/lorenz96_filter.py --smoke               # everything runs, few cycles

The weather of a latitude circle (Lorenz 1996), observed every tenth step with a noise of 0.05 through arctan, which
saturates: large values are hardly seen. From cycle 60 on the truth is hit by shocks that no filter is told of (the
set-up of Bao, Zhang and Zhang 2024, arXiv 2309.00983). `ScoreFilter` puts the exact likelihoods into a localised
Gaussian prior and infers the model's error; `LETKF` is the tuned baseline; `EnSF` the published score filter. Each run
gets a verdict: do the observations scatter as they were forecast, and, for `ScoreFilter`, is it calibrated on worlds
that the model itself simulates.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import scoreinfer as si
from scoreinfer.filters import LETKF, EnSF, ScoreFilter, certify, gaspari_cohn, grid

DIM, MEMBERS, STEP, EVERY, NOISE, CALM = 100, 20, 0.01, 10, 0.05, 60
"""Variables, members, time step, steps between observations, their noise, cycles before the first shock."""
SIZES, CHANCES = jnp.array([0.5, 0.2, 0.05]), jnp.array([0.005, 0.01, 0.02])
"""Relative sizes of shocks, and their probabilities at every step."""


def drift(x):
    """Compute dx/dt with a forcing of 8."""
    return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + 8.0


def advance(x):
    """Make one step of the classical Runge-Kutta method."""
    a = drift(x)
    b = drift(x + 0.5 * STEP * a)
    c = drift(x + 0.5 * STEP * b)
    return x + STEP / 6.0 * (a + 2 * b + 2 * c + drift(x + STEP * c))


def simulate(key, num_cycles):
    """Draw a truth that is shocked after `CALM` cycles, and its observations."""
    for_start, for_moves, for_noise = jax.random.split(key, 3)
    x = jax.lax.fori_loop(0, 1000, lambda _, x: advance(x), 3.0 * jax.random.normal(for_start, (DIM,)))

    def step(carry, key):
        x, number = carry
        for_which, for_how = jax.random.split(key)
        size = (SIZES * (jax.random.uniform(for_which, (3,)) < CHANCES)).sum() * (number >= CALM * EVERY)
        x = advance(x)
        return (x + size * jnp.abs(x) * jax.random.normal(for_how, x.shape), number + 1), x

    _, path = jax.lax.scan(step, (x, 0), jax.random.split(for_moves, num_cycles * EVERY))
    truth = path[EVERY - 1 :: EVERY]
    return truth, jnp.arctan(truth) + NOISE * jax.random.normal(for_noise, truth.shape)


def weather():
    """Write the model as the filters know it: no noise, no shocks, a first guess of N(0, 1)."""
    return si.StateSpace(
        initial=dist.Normal(0.0, 1.0).expand([DIM]).to_event(1),
        transition=lambda t0, t1, x: jnp.clip(jax.lax.fori_loop(0, EVERY, lambda _, x: advance(x), x), -50.0, 50.0),
        observation=lambda t, x: dist.Normal(jnp.arctan(x), NOISE),
    )


def distance(i, j):
    """Compute the distance of two places along the circle."""
    return jnp.minimum((i - j) % DIM, (j - i) % DIM).astype(float)


def coverage(run, truth, level=0.9):
    """Compute how often the central interval of the members holds the truth."""
    low, high = np.quantile(np.asarray(run.analysis.x), [(1 - level) / 2, (1 + level) / 2], axis=1)
    return np.mean((low < truth) & (truth < high), axis=1)


def judge(key, methods, runs, worlds):
    """Certify every run; try `ScoreFilter` on worlds without shocks too."""
    for_twins, for_verdicts = jax.random.split(key)
    spin_up = min(20, len(next(iter(runs.values())).ts) // 2)
    twins = si.twin(
        for_twins, weather(), method=methods["ScoreFilter"], num_members=MEMBERS, num_experiments=worlds,
        spin_up=spin_up, y=np.zeros((len(runs["ScoreFilter"].ts), DIM)),
    )  # fmt: skip
    print(f"\ntwins of ScoreFilter: {twins.reason}\n")
    rivals = {name: run for name, run in runs.items() if name != "ScoreFilter"}
    found = {name: certify(for_verdicts, run, spin_up=spin_up) for name, run in rivals.items()}
    found["ScoreFilter"] = certify(for_verdicts, runs["ScoreFilter"], twins=twins, rivals=rivals, spin_up=spin_up)
    for name, certificate in found.items():
        print(f"{name}: {certificate}\n")
    return found


def plot(path, truth, runs, certificates):
    """Plot the truth, each filter's error in space and time, error beside spread, and the test of the forecasts."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3 + len(runs), figsize=(3.1 * (3 + len(runs)), 3.6), layout="constrained")
    axes[0].imshow(truth, aspect="auto", cmap="RdBu_r", vmin=-10, vmax=12)
    axes[0].set(title="truth", xlabel="place", ylabel="cycle")
    for axis, (name, run) in zip(axes[1:], runs.items(), strict=False):
        error = np.abs(np.asarray(run.mean()) - truth)
        axis.imshow(error, aspect="auto", cmap="magma_r", vmin=0, vmax=3)
        axis.axhline(CALM, color="0.5", linewidth=0.7, linestyle="--")
        axis.set(title=f"error of {name}", xlabel="place", yticks=())
        (line,) = axes[-2].semilogy(np.sqrt((error**2).mean(1)), label=name)
        axes[-2].semilogy(np.sqrt((np.asarray(run.sd()) ** 2).mean(1)), ":", color=line.get_color())
        axes[-1].plot(certificates[name].data.total / np.log(10.0), color=line.get_color())
    for axis in axes[-2:]:
        axis.axvline(CALM, color="0.5", linewidth=0.7, linestyle="--")
    axes[-1].axhline(np.log10(20.0), color="k", linewidth=0.7)
    axes[-2].set(title="error (solid), spread (dotted)", xlabel="cycle")
    axes[-1].set(title="log10 evidence against forecasts", xlabel="cycle", ylim=(-4, 16))
    axes[-2].legend(fontsize="small")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main():
    """Run the filters on one truth, print and plot their errors, and judge them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few cycles: see that everything runs")
    parser.add_argument("--figure", type=Path, help="where to save a figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for_truth, for_filters, for_verdicts = jax.random.split(jax.random.key(args.seed), 3)
    truth, y = jax.jit(simulate, static_argnums=1)(for_truth, 10 if args.smoke else 160)
    methods = {
        "EnSF": EnSF(),
        "LETKF": LETKF(lambda i, j: gaspari_cohn(distance(i, j), 3.0), inflation=1.3),
        "ScoreFilter": ScoreFilter(grid((DIM,), 12.0)),
    }
    truth, runs = np.asarray(truth), {}
    for name, method in methods.items():
        runs[name] = run = si.filter(for_filters, weather(), method=method, num_members=MEMBERS, y=y)
        error, held = np.sqrt(((np.asarray(run.mean()) - truth) ** 2).mean(1)), coverage(run, truth)
        calm, shocked = slice(20, CALM), slice(CALM, None)
        told = "".join(
            f", {when}: error {error[part].mean():.3f}, 90 % intervals hold {held[part].mean():.0%}"
            for when, part in (("calm", calm), ("under shocks", shocked)) if error[part].size
        )  # fmt: skip
        print(f"{name:12s}{told or f', last error {error[-1]:.2f}'}")
    certificates = judge(for_verdicts, methods, runs, worlds=2 if args.smoke else 20)
    if args.figure:
        plot(args.figure, truth, runs, certificates)


if __name__ == "__main__":
    main()
