"""The score filter: a local Gaussian prior, exact scalar likelihoods, model error inferred from the data.

A diffusion filter draws from the posterior by running a score backwards. Where the prior is Gaussian, the posterior's
moments are available at once, and the run could only add errors. So `ScoreFilter` fits a local Gaussian to the members
(its score is `scoreinfer.score.LocalGaussianScore`), puts every likelihood in by expectation propagation, and moves the
members by the symmetric square root. Both happen in the space that the members span, as in `LETKF`.

References: Minka 2001, UAI (expectation propagation); Anderson 2010, MWR 138 (exact scalar likelihoods in ensemble
filters).
"""

import dataclasses
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scoreinfer._quadrature import LogLikelihood, Numbers, tilt
from scoreinfer.filters.base import AbstractFilter, Analysis, EvidenceKind, Members, predict
from scoreinfer.filters.jumps import Error, Jumps, white_noise
from scoreinfer.filters.mixture import analyse_mixture
from scoreinfer.filters.sites import Prior, cavities, propagate
from scoreinfer.filters.taper import Locality, everywhere
from scoreinfer.filters.transform import transform
from scoreinfer.markov import Entries, Observed, Sees, Time, is_missing
from scoreinfer.score.sites import Sites

Ensemble = Float[Array, "num points"]


class Points(NamedTuple):
    """The numbers that sites belong to: components of the state, then what entries see that is no component.

    Args:
        place: number of the point that each entry sees.
        extra: the entries that see no single component, in order.
        dim: number of components.
    """

    place: Int[Array, " entries"]
    extra: tuple[int, ...]
    dim: int

    @property
    def num(self) -> int:
        """Number of points."""
        return self.dim + len(self.extra)


def read_points(observed: Observed, dim: int) -> Points:
    """Give every entry a point."""
    place = list(observed.component)
    extra = tuple(i for i, kind in enumerate(observed.kinds) if kind is not Sees.COMPONENT)
    for number, i in enumerate(extra):
        place[i] = dim + number
    return Points(jnp.asarray(place, jnp.int32), extra, dim)


class Likelihoods(NamedTuple):
    """The likelihoods of one observation, by points.

    Args:
        value: log likelihood of every point, summed over the entries that see it.
        informed: which points an entry that is not missing sees.
    """

    value: LogLikelihood
    informed: Bool[Array, " points"]


def read_likelihoods(observed: Observed, points: Points, t: Time, y: Entries) -> Likelihoods:
    """Gather the likelihoods of all entries at their points."""
    present = ~is_missing(y)

    def value(u: Numbers) -> Numbers:
        entries = observed.log_likelihood(t, u[points.place], y)
        return jnp.zeros(points.num, u.dtype).at[points.place].add(jnp.where(present, entries, 0.0))

    return Likelihoods(value, jnp.zeros(points.num, bool).at[points.place].max(present))


