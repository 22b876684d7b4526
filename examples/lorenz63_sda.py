"""Lorenz-63 from one noisy coordinate: score-based data assimilation, and its exact finish.

    python examples/lorenz63_sda.py                    # ten minutes on one core, most of it learning and the reference
    python examples/lorenz63_sda.py --figure sda.png   # paths before and after the finish, beside a particle smoother
    python examples/lorenz63_sda.py --smoke            # everything runs, nothing is learned well

The set-up of Rozet and Louppe (2023, arXiv 2306.10574): 65 states, 0.025 time units apart, with noise at every step;
every eighth is observed, its first coordinate alone. The score of windows of nine states is learned from simulations;
it has never seen an observation. Guided by the data it draws paths that look right, and break the model's own physics
by hundreds of nats. A hundred Hamiltonian steps on the model's density repair them. Particles show the truth.

Then the third coordinate alone is observed. Turned by half a turn, (x, y) to (-x, -y), a path is as probable as before:
half of the draws must lie on either side, or be refused.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import scoreinfer as si

STEP, TIMES = 0.025, 65
"""Time between states, and number of states."""
MEAN, SD = jnp.array([0.0, 0.0, 25.0]), jnp.array([8.0, 9.0, 8.6])
COVARIANCE = jnp.array([[64.0, 50.0, 0.0], [50.0, 81.0, 0.0], [0.0, 0.0, 75.0]])
"""Moments of the climate, roughly; observations are made in these units."""


def drift(x):
    """Compute dx/dt of Lorenz (1963)."""
    a, b, c = x
    return jnp.stack([10.0 * (b - a), a * (28.0 - c) - b, a * b - 8.0 / 3.0 * c])


def advance(t0, t1, x):
    """Make one step of the classical Runge-Kutta method."""
    h = t1 - t0
    one = drift(x)
    two = drift(x + 0.5 * h * one)
    three = drift(x + 0.5 * h * two)
    return x + h / 6.0 * (one + 2 * two + 2 * three + drift(x + h * three))


def paths(times):
    """Make the distribution of paths: a step, and noise of variance 0.025 in every coordinate."""
    first = dist.MultivariateNormal(MEAN, COVARIANCE)
    return si.PhysicsPath(advance, STEP**0.5, STEP * jnp.arange(times), first)


def model(y=None, every=8, noise=0.05, coordinate=0):
    """See one coordinate of every so many states, in units of the climate."""
    x = numpyro.sample("x", paths(TIMES))
    seen = (x[::every, coordinate] - MEAN[coordinate]) / SD[coordinate]
    numpyro.sample("y", dist.Normal(seen, noise), obs=y)


def simulate(key, every=8, noise=0.05, coordinate=0):
    """Draw a truth that has forgotten its start, and observe it."""
    for_path, for_noise = jax.random.split(key)
    x = paths(3 * TIMES).sample(for_path)[-TIMES:]
    seen = (x[::every, coordinate] - MEAN[coordinate]) / SD[coordinate]
    return x, seen + noise * jax.random.normal(for_noise, seen.shape)


def smoothed(key, num, num_particles, **data):
    """Draw paths through the particles of a bootstrap filter: the reference."""
    for_run, for_paths = jax.random.split(key)
    method = si.filters.BootstrapFilter()
    run = si.filter(for_run, model, "x", method=method, num_members=num_particles, **data)
    return np.asarray(si.smooth(for_paths, run, num=num))


def log_densities(posterior, x):
    """Tell medians of log p(x) and log p(y | x)."""
    flat = jnp.asarray(x).reshape(len(x), -1)
    problem = posterior.problem
    both = jax.jit(jax.vmap(lambda z: jnp.stack([problem.log_prior(z), problem.log_likelihood(z, {})])))(flat)
    prior, likelihood = np.median(np.asarray(both), axis=0)
    return f"log p(x) {prior:.1f}, log p(y | x) {likelihood:.1f}"


def plot(path, truth, y, drawn, turned):
    """Plot the first two coordinates of all draws, and those of the hidden-coordinate problem."""
    import matplotlib.pyplot as plt

    ts = STEP * np.arange(TIMES)
    figure, axes = plt.subplots(2, 4, figsize=(13, 5), sharex=True, layout="constrained")
    for column, (name, x) in zip(axes.T, drawn.items(), strict=False):
        for row, (axis, label) in enumerate(zip(column, "xy", strict=True)):
            axis.plot(ts, np.asarray(x)[:32, :, row].T, color="C0", alpha=0.25, linewidth=0.7)
            axis.plot(ts, truth[:, row], color="k", linewidth=1.2)
            axis.set_ylabel(label)
        column[0].plot(ts[::8], np.asarray(y) * SD[0], "o", color="C3", markersize=4)
        column[0].set_title(name, fontsize="medium")
    for row, axis in enumerate(axes[:, -1]):
        axis.plot(ts, np.asarray(turned)[:64, :, row].T, color="C2", alpha=0.2, linewidth=0.7)
    axes[0, -1].set_title("z observed alone: both signs", fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("time")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main():
    """Learn the score, draw unfinished and finished, compare with particles; then hide the sign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="nothing is learned well: see that everything runs")
    parser.add_argument("--figure", type=Path, help="where to save a figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keys = jax.random.split(jax.random.key(args.seed), 7)
    num, steps = (8, 250) if args.smoke else (64, 4000)
    hmc = si.samplers.HMC(10, 4) if args.smoke else si.samplers.HMC()
    truth, y = simulate(keys[0])
    local = si.fit_local(keys[1], model, "x", k=4, num_steps=steps)
    print(f"local score: {local.training}")
    drawn = {}
    for name, finish in (("guided, unfinished", None), ("finished by HMC", hmc)):
        posterior = si.SDA(model, "x", local, finish=finish, num_steps=8 if args.smoke else 64).condition(y=y)
        draws = posterior.sample(keys[2], num)
        drawn[name] = draws.sites["x"]
        print(f"\n{name}: {log_densities(posterior, drawn[name])}")
        print(draws.certificate)
    drawn["particle smoother"] = smoothed(keys[3], num, 200 if args.smoke else 10_000, y=y)
    print(f"\nparticle smoother: {log_densities(posterior, drawn['particle smoother'])}")

    _, z = simulate(keys[4], coordinate=2)
    gibbs = si.samplers.ParticleGibbs(4, 32) if args.smoke else si.samplers.ParticleGibbs(20, 512)
    hidden = si.SDA(model, "x", finish=gibbs).condition(y=z, coordinate=2)  # a small state: no score needed
    turned = hidden.sample(keys[5], 16 if args.smoke else 128)
    share = float((turned.sites["x"][:, TIMES // 2, 0] > 0).mean())
    print(f"\nz alone: share of paths with x > 0 in the middle: {share:.2f}")
    print(turned.certificate)
    if args.figure:
        plot(args.figure, np.asarray(truth), y, drawn, turned.sites["x"])


if __name__ == "__main__":
    main()
