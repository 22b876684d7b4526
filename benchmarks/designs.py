"""One fit for many designs, against known answers: figures of `accuracy.py --suite designs`.

Numbers of rows, irregular times, groups of rows, missing counts, and draws that are weighed anew.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from measure import Clock
from numpyro.contrib.control_flow import scan
from scipy import stats
from scipy.special import logsumexp

import scoreinfer as si
from scoreinfer.montecarlo.weights import effective_sample_size, relative_weights

NUM_DRAWS = 10_000
Figures = dict[str, float]


def rows(seed: int, chosen: Callable[[str], bool]) -> Iterator[tuple[str, Figures]]:
    """Yield the rows of every part of the suite whose name is chosen."""
    parts = {"location": location, "times": times, "groups": groups, "lynx_hare": counts, "reweigh": weighed_anew}
    for name, part in parts.items():
        if chosen(name):
            yield from part(seed)


def moments(draws, site: str) -> tuple[np.ndarray, np.ndarray]:
    """Compute mean and standard deviation of a site by weight."""
    weight = relative_weights(draws.log_weight)
    values = np.asarray(draws.sites[site], np.float64).reshape(draws.num, -1)
    mean = weight @ values / weight.sum()
    return mean, np.sqrt(weight @ (values - mean) ** 2 / weight.sum())


def verdict(draws) -> Figures:
    return {
        "ess_share": effective_sample_size(draws.log_weight) / draws.num,
        "certified": draws.certificate.certified,
        "k_hat": draws.certificate.k_hat,
    }


def against(draws, sites, mean, sd, log_evidence) -> Figures:
    """Hold means of scalar sites and the evidence against known ones."""
    found = np.concatenate([moments(draws, site)[0] for site in sites])
    return verdict(draws) | {
        "mean_error": np.abs((found - mean) / sd).max(),
        "log_evidence_error": abs(draws.certificate.log_evidence - log_evidence),
    }


def fitted(key, model, designs, **options):
    """Fit, and measure the seconds."""
    with Clock() as clock:
        posterior = si.NPSE(model, designs=designs, progress_bar=False, **options).fit(key)
    return posterior, {"fit_s": clock.times.wall, "fit_cpu_s": clock.times.cpu}


# --- Gaussian location: 1 to 200 rows, 0 to 60 % missing

MOST_ROWS = 200


def any_rows(key):
    """Draw a number of rows, uniform on the log scale, and which of them are there; the first always is."""
    for_num, for_share, for_rows = jax.random.split(key, 3)
    num = jnp.floor(jnp.exp(jax.random.uniform(for_num, maxval=np.log(MOST_ROWS + 1.0))))
    missing = jax.random.uniform(for_rows, (MOST_ROWS,)) < jax.random.uniform(for_share, maxval=0.6)
    at = jnp.arange(MOST_ROWS)
    return {"present": (at < num) & (~missing | (at == 0))}


def located(present, y=None):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", MOST_ROWS), numpyro.handlers.mask(mask=present):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def location(seed: int) -> Iterator[tuple[str, Figures]]:
    """Weights, evidence and calibration at any number of rows, any of them missing."""
    posterior, seconds = fitted(jax.random.key(seed), located, any_rows)
    yield "location/fit", seconds
    rng = np.random.default_rng(seed)
    for num in (1, 10, 50, 200):
        for share in (0.0, 0.3, 0.6) if num > 1 else (0.0,):
            at = np.arange(MOST_ROWS)
            present = (at < num) & ((rng.random(MOST_ROWS) >= share) | (at == 0))
            y = rng.normal(rng.normal(), 1.0, MOST_ROWS)
            draws = posterior.sample(jax.random.key(num), NUM_DRAWS, present, y=y)
            dirty = np.where(present, y, np.where(at % 2, np.nan, 1e30))
            other = posterior.sample(jax.random.key(num), NUM_DRAWS, present, y=dirty)
            seen, sd = y[present], (1 + present.sum()) ** -0.5
            evidence = stats.multivariate_normal(np.zeros(len(seen)), np.eye(len(seen)) + 1.0).logpdf(seen)
            yield f"location/{num}/{share:.0%}", verdict(draws) | {
                "mean_error": abs(moments(draws, "mean")[0][0] - sd**2 * seen.sum()) / sd,
                "log_evidence_error": abs(draws.certificate.log_evidence - evidence),
                "garbage": float(
                    not np.array_equal(draws.unconstrained, other.unconstrained)
                    or not np.array_equal(draws.log_weight, other.log_weight)
                ),
            }  # fmt: skip
    ranks = si.calibration.sbc(jax.random.key(seed + 1), posterior, 2000, label=stratum, progress_bar=False)
    for label, within in ranks.strata().items():
        size, gaps = ("few", "many")[label // 2], ("whole", "gaps")[label % 2]
        yield f"location/calibration/{size}/{gaps}", {"p_value": within.p_value, "num": within.num_simulations}


def stratum(y):
    """Tell few rows from many, and few gaps from many."""
    num = jnp.where(y["present"], jnp.arange(MOST_ROWS) + 1, 0).max()
    return 2 * (num > 14) + (y["present"].sum() < 0.7 * num)


# --- an Ornstein-Uhlenbeck process at 5 to 40 irregular times

MOST_TIMES = 40


def any_times(key):
    """Draw a number of times, and gaps from .1 to 2."""
    for_num, for_gaps = jax.random.split(key)
    gaps = jnp.exp(jax.random.uniform(for_gaps, (MOST_TIMES,), minval=np.log(0.1), maxval=np.log(2.0)))
    return {
        "t": jnp.cumsum(gaps),
        "present": jnp.arange(MOST_TIMES) < jax.random.randint(for_num, (), 5, MOST_TIMES + 1),
    }


def reverting(t, present, y=None):
    """Unit stationary variance; level and rate of return are unknown."""
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))

    def step(last, row):
        gap, here, value = row
        decay = jnp.exp(-rate * gap)
        law = dist.Normal(level + (last - level) * decay, jnp.sqrt(1.0 - decay**2))
        new = numpyro.sample("y", law.mask(here), obs=value)
        return jnp.where(here, new, last), None

    scan(step, level, (jnp.diff(t, prepend=t[:1] - 1e3), present, y))


def times(seed: int) -> Iterator[tuple[str, Figures]]:
    """Mean of both parameters against quadrature."""
    posterior, seconds = fitted(jax.random.key(seed), reverting, any_times, num_steps=3000)
    yield "times/fit", seconds
    rng = np.random.default_rng(seed)
    for num in (5, 10, 20, 40):
        t, present = np.cumsum(np.exp(rng.uniform(np.log(0.1), np.log(2.0), MOST_TIMES))), np.arange(MOST_TIMES) < num
        y = np.zeros(MOST_TIMES)
        last, level, rate = 0.0, rng.normal(), np.exp(0.5 * rng.normal())
        for i, gap in enumerate(np.diff(t, prepend=t[0] - 1e3)):
            decay = np.exp(-rate * gap)
            y[i] = last = level + (last - level) * decay + np.sqrt(1 - decay**2) * rng.normal()
        draws = posterior.sample(jax.random.key(num), NUM_DRAWS, t, present, y=y)
        mean, sd, evidence = quadrature(t[:num], y[:num])
        yield f"times/{num}", against(draws, ("level", "rate"), mean, sd, evidence)


def quadrature(t, y) -> tuple[np.ndarray, np.ndarray, float]:
    """Compute mean and sd of level and rate, and the log evidence, on a fine grid."""
    level, log_rate = np.meshgrid(np.linspace(-5, 5, 801), np.linspace(-2.5, 2.5, 801), indexing="ij")
    rate = np.exp(log_rate)
    log_p = stats.norm.logpdf(level) + stats.norm.logpdf(log_rate, 0.0, 0.5) + stats.norm.logpdf(y[0], level, 1.0)
    for gap, last, new in zip(np.diff(t), y[:-1], y[1:], strict=True):
        decay = np.exp(-rate * gap)
        log_p += stats.norm.logpdf(new, level + (last - level) * decay, np.sqrt(1 - decay**2))
    log_evidence = logsumexp(log_p) + np.log(10 / 800) + np.log(5 / 800)
    weight = np.exp(log_p - logsumexp(log_p))
    mean = np.array([(weight * value).sum() for value in (level, rate)])
    square = np.array([(weight * value**2).sum() for value in (level, rate)])
    return mean, np.sqrt(square - mean**2), float(log_evidence)


# --- groups: 5 to 50 of them, of 1 to 20 rows

MOST_GROUPS, MOST_IN_GROUP = 50, 20


def any_groups(key):
    for_num, for_rows = jax.random.split(key)
    sizes = jax.random.randint(for_rows, (MOST_GROUPS, 1), 1, MOST_IN_GROUP + 1)
    num = jax.random.randint(for_num, (), 5, MOST_GROUPS + 1)
    return {"present": (jnp.arange(MOST_GROUPS)[:, None] < num) & (jnp.arange(MOST_IN_GROUP) < sizes)}


def grouped(present, y=None):
    """Group means around a common mean; groups that are not there keep their prior."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    spread = numpyro.sample("spread", dist.LogNormal(-0.5, 0.5))
    with numpyro.plate("groups", MOST_GROUPS):
        own = numpyro.sample("own", dist.Normal(0.0, 1.0))
    law = dist.Normal((mean + spread * own)[:, None], 1.0).expand([MOST_GROUPS, MOST_IN_GROUP])
    numpyro.sample("y", law.mask(present), obs=y)


