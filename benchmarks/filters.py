"""Filters of Lorenz-96 beside rivals tuned in the same run: error, spread, coverage and cost, every seed printed.

    python benchmarks/filters.py --tasks quiet shocks
    python benchmarks/filters.py --tasks quiet_1000 --no-rivals

Lorenz-96 as in Bao, Zhang and Zhang 2024 (arXiv 2309.00983: arctan observations, first members from N(0, I), shocks
proportional to the state that no filter is told of) and in Sakov and Oke 2008 (linear observations). Every LETKF of the
grid below runs on the very seeds that are reported, and the best of them is the rival: it is tuned on the test. The
score filter has one configuration for all cases.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import stats

from scoreinfer.filters import LETKF, AbstractFilter, BootstrapFilter, EnSF, Members, ScoreFilter, cycle, grid
from scoreinfer.filters.monitoring import monitor, probits
from scoreinfer.filters.taper import gaspari_cohn
from scoreinfer.model.states import StateSpace, read_space
from scoreinfer.montecarlo.resampling import systematic

SHOCK_SIZES, SHOCK_PROBS = jnp.array([0.5, 0.2, 0.05]), jnp.array([0.005, 0.01, 0.02])


# --- models


def lorenz96(x, forcing=8.0):
    """Compute dx/dt (Lorenz 1996)."""
    return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + forcing


def lorenz63(x):
    """Compute dx/dt (Lorenz 1963)."""
    return jnp.array([10.0 * (x[1] - x[0]), x[0] * (28.0 - x[2]) - x[1], x[0] * x[1] - 8.0 / 3.0 * x[2]])


def runge_kutta(drift, x, dt):
    """Make one step of the classical method of fourth order."""
    a = drift(x)
    b = drift(x + 0.5 * dt * a)
    c = drift(x + 0.5 * dt * b)
    return x + dt / 6.0 * (a + 2.0 * b + 2.0 * c + drift(x + dt * c))


class Case(NamedTuple):
    """A model with a truth and observations.

    Args:
        name: its name.
        dim: number of components.
        num_members: number of members.
        drift: dx/dt.
        dt: solver step.
        every: solver steps from one observation to the next.
        num_times: number of observations.
        after: observations before this one are spin-up.
        see: what is observed of the state, before noise.
        noise: standard deviation of the noise.
        observed_every: every so many components are observed.
        shocks: whether the truth is hit by shocks.
        spread: standard deviation of the first members about the truth; None: N(0, 1), whatever the truth.
        radius: radius of the score filter's blocks.
        num_seeds: number of seeds. Shocks come at random times, and errors depend on them.
        bound: members are clipped to this absolute value, in the model of every filter.
        jitter: standard deviation of noise in the model of every filter, not in the truth. Particles that were drawn
            twice stay one without it.
    """

    name: str
    dim: int
    num_members: int = 20
    drift: Callable = lorenz96
    dt: float = 0.01
    every: int = 10
    num_times: int = 150
    after: int = 50
    see: Callable = jnp.arctan
    noise: float = 0.05
    observed_every: int = 1
    shocks: bool = False
    spread: float | None = None
    radius: float = 12.0
    num_seeds: int = 8
    bound: float = 50.0
    jitter: float = 0.0


CASES = {
    case.name: case
    for case in (
        Case(
            "linear",
            40,
            dt=0.05,
            every=1,
            num_times=500,
            after=100,
            see=lambda x: x,
            noise=1.0,
            spread=0.03,
            radius=20.0,
        ),
        Case("quiet", 100),
        Case("shocks", 100, shocks=True, num_seeds=24),
        Case("half", 100, observed_every=2),
        Case("quiet_1000", 1000, num_times=60, after=30, num_seeds=2),
    )
}

LORENZ63 = Case(
    "lorenz63", 3, drift=lorenz63, every=25, num_times=200, after=20, see=lambda x: x, noise=2.0**0.5, spread=3.0,
    bound=200.0,
)  # fmt: skip
"""As in Sakov, Oliver and Bertino 2012: all observed, with variance 2, every .25; first members around the truth."""


def simulate(key, case: Case):
    """Draw a truth on the attractor, and its observations; missing components are NaN."""
    start, moves, noise = jax.random.split(key, 3)
    x = 3.0 * jax.random.normal(start, (case.dim,))
    x = jax.lax.fori_loop(0, 1000, lambda _, x: runge_kutta(case.drift, x, case.dt), x)

    def step(x, key):
        which, how = jax.random.split(key)
        x = runge_kutta(case.drift, x, case.dt)
        size = (SHOCK_SIZES * (jax.random.uniform(which, (3,)) < SHOCK_PROBS)).sum() * case.shocks
        return x + size * jnp.abs(x) * jax.random.normal(how, x.shape), None

    def observation(x, key):
        x, _ = jax.lax.scan(step, x, jax.random.split(key, case.every))
        return x, x

    _, truth = jax.lax.scan(observation, x, jax.random.split(moves, case.num_times))
    y = case.see(truth) + case.noise * jax.random.normal(noise, truth.shape)
    seen = jnp.zeros(case.dim, bool).at[:: case.observed_every].set(True)
    return x, truth, jnp.where(seen, y, jnp.nan)


def space(case: Case) -> StateSpace:
    """Write the model as a filter is told it: without shocks."""

    def transition(key, t0, t1, x):
        x = jax.lax.fori_loop(0, case.every, lambda _, x: runge_kutta(case.drift, x, case.dt), x)
        noise = case.jitter * jax.random.normal(key, x.shape) if case.jitter else 0.0
        return jnp.clip(x + noise, -case.bound, case.bound)

    return StateSpace(
        initial=dist.Normal(0.0, 1.0).expand([case.dim]).to_event(1),
        transition=transition,
        observation=lambda t, x: dist.Normal(case.see(x), case.noise),
    )


# --- figures


def fair_crps(x, truth):
    """Compute the continuous ranked probability score of an ensemble, without bias from its size."""
    num, rank = x.shape[0], jnp.arange(x.shape[0])[:, None]
    pairs = 2.0 * ((2 * rank - num + 1) * jnp.sort(x, axis=0)).sum(0) / (num * (num - 1))
    return jnp.abs(x - truth).mean(0) - 0.5 * pairs


@eqx.filter_jit
def run(method: AbstractFilter, model: Any, case: Case, seeds) -> dict[str, Any]:
    """Run a filter on every seed; figures by seed and time. What differs in numbers only is compiled once."""
    wide = stats.t.ppf(0.975, case.num_members - 1) * np.sqrt(1.0 + 1.0 / case.num_members)

    def one(seed):
        key = jax.random.key(seed)
        start, truth, y = simulate(key, case)
        first = jax.random.normal(jax.random.fold_in(key, 1), (case.num_members, case.dim))
        members = Members(first if case.spread is None else start + case.spread * first, jnp.zeros(case.num_members))
        now = cycle.Now(jnp.zeros(()), members, method.init(key, members))

        def step(now, inputs):
            key, t, truth, y = inputs
            now, cycles = cycle.run(key, method, model, now, t[None], y[None])
            members = now.members
            x = members.x[systematic(jax.random.fold_in(key, 1), members.log_weight, case.num_members)]
            off, sd = x.mean(0) - truth, x.std(0, ddof=1)
            return now, {
                "rmse": jnp.sqrt(jnp.mean(off**2)),
                "spread": jnp.sqrt(jnp.mean(sd**2)),
                "coverage": jnp.mean(jnp.abs(off) < wide * sd),
                "crps": fair_crps(x, truth).mean(),
                "replaced": cycles.replaced.sum(),
            }

        keys = jax.random.split(jax.random.fold_in(key, 2), case.num_times)
        return jax.lax.scan(step, now, (keys, jnp.arange(1.0, case.num_times + 1.0), truth, y))[1]

    return jax.vmap(one)(seeds)


def measure(case: Case, method: AbstractFilter, seeds, label: str) -> dict[str, float]:
    """Run a filter, print every seed, and take medians over seeds; an error of a lost seed is infinite."""
    model = read_space(space(case), jnp.zeros((2, case.dim)), None).model
    method.check(model)
    start = time.process_time()
    found = {name: np.asarray(value) for name, value in run(method, model, case, jnp.asarray(seeds)).items()}
    seconds = time.process_time() - start
    after = {name: value[:, case.after :].mean(1) for name, value in found.items()}
    lost = ~np.isfinite(found["rmse"]).all(1) | (found["replaced"].sum(1) > 0)
    seen = " ".join(f"{value:.3f}" for value in after["rmse"])
    print(f"  {case.name:12s} {label:22s} {seen}   lost {lost.sum()}   {seconds:.0f} s", flush=True)
    errors = {name: np.where(np.isnan(after[name]), np.inf, after[name]) for name in ("rmse", "crps")}
    medians = {name: float(np.median(value)) for name, value in (after | errors).items() if name != "replaced"}
    whole = {"rmse_all": float(np.median(found["rmse"].mean(1))), "rmse_worst": float(after["rmse"].max())}
    return medians | whole | {"lost": int(lost.sum())}


# --- the filters


class Taper(eqx.Module):
    """Gaspari and Cohn's taper along a ring; its half-width is data."""

    half_width: jax.Array
    size: int = eqx.field(static=True)

    def __call__(self, i, j):
        way = jnp.abs(i - j)
        return gaspari_cohn(jnp.minimum(way, self.size - way).astype(float), self.half_width)


