"""K2-24: which periods do 32 radial velocities allow? A posterior of many aliases, and its exact answer beside it.

    python examples/k2_24_velocities.py                 # one planet: five minutes on two cores
    python examples/k2_24_velocities.py --planets 1 2   # then two: about fifteen minutes
    python examples/k2_24_velocities.py --smoke         # two minutes, nearly all compilation: everything runs

Keck/HIRES velocities of the star K2-24 (Petigura et al. 2016, ApJ 818, 36), which transits tell to have planets with
periods of 20.9 and 42.4 days. The velocities alone, on circular orbits, leave many periods possible, separated by
gaps that no local move crosses. Amplitudes and offset are linear, so a grid of periods (and of jitters between 0.3 and
30 m/s, where all of the posterior is) gives the exact answer.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.linalg import cho_solve, solve_triangular
from numpyro.infer import NUTS

import scoreinfer as si

DATA = Path(__file__).parent / "data" / "k2_24_velocities.csv"
SHORTEST, LONGEST = 2.0, 100.0
"""Range of the periods, in days."""
AMPLITUDE = 10.0
"""Prior standard deviation of the amplitudes and of the offset, in m/s."""
JITTER = 3.0
"""Prior median of the noise beyond the measurement error, in m/s."""


def model(time, error, velocity=None, num_planets=1):
    """Circular orbits: offset + sum of a cos(2 pi t / P) + b sin(2 pi t / P), and noise of unknown size.

    The periods are log-uniform, the longest first: planets whose names could be swapped would double every mode. Of n
    uniform numbers the largest is Beta(n, 1), the second largest that times a Beta(n - 1, 1), and so on.

    Offset and amplitudes, linear with normal priors, are integrated out of the likelihood and drawn from what it leaves
    of them (as by The Joker: Price-Whelan et al. 2017, ApJ 837, 20): the same posterior, but periods move freely.
    """
    ratio = numpyro.sample("ratio", dist.Beta(jnp.arange(num_planets, 0.0, -1.0), 1.0).to_event(1))
    period = numpyro.deterministic("period", SHORTEST * (LONGEST / SHORTEST) ** jnp.cumprod(ratio))
    jitter = numpyro.sample("jitter", dist.LogNormal(jnp.log(JITTER), 1.0))
    unit = numpyro.sample("unit", dist.Normal(0.0, 1.0).expand([1 + 2 * num_planets]).to_event(1))
    phase = 2 * jnp.pi * time[:, None] / period
    waves = AMPLITUDE * jnp.concatenate([jnp.ones_like(time)[:, None], jnp.cos(phase), jnp.sin(phase)], axis=1)
    variance = error**2 + jitter**2
    velocity = numpyro.sample(
        "velocity", dist.LowRankMultivariateNormal(jnp.zeros_like(time), waves, variance), obs=velocity
    )
    weighted = waves.T / variance
    lower = jnp.linalg.cholesky(jnp.eye(waves.shape[1]) + weighted @ waves)
    linear = AMPLITUDE * (cho_solve((lower, True), weighted @ velocity) + solve_triangular(lower.T, unit))
    cosine, sine = linear[1:].reshape(2, num_planets)
    numpyro.deterministic("offset", linear[0])
    numpyro.deterministic("semi_amplitude", jnp.hypot(cosine, sine))
    numpyro.deterministic("phase", jnp.arctan2(sine, cosine))


def read():
    """Read time (days from the mean of the times), velocity and its error (m/s)."""
    time, velocity, error = np.loadtxt(DATA, delimiter=",", skiprows=4, unpack=True)
    return time - time.mean(), velocity, error


# --- the exact answer


def marginal_likelihood(basis, velocity, error, jitter):
    """Compute the log likelihood with the linear parameters integrated out, for a batch of bases [batch, time, 1 + 2n].

    They are Gaussian with standard deviation AMPLITUDE each; Woodbury's identity leaves a small linear system.
    """
    weight = 1.0 / (error**2 + jitter**2)
    scaled = AMPLITUDE * basis
    matrix = np.swapaxes(scaled * weight[:, None], 1, 2) @ scaled + np.eye(basis.shape[2])
    vector = np.swapaxes(scaled, 1, 2) @ (weight * velocity)
    lower = np.linalg.cholesky(matrix)
    half = np.linalg.solve(lower, vector[..., None])[..., 0]
    log_det = 2 * np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(1)
    return 0.5 * ((half**2).sum(1) - log_det - (weight * velocity**2).sum() + np.log(weight / (2 * np.pi)).sum())


def exact(num_planets, num_frequencies, num_jitters=20):
    """Compute the frequencies of a grid, the posterior mass of each cell (of each pair, for two), and log evidence.

    The likelihood is taken at the middle of each cell, because the density is high at the longest period allowed.
    """
    time, velocity, error = read()
    edges = np.linspace(1 / LONGEST, 1 / SHORTEST, num_frequencies + 1)
    frequency = 0.5 * (edges[1:] + edges[:-1])
    phase = 2 * np.pi * frequency[:, None] * time
    waves = np.stack([np.cos(phase), np.sin(phase)], axis=2)
    edges_of_jitter, width = np.linspace(np.log(0.3), np.log(30.0), num_jitters + 1, retstep=True)
    log_jitter = edges_of_jitter[1:] - 0.5 * width
    log_prior = dist.Normal(np.log(JITTER), 1.0).log_prob(log_jitter) + np.log(width)
    cells = np.stack(np.triu_indices(num_frequencies), 1) if num_planets == 2 else np.arange(num_frequencies)[:, None]
    parts = []
    for chunk in np.array_split(cells, max(len(cells) // 50_000, 1)):
        ones = np.ones((len(chunk), len(time), 1))
        basis = np.concatenate([ones, *(waves[column] for column in chunk.T)], axis=2)
        both = [
            marginal_likelihood(basis, velocity, error, np.exp(j)) + p
            for j, p in zip(log_jitter, log_prior, strict=True)
        ]
        parts.append(np.logaddexp.reduce(both, axis=0))
    # Log-uniform in the period is log-uniform in the frequency.
    log_share = np.log(np.diff(np.log(edges)) / np.log(LONGEST / SHORTEST))
    log_mass = np.concatenate(parts) + log_share[cells].sum(1)
    if num_planets == 2:  # in order of their periods: each pair of cells once, at twice the density
        log_mass = np.where(cells[:, 0] < cells[:, 1], log_mass + np.log(2.0), log_mass)
    log_evidence = np.logaddexp.reduce(log_mass)
    return frequency, cells, np.exp(log_mass - log_evidence), log_evidence


class Aliases:
    """Modes of the period posterior: intervals of frequency between the minima of its density, or pairs of intervals.

    Each has a number, its exact share, and the periods of its peaks; ``of`` numbers the mode of any periods.
    """

    def __init__(self, frequency, cells, mass):
        self.frequency, self.num_planets = frequency, cells.shape[1]
        self.density = sum(np.bincount(column, mass, minlength=len(frequency)) for column in cells.T)
        inner = self.density[1:-1]
        self.edges = frequency[1:-1][(inner < self.density[:-2]) & (inner <= self.density[2:])]
        self.num_intervals = len(self.edges) + 1
        self.shares = np.bincount(self.of(1 / frequency[cells]), mass, minlength=self.num_intervals**self.num_planets)

    def of(self, period):
        """Number the modes of periods [draws, planets], whatever the planets' order."""
        intervals = np.sort(np.searchsorted(self.edges, 1 / np.asarray(period)), axis=1)
        return intervals @ self.num_intervals ** np.arange(self.num_planets)

    def name(self, number):
        """Write the periods of a mode's peaks."""
        of_frequency = np.searchsorted(self.edges, self.frequency)
        peaks = []
        for interval in np.unravel_index(number, (self.num_intervals,) * self.num_planets):
            rows = np.flatnonzero(of_frequency == interval)
            peaks.append(1 / self.frequency[rows[self.density[rows].argmax()]])
        return " and ".join(f"{peak:.2f}" for peak in sorted(peaks)) + " d"


