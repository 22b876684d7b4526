r"""Ensemble Kalman filters: members are moved by the ensemble's own regression of the state on the observation.

With members x_j, h_j = E(y | x_j), and R the mean over members of var(y | x_j), the regression is that of a Gaussian
with covariances C_xh = cov(x, h) and C_hh = cov(h, h),

    x -> x + K (y - h),        K = C_xh (C_hh + R)^{-1}.

A small ensemble has spurious covariances. A *taper* multiplies them by a number that
falls with the distance of two components, and *inflation* widens an ensemble that its own errors made too narrow.

References: Burgers, van Leeuwen and Evensen 1998, MWR 126; Hunt, Kostelich and Szunyogh 2007, Physica D 230.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Bool, Float, Int

from scoreinfer.filters.base import AbstractFilter, Analysis, EvidenceKind, Members, predict
from scoreinfer.filters.spectral import left_of, shrunk
from scoreinfer.filters.taper import Locality
from scoreinfer.markov import Entries, Observed, Time
from scoreinfer.process.base import LOG_2PI

Taper = (
    Locality
    | Callable[[Int[Array, "..."], Int[Array, "..."]], Float[Array, "..."]]
    | Float[Array | np.ndarray, "dim dim"]
)
"""A number from 0 to 1 for two components: a locality, a function of two arrays of their numbers, or a matrix."""


class Seen(NamedTuple):
    """What an ensemble Kalman filter sees of an observation. Missing entries have no innovation and no anomalies.

    Args:
        anomalies: h_j minus their mean.
        innovation: y minus the mean of the h_j.
        variance: R.
        present: which entries are not missing.
    """

    anomalies: Float[Array, "num entries"]
    innovation: Entries
    variance: Entries
    present: Bool[Array, " entries"]


def see(observed: Observed, t: Time, members: Members, y: Entries) -> Seen:
    """Compute the means and variances of the observation at all members."""
    u = jax.vmap(observed.predict, (None, 0))(t, members.x)
    h = jax.vmap(observed.mean, (None, 0))(t, u)
    variance = jax.vmap(observed.variance, (None, 0))(t, u).mean(axis=0)
    present = ~jnp.isnan(y)
    mean = h.mean(axis=0)
    return Seen(
        jnp.where(present, h - mean, 0.0),
        jnp.where(present, y - mean, 0.0),
        jnp.where(present, variance, 1.0),
        present,
    )


class AbstractKalman(AbstractFilter):
    """Localisation, inflation and evidence, as all ensemble Kalman filters have them."""

    log_evidence_kind: ClassVar[EvidenceKind] = "approximate"
    taper: eqx.AbstractVar[Taper | None]
    inflation: eqx.AbstractVar[float]

    def check(self, model):
        """Refuse entries that see more than one number, and entries without a place where there is a taper."""
        super().check(model)
        if isinstance(self.taper, Locality) and self.taper.num != model.dim:
            raise ValueError(
                f"The locality must have {model.dim} points, as many as the state has components, got {self.taper.num}."
            )
        if self.taper is not None and min(model.observed.component) < 0:
            entry = model.observed.component.index(-1)
            raise ValueError(
                f"A taper needs entries that each see one component, whose place is known, but entry {entry} sees "
                "several. Leave out `taper=`, or make what it sees a component of the state."
            )

    def rho(self, i: Int[Array, " rows"], j: Int[Array, " columns"]) -> Float[Array, "rows columns"] | float:
        """Compute the taper between components ``i`` (rows) and ``j`` (columns); one without a taper."""
        if self.taper is None:
            return 1.0
        pair = i[:, None], j[None, :]
        taper = self.taper.taper if isinstance(self.taper, Locality) else self.taper
        return taper(*pair) if callable(taper) else jnp.asarray(taper)[pair]

    def inflated(self, members: Members) -> Members:
        """Stretch the members around their mean."""
        mean = members.x.mean(axis=0)
        return members._replace(x=mean + self.inflation * (members.x - mean))

    def covariance(self, seen: Seen, observed: Observed) -> Float[Array, "entries entries"]:
        """Compute rho o C_hh + R."""
        place = jnp.asarray(observed.component)
        return self.rho(place, place) * _covariance(seen.anomalies, seen.anomalies) + jnp.diag(seen.variance)


class EnKF(AbstractKalman):
    r"""The stochastic ensemble Kalman filter: every member meets an observation with noise of its own.

        x_j -> x_j + K (y + e_j - h_j),        e_j ~ N(0, R), sum_j e_j = 0.

    Args:
        taper: a number from 0 to 1 for every two components: a function, a matrix, or a locality from `grid` or `near`,
            whose radius does not matter here. None: no taper.
        inflation: factor of the forecast's anomalies.

    Exactness: exact for linear Gaussian models as the number of members grows, without a taper; else biased: the
        regression is linear, and a taper changes it. The evidence is that of a Gaussian.

    Good values: 100 members without a taper in a few dimensions. For small ensembles take `LETKF`, whose noise-free
        transform loses less.

    References: Burgers, van Leeuwen and Evensen 1998, MWR 126 (perturbed observations); Houtekamer and Mitchell 2001,
        MWR 129 (taper).
    """

    taper: Taper | None = None
    inflation: float = 1.0

    def analyse(self, key, memory, t, members, observed, y):
        """Regress every member on its own perturbed observation."""
        members = self.inflated(members)
        predictive = predict(observed, t, members)
        seen = see(observed, t, members, y)
        noise = jax.random.normal(key, seen.anomalies.shape) * jnp.sqrt(seen.variance)
        noise = noise - noise.mean(axis=0)
        factor = jnp.linalg.cholesky(self.covariance(seen, observed))
        moved = jax.scipy.linalg.cho_solve((factor, True), (seen.innovation + noise - seen.anomalies).T)
        centred = members.x - members.x.mean(axis=0)
        place = jnp.arange(members.x.shape[1]), jnp.asarray(observed.component)
        gain = self.rho(*place) * _covariance(centred, seen.anomalies)
        x = members.x + (gain @ moved).T
        return memory, Analysis(members._replace(x=x), _log_density(seen, factor), predictive)


class LETKF(AbstractKalman):
    r"""The local ensemble transform Kalman filter: every component is analysed by the observations near it.

    In the space of the N members, with Y the anomalies of h and D = diag(rho_i / R) for component i,

        P = [(N - 1) I + Y D Y^T]^{-1},        x_i -> mean_i + X_i^T [P Y D (y - h) 1^T + ((N - 1) P)^{1/2}].

    The square root is the symmetric one, so that neighbouring components have nearly the same transform.

    Args:
        taper: a number from 0 to 1 for every two components: a function, a matrix, or a locality from `grid` or `near`,
            whose radius does not matter here. None: no taper.
        inflation: factor of the forecast's anomalies.
        relaxation: alpha of the relaxation to prior spread: analysed anomalies of a component are multiplied by
            1 + alpha (sd_forecast - sd_analysis) / sd_analysis.
        batch_size: components that are analysed at once; it limits the memory.

    Exactness: exact for linear Gaussian models as the number of members grows, without a taper; else biased: the
        regression is linear, and a taper changes it. The evidence is that of a Gaussian; with a taper each entry is
        conditioned on those before it, weighted by the taper (Vecchia 1988).

    Good values: a half width of a few grid points for 20 members, inflation 1.02 to 1.1 (more where the model has
        errors), relaxation 0 to .5. They need tuning: try several, and say so.

    References: Hunt, Kostelich and Szunyogh 2007, Physica D 230, section 2.3; Whitaker and Hamill 2012, MWR 140,
        equation 2 (relaxation).
    """

    taper: Taper | None = None
    inflation: float = 1.0
    relaxation: float = 0.0
    batch_size: int = eqx.field(static=True, default=1024)

    def analyse(self, key, memory, t, members, observed, y):
        """Transform the members, component by component."""
        members = self.inflated(members)
        predictive = predict(observed, t, members)
        seen = see(observed, t, members, y)
        mean = members.x.mean(axis=0)
        centred = members.x - mean
        if self.taper is None:
            x = mean + _transformed(seen, jnp.ones_like(seen.innovation), centred)
        else:
            x = self._locally(observed, seen, mean, centred)
        x = _relaxed(x, centred, self.relaxation)
        return memory, Analysis(members._replace(x=x), self._evidence(observed, seen), predictive)

    def _evidence(self, observed: Observed, seen: Seen) -> Float[Array, ""]:
        """Compute log p(y); with a taper as the sum of log p(y_i | y_j, j before i), weighted as analyses are."""
        if self.taper is None:
            return _log_density_in_ensemble_space(seen)
        place, numbers = jnp.asarray(observed.component), jnp.arange(observed.num)
        scaled = seen.anomalies / jnp.sqrt(seen.anomalies.shape[0] - 1.0)

        def entry(i: Array) -> Float[Array, ""]:
            weight = jnp.asarray(self.rho(place[i][None], place))[0] * (numbers < i) / seen.variance
            system = jnp.eye(len(scaled)) + (scaled * weight) @ scaled.T
            solved = jax.scipy.linalg.solve(system, scaled[:, i], assume_a="pos")
            mean = solved @ (scaled @ (weight * seen.innovation))
            sd = jnp.sqrt(solved @ scaled[:, i] + seen.variance[i])
            return jnp.where(seen.present[i], norm.logpdf(seen.innovation[i], mean, sd), 0.0)

        return jax.lax.map(entry, numbers, batch_size=self.batch_size).sum()

    def _locally(
        self, observed: Observed, seen: Seen, mean: Float[Array, " dim"], centred: Float[Array, "num dim"]
    ) -> Float[Array, "num dim"]:
        place = jnp.asarray(observed.component)

        def component(i: Array) -> Float[Array, " num"]:
            rho = jnp.asarray(self.rho(i[None], place))[0]
            return mean[i] + _transformed(seen, rho, centred[:, i, None])[:, 0]

        return jax.lax.map(component, jnp.arange(mean.size), batch_size=self.batch_size).T


def _transformed(seen: Seen, rho: Entries, centred: Float[Array, "num dim"]) -> Float[Array, "num dim"]:
    """Move anomalies to the analysis: X^T [w 1^T + (I + S S^T)^{-1/2}] with S = Y D^{1/2} / sqrt(N - 1)."""
    scale = jnp.sqrt(rho / seen.variance / (seen.anomalies.shape[0] - 1))
    small, aim = seen.anomalies * scale, seen.innovation * scale
    spread = shrunk(small, centred)
    return spread + jax.vmap(lambda column: left_of(small, column)[0] @ aim, 1)(centred)


def _relaxed(
    x: Float[Array, "num dim"], centred: Float[Array, "num dim"], relaxation: float | Float[Array, ""]
) -> Float[Array, "num dim"]:
    mean = x.mean(axis=0)
    before, after = (jnp.sqrt((a**2).sum(axis=0) + 1e-30) for a in (centred, x - mean))
    return mean + (1.0 + relaxation * (before - after) / after) * (x - mean)


def _covariance(a: Float[Array, "num rows"], b: Float[Array, "num columns"]) -> Float[Array, "rows columns"]:
    return a.T @ b / (a.shape[0] - 1)


def _log_density_in_ensemble_space(seen: Seen) -> Float[Array, ""]:
    """Compute the log density of the innovation under N(0, C_hh + R), by matrices of N rows, or one for each entry."""
    (num, entries), sd = seen.anomalies.shape, jnp.sqrt(seen.variance)
    if entries <= num:
        covariance = _covariance(seen.anomalies, seen.anomalies) + jnp.diag(seen.variance)
        return _log_density(seen, jnp.linalg.cholesky(covariance))
    small, z = seen.anomalies / sd / jnp.sqrt(num - 1.0), seen.innovation / sd
    factor = jnp.linalg.cholesky(jnp.eye(num) + small @ small.T)
    weight = jax.scipy.linalg.cho_solve((factor, True), small @ z)
    quadratic = ((z - weight @ small) ** 2).sum() + (weight**2).sum()
    log_det = jnp.log(jnp.diag(factor)).sum() + jnp.log(sd).sum()
    return -0.5 * quadratic - log_det - 0.5 * LOG_2PI * seen.present.sum()


def _log_density(seen: Seen, factor: Float[Array, "entries entries"]) -> Float[Array, ""]:
    """Compute the log density of the innovation under N(0, F F^T), without the entries that are missing."""
    noise = jax.scipy.linalg.solve_triangular(factor, seen.innovation, lower=True)
    return -0.5 * (noise**2).sum() - jnp.log(jnp.diag(factor)).sum() - 0.5 * LOG_2PI * seen.present.sum()
