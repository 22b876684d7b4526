"""Disasters in British coal mines, 1851 to 1961: how often did they happen, year by year, and what comes next?

    python examples/coal_disasters.py                          # a minute and a half on one core
    python examples/coal_disasters.py --figure disasters.png   # the rate in every year, and the forecast
    python examples/coal_disasters.py --smoke                  # fewer particles

The logarithm of the yearly rate is a random walk, and the counts are Poisson. Two years are missing. The size of a
step is unknown: the evidence of the particles, which is unbiased, gives its posterior. In one dimension a grid knows
the exact answer, which is printed beside.

Data: Jarrett 1979, "A note on the intervals between coal-mining disasters", Biometrika 66(1), counted by year; two
years are left out, as in many textbooks of Bayesian statistics.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from scipy import stats
from scipy.special import logsumexp

import scoreinfer as si

FIRST_YEAR, NUM_AHEAD = 1851, 10
COUNTS = np.array(
    """
    4 5 4 0 1 4 3 4 0 6 3 3 4 0 2 6 3 3 5 4 5 3 1 4 4 1 5 5 3 4 2 5 2 2 3 4 2 1 3 nan 2 1 1 1 1 3 0 0 1 0 1 1 0 0 3 1
    0 3 2 2 0 1 1 1 0 1 0 1 0 0 0 2 1 0 0 0 1 1 0 2 3 3 1 nan 2 1 1 1 1 2 4 2 0 0 1 4 0 0 0 1 0 0 0 0 0 1 0 0 1 0 1
    """.split(),  # noqa: SIM905
    np.float32,
)
STEPS = np.linspace(0.02, 0.6, 30)
"""Sizes of a yearly step of the log rate that are compared."""
START = (1.0, 1.0)
"""Mean and sd of the log rate before the first year."""


def model(counts=None, step=0.2, num_years=len(COUNTS)):
    """The log rate walks; the body of the scan is what any NumPyro user writes."""

    def year(before, count):
        level = numpyro.sample("level", dist.Normal(before, step))
        numpyro.sample("counts", dist.Poisson(jnp.exp(level)), obs=count)
        return level, None

    scan(year, numpyro.sample("first", dist.Normal(*START)), counts, length=num_years)


def exact(counts, step, levels=np.linspace(-6.0, 4.0, 401)):
    """Compute log evidence, and mean and sd of the log rate given all counts, on a grid: forwards, then backwards."""
    move = stats.norm.pdf(levels[:, None], levels, step) * (levels[1] - levels[0])
    likelihood = [1.0 if np.isnan(n) else stats.poisson.pmf(n, np.exp(levels)) for n in counts]
    ahead = stats.norm.pdf(levels, *START) * (levels[1] - levels[0])
    forwards, log_evidence = [], 0.0
    for factor in likelihood:
        ahead = (move @ ahead) * factor
        log_evidence += np.log(ahead.sum())
        forwards.append(ahead := ahead / ahead.sum())
    backwards = [behind := np.ones_like(levels)]
    for factor in likelihood[:0:-1]:
        behind = move.T @ (behind * factor)
        backwards.append(behind := behind / behind.max())
    weight = np.stack(forwards) * np.stack(backwards[::-1])
    weight /= weight.sum(axis=1, keepdims=True)
    mean = weight @ levels
    return log_evidence, mean, np.sqrt(weight @ levels**2 - mean**2)


def learn_step(key, num):
    """Compute the posterior of the step's size under a flat prior, from unbiased evidences."""
    method = si.filters.GuidedFilter()

    @jax.jit
    def log_evidences(keys, steps):
        def one(pair):
            key, step = pair
            return si.filter(key, model, "level", COUNTS, step, method=method, num_members=num).log_evidence

        return jax.lax.map(one, (keys, steps))

    found = np.asarray(log_evidences(jax.random.split(key, len(STEPS)), jnp.asarray(STEPS)), np.float64)
    return found, np.exp(found - logsumexp(found))


def plot(path, years, paths, filtered, counts):
    """Plot the rate in every year given all counts, and given those so far; the counts, and those to come."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    low, middle, high = np.quantile(np.exp(paths), [0.05, 0.5, 0.95], axis=0)
    axis.fill_between(years, low, high, color="tab:red", alpha=0.3, label="90 % of rates, given all counts")
    axis.plot(years, middle, color="tab:red", label="median")
    axis.plot(years, np.exp(filtered), color="k", linewidth=0.8, label="given the counts so far")
    axis.plot(years[: len(COUNTS)], COUNTS, "k.", label="disasters counted")
    ahead = years[len(COUNTS) :]
    most = np.quantile(counts, 0.95, axis=0)
    axis.fill_between(ahead, 0, most, color="tab:gray", alpha=0.3, label="95 % of what comes")
    axis.set(xlabel="year", ylabel="disasters in a year", ylim=(0, None))
    axis.legend(ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    """Check, learn the step, filter, smooth, forecast, certify, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="fewer particles")
    parser.add_argument("--figure", type=Path, help="where the picture goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    num, num_paths = (200, 100) if args.smoke else (2000, 2000)
    for_step, for_run, for_paths, for_more, for_judge, for_counts = jax.random.split(jax.random.key(args.seed), 6)

    if not args.smoke:
        si.check(model)
    log_evidences, weight = learn_step(for_step, num)
    best = float(STEPS[np.argmax(log_evidences)])
    truth = np.array([exact(COUNTS, step)[0] for step in STEPS])
    exact_weight = np.exp(truth - logsumexp(truth))
    print(f"\nstep of the log rate: mean {weight @ STEPS:.3f} (exact {exact_weight @ STEPS:.3f}), best {best:.2f}")
    print(f"log evidences are off by {np.abs(log_evidences - truth).max():.2f} at most")

    run = si.filter(for_run, model, "level", COUNTS, best, method=si.filters.GuidedFilter(), num_members=num)
    print(f"these counts: {si.filters.certify(for_judge, run).reason}")
    unknown = np.append(COUNTS, np.full(NUM_AHEAD, np.nan, np.float32))
    run = si.extend(for_more, run, unknown, best, len(unknown))
    paths = np.asarray(si.smooth(for_paths, run, num=num_paths))
    _, mean, sd = exact(unknown, best)
    print(f"rates given all counts: off by {np.abs((paths.mean(axis=0) - mean) / sd).max():.2f} sd at most")
    counts = np.asarray(dist.Poisson(jnp.exp(paths[:, len(COUNTS) :])).sample(for_counts))
    low, middle, high = np.quantile(counts.sum(axis=1), [0.05, 0.5, 0.95])
    print(f"disasters in the {NUM_AHEAD} years to come: {middle:.0f} (90 %: {low:.0f} to {high:.0f})")
    if args.figure:
        plot(args.figure, FIRST_YEAR + np.arange(len(unknown)), paths, run.mean(), counts)
        print(f"written: {args.figure}")


if __name__ == "__main__":
    main()
