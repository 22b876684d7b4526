"""Lorenz-96 seen through arctan and hit by shocks: the score filter beside the published EnSF and LETKF.

    python examples/lorenz96_shocks.py                  # two minutes on one core
    python examples/lorenz96_shocks.py --smoke          # tiny: everything runs

The set-up is that of Bao, Zhang and Zhang 2024 (arXiv 2309.00983): 100 variables, all observed as arctan(x) with noise
.05 every tenth step of .01, so that an observation of |x| > 5 says little more than its sign. Members start from
N(0, I), whatever the truth. At random times every variable of the truth is hit by a shock proportional to itself. No
filter is told of shocks: they are an error of the model, which the score filter infers and the certificate reports.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import scoreinfer as si
from scoreinfer.filters import LETKF, EnSF, ScoreFilter, certify, grid

STEP, STEPS, NOISE, FORCING = 0.01, 10, 0.05, 8.0
SIZES, PROBS = jnp.array([0.5, 0.2, 0.05]), jnp.array([0.005, 0.01, 0.02])
"""Sizes of shocks, relative to the state, and their probabilities in one step."""


def drift(x):
    """Compute dx/dt (Lorenz 1996)."""
    return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + FORCING


def advance(x):
    """Make one Runge-Kutta step."""
    a = drift(x)
    b = drift(x + 0.5 * STEP * a)
    c = drift(x + 0.5 * STEP * b)
    return x + STEP / 6.0 * (a + 2.0 * b + 2.0 * c + drift(x + STEP * c))


def space(dim):
    """Write the model that filters are given: no shocks, and states kept within 50."""
    return si.StateSpace(
        initial=dist.Normal(0.0, 1.0).expand([dim]).to_event(1),
        transition=lambda key, t0, t1, x: jnp.clip(
            jax.lax.fori_loop(0, STEPS, lambda _, x: advance(x), x), -50.0, 50.0
        ),
        observation=lambda t, x: dist.Normal(jnp.arctan(x), NOISE),
    )


def simulate(key, dim, num_times, shocks=True):
    """Draw a truth with shocks, its observations, and the size of the shocks between them."""
    for_start, for_steps, for_noise = jax.random.split(key, 3)
    x = jax.lax.fori_loop(0, 1000, lambda _, x: advance(x), 3.0 * jax.random.normal(for_start, (dim,)))

    def step(x, key):
        for_time, for_size = jax.random.split(key)
        size = shocks * (SIZES * (jax.random.uniform(for_time, (3,)) < PROBS)).sum()
        x = advance(x)
        return x + size * jnp.abs(x) * jax.random.normal(for_size, x.shape), size

    def between(x, key):
        x, size = jax.lax.scan(step, x, jax.random.split(key, STEPS))
        return x, (x, size.sum())

    _, (truth, size) = jax.lax.scan(between, x, jax.random.split(for_steps, num_times))
    return truth, jnp.arctan(truth) + NOISE * jax.random.normal(for_noise, truth.shape), size


def methods(dim):
    """Make the filters: ours in its default configuration; LETKF as tuned for shocks; EnSF as its authors tuned it."""
    rival = LETKF(grid((dim,), 4.0, half_width=3.0).taper, inflation=1.3)
    return {"ScoreFilter": ScoreFilter(grid((dim,), min(12.0, dim // 2))), "LETKF": rival, "EnSF": EnSF()}


def plot(path, truth, sizes, runs, certificate):
    """Draw the truth, the errors of all filters over space and time, errors and spread over time, and the test."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(runs) + 3, 1, figsize=(9, 12), sharex=True, layout="constrained")
    picture = axes[0].imshow(truth.T, aspect="auto", cmap="RdBu_r", vmin=-10, vmax=12)
    axes[0].set(title="truth", ylabel="variable")
    figure.colorbar(picture, ax=axes[0])
    for axis, (name, run) in zip(axes[1:], runs.items(), strict=False):
        off = np.abs(np.asarray(run.mean()) - truth)
        picture = axis.imshow(off.T, aspect="auto", cmap="magma", vmin=0, vmax=4)
        axis.set(title=f"absolute error of {name}", ylabel="variable")
        figure.colorbar(picture, ax=axis)
        rmse, spread = np.sqrt((off**2).mean(1)), np.sqrt((np.asarray(run.sd()) ** 2).mean(1))
        (line,) = axes[-2].semilogy(rmse, label=name)
        axes[-2].semilogy(spread, ":", color=line.get_color())
    for hit in np.flatnonzero(sizes > 0):
        axes[-2].axvline(hit, color="grey", alpha=min(1.0, float(sizes[hit]) + 0.2), linewidth=1)
    axes[-2].set(ylabel="error, spread (dotted)", title="errors of the mean; grey: shocks that no filter is told of")
    axes[-2].legend(ncols=3, fontsize="small")
    for name, found in certificate.items():
        axes[-1].plot(found.data.total / np.log(10.0), label=name)
    axes[-1].axhline(np.log10(20.0), color="k", linestyle="--", linewidth=1)
    axes[-1].set(ylabel="log10 evidence", xlabel="observation", ylim=(-5, 20), title="evidence against the forecasts")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    """Simulate, filter, compare, certify, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny budgets: see that everything runs")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/lorenz96_shocks"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    dim, num_times, after, worlds = (20, 30, 10, 2) if args.smoke else (100, 150, 50, 20)
    for_world, for_runs, for_twins, for_verdict = jax.random.split(jax.random.key(args.seed), 4)
    truth, y, sizes = (np.asarray(part) for part in simulate(for_world, dim, num_times))

    print("=== Filter the same observations three times, 20 members each\n")
    runs = {}
    print(f"{'':14s}{'RMSE':>8s}{'after ' + str(after):>10s}{'spread':>8s}{'seconds':>9s}")
    for name, method in methods(dim).items():
        start = time.perf_counter()
        runs[name] = si.filter(for_runs, space(dim), method=method, num_members=20, y=y)
        rmse = np.sqrt(((np.asarray(runs[name].mean()) - truth) ** 2).mean(1))
        spread = np.sqrt((np.asarray(runs[name].sd())[after:] ** 2).mean())
        seconds = time.perf_counter() - start
        print(f"{name:14s}{rmse.mean():8.3f}{rmse[after:].mean():10.3f}{spread:8.3f}{seconds:9.1f}")

    print("\n=== Is the algorithm right where the model is? Twins: worlds without shocks\n")
    twins = si.twin(
        for_twins, space(dim), method=methods(dim)["ScoreFilter"], num_members=20, y=y, num_experiments=worlds,
        spin_up=after,
    )  # fmt: skip
    print(twins.reason)

    print("\n=== The verdicts\n")
    others = {name: run for name, run in runs.items() if name != "ScoreFilter"}
    found = {"ScoreFilter": certify(for_verdict, runs["ScoreFilter"], twins=twins, rivals=others, spin_up=20)}
    found |= {name: certify(for_verdict, run, spin_up=20) for name, run in others.items()}
    for name, certificate in found.items():
        print(f"{name}: {certificate}\n")
    plot(args.output_dir / "lorenz96_shocks.png", truth, sizes, runs, found)
    print(f"The picture is in {args.output_dir}")


if __name__ == "__main__":
    main()