LETKFS = {
    "linear": [(c, i) for c in (8.0, 10.0, 12.0) for i in (1.01, 1.02)],
    "quiet": [(3.0, 1.1), (6.0, 1.1), (6.0, 1.2), (9.0, 1.1)],
    "shocks": [(2.0, 1.4), (3.0, 1.3), (3.0, 1.4), (6.0, 1.3)],
    "half": [(3.0, 1.1), (3.0, 1.2), (6.0, 1.1)],
}
"""Half-widths and inflations that are tried."""


def score_filter(case: Case) -> ScoreFilter:
    """Make the filter in its one configuration; only the radius of the blocks differs."""
    return ScoreFilter(grid((case.dim,), case.radius))


def best_letkf(case: Case, seeds) -> dict[str, float]:
    """Try every LETKF, and take the one with the lowest median error among those that lost the fewest seeds."""
    tried = []
    for half_width, inflation in LETKFS[case.name]:
        method = LETKF(Taper(jnp.array(half_width), case.dim), jnp.array(inflation))
        tried.append(measure(case, method, seeds, f"LETKF c {half_width:g} i {inflation:g}"))
    return min(tried, key=lambda row: (row["lost"], row["rmse"]))


def rows(
    chosen: Callable[[str], bool], first_seed: int = 1000, rivals: bool = True
) -> Iterator[tuple[str, dict[str, float]]]:
    """Measure every case that is chosen."""
    for name, case in CASES.items():
        if not chosen(name):
            continue
        jax.clear_caches()
        seeds = range(first_seed, first_seed + case.num_seeds)
        figures = measure(case, score_filter(case), seeds, "ScoreFilter")
        if rivals and name in LETKFS:
            best = best_letkf(case, seeds)
            figures |= {f"letkf_{key}": best[key] for key in ("rmse", "coverage", "crps", "lost")}
            figures["times_letkf"] = figures["rmse"] / best["rmse"]
        if rivals and name in ("quiet", "shocks"):
            published = measure(case, EnSF(), seeds, "EnSF")
            figures |= {f"ensf_{key}": published[key] for key in ("rmse", "rmse_all", "coverage", "crps")}
            figures["times_ensf"] = figures["rmse"] / published["rmse"]
        yield name, figures
    if chosen("lorenz63"):
        jax.clear_caches()
        yield "lorenz63", lorenz63_rows(first_seed)
    if chosen("lorenz63_particles"):
        jax.clear_caches()
        case = LORENZ63._replace(name="lorenz63_particles", num_members=4000, jitter=0.03)
        yield case.name, measure(case, BootstrapFilter(), range(first_seed, first_seed + 8), "BootstrapFilter 4000")
    if chosen("surface_qg"):
        jax.clear_caches()
        yield from surface_qg_rows()
    if chosen("alarms"):
        jax.clear_caches()
        yield "alarms", alarms()
    for dim in (1_000, 10_000, 100_000):
        if chosen(f"cost_{dim}"):
            jax.clear_caches()
            yield f"cost_{dim}", cost(dim)