def groups(seed: int) -> Iterator[tuple[str, Figures]]:
    """Mean, spread and evidence against a grid over the spread, with everything else in closed form."""
    options = {"width": 32, "depth": 1, "num_steps": 4000, "batch_size": 128, "target_share": 0.5}
    posterior, seconds = fitted(jax.random.key(seed), grouped, any_groups, target_score=False, **options)
    yield "groups/fit", seconds
    rng = np.random.default_rng(seed)
    for num in (5, 15, 30, 50):
        sizes = rng.integers(1, MOST_IN_GROUP + 1, MOST_GROUPS)
        present = (np.arange(MOST_GROUPS)[:, None] < num) & (np.arange(MOST_IN_GROUP) < sizes[:, None])
        own = rng.normal() + np.exp(-0.5 + 0.5 * rng.normal()) * rng.normal(size=(MOST_GROUPS, 1))
        y = own + rng.normal(size=present.shape)
        draws = posterior.sample(jax.random.key(num), NUM_DRAWS, present, y=y)
        mean, sd, evidence = group_truth(sizes[:num], np.where(present, y, 0.0)[:num])
        yield f"groups/{num}", against(draws, ("mean", "spread"), mean, sd, evidence)


def group_truth(sizes, y) -> tuple[np.ndarray, np.ndarray, float]:
    """Compute mean and sd of common mean and spread, and the log evidence, given group sizes and zero-padded data."""
    log_spread = np.linspace(-3.5, 2.5, 4001)
    spread, averages = np.exp(log_spread)[:, None], y.sum(1) / sizes
    variance = spread**2 + 1 / sizes  # of group averages around the common mean
    within = -0.5 * ((y**2).sum() - (sizes * averages**2).sum()) - 0.5 * (sizes.sum() - len(sizes)) * np.log(2 * np.pi)
    within -= 0.5 * np.log(sizes).sum()
    precision = 1.0 + (1 / variance).sum(1)
    centre = (averages / variance).sum(1) / precision
    log_p = within - 0.5 * (np.log(2 * np.pi * variance) + averages**2 / variance).sum(1)
    log_p += 0.5 * precision * centre**2 - 0.5 * np.log(precision) + stats.norm.logpdf(log_spread, -0.5, 0.5)
    step = log_spread[1] - log_spread[0]
    weight = np.exp(log_p - logsumexp(log_p))
    spread = spread[:, 0]
    mean = np.array([weight @ centre, weight @ spread])
    square = np.array([weight @ (centre**2 + 1 / precision), weight @ spread**2])
    return mean, np.sqrt(square - mean**2), float(logsumexp(log_p) + np.log(step))


