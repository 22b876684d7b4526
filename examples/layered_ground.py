"""Layered ground: a prior that is known by samples only, reused with two likelihoods.

    python examples/layered_ground.py                       # two minutes on one core
    python examples/layered_ground.py --figure ground.png   # the archive, and the two posteriors
    python examples/layered_ground.py --smoke               # everything runs, little is learned

The log conductivity of a column of 16 cells is layered: sand, clay, sand. Suppose that nobody writes its density down,
but an archive holds thousands of columns. Its score is learned once. Then two boreholes, which measure quite different
things, are answered with the same prior and without any more training:

- *heads*: the pressure at five depths under a steady flow. Flow through layers in series: the drop over a cell is in
  proportion to 1 / conductivity. Gaussian noise.
- *tracer*: counts of a tracer in four cells, Poisson, the more the more conductive the cell is.

Every posterior is weighed against the learned prior and the likelihood, and certified. How good the learned prior is,
is another question. Millions of columns from the archive's own generator, weighed by the likelihood, answer it.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import scoreinfer as si

NUM_CELLS = 16
SAND, CLAY, WITHIN = 1.0, -1.5, 0.3
"""Log conductivity of pure sand and of pure clay, and the spread within a layer."""
LAYER, SHARPNESS = 2.5, 3.0
"""Thickness of a layer in cells, and how sharply layers end."""
WELLS, HEAD_NOISE = jnp.array([1, 4, 7, 10, 13]), 0.02
"""Cells below which the head is read, and its standard deviation, of a total drop of one."""
SAMPLED, RATE = jnp.array([2, 6, 9, 14]), 8.0
"""Cells whose tracer is counted, and counts of a cell of conductivity one."""


def columns(key, num):
    """Draw columns as the ground makes them: a smooth field says where sand and clay are, another one how pure."""
    apart = np.subtract.outer(np.arange(NUM_CELLS), np.arange(NUM_CELLS))
    factor = np.linalg.cholesky(np.exp(-0.5 * (apart / LAYER) ** 2) + 1e-3 * np.eye(NUM_CELLS))
    kind, within = jnp.asarray(factor, jnp.float32) @ jax.random.normal(key, (2, NUM_CELLS, num))
    middle, half = (SAND + CLAY) / 2, (SAND - CLAY) / 2
    return (middle + half * jnp.tanh(SHARPNESS * kind) + WITHIN * within).T


def heads(x):
    """Compute the head above the wells: one at the top, zero below the last cell."""
    resistance = jnp.cumsum(jnp.exp(-x))
    return 1.0 - resistance[WELLS] / resistance[-1]


def model(prior, head=None, count=None):
    """The ground, seen by whichever data there are."""
    x = si.score_prior("x", prior)
    if head is not None:
        numpyro.sample("head", dist.Normal(heads(x), HEAD_NOISE).to_event(1), obs=head)
    if count is not None:
        numpyro.sample("count", dist.Poisson(RATE * jnp.exp(x[SAMPLED])).to_event(1), obs=count)


def log_likelihood(x, head=None, count=None):
    """Compute log p(data given x) by hand, for the reference."""
    total = 0.0
    if head is not None:
        total += dist.Normal(heads(x), HEAD_NOISE).log_prob(head).sum()
    if count is not None:
        total += dist.Poisson(RATE * jnp.exp(x[SAMPLED])).log_prob(count).sum()
    return total


def reference(key, data, num):
    """Weigh columns of the archive's generator: mean and standard deviation of every cell, and the effective number."""

    @jax.jit
    def batch(key):
        x = columns(key, 2**16)
        return x, jax.vmap(lambda row: log_likelihood(row, **data))(x)

    kept, logs = [], []
    for one in jax.random.split(key, -(-num // 2**16)):
        x, log_weight = jax.device_get(batch(one))
        best = np.argsort(log_weight)[-(2**12) :]
        kept.append(x[best])
        logs.append(log_weight[best])
    x, log_weight = np.concatenate(kept), np.concatenate(logs)
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    mean = weight @ x
    return mean, np.sqrt(weight @ (x - mean) ** 2), 1.0 / (weight**2).sum()


def weighted(draws):
    """Compute mean and standard deviation of every cell from weighted draws."""
    weight = np.exp(draws.log_weight - draws.log_weight.max())
    weight /= weight.sum()
    mean = weight @ draws.sites["x"]
    return mean, np.sqrt(weight @ (draws.sites["x"] - mean) ** 2)


def plot(path, archive, truth, answers):
    """Draw some columns of the archive, then truth, posterior draws and reference for each kind of data."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    depth = np.arange(NUM_CELLS)
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.8), sharey=True, layout="constrained")
    for row in archive[:6]:
        axes[0].plot(row, depth, lw=1.2)
    axes[0].set(title="the archive: six of its columns", ylabel="cell below the ground", ylim=(NUM_CELLS - 0.8, -0.2))
    for axis, (title, cells, x, mean, sd) in zip(axes[1:], answers, strict=True):
        axis.fill_betweenx(depth, mean - 2 * sd, mean + 2 * sd, color="tab:orange", alpha=0.25, label="exact, 2 sd")
        lines = axis.plot(x.T, depth, color="tab:blue", alpha=0.25, lw=0.8)
        lines[0].set_label("posterior draws")
        axis.plot(truth, depth, color="black", lw=2, label="truth")
        axis.plot(np.full(len(cells), -3.6), cells, ">", color="tab:red", label="measured here")
        axis.set(title=title)
    for axis in axes:
        axis.set(xlabel="log conductivity", xlim=(-3.8, 3.0))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    """Learn the prior once, then answer two boreholes of different kinds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="everything runs, little is learned")
    parser.add_argument("--figure", type=Path, help="where to save a figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    num_steps, num, num_reference = (100, 256, 2**17) if args.smoke else (4000, 2000, 2**22)
    keys = dict(
        zip(
            ["archive", "prior", "truth", "head", "count", "draws", "reference"],
            jax.random.split(jax.random.key(args.seed), 7),
            strict=True,
        )
    )

    archive = columns(keys["archive"], 20_000)
    prior = si.fit_score(keys["prior"], archive, num_steps=num_steps, width=64)
    print(f"the prior: {prior.training}")
    truth = columns(keys["truth"], 1)[0]
    noise = HEAD_NOISE * jax.random.normal(keys["head"], WELLS.shape)
    count = jax.random.poisson(keys["count"], RATE * jnp.exp(truth[SAMPLED])).astype(jnp.float32)
    boreholes = {"heads": (WELLS, {"head": heads(truth) + noise}), "tracer": (SAMPLED, {"count": count})}
    answers = []
    for name, (cells, data) in boreholes.items():
        posterior = si.Guided(model, "x", prior, discretised=True).condition(prior, **data)
        draws = posterior.sample(keys["draws"], num)
        mean, sd, effective = reference(keys["reference"], data, num_reference)
        found, spread = weighted(draws)
        print(f"\n{name}: {draws.certificate}\nweights are exact for {posterior.exact_for}")
        print(
            f"beside the archive's generator ({effective:.0f} effective columns): means off by "
            f"{np.abs((found - mean) / sd).mean():.2f} sd (worst cell {np.abs((found - mean) / sd).max():.2f}), spread "
            f"{np.exp(np.log(spread / sd).mean()):.2f} times the exact one"
        )
        answers.append((f"{name} of one borehole", cells, np.asarray(draws.resample(keys["draws"], 60)["x"]), mean, sd))
    if args.figure:
        plot(args.figure, archive, truth, answers)
        print(f"written: {args.figure}")


if __name__ == "__main__":
    main()