def lorenz63_rows(first_seed: int) -> dict[str, float]:
    """Filter Lorenz-63 by narrower and narrower mixtures."""
    figures = {}
    for num, bandwidth in ((100, 0.5), (400, 0.3), (2000, 0.05)):
        method = ScoreFilter(bandwidth=bandwidth, inflation=1.0, num_sweeps=1, jumps=None)
        seeds = range(first_seed, first_seed + 8)
        found = measure(LORENZ63._replace(num_members=num), method, seeds, f"N {num} h {bandwidth:g}")
        figures |= {f"{name}_{num}": found[name] for name in ("rmse", "spread", "coverage", "rmse_worst")}
    return figures


def surface_qg_rows(size: int = 16, num_cycles: int = 30, seeds=range(4)) -> Iterator[tuple[str, dict[str, float]]]:
    """Follow surface quasi-geostrophic turbulence (`examples/surface_qg.py`) on a small domain; later half.

    Every seed has a truth of its own, fifty days apart.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import surface_qg as example

    flow = example.Flow(size, width=10.0 * size / 32)
    states = jax.jit(partial(example.climate, flow), static_argnums=1)(jax.random.key(0), 41)
    for name in ("arctan", "half"):
        found: dict[str, list[list[float]]] = {}
        for seed in seeds:
            own = jnp.roll(states, 10 * seed, axis=0)  # the last is where the truth starts
            told = example.follow(jax.random.key(seed), flow, example.CASES[name], own, num_cycles)[2]
            for method, values in told.items():
                found.setdefault(method, []).append([float(value[num_cycles // 2 :].mean()) for value in values])
        rmse, _, coverage = (
            dict(zip(found, np.array(list(found.values())).mean(1)[:, i], strict=True)) for i in range(3)
        )
        yield f"surface_qg_{name}", {
            "rmse": rmse["ScoreFilter"], "coverage": coverage["ScoreFilter"], "letkf_rmse": rmse["LETKF"],
            "letkf_coverage": coverage["LETKF"], "times_letkf": rmse["ScoreFilter"] / rmse["LETKF"],
            "times_ensf": rmse["ScoreFilter"] / rmse["EnSF"],
        }  # fmt: skip


def cost(dim: int, num_times: int = 5) -> dict[str, float]:
    """Time one cycle of a large state, forecast included, and say how much memory the process has used at most."""
    case = Case(f"cost_{dim}", dim, num_times=num_times, after=0)
    model = read_space(space(case), jnp.zeros((2, dim)), None).model
    method = score_filter(case)
    _, _, y = jax.jit(partial(simulate, case=case))(jax.random.key(0))
    members = Members(jax.random.normal(jax.random.key(1), (case.num_members, dim)), jnp.zeros(case.num_members))
    now = cycle.Now(jnp.zeros(()), members, method.init(jax.random.key(2), members))

    @eqx.filter_jit
    def one(key, method, model, now, y):
        return cycle.run(key, method, model, now, now.t[None] + 1.0, y[None])[0]

    seconds = []
    for key, row in zip(jax.random.split(jax.random.key(3), num_times), y, strict=True):
        start = time.process_time()
        now = jax.block_until_ready(one(key, method, model, now, row))
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"ms_per_cycle": 1e3 * float(np.median(seconds[1:])), "compile_s": seconds[0], "peak_gib": peak}


def alarms(num: int = 100, spin_up: int = 20) -> dict[str, float]:
    """Count alarms of the data test: on worlds of the filter's own model, and on four kinds of sabotage.

    Filters without jumps start around the truth: far away they are lost before they are sabotaged.
    """
    case = Case("alarms", 40, num_times=60)
    near = case._replace(spread=0.3)
    model = read_space(space(case), jnp.zeros((2, case.dim)), None).model
    plain = ScoreFilter(grid((case.dim,), case.radius), jumps=None)
    sabotages = {
        "no_inflation": (case, LETKF(grid((case.dim,), 4.0, half_width=3.0).taper)),
        "half_noise": (near._replace(noise=2.0 * case.noise), plain),
        "forcing_9": (near._replace(drift=partial(lorenz96, forcing=9.0)), plain),
        "shocks": (near._replace(shocks=True), plain),
    }

    def delays(world: Case, method: AbstractFilter, seeds) -> np.ndarray:
        @jax.jit
        @jax.vmap
        def probits_of(seed):
            key = jax.random.key(seed)
            start, _, y = simulate(key, world)
            first = jax.random.normal(jax.random.fold_in(key, 1), (case.num_members, case.dim))
            first = first if world.spread is None else start + world.spread * first
            members = Members(first, jnp.zeros(case.num_members))
            now = cycle.Now(jnp.zeros(()), members, method.init(key, members))
            ts = jnp.arange(1.0, case.num_times + 1.0)
            _, cycles = cycle.run(key, method, model, now, ts, y)
            return probits(key, model.observed, ts, cycles.analysis.predictive, y)

        found = [monitor(z, spin_up).alarm for z in np.asarray(probits_of(jnp.asarray(seeds)))]
        return np.array([np.nan if alarm is None else alarm - spin_up for alarm in found])

    false = delays(case, score_filter(case), range(5000, 5000 + num))
    print(f"  twins: {int(np.isfinite(false).sum())} alarms of {num}", flush=True)
    caught = []
    for name, (world, method) in sabotages.items():
        caught.append(delays(world, method, range(6000, 6000 + num // 4)))
        print(f"  {name}: delays {caught[-1]}", flush=True)
    late = np.concatenate(caught)
    return {
        "false_alarms": float(np.isfinite(false).sum()), "worlds": num, "caught": float(np.isfinite(late).sum()),
        "sabotages": len(late), "median_delay": float(np.nanmedian(late)),
    }  # fmt: skip


def main():
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(CASES))
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--no-rivals", action="store_true")
    args = parser.parse_args()
    for name, figures in rows(lambda name: name in args.tasks, args.first_seed, not args.no_rivals):
        print(name, " ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