class ScoreFilter(AbstractFilter):
    """Filter with a localised Gaussian prior, exact scalar likelihoods and inferred model error.

    One analysis infers the variance that errors of the model add to every component (`Jumps`), gives the members noise
    of this variance, finds a Gaussian site for every likelihood (`propagate`), and moves the members (`transform`).

    Args:
        locality: which components lie near each other, from `grid` or `near`. None: one block without a taper, for an
            ensemble larger than the state.
        inflation: factor of the forecast's anomalies.
        jumps: the scale mixture of the model's error; None for a model without errors.
        num_sweeps: sweeps of expectation propagation. One is exact for normal likelihoods of components.
        damping: share of the new sites in every sweep but the first.
        bandwidth: h of a Gaussian mixture around the members, for states of few components; 1 is one Gaussian.

    Raises:
        ValueError: if ``locality`` has another number of points than the state, ``bandwidth`` is not in (0, 1], or it
            is below 1 beside a locality.

    Exactness: without ``locality``, ``jumps`` and inflation, exact for linear Gaussian models as the ensemble grows.
        Otherwise biased: the forecast is taken as Gaussian, distant observations count less, and the model's error is
        taken as known once it is inferred. Given these, marginals are the posterior's to the accuracy of expectation
        propagation. The evidence conditions each entry on those before it in its block (Vecchia 1988). With ``jumps``
        it is no density of y: the variance added is inferred from the same y, so that its integral exceeds one (1.14
        was measured for one entry). Compare models by it with ``jumps=None`` only. As ``bandwidth``
        falls while the ensemble grows, without inflation and jumps: consistent.

    Good values: the defaults. The radius, at which observations cease to count, is the one thing to choose: as far as
        the ensemble can tell correlations from noise. With 20 members that is 12 to 20 on Lorenz-96, and 8 in the plane
        (`examples/surface_qg.py`).

    >>> from scoreinfer.filters import grid
    >>> ScoreFilter(grid((40,), 12.0)).inflation
    1.01
    """

    log_evidence_kind: ClassVar[EvidenceKind] = "approximate"
    locality: Locality | None = None
    inflation: float = eqx.field(static=True, default=1.01)
    jumps: Jumps | None = Jumps()
    num_sweeps: int = eqx.field(static=True, default=2)
    damping: float = eqx.field(static=True, default=0.8)
    bandwidth: float = eqx.field(static=True, default=1.0)

    def check(self, model):
        """Refuse a locality of another state, and a mixture beside a locality."""
        super().check(model)
        if not 0.0 < self.bandwidth <= 1.0 or (self.bandwidth < 1.0 and self.locality is not None):
            raise ValueError(
                f"`bandwidth` must be in (0, 1], and 1 beside a `locality`, got {self.bandwidth:g}: a mixture weighs "
                "whole states, and of states of many components one takes all the weight. Leave one of the two out."
            )
        num = read_points(model.observed, model.dim).num
        if self.locality is not None and self.locality.num != num:
            raise ValueError(
                f"`locality` must have {num} points, the {model.dim} components of the state and then the "
                f"{num - model.dim} entries that see several of them, got {self.locality.num}. Make it by `grid` or "
                "`near`, or leave it out."
            )

    def init(self, key, members):
        """Begin with the first weights of the jumps, and the first members as climate."""
        return () if self.jumps is None else self.jumps.init(members.x)

    def foresee(self, memory, t, members, observed):
        """Forecast the observation by members with noise of every scale of the model's error.

        The members' variance about their mean is (1 - 1/N) P, that of the truth is (1 + 1/N) P: 2 P / N is added.
        """
        members, points = inflated(members, self.inflation), read_points(observed, members.x.shape[1])
        found = predict(observed, t, members)
        narrow = 2.0 / members.x.shape[0] * found.u.var(axis=0, ddof=1)
        if self.jumps is None:
            return found._replace(added=narrow[None])
        scales = self.jumps.variances(_unit(memory, points, observed, t, members))[:, points.place]
        return found._replace(added=narrow + scales, log_share=memory.log_weight)

    def analyse(self, key, memory, t, members, observed, y):
        """Put one observation into the members."""
        points = read_points(observed, members.x.shape[1])
        likelihoods = read_likelihoods(observed, points, t, y)
        if self.jumps is not None:
            memory = memory._replace(climate=memory.climate.seen(members.x))
        predictive = self.foresee(memory, t, members, observed)
        members = inflated(members, self.inflation)
        memory, prior, anomalies = self._with_error(key, memory, t, members, observed, points, likelihoods)

        def fit(prior: Prior) -> tuple[Sites, Float[Array, ""]]:
            sites = propagate(prior, *likelihoods, num_sweeps=self.num_sweeps, damping=self.damping)
            log_evidence = evidence(prior, sites, likelihoods)
            return sites, log_evidence

        if self.bandwidth < 1.0:
            noisy = dataclasses.replace(prior, anomalies=anomalies, added=jnp.zeros_like(prior.added))
            x, log_evidence = analyse_mixture(jax.random.fold_in(key, 1), noisy, self.bandwidth, fit)
        else:
            sites, log_evidence = fit(prior)
            x = transform(prior, sites, anomalies)
        return memory, Analysis(members._replace(x=x[:, : points.dim]), log_evidence, predictive)

    def _with_error(self, key, memory, t, members, observed, points, likelihoods):
        """Infer the model's error; return the prior, and the members less their mean, noise included."""
        prior = self._prior(at(points, observed, t, members.x))
        if self.jumps is None:
            return memory, prior, prior.anomalies
        scales = self.jumps.variances(_unit(memory, points, observed, t, members))
        memory, added = self.jumps.infer(memory, prior, scales, *likelihoods)
        noise = white_noise(key, members.x.shape[0], added[: points.dim])
        noisy = at(points, observed, t, members.x + noise)
        if points.extra:  # what the noise does to functions of the state is known from the members alone
            prior = self._prior(noisy)
            return memory, prior, prior.anomalies
        return memory, dataclasses.replace(prior, added=added), noisy - prior.mean

    def _prior(self, members: Ensemble) -> Prior:
        """Fit the local Gaussian."""
        mean = members.mean(axis=0)
        return Prior(mean, members - mean, jnp.zeros_like(mean), self.locality or everywhere(mean.size))


def inflated(members: Members, factor: float) -> Members:
    """Stretch the members about their mean."""
    mean = members.x.mean(0)
    return members._replace(x=mean + factor * (members.x - mean))


def at(points: Points, observed: Observed, t: Time, x: Float[Array, "num dim"]) -> Ensemble:
    """Compute the members at all points."""
    if not points.extra:
        return x
    u = jax.vmap(observed.predict, (None, 0))(t, x)
    return jnp.concatenate([x, u[:, np.asarray(points.extra)]], axis=1)


def evidence(prior: Prior, sites: Sites, likelihoods: Likelihoods) -> Float[Array, ""]:
    """Compute log p(y) as the sum of log p(y_i | y_j, j before i in the block of i).

    References: Vecchia 1988, JRSS B 50(2).
    """
    tilted = tilt(likelihoods.value, *cavities(prior, sites, before=True))
    return jnp.where(likelihoods.informed, tilted.log_evidence, 0.0).sum()


def _unit(memory: Error, points: Points, observed: Observed, t: Time, members: Members) -> Numbers:
    """Compute how far noise of one climate's standard deviation moves every point, to first order."""
    sd = memory.climate.sd
    if not points.extra:
        return sd
    slope = jax.jacrev(lambda x: observed.predict(t, x)[np.asarray(points.extra)])(members.x.mean(axis=0))
    return jnp.concatenate([sd, jnp.sqrt(slope**2 @ sd**2)])