# --- lynx and hare, a third of the counts missing


def counts(seed: int) -> Iterator[tuple[str, Figures]]:
    """Learn the published model for any counts that are missing; compare with NUTS for one third of them."""
    import lynx_hare

    missing = ("pelts",)
    options = {"num_steps": 2000, "width": 48, "target_share": 0.33, "target_score": False, "tune": True}
    present = np.random.default_rng(seed).random(lynx_hare.PELTS.shape) > 1 / 3

    def some(key):
        for_share, for_counts = jax.random.split(key)
        share = jax.random.uniform(for_share, minval=0.5, maxval=1.0)
        return {"pelts": jax.random.bernoulli(for_counts, share, lynx_hare.PELTS.shape)}

    posterior, seconds = fitted(jax.random.key(seed), lynx_hare.model, some, missing=missing, **options)
    given = posterior.condition(pelts=np.where(present, lynx_hare.PELTS, np.nan))
    draws = given.sample(jax.random.key(1), NUM_DRAWS)
    if not draws.certificate.certified:
        draws = given.focus(jax.random.key(1)).sample(jax.random.key(1), NUM_DRAWS)
    truth, r_hat = long_run(partial(kept, present), seed)
    yield "lynx_hare/batch", verdict(draws) | seconds | {"nuts_r_hat": r_hat}
    for site, values in truth.items():
        columns = np.asarray(values, np.float64).reshape(len(values), -1)
        mean, sd = moments(draws, site)
        yield (
            f"lynx_hare/{site}",
            {
                "mean_error": np.abs((mean - columns.mean(0)) / columns.std(0)).max(),
                "sd_error": np.abs(sd / columns.std(0) - 1).max(),
            },
        )


