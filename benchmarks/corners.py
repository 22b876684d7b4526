"""Posteriors with a second mode in a rare corner of the prior, of known share.

The first of d standard normal parameters decides: beyond a threshold it lies in the corner, where the simulator returns
data as from elsewhere, and the signs of the other parameters are turned round. Given the first parameter everything is
Gaussian, so that shares and evidence are sums over a grid.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC
from scipy.special import expit, logsumexp
from scipy.stats import norm

import scoreinfer as si

WRONG_SHARE = 0.1
STEPS, BUDGET = 3000, 10_000


class Corner(NamedTuple):
    """A model with a mode in a corner of its prior.

    Args:
        dim: number of parameters.
        mass: prior mass of the corner.
        noise: noise of the data.
        inside: noise of the first datum where the parameter lies in the corner (a thin spike has less).
        width: width of the corner's edge; 0: a jump.
        most: the largest share of the posterior that the corner can have.
    """

    dim: int
    mass: float
    noise: float = 0.05
    inside: float = 0.05
    width: float = 0.0
    most: float = 0.65

    @property
    def edge(self) -> float:
        """Where the corner begins."""
        return float(norm.isf(self.mass))

    @property
    def place(self) -> float:
        """Where the corner's data lie: where the others' density is as low as the corner's largest share asks for."""
        density = self.mass / (np.sqrt(2 * np.pi) * self.inside) * (1 - self.most) / self.most
        return -float(np.sqrt(2 * np.log(min(norm.pdf(0.0) / density, np.exp(18.0)))))

    def within(self, first: Any, xp: Any = jnp) -> Any:
        """Say how far inside the corner a first parameter lies, from 0 to 1."""
        if self.width == 0.0:
            return xp.where(first > self.edge, 1.0, 0.0)
        return (jax.nn.sigmoid if xp is jnp else expit)((first - self.edge) / self.width)

    def mean(self, first: Any, xp: Any = jnp) -> Any:
        """Compute the mean of the first datum: hardly moving in the corner."""
        return first + self.within(first, xp) * (self.place + 0.1 * self.inside * (first - self.edge) - first)

    def scale(self, first: Any, xp: Any = jnp) -> Any:
        """Compute the noise of the first datum."""
        return self.noise + self.within(first, xp) * (self.inside - self.noise)

    def model(self, y=None):
        """Make the NumPyro model."""
        z = numpyro.sample("z", dist.Normal(jnp.zeros(self.dim), 1.0).to_event(1))
        sign = 1.0 - 2.0 * self.within(z[0])
        mean = jnp.concatenate([self.mean(z[:1]), sign * z[1:]])
        scale = jnp.concatenate([self.scale(z[:1]), jnp.full(self.dim - 1, self.noise)])
        numpyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y)

    def grid(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute log p(first, y) on a grid of the first parameter, in log masses."""
        grid = np.unique(np.concatenate([np.linspace(-8, 8, 20_001), self.edge + np.linspace(-1, 1.5, 20_001)]))
        sign = 1.0 - 2.0 * self.within(grid, np)
        log_p = norm.logpdf(grid) + norm.logpdf(y[0], self.mean(grid, np), self.scale(grid, np))
        for value in y[1:]:
            log_p += norm.logpdf(value, 0.0, np.sqrt(sign**2 + self.noise**2))
        return grid, log_p + np.log(np.gradient(grid))

    def truth(self, y: np.ndarray) -> tuple[float, float]:
        """Compute the corner's posterior mass and the log evidence."""
        grid, log_mass = self.grid(y)
        log_evidence = logsumexp(log_mass)
        return float(np.exp(log_mass - log_evidence)[grid > self.edge].sum()), float(log_evidence)

    def observation(self, share: float, seed: int) -> np.ndarray:
        """Find data for which the corner holds about this share of the posterior."""
        rest = np.random.default_rng(seed).normal(size=self.dim - 1) * np.sqrt(1 + self.noise**2)
        places = self.place + self.inside * np.linspace(0.0, 4.0, 161)
        shares = [self.truth(np.concatenate([[place], rest]))[0] for place in places]
        nearest = int(np.argmin(np.abs(np.array(shares) - share)))
        return np.concatenate([places[nearest : nearest + 1], rest]).astype(np.float32)


class Problem(NamedTuple):
    """A corner, data for which it holds a known share, and how the posterior is learned and asked."""

    kind: str
    corner: Corner
    share: float
    seed: int

    @property
    def data(self) -> np.ndarray:
        """The data."""
        return self.corner.observation(self.share, self.seed)


class Outcome(NamedTuple):
    """What the certificate said, and what the known answers say."""

    problem: Problem
    share: float
    found_share: float
    evidence_error: float
    certificate: si.Certificate
    certified: bool
    reason: str

    @property
    def wrong(self) -> bool:
        """Whether the corner's share is off by more than .1, or the log evidence by .05 and five standard errors."""
        bound = 0.05 + 5 * self.certificate.log_evidence_se
        return abs(self.found_share - self.share) > WRONG_SHARE or not self.evidence_error <= bound

    @property
    def covered(self) -> bool:
        """Whether the stated resolution says that the corner would have been seen."""
        c = self.certificate
        return self.share >= c.seen_mass and self.problem.corner.mass >= c.seen_prior_mass

    def __str__(self) -> str:
        kind, corner, *_ = self.problem
        spike = " spike" if corner.inside < corner.noise else ""
        verdict = ("certified" if self.certified else "refused  ") + (", wrong" if self.wrong else ", right")
        c = self.certificate
        return (
            f"{kind:8s} d {corner.dim:2d} mass {corner.mass:.0e}{spike} share {self.share:.3f} found "
            f"{self.found_share:.3f} evidence off {self.evidence_error:.3f} {verdict}, "
            f"seen {c.seen_mass:.3f} {c.seen_prior_mass:.0e}, ESS {c.ess:.0f}  {self.reason}"
        )


SHARES = (0.06, 0.2, 0.4, 0.6)
AMORTISED = (
    ("online", Corner(1, 1e-2, width=0.02)), ("online", Corner(2, 1e-3)), ("online", Corner(3, 1e-4, width=0.05)),
    ("online", Corner(5, 3e-4)), ("online", Corner(10, 1e-3)), ("online", Corner(20, 3e-3)),
    ("budget", Corner(2, 1e-4)), ("budget", Corner(4, 1e-3, width=0.05)), ("budget", Corner(8, 1e-2)),
    ("budget", Corner(2, 1e-5, inside=0.01)), ("online", Corner(1, 1e-3, inside=0.002)),
)  # fmt: skip
"""How each amortised posterior is learned; its four observations are asked, and those of two focused as well."""
FOCUSED = (Corner(2, 1e-3), Corner(4, 1e-3, width=0.05))
CHAINS = (
    Corner(1, 1e-3), Corner(2, 1e-4), Corner(3, 1e-3, width=0.05), Corner(5, 1e-4), Corner(10, 1e-3), Corner(20, 1e-3),
)  # fmt: skip


def problems() -> Iterator[tuple[str, Corner]]:
    """Yield what is trained, one by one."""
    yield from AMORTISED
    yield from (("paths", Corner(1, mass)) for mass in (1e-2, 1e-3))
    yield from (("chains", corner) for corner in CHAINS)


def outcomes(key, kind: str, corner: Corner) -> Iterator[Outcome]:
    """Learn, ask, and judge."""
    observations = [Problem(kind, corner, share, seed) for seed, share in enumerate(SHARES)]
    if kind == "chains":
        yield _chains(key, observations[1 + corner.dim % 3])
        return
    keys = [jax.random.fold_in(key, p.seed) for p in observations]
    if kind == "paths":
        model = path_model(corner)
        paths = si.SMDP(model, "x", num_steps=1000, progress_bar=False).fit(key)
        for own, p in zip(keys, observations, strict=True):
            yield _drawn(own, p, paths.condition(y=p.data[0]), "x")
        return
    options = {"num_simulations": BUDGET} if kind == "budget" else {}
    posterior = si.NPSE(corner.model, num_steps=STEPS, progress_bar=False, **options).fit(key)
    for own, p in zip(keys, observations, strict=True):
        yield _drawn(own, p, posterior.condition(y=p.data), "z")
    if corner in FOCUSED:
        for own, p in zip(keys, observations, strict=True):
            focused = posterior.condition(y=p.data).focus(own, num_steps=500)
            yield _drawn(own, p._replace(kind="focused"), focused, "z")


def path_model(corner: Corner) -> Any:
    """Make a random walk whose last state, a standard normal one, is seen through the corner's map."""
    ts = jnp.linspace(0.0, 1.0, 5)

    def model(y=None):
        x = numpyro.sample("x", dist.EulerMaruyama(ts, lambda x, t: (0.0 * x, 0.3), dist.Normal(0.0, 0.91**0.5)))
        numpyro.sample("y", dist.Normal(corner.mean(x[-1]), corner.scale(x[-1])), obs=y)

    return model


def _drawn(key, problem: Problem, posterior: Any, site: str) -> Outcome:
    """Draw from the posterior of a problem's data."""
    draws = posterior.sample(key, 4000)
    log_weight = np.asarray(draws.log_weight, np.float64)
    weight = np.exp(log_weight - np.nanmax(log_weight))
    first = np.asarray(draws.sites[site])[:, -1 if site == "x" else 0]
    found = float(np.nansum(weight * (first > problem.corner.edge)) / np.nansum(weight))
    c = draws.certificate
    return _outcome(problem, found, c, c.certified, c.reason)


def _chains(key, problem: Problem) -> Outcome:
    """Learn this posterior alone, and run chains."""
    mcmc = MCMC(
        si.ScoreSDE(problem.corner.model, num_proposals=4, progress_bar=False), num_warmup=300, num_samples=1000,
        num_chains=4, chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    mcmc.run(key, y=problem.data)
    verdict = si.certify(mcmc)
    found = float((np.asarray(mcmc.get_samples()["z"])[:, 0] > problem.corner.edge).mean())
    return _outcome(problem, found, verdict.weights, verdict.certified, verdict.reason)


def _outcome(problem: Problem, found: float, certificate: si.Certificate, certified: bool, reason: str) -> Outcome:
    share, log_evidence = problem.corner.truth(np.asarray(problem.data, np.float64))
    error = abs(certificate.log_evidence - log_evidence)
    return Outcome(problem, share, found, error, certificate, certified, reason)
