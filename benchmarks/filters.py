"""Filters of chaotic models beside rivals tuned in the same run: errors, spread, coverage and cost, seed by seed.

    python benchmarks/filters.py --tasks quiet shocks --seeds 8

Lorenz-96 as in Bao, Zhang and Zhang 2024 (arXiv 2309.00983, section 4; arctan observations, ensembles that start at
random, shocks proportional to the state that the model knows nothing of) and in Sakov and Oke 2008 (linear
observations). Lorenz-63 as in Sakov, Oliver and Bertino 2012. Rivals are tuned on the very seeds that are reported.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import stats

from scoreinfer.filters import AbstractFilter, Members, ScoreFilter, cycle, grid
from scoreinfer.model.states import StateSpace, read_space

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
        observed: which components are observed.
        shocks: whether the truth is hit by shocks.
        spread: standard deviation of the first members about the truth; None: N(0, 1), whatever the truth.
        bound: members are clipped to this absolute value, in the model of every filter.
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
    observed: slice = slice(None)
    shocks: bool = False
    spread: float | None = None
    bound: float = 50.0


CASES = {
    case.name: case
    for case in (
        Case("linear", 40, dt=0.05, every=1, num_times=500, after=100, see=lambda x: x, noise=1.0, spread=0.03),
        Case("quiet", 100),
        Case("shocks", 100, shocks=True),
        Case("half", 100, observed=slice(None, None, 2)),
        Case("quiet_1000", 1000, num_times=60, after=30),
        Case("shocks_1000", 1000, num_times=60, after=30, shocks=True),
    )
}


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
    seen = jnp.zeros(case.dim, bool).at[case.observed].set(True)
    return x, truth, jnp.where(seen, y, jnp.nan)


def space(case: Case) -> StateSpace:
    """Write the model as a filter is told it: without shocks."""

    def transition(key, t0, t1, x):
        x = jax.lax.fori_loop(0, case.every, lambda _, x: runge_kutta(case.drift, x, case.dt), x)
        return jnp.clip(x, -case.bound, case.bound)

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


def measure(case: Case, method: AbstractFilter, seeds) -> dict[str, np.ndarray]:
    """Run a filter on every seed; figures by seed and time."""
    model = read_space(space(case), jnp.zeros((2, case.dim)), None).model
    method.check(model)
    wide = stats.t.ppf(0.975, case.num_members - 1) * np.sqrt(1.0 + 1.0 / case.num_members)

    def one(seed):
        key = jax.random.key(seed)
        start, truth, y = simulate(key, case)
        first = jax.random.normal(jax.random.fold_in(key, 1), (case.num_members, case.dim))
        first = first if case.spread is None else start + case.spread * first
        members = Members(first, jnp.zeros(case.num_members))
        now = cycle.Now(jnp.zeros(()), members, method.init(key, members))
        ts = jnp.arange(1.0, case.num_times + 1.0)

        def step(now, inputs):
            key, t, truth, y = inputs
            now, cycles = cycle.run(key, method, model, now, t[None], y[None])
            x = now.members.x
            off, sd = x.mean(0) - truth, x.std(0, ddof=1)
            return now, {
                "rmse": jnp.sqrt(jnp.mean(off**2)),
                "spread": jnp.sqrt(jnp.mean(sd**2)),
                "coverage": jnp.mean(jnp.abs(off) < wide * sd),
                "crps": fair_crps(x, truth).mean(),
                "replaced": cycles.replaced.sum(),
            }

        keys = jax.random.split(jax.random.fold_in(key, 2), case.num_times)
        return jax.lax.scan(step, now, (keys, ts, truth, y))[1]

    return {name: np.asarray(value) for name, value in jax.jit(jax.vmap(one))(jnp.asarray(seeds)).items()}


def summary(case: Case, figures: dict[str, np.ndarray], label: str = "") -> dict[str, float]:
    """Take medians over seeds; print every seed; count seeds that are not finite or had members replaced."""
    after = figures["rmse"][:, case.after :].mean(1)
    print(f"  {case.name} {label}: rmse after spin-up {' '.join(f'{value:.3f}' for value in after)}", flush=True)
    row = {name: float(np.median(figures[name][:, case.after :].mean(1))) for name in ("spread", "coverage", "crps")}
    lost = ~np.isfinite(figures["rmse"]).all(1) | (figures["replaced"].sum(1) > 0)
    return {
        "rmse": float(np.median(after)), "rmse_worst": float(after.max()),
        "rmse_all": float(np.median(figures["rmse"].mean(1))), **row, "lost": int(lost.sum()),
    }  # fmt: skip


def score_filter(case: Case, radius: float = 12.0) -> ScoreFilter:
    """Make the filter in its one configuration."""
    return ScoreFilter(grid((case.dim,), radius))
