"""An interferometer: where is the source? A posterior of many fringes, under NUTS and under ScoreSDE.

    python examples/interferometer.py                       # two minutes on one core
    python examples/interferometer.py --figure front.png    # the three posteriors side by side
    python examples/interferometer.py --smoke               # a minute, nearly all compilation: everything runs

Two pairs of antennas see the phase of a source's wave, k b . x, and a phase is known up to whole turns. So the position
x of the source is one of many points on a lattice, each as likely as the prior says: a dozen separate modes with
unequal shares. Two unknowns on a grid give the exact answer.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC, NUTS

import scoreinfer as si

BASELINES = 4.2 * np.array([[1.0, 0.25], [-0.3, 0.95]])
"""Baselines of the two pairs, in wavelengths per radian of sky times 2 pi."""
NOISE = 0.25
"""Standard deviation of the complex visibilities' parts, of amplitude one."""
SOURCE = np.array([0.55, -0.35])
"""Where the source is."""
WIDE, WIDEST = 3.2, 5.0
"""Half widths of the picture and of the grid, in prior standard deviations."""


def visibility(position):
    """Compute the real and imaginary parts that the two pairs see without noise."""
    phase = BASELINES @ position
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)])


def model(y=None):
    """Two unknowns: the position of the source."""
    position = numpyro.sample("position", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(visibility(position), NOISE).to_event(1), obs=y)


class Exact(NamedTuple):
    """The posterior on a grid.

    Args:
        axis: coordinates of the grid, the same on both axes.
        density: posterior density, ``density[i, j]`` at ``(axis[i], axis[j])``.
        log_evidence: log p(y).
        shares: posterior mass by fringe.
    """

    axis: np.ndarray
    density: np.ndarray
    log_evidence: float
    shares: dict[tuple[int, int], float]


def fringe(position, y):
    """Number the fringe of a position: its whole turns of phase, counted from the observed phases."""
    observed = np.arctan2(y[2:], y[:2])
    return np.round((position @ BASELINES.T - observed) / (2 * np.pi)).astype(int)


def shares_of(position, y):
    """Count the share of positions in each fringe."""
    numbers, counts = np.unique(fringe(position, y), axis=0, return_counts=True)
    return {tuple(number): count / len(position) for number, count in zip(numbers.tolist(), counts, strict=True)}


def exact(y, num=801):
    """Integrate the posterior on a grid of ``num`` x ``num`` points."""
    axis = np.linspace(-WIDEST, WIDEST, num)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    phase = points @ BASELINES.T
    seen = np.concatenate([np.cos(phase), np.sin(phase)], 1)
    log_joint = -0.5 * (points**2).sum(1) - np.log(2 * np.pi)
    log_joint -= 0.5 * (((y - seen) / NOISE) ** 2).sum(1) + 4 * np.log(NOISE * np.sqrt(2 * np.pi))
    mass = np.exp(log_joint) * (axis[1] - axis[0]) ** 2
    numbers, inverse = np.unique(fringe(points, y), axis=0, return_inverse=True)
    share = np.bincount(inverse.ravel(), mass) / mass.sum()
    shares = {tuple(number): value for number, value in zip(numbers.tolist(), share.tolist(), strict=True)}
    return Exact(axis, (mass / mass.sum()).reshape(num, num), float(np.log(mass.sum())), shares)


def largest_error(shares, truth):
    """Compute the largest error of a fringe's share."""
    return max(abs(shares.get(number, 0.0) - truth.get(number, 0.0)) for number in shares | truth)


def plot(path, truth, panels):
    """Plot the exact density and the draws of each method."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    figure, axes = plt.subplots(1, 1 + len(panels), figsize=(10.5, 4.0), sharex=True, sharey=True)
    edges = np.linspace(-WIDE, WIDE, 101)
    inside = np.abs(truth.axis) < WIDE
    cells = np.digitize(truth.axis[inside], edges[1:-1])
    images = {"exact, on a grid:\na dozen fringes": np.zeros((100, 100))}
    np.add.at(next(iter(images.values())), np.ix_(cells, cells), truth.density[np.ix_(inside, inside)])
    for title, position in panels.items():
        images[title] = np.histogram2d(*position.T, bins=(edges, edges))[0] / len(position)
    colours = PowerNorm(0.35, 0.0, max(image.max() for image in images.values()))
    for axis, (title, image) in zip(axes, images.items(), strict=True):
        axis.imshow(image.T, extent=(-WIDE, WIDE) * 2, origin="lower", cmap="Blues", norm=colours)
        axis.set(title=title, xticks=(-2, 0, 2), yticks=(-2, 0, 2), xlabel="east")
        axis.title.set_fontsize(11)
    axes[0].set_ylabel("north")
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)


def run(kernel, key, y, num_warmup, num_samples):
    """Run four chains; return the run and its positions."""
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=4, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    mcmc.run(key, y=y, extra_fields=("accept_prob",))
    return mcmc, np.asarray(mcmc.get_samples(group_by_chain=True)["position"], np.float64)


def main():
    """Run both kernels, hold them against the grid, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny budgets: see that everything runs")
    parser.add_argument("--figure", type=Path, help="where to save a figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for_data, for_nuts, for_score = jax.random.split(jax.random.key(args.seed), 3)
    y = np.asarray(visibility(SOURCE) + NOISE * jax.random.normal(for_data, (4,)), np.float64)
    truth, budget = exact(y), (50, 100) if args.smoke else (500, 2500)

    _, nuts = run(NUTS(model), for_nuts, y, *budget)
    mcmc, score = run(si.ScoreSDE(model), for_score, y, *budget)
    certificate = si.certify(mcmc)
    draws = {"nuts": nuts, "score": score}
    errors = {name: largest_error(shares_of(x.reshape(-1, 2), y), truth.shares) for name, x in draws.items()}
    r_hat = {name: float(np.max(split_gelman_rubin(x))) for name, x in draws.items()}
    many = sum(share > 0.01 for share in truth.shares.values())
    print(f"exact: {many} fringes above 1 %, log evidence {truth.log_evidence:.3f}")
    for name in errors:
        print(f"{name}: largest error of a fringe's share {errors[name]:.3f}, R-hat {r_hat[name]:.3f}")
    print(certificate)
    if args.figure:
        verdict = "certified" if certificate.certified else "not certified"
        titles = (
            f"NUTS: shares off by up to {errors['nuts']:.0%},\nR-hat {r_hat['nuts']:.1f}",
            f"scoreinfer: off by up to {errors['score']:.1%},\n{verdict}, k-hat {certificate.weights.k_hat:.2f}",
        )
        panels = {title: x.reshape(-1, 2) for title, x in zip(titles, draws.values(), strict=True)}
        plot(args.figure, truth, panels)


if __name__ == "__main__":
    main()
