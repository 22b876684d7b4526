"""Lynx and hare: a Lotka-Volterra model of the Hudson Bay pelt counts, from a NumPyro model to certified draws.

    python examples/lynx_hare.py                  # two and a half minutes on two cores
    python examples/lynx_hare.py --smoke          # a minute, nearly all compilation: everything runs

Pelts counted by the Hudson's Bay Company, 1900 to 1920, in thousands (Hewitt 1921, as given by Howard 2009):
hares u and lynxes v follow du/dt = (alpha - beta v) u, dv/dt = (-gamma + delta u) v, seen through log-normal
noise. The ODE is solved by diffrax in log populations, where every state is legal and the right-hand side is
two exponentials.
"""

import argparse
import time
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from diffrax import ODETerm, Tsit5
from numpyro.infer import MCMC, NUTS, init_to_median

import scoreinfer as si

YEARS = np.arange(21.0)
"""Time of each count, in years since 1900."""

HARE = [30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1, 40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]  # fmt: skip  # noqa: E501
LYNX = [4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4, 8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
PELTS = np.array([HARE, LYNX], dtype=np.float32).T
"""Pelts in thousands, hares and lynxes, one row a year."""

STEPS_PER_YEAR = 2
"""Tsit5 steps a year; all over the posterior log populations are within 2e-4, log likelihoods within 4e-3 of exact."""

LOWEST, HIGHEST, NOISIEST = np.log(1e-3), 10.0, 10.0
"""Log populations kept (one pelt to 22 million thousand) and largest log noise: with these no prior draw, however
wild, simulates a count that underflows or overflows in float32, and nothing near any data changes."""


def growth(t, log_population, rates):
    """Compute d(log u, log v)/dt; the cap keeps wild prior draws finite and is never felt near the data."""
    alpha, beta, gamma, delta = rates
    hare, lynx = jnp.exp(jnp.minimum(log_population, 2 * HIGHEST))
    return jnp.stack([alpha - beta * lynx, delta * hare - gamma])


def populations(rates, initial):
    """Solve for the log populations in every year.

    Steps of fixed length need no controller: a scan over the solver's own steps gives the numbers of
    `diffrax.diffeqsolve`, and compiles and differentiates in half of its time.
    """
    term, solver, length = ODETerm(growth), Tsit5(), 1 / STEPS_PER_YEAR

    def step(state, t):
        y, _, _, kept, _ = solver.step(term, t, t + length, state[0], rates, state[1], made_jump=False)
        return (y, kept), y

    start = jnp.log(initial)
    times = np.arange(YEARS[0], YEARS[-1], length)
    _, ys = jax.lax.scan(step, (start, solver.init(term, times[0], times[1], start, rates)), times)
    return jnp.concatenate([start[None], ys[STEPS_PER_YEAR - 1 :: STEPS_PER_YEAR]])


def model(pelts=None, solve=populations):
    """Eight parameters, one observed site: an ordinary NumPyro model."""
    rate, coupling = dist.TruncatedNormal(1.0, 0.5, low=0.0), dist.TruncatedNormal(0.05, 0.05, low=0.0)
    alpha = numpyro.sample("alpha", rate)
    beta = numpyro.sample("beta", coupling)
    gamma = numpyro.sample("gamma", rate)
    delta = numpyro.sample("delta", coupling)
    initial = numpyro.sample("initial", dist.LogNormal(jnp.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    log_population = jnp.clip(solve((alpha, beta, gamma, delta), initial), LOWEST, HIGHEST)
    numpyro.sample("pelts", dist.LogNormal(log_population, jnp.minimum(sigma, NOISIEST)).to_event(2), obs=pelts)


# --- the demo


def draw_and_time(key, posterior, num, pelts):
    """Draw one certified batch for one data set and measure the seconds it takes.

    The learned Gaussian is tuned to these data before it is drawn from; where the draws are not certified, it is tuned
    more thoroughly.
    """
    start = time.perf_counter()
    conditioned = posterior.condition(pelts=pelts)
    draws = conditioned.sample(key, num)
    print(f"amortised: {draws.certificate}")
    if not draws.certificate.certified:
        conditioned = conditioned.focus(key)  # tuned more thoroughly, once: seconds
        draws = conditioned.sample(key, num)
        print(f"focused on these data: {draws.certificate}")
    seconds = time.perf_counter() - start
    print(f"{seconds:.1f} s")
    return conditioned, draws, seconds


def run_and_time(key, mcmc, pelts):
    """Run a chain on one data set and measure the seconds it takes."""
    start = time.perf_counter()
    mcmc.run(key, pelts=pelts)
    jax.block_until_ready(mcmc.get_samples())
    return time.perf_counter() - start


def simulate_pelts(key, rates=(0.55, 0.028, 0.8, 0.024), initial=(33.0, 6.0), sigma=0.25):
    """Simulate a second data set of the same design, from parameters near those of the first."""
    log_population = populations(rates, jnp.array(initial))
    return np.asarray(dist.LogNormal(log_population, sigma).sample(key))


def parameters(sites):
    """Name the eight parameters one by one."""
    columns = {}
    for site in ("alpha", "beta", "gamma", "delta", "initial", "sigma"):
        value = np.asarray(sites[site])
        if value.ndim == 1:
            columns[site] = value
        else:
            columns |= {f"{site} {species}": value[:, i] for i, species in enumerate(("hare", "lynx"))}
    return columns


def print_table(results):
    """Print mean and sd of every parameter, and the seconds to the first draws and for a second data set."""
    print(f"\n{'':14s}" + "".join(f"{name:>26s}" for name in results))
    print(f"{'':14s}" + f"{'mean':>16s}{'sd':>10s}" * len(results))
    columns = [parameters(sites) for sites, _, _ in results.values()]
    for name in columns[0]:
        print(f"{name:14s}" + "".join(f"{c[name].mean():16.4f}{c[name].std():10.4f}" for c in columns))
    for label, index in (("first draws", 1), ("second data", 2)):
        seconds = [result[index] for result in results.values()]
        print(f"{label:14s}" + "".join(f"{'run again':>26s}" if s is None else f"{s:24.1f} s" for s in seconds))


def plot_predictive(path, sites, key):
    """Plot the posterior predictive bands of both species over the counts."""
    import matplotlib.pyplot as plt

    def replicate(key, site):
        rates = tuple(site[name] for name in ("alpha", "beta", "gamma", "delta"))
        log_population = populations(rates, site["initial"])
        return log_population, dist.LogNormal(log_population, site["sigma"]).sample(key)

    keys = jax.random.split(key, len(sites["alpha"]))
    log_population, counts = jax.jit(jax.vmap(replicate))(keys, sites)
    figure, axes = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for i, (axis, species, colour) in enumerate(zip(axes, ("hare", "lynx"), ("tab:brown", "tab:gray"), strict=True)):
        low, middle, high = np.quantile(np.exp(log_population[..., i]), [0.05, 0.5, 0.95], axis=0)
        noisy_low, noisy_high = np.quantile(counts[..., i], [0.05, 0.95], axis=0)
        axis.fill_between(1900 + YEARS, noisy_low, noisy_high, color=colour, alpha=0.2, label="90 % of new counts")
        axis.fill_between(1900 + YEARS, low, high, color=colour, alpha=0.4, label="90 % of populations")
        axis.plot(1900 + YEARS, middle, color=colour)
        axis.plot(1900 + YEARS, PELTS[:, i], "k.", label="pelts counted")
        axis.set(ylabel=f"{species} pelts (thousands)", yscale="log", xticks=1900 + YEARS[::4])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_pairs(path, results):
    """Plot all pairs of parameters, one colour a method, with marginal histograms on the diagonal."""
    import matplotlib.pyplot as plt

    columns = {name: parameters(sites) for name, (sites, _, _) in results.items()}
    names = list(next(iter(columns.values())))
    figure, axes = plt.subplots(len(names), len(names), figsize=(12, 12), layout="constrained")
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            axis = axes[i, j]
            axis.tick_params(labelsize=6)
            axis.set_visible(j <= i)
            for k, (method, values) in enumerate(columns.items()):
                if i == j:
                    axis.hist(values[row], 40, density=True, histtype="step", color=f"C{k}", label=method)
                else:
                    axis.plot(values[column][:800], values[row][:800], ".", color=f"C{k}", markersize=1.5, alpha=0.4)
        axes[-1, i].set_xlabel(row)
        axes[i, 0].set_ylabel(row)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    """Train, draw, certify, run the kernel, run NUTS, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny budgets: see that everything runs")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/lynx_hare"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    num_steps, num_draws, num_warmup, num_nuts = (250, 1024, 10, 10) if args.smoke else (2_000, 4000, 400, 300)
    width = 16 if args.smoke else 48
    names = ("train", "draw", "kernel", "nuts", "second", "plot")
    keys = dict(zip(names, jax.random.split(jax.random.key(args.seed), len(names)), strict=True))
    second = simulate_pelts(keys["second"])
    results = {}

    print("=== The model\n")
    si.check(model, pelts=PELTS)

    print("\n=== Train a score SDE on the model's own simulations, once for all data of this design\n")
    start = time.perf_counter()
    # Posteriors are far narrower than what a network gets wrong about them. So it only learns a Gaussian of each data
    # set, which is tuned to the density before draws; a score is not trained if a third of the draws are effective.
    # Prior draws reach populations so wild that gradients of the density are of no use in training.
    options = {"num_steps": num_steps, "width": width, "target_share": 0.33, "target_score": False, "tune": True}
    posterior = si.NPSE(model, **options).fit(keys["train"])
    training = time.perf_counter() - start
    print(posterior.history)
    print(f"{training:.1f} s, {posterior.history.num_simulations:,} simulations")

    print("\n=== Draw and certify\n")
    conditioned, draws, first = draw_and_time(keys["draw"], posterior, num_draws, PELTS)
    print("\nA second data set of the same design, simulated: no fit, no compilation")
    _, _, other = draw_and_time(keys["draw"], posterior, num_draws, second)
    results["score SDE, batch"] = draws.resample(keys["draw"], num_draws), training + first, other

    print("\n=== The same posterior as a NumPyro kernel\n")
    fixed = conditioned.focus(keys["kernel"], num_steps=0).posterior  # a kernel needs one proposal, tuned once
    mcmc = MCMC(
        si.ScoreSDE(model, posterior=fixed), num_warmup=0, num_samples=num_draws // 8, num_chains=4,
        chain_method="vectorized", progress_bar=False, jit_model_args=True,
    )  # fmt: skip
    first = run_and_time(keys["kernel"], mcmc, PELTS)
    mcmc.print_summary()
    az.from_numpyro(mcmc, log_likelihood=False).to_netcdf(args.output_dir / "kernel.nc")
    samples = mcmc.get_samples()
    results["score SDE, chains"] = samples, training + first, run_and_time(keys["kernel"], mcmc, second)

    print("\n=== NUTS on the same model\n")
    nuts = MCMC(
        NUTS(model, init_strategy=init_to_median), num_warmup=num_warmup, num_samples=num_nuts,
        num_chains=1 if args.smoke else 4, chain_method="sequential", progress_bar=False, jit_model_args=True,
    )  # fmt: skip
    first = run_and_time(keys["nuts"], nuts, PELTS)
    nuts.print_summary()
    results["NUTS"] = nuts.get_samples(), first, None  # other data: the whole run again

    print(
        "\n=== Side by side (a batch's draws are independent: R-hat and ESS near perfect prove nothing by themselves)"
    )
    print_table(results)

    data = draws.to_arviz(keys["plot"], predictive=True)
    data.to_netcdf(args.output_dir / "posterior.nc")
    plot_predictive(args.output_dir / "predictive.png", draws.resample(keys["plot"], 1000), keys["plot"])
    if not args.smoke:
        plot_pairs(args.output_dir / "pairs.png", results)
    print(f"\nThe draws (netCDF) and the plots are in {args.output_dir}")


if __name__ == "__main__":
    main()