def kept(present, pelts):
    """The published model with another likelihood: that of the counts which are there, and no others."""
    import lynx_hare

    with numpyro.handlers.block(hide=["pelts"]), numpyro.handlers.trace() as played:
        lynx_hare.model(pelts)
    law = played["pelts"]["fn"].base_dist
    loc, scale = law.loc[present], jnp.broadcast_to(law.scale, present.shape)[present]
    numpyro.sample("kept", dist.LogNormal(loc, scale), obs=pelts[present])


START = {
    "alpha": 0.55, "beta": 0.028, "gamma": 0.8, "delta": 0.024,
    "initial": np.array([33.0, 6.0]), "sigma": np.array([0.25, 0.25]),
}  # fmt: skip
"""About the published posterior means: of chains that start at medians of the prior, one in four stays elsewhere."""


def long_run(model, seed: int) -> tuple[dict[str, np.ndarray], float]:
    """Run four chains of NUTS from the published answer; also give the largest R-hat."""
    import lynx_hare
    from numpyro.diagnostics import split_gelman_rubin
    from numpyro.infer import MCMC, NUTS, init_to_value

    mcmc = MCMC(
        NUTS(model, init_strategy=init_to_value(values=START)), num_warmup=500, num_samples=1500, num_chains=4,
        chain_method="sequential", progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(seed + 2), lynx_hare.PELTS)
    chains = mcmc.get_samples(group_by_chain=True).values()
    return mcmc.get_samples(), max(float(np.max(split_gelman_rubin(np.asarray(chain)))) for chain in chains)


# --- draws of another posterior


def weighed_anew(seed: int) -> Iterator[tuple[str, Figures]]:
    """Weigh draws of N(0, I) in five dimensions for N(delta, r I): the closed-form share, a refusal, and a bridge."""
    for delta, ratio in ((0.5, 1.0), (0.3, 0.7), (0.2, 1.3)):
        draws = standard_normal(seed, 200_000)
        new = si.reweigh(jax.random.key(seed + 1), draws, normal, delta, ratio**0.5)
        share = (np.sqrt(ratio * (2 - ratio)) * np.exp(-(delta**2) / (2 - ratio))) ** 5
        error = abs(verdict(new)["ess_share"] / share - 1)
        yield f"reweigh/{delta}/{ratio}", verdict(new) | {"share_error": error, "expected_share": share}
    draws = standard_normal(seed, 4000)
    refused = si.reweigh(jax.random.key(seed + 1), draws, normal, 2.0, 1.0)
    bridged = si.bridge(jax.random.key(seed + 2), draws, normal, 2.0, 1.0)
    mean, sd = moments(bridged, "a")
    yield (
        "reweigh/bridge",
        verdict(bridged)
        | {
            "refused_before": not refused.certificate.certified,
            "mean_error": np.abs(mean - 2.0).max(),
            "sd_error": np.abs(sd - 1.0).max(),
            "log_evidence_error": abs(bridged.certificate.log_evidence),
        },
    )


def normal(mean, scale):
    """A prior without data: the posterior itself."""
    numpyro.sample("a", dist.Normal(mean, scale).expand([5]).to_event(1))


def standard_normal(seed: int, num: int):
    """Draw from N(0, I), with the exact weights."""
    problem = si.from_numpyro(normal, 0.0, 1.0)
    z = jax.random.normal(jax.random.key(seed), (num, 5))
    log_joint = jax.vmap(lambda z: problem.log_joint(z, {}))(z)
    log_q = jax.scipy.stats.norm.logpdf(z).sum(1)
    return si.Draws({"a": z}, z, log_joint - log_q, log_q, log_joint, {}, problem=problem)