# --- the demo


SMALLEST = 0.01
"""Share of the posterior above which a mode is looked at."""


def largest_errors(aliases, comparison):
    """Compute the largest error of any looked-at mode's share, kernel by kernel."""
    numbers = np.flatnonzero(aliases.shares > SMALLEST)
    return {
        name: max(abs(result.modes.get(int(n), 0.0) - aliases.shares[n]) for n in numbers)
        for name, result in comparison.results.items()
    }


def print_shares(aliases, comparison):
    """Print the exact share of every mode that is looked at beside each kernel's, and the largest error of each."""
    numbers = [number for number in np.argsort(-aliases.shares) if aliases.shares[number] > SMALLEST]
    names = list(comparison.results)
    print(f"\n{'period':24s}{'exact':>8s}" + "".join(f"{name:>14s}" for name in names))
    found = {name: result.modes for name, result in comparison.results.items()}
    for number in numbers:
        shares = "".join(f"{found[name].get(number, 0.0):14.3f}" for name in names)
        print(f"{aliases.name(number):24s}{aliases.shares[number]:8.3f}{shares}")
    errors = largest_errors(aliases, comparison)
    print(f"{'largest error':32s}" + "".join(f"{errors[name]:14.3f}" for name in names))


def plot(path, aliases, comparison):
    """Plot the exact density of the frequency and every kernel's histogram, like a periodogram."""
    import matplotlib.pyplot as plt

    names = list(comparison.results)
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 2.2 * len(names)), sharex=True, layout="constrained")
    step = aliases.frequency[1] - aliases.frequency[0]
    bins = np.linspace(1 / LONGEST, 1 / SHORTEST, 400)
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        period = np.asarray(comparison.mcmc[name].get_samples()["period"])
        weights = np.full(period.size, period.shape[1] / period.size / (bins[1] - bins[0]))
        axis.hist(1 / period.ravel(), bins, weights=weights, color="tab:orange", label=name)
        axis.plot(aliases.frequency, aliases.density / step, color="k", linewidth=0.8, label="exact")
        axis.set_yscale("log")
        axis.set(ylim=(1e-2, 3 * aliases.density.max() / step), ylabel="density")
        axis.legend(loc="upper right")
    axes[-1].set_xlabel("frequency (cycles per day)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(num_planets, args):
    """Compare kernels on the model with this many planets, and with the exact answer; return both."""
    print(f"\n=== {num_planets} planet{'s' * (num_planets > 1)}: the exact answer\n")
    frequencies = {1: 20_001, 2: 1226} if not args.smoke else {1: 2001, 2: 301}
    *grid, log_evidence = exact(num_planets, frequencies[num_planets])
    aliases = Aliases(*grid)
    print(f"log evidence {log_evidence:.3f}; modes above 1 %: {(aliases.shares > SMALLEST).sum()}")

    print("\n=== The same model under three kernels\n")
    planets = partial(model, num_planets=num_planets)
    time, velocity, error = (np.asarray(column, np.float32) for column in read())
    budget = {"num_warmup": 60, "num_samples": 100} if args.smoke else {"num_warmup": 1000, "num_samples": 2500}
    kernels = {"ScoreSDE": si.ScoreSDE(planets), "NUTS": NUTS(planets), "MALA": si.mcmc.MALA(planets)}
    contest = si.Comparison(planets, kernels, **budget, modes=lambda sites: aliases.of(sites["period"]))
    comparison = contest.run(jax.random.key(args.seed), time, error, velocity=velocity)
    table = comparison.to_dataframe()
    table = table.drop(columns=[column for column in table if column.startswith("mode ")])
    print(comparison.settings)
    print(table.dropna(axis="columns", how="all").T.to_string(float_format=lambda value: f"{value:.4g}"))
    print(f"\nScoreSDE: {comparison.certificates['ScoreSDE']}")
    print_shares(aliases, comparison)
    stem = args.output_dir / f"planets_{num_planets}"
    table.to_csv(f"{stem}.csv")
    plot(f"{stem}.png", aliases, comparison)
    return aliases, log_evidence, comparison


def main():
    """Run one planet, then two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--planets", type=int, choices=(1, 2), nargs="+", default=(1,))
    parser.add_argument("--smoke", action="store_true", help="tiny budgets: see that everything runs")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/k2_24"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for num_planets in args.planets:
        run(num_planets, args)
    print(f"\nTables and plots are in {args.output_dir}")


if __name__ == "__main__":
    main()
