"""Rainfall and runoff: the five parameters of HYMOD, a C program without gradients, from four years of discharge.

    python examples/rainfall_runoff.py            # about ten minutes on two cores
    python examples/rainfall_runoff.py --smoke    # a minute: everything runs

The soil of a small catchment fills, spills and dries; water leaves it through quick and slow reservoirs (Moore 1985;
Boyle 2000). The program (hymod.c, compiled here with ``cc``) is run by subprocess, thousands of times, in threads; it
fails in a planted region of the prior; its first run is killed half way and goes on. What is known is how the data
come about given its flows: monthly means off by a factor of two or so, which is what so simple a model reaches here.
So draws learned from the runs are weighed exactly, by running the program on them.

Rain, evaporation and discharge of 2012 to 2016 (a catchment of 1.783 km2 in Hesse, Houska et al. 2015) come with the
package spotpy where it is installed; else weather of the same kind is made up, with discharge of known parameters.
"""

import argparse
import concurrent.futures
import csv
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import scoreinfer as si

HERE = Path(__file__).parent
DAYS = np.arange("2012-01-01", "2017-01-01", dtype="datetime64[D]")
MONTHS = (DAYS.astype("datetime64[M]") - np.datetime64("2013-01", "M")).astype(int)
"""Month of each day, from January 2013 on; those before let the reservoirs fill."""
LITRES_PER_SECOND = 1.783e6 / 86_400
"""Discharge of one millimetre a day."""
RANGES = {"cmax": (10.0, 1000.0), "bexp": (0.01, 2.0), "alpha": (0.1, 0.99), "ks": (0.0005, 0.1), "kq": (0.1, 0.99)}
LOGARITHMIC = "cmax", "bexp", "ks"
"""Parameters whose order of magnitude is unknown."""
TRUTH = {"cmax": 250.0, "bexp": 0.3, "alpha": 0.6, "ks": 0.01, "kq": 0.5}
"""Parameters of the made-up discharge."""
ERROR = 0.8
"""Standard deviation of log monthly means: structural error, far larger than that of any gauge."""
DRIEST = 1e-4
"""Monthly mean below which the model's flow counts as this much, in mm a day."""


class Weather(NamedTuple):
    """Five years of days: rain and potential evaporation in mm; 48 months of discharge in mm a day, or None."""

    rain: np.ndarray
    evaporation: np.ndarray
    discharge: np.ndarray | None


class Catchment:
    """HYMOD as a simulator: parameters in, monthly means of its flows out."""

    def __init__(self, program, forcing):
        self.command = [str(program), str(forcing)]

    def __call__(self, parameters, seed):
        """Run the program once."""
        text = " ".join(f"{float(parameters[name]):.9g}" for name in RANGES)
        done = subprocess.run(self.command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"hymod ended with {done.returncode}: {done.stderr.strip()}")
        return {"flow": monthly(np.array(done.stdout.split(), float))}


def compile_program(folder):
    """Compile hymod.c with the machine's C compiler ($CC, else cc)."""
    compiler, program = os.environ.get("CC", "cc"), folder / "hymod"
    if shutil.which(compiler) is None:
        sys.exit(f"This example needs a C compiler, and there is no `{compiler}`: install gcc or clang, or set CC.")
    subprocess.run([compiler, "-O2", "-o", str(program), str(HERE / "hymod.c"), "-lm"], check=True)
    return program


def monthly(daily):
    """Average daily values over the months from 2013 on."""
    after = MONTHS >= 0
    return np.bincount(MONTHS[after], daily[after]) / np.bincount(MONTHS[after])


def read_weather():
    """Read the weather and the discharge that come with spotpy; None where it is not installed."""
    found = importlib.util.find_spec("spotpy")
    path = found and Path(found.origin).parent / "examples" / "hymod_python" / "hymod_input.csv"
    if not path or not path.exists():
        return None
    with path.open() as file:
        rain, evaporation, discharge = np.array([row[1:4] for row in csv.reader(file, delimiter=";")][1:], float).T
    return Weather(rain, evaporation, monthly(discharge) / LITRES_PER_SECOND)


def make_weather(seed=0):
    """Make up weather like it: rain after a day of rain with probability .69, else .35; evaporation by season."""
    rng = np.random.default_rng(seed)
    wet = np.zeros(len(DAYS), bool)
    for day in range(1, len(DAYS)):
        wet[day] = rng.uniform() < (0.69 if wet[day - 1] else 0.35)
    rain = wet * rng.gamma(0.42, 2.77 / 0.42, len(DAYS))
    season = 1.6 - 1.7 * np.cos(2 * np.pi * np.arange(len(DAYS)) / 365.25)
    return Weather(rain, np.maximum(season + 0.6 * rng.normal(size=len(DAYS)), 0.0), None)


def prior():
    """Five parameters, anywhere in their customary ranges."""
    for name, (low, high) in RANGES.items():
        numpyro.sample(name, dist.LogUniform(low, high) if name in LOGARITHMIC else dist.Uniform(low, high))


def likelihood(parameters, outputs, discharge=None):
    """Data given the program's flows."""
    flow = jnp.log(jnp.maximum(outputs["flow"], DRIEST))
    numpyro.sample("discharge", dist.LogNormal(flow, ERROR).to_event(1), obs=discharge)


# --- the demo


def simulate(catchment, seed, num, store, draws=None, progress_bar=True):
    """Run the program on prior draws, or on given draws, in threads."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        return si.simulators.simulate(
            jax.random.key(seed), prior if draws is None else draws, catchment, num, store=store, executor=executor,
            simulator_version=[HERE / "hymod.c", catchment.command[1]], progress_bar=progress_bar,
        )  # fmt: skip


def simulate_runs(args, progress_bar=True):
    """Run the program on prior draws, those that are missing."""
    catchment = Catchment(args.output_dir / "hymod", args.output_dir / "forcing.txt")
    num = 1500 if args.smoke else 20_000
    return simulate(catchment, args.seed, num, args.output_dir / "runs", progress_bar=progress_bar)


def simulate_and_kill(args, store):
    """Let another process simulate, and kill it as soon as it has written something."""
    options = ["--seed", str(args.seed), "--output-dir", str(args.output_dir), *(["--smoke"] if args.smoke else [])]
    child = subprocess.Popen([sys.executable, __file__, *options, "--only-simulate"])
    while child.poll() is None and not list(store.glob("*.npz")):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()


def plot_hydrograph(path, discharge, flows):
    """Plot the months' discharge over the posterior's flows and new data."""
    import matplotlib.pyplot as plt

    months = np.arange("2013-01", "2017-01", dtype="datetime64[M]")
    noise = ERROR * np.random.default_rng(0).normal(size=flows.shape)
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for values, alpha, label in ((flows * np.exp(noise), 0.2, "new data"), (flows, 0.5, "flows")):
        low, high = np.quantile(values, [0.05, 0.95], axis=0)
        axis.fill_between(months, low, high, color="tab:blue", alpha=alpha, label=f"90 % of {label}")
    axis.plot(months, discharge, "k.", label="discharge")
    axis.set(ylabel="mm a day, monthly mean", yscale="log", ylim=(0.3 * discharge.min(), 3 * discharge.max()))
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_parameters(path, sites, tried, valid):
    """Plot pairs of parameters over the prior's runs, with those that failed; marginals on the diagonal."""
    import matplotlib.pyplot as plt

    names = list(RANGES)
    figure, axes = plt.subplots(len(names), len(names), figsize=(11, 11), layout="constrained")
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            axis = axes[i, j]
            axis.set_visible(j <= i)
            axis.set(xlim=RANGES[column], xscale="log" if column in LOGARITHMIC else "linear")
            if i == j:
                edges = (np.geomspace if row in LOGARITHMIC else np.linspace)(*RANGES[row], 60)
                axis.hist(sites[row], edges, color="tab:blue")
                continue
            axis.set(ylim=RANGES[row], yscale="log" if row in LOGARITHMIC else "linear")
            for which, colour in ((valid, "0.8"), (~valid, "tab:red")):
                axis.plot(tried[column][which][:800], tried[row][which][:800], ".", color=colour, markersize=1.5)
            axis.plot(sites[column][:800], sites[row][:800], ".", color="tab:blue", markersize=1.5)
        axes[-1, i].set_xlabel(row)
        axes[i, 0].set_ylabel(row)
    figure.suptitle("posterior (blue) over runs of the program (grey), of which some failed (red)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run(args):
    """Simulate, kill, resume, train, draw, weigh, calibrate, report; return the draws and the report."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    num_steps, num_draws, num_tests = (400, 512, 100) if args.smoke else (8000, 4000, 1000)
    small = {"width": 32, "depth": 1} if args.smoke else {}
    # The flow by default starts a little too wide, for the weights' sake; here the learned draws are judged, too.
    sampler = si.samplers.ReverseSDE(num_steps=16) if args.smoke else si.samplers.ProbabilityFlow()
    train, draw, weigh, test = jax.random.split(jax.random.key(args.seed), 4)
    weather = read_weather() or make_weather(args.seed)
    forcing, runs = args.output_dir / "forcing.txt", args.output_dir / "runs"
    np.savetxt(forcing, np.stack([weather.rain, weather.evaporation], axis=1), fmt="%.9g")
    catchment = Catchment(compile_program(args.output_dir), forcing)
    discharge = weather.discharge
    if discharge is None:
        print("spotpy is not installed: weather is made up, and discharge simulated with known parameters")
        noise = ERROR * np.random.default_rng(args.seed).normal(size=48)
        discharge = catchment(TRUTH, 0)["flow"] * np.exp(noise)

    print("=== Run the program on prior draws; killed half way, it goes on\n")
    start = time.perf_counter()
    simulate_and_kill(args, runs)
    print(f"killed:  {si.simulators.Store(runs)}")
    store = simulate_runs(args)
    print(f"resumed: {store}; {time.perf_counter() - start:.0f} s in all")

    print("\n=== Train on the runs, with the likelihood's noise\n")
    start = time.perf_counter()
    posterior = si.NPSE(
        prior, simulations=store, likelihood=likelihood, num_steps=num_steps, sampler=sampler, **small
    ).fit(train)
    print(f"{time.perf_counter() - start:.0f} s")

    print("\n=== Draw, run the program on the draws, weigh\n")
    start = time.perf_counter()
    conditioned = posterior.condition(discharge=discharge)
    learned = conditioned.sample(draw, num_draws)
    shutil.rmtree(args.output_dir / "runs-on-draws", ignore_errors=True)  # of another training
    tried = simulate(catchment, args.seed, num_draws, args.output_dir / "runs-on-draws", learned)
    draws = conditioned.weigh(weigh, learned, tried, store)
    print(f"{draws.certificate}\n{time.perf_counter() - start:.0f} s")

    print("\n=== Calibrate the learned draws on other runs, whose parameters are known\n")
    others = simulate(catchment, args.seed + 1, 2 * num_tests, args.output_dir / "other-runs")
    report = si.calibrate(test, posterior, num_tests, store=others, draws=draws)
    report.save(args.output_dir / "report.html")
    print(report)

    sites = draws.resample(draw, num_draws)
    print("\nposterior mean and sd" + ("" if weather.discharge is not None else ", and the truth"))
    for name, values in sites.items():
        truth = "" if weather.discharge is not None else f"{TRUTH[name]:12.4g}"
        print(f"{name:8s}{values.mean():12.4g}{values.std():12.4g}{truth}")
    draws.to_arviz(weigh).to_netcdf(args.output_dir / "posterior.nc")
    flows = draws._replace(sites={"flow": jnp.asarray(tried.read().outputs["flow"])}).resample(draw, num_draws)["flow"]
    plot_hydrograph(args.output_dir / "hydrograph.png", discharge, np.maximum(flows, DRIEST))
    rows = store.read()
    tried = jax.vmap(posterior.problem.constrain)(jnp.asarray(rows.z, float))
    plot_parameters(args.output_dir / "parameters.png", sites, tried, rows.valid)
    print(f"\nReport, draws (netCDF) and plots are in {args.output_dir}")
    return draws, report


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny budgets: see that everything runs")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/rainfall_runoff"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-simulate", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_simulate:
        simulate_runs(args, progress_bar=False)
    else:
        run(args)


if __name__ == "__main__":
    main()
