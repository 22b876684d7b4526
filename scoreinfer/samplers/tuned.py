"""Tuning: fit a mixture of t distributions to each posterior when it is drawn from; nothing is trained.

The method is population Monte Carlo. It starts from the learned whitening map of the observation. Each round draws from
the mixture and weighs the draws by the exact density, tempered by a power that keeps the weights even enough. Shares,
means and covariances of the components are then matched to the weighted draws: one step of expectation maximisation, in
which each draw belongs to every component in part. A fixed share of the mixture stays the learned Gaussian, with the
tails of a t distribution, so that the mixture covers what the whitening map covers.

A network has to be right about all data sets at once. Posteriors far narrower than the network's errors, as those of
differential equations often are, need one look at their own density instead, which takes a fraction of a second.

References: Cappe, Douc, Guillin, Marin and Robert 2008, "Adaptive importance sampling in general mixture classes",
Statistics and Computing 18(4), arXiv 0710.4242, equations 10 to 13.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices
from scoreinfer._typing import Key
from scoreinfer.bijections.affine import Affine
from scoreinfer.montecarlo.kernel_estimate import DEGREES, KernelEstimate
from scoreinfer.montecarlo.resampling import next_power
from scoreinfer.montecarlo.weights import log_effective_share
from scoreinfer.samplers.amortised import AmortisedProposal
from scoreinfer.samplers.base import AbstractDensityProposal, Target, Weighted
from scoreinfer.samplers.focused import AbstractAdapted

MAX_TUNED_DIM = 32
"""Largest dimension in which proposals are tuned. Chosen by judgement: a covariance needs several draws a dimension."""
KEPT_SHARE = 0.15
"""Effective share that the tempered weights of a round keep. Measured on Lotka-Volterra posteriors with eight
parameters: .3 does as well."""
HOME_SHARE = 0.1
"""Share of the learned Gaussian in the mixture. Chosen by judgement."""
GOOD_SHARE = 0.6
"""Effective share of a round after which no other is needed. Chosen by judgement."""
LEAST_SHARE = 0.1
"""Part of the mixture that is shared evenly by its components, so that none dies out. Chosen by judgement."""
TOGETHER = 256
"""Draws that are weighed at once; bounds the memory. Chosen by judgement."""


class Tuning(NamedTuple):
    """How much is done to tune a proposal to one observation.

    Args:
        num_draws: draws in each round.
        max_rounds: largest number of rounds.
        num_components: number of components, besides the learned Gaussian.
    """

    num_draws: int = 2048
    max_rounds: int = 20
    num_components: int = 6


THOROUGH = Tuning(num_draws=8192, max_rounds=40)
"""The effort of `Conditioned.focus`. Chosen by judgement: up to eight times as many draws; the programs that draw from
the mixture stay the same, because it has as many components."""


class AbstractMixture(AbstractDensityProposal):
    """A proposal whose context is a mixture of t distributions."""

    def propose(self, key: Key, context: KernelEstimate) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Draw one z and compute its ``log_q``."""
        z = context.sample(key)
        return z, context.log_density(z)

    def log_q(self, key: Key, context: KernelEstimate, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute the ``log_q`` of a given z."""
        return context.log_density(z)


class FittedMixture(AbstractMixture):
    """A given mixture, for one observation.

    Exactness: exact.
    """

    mixture: KernelEstimate

    def context(self, target):
        """Return the mixture."""
        return self.mixture


class TunedMixture(AbstractMixture, AbstractAdapted):
    """The mixture that was tuned to one observation.

    Exactness: exact, at any other observation too, but there its draws are in the wrong place.
    """

    original: AmortisedProposal
    mixture: KernelEstimate

    @property
    def num_evaluations(self):
        """Return zero: no score is evaluated for a draw."""
        return 0

    def context(self, target):
        """Return the mixture."""
        return self.mixture


class TunedProposal(AbstractMixture, AbstractAdapted):
    """A mixture of t distributions that is tuned to every observation anew, from the learned whitening map.

    Args:
        original: the amortised proposal. Its whitening map is where tuning starts; its score is not used.
        bits: two words, the random key of the tuning: the same for every observation, and independent of draws.
        effort: how much is done for each observation.

    Exactness: ``log_q`` is the exact log density of the mixture, whatever the tuning has found. The draws have other
        random numbers than the tuning, so their weights are unbiased. A mode far from the learned Gaussian may be
        missed, as by every proposal (see `scoreinfer.evidence.witnesses`).
    """

    original: AmortisedProposal
    bits: UInt[Array, " words"]
    effort: Tuning = eqx.field(static=True, default=Tuning())

    @property
    def num_evaluations(self):
        """Return zero: no score is evaluated for a draw."""
        return 0

    def at(self, target):
        """Tune once, for all batches of one observation."""
        return TunedMixture(self.original, _context(self, target))

    def context(self, target: Target) -> KernelEstimate:
        """Tune the mixture to one observation."""
        key = jax.random.wrap_key_data(self.bits, impl="threefry2x32")
        return tune(key, target, self.original.context(target).affine, self.effort)


@over_devices
def _context(proposal: TunedProposal, target: Target) -> KernelEstimate:
    return proposal.context(target)


class _Round(NamedTuple):
    """Number of the next round, its mixture, the best mixture so far and its effective share."""

    number: Int[Array, ""]
    mixture: KernelEstimate
    best: KernelEstimate
    share: Float[Array, ""]


def untuned(dim: int, effort: Tuning) -> KernelEstimate:
    """Make a mixture of zeros, of the shapes and dtypes of a tuned one."""
    num, dtype = effort.num_components + 1, jnp.result_type(float)
    return KernelEstimate(jnp.zeros((num, dim), dtype), jnp.zeros((num, dim, dim), dtype), jnp.zeros(num, dtype))


def tune(key: Key, target: Target, home: Affine, effort: Tuning = Tuning()) -> KernelEstimate:
    """Tune a mixture of t distributions to one posterior.

    Args:
        key: random key.
        target: the posterior; it must have a density.
        home: the learned Gaussian of the observation, as the map from a standard normal draw.
        effort: how much is done.

    Returns:
        The mixture of the round with the largest effective share. Its first component is the learned Gaussian.

    Exactness: a normalised density, whatever was found.
    """
    num = effort.num_components
    mean, factor = (part.astype(jnp.result_type(float)) for part in (home.mean, home.factor))
    shares = jnp.full(num + 1, (1.0 - HOME_SHARE) / num).at[0].set(HOME_SHARE)
    start = KernelEstimate(jnp.stack([mean] * (num + 1)), jnp.stack([factor] * (num + 1)), jnp.log(shares))

    def going(state: _Round):
        return (state.number < effort.max_rounds) & (state.share < GOOD_SHARE)

    def one_round(state: _Round) -> _Round:
        for_draws, for_centres = jax.random.split(jax.random.fold_in(key, state.number))
        drawn = _weighed(for_draws, target, state.mixture, effort.num_draws)
        share = jnp.exp(log_effective_share(drawn.log_weight))
        share = jnp.where(jnp.isfinite(share), share, 0.0)
        best = jax.tree.map(lambda a, b: jnp.where(share > state.share, a, b), state.mixture, state.best)
        new = _matched(for_centres, state.mixture, drawn, state.number == 0)
        return _Round(state.number + 1, new, best, jnp.maximum(share, state.share))

    return jax.lax.while_loop(going, one_round, _Round(jnp.array(0), start, start, jnp.zeros_like(mean[0]))).best


def _weighed(key: Key, target: Target, mixture: KernelEstimate, num: int) -> Weighted:
    """Draw from the mixture and weigh; a weight that is not finite is zero."""

    def one(key: Key) -> Weighted:
        z = mixture.sample(key)
        log_target = target(z)
        log_weight = log_target - mixture.log_density(z)
        return Weighted(z, jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf), log_target)

    together = min(getattr(target, "at_once", None) or TOGETHER, TOGETHER)
    return map_rows(one, together)(jax.random.split(key, num))


def _matched(key: Key, mixture: KernelEstimate, drawn: Weighted, first: Array) -> KernelEstimate:
    """Match the components to weighted draws; in the first round they also get centres of their own.

    A component to which few draws belong changes little: with n effective draws its covariance is moved by
    n / (n + 2 dim), its mean by n / (n + 2).
    """
    z, largest = drawn.z, drawn.log_weight.max()
    possible = jnp.isfinite(largest)
    log_weight = jnp.where(possible, drawn.log_weight - largest, 0.0)
    log_weight = next_power(log_weight, KEPT_SHARE) * log_weight
    weight = jax.nn.softmax(jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight))
    dim = z.shape[1]

    def density(centre, factor):
        u = jax.scipy.linalg.solve_triangular(factor, (z - centre).T, lower=True)
        square = (u**2).sum(0)
        log_part = -0.5 * (DEGREES + dim) * jnp.log1p(square / DEGREES) - jnp.log(jnp.diag(factor)).sum()
        return log_part, (DEGREES + dim) / (DEGREES + square)

    log_part, pull = jax.vmap(density)(mixture.centres, mixture.factors)
    belongs = jax.nn.softmax(log_part + mixture.log_shares[:, None], axis=0)

    def match(belongs, pull, centre, factor):
        part = weight * belongs
        share = part.sum() + 1e-30
        num = share**2 / ((part**2).sum() + 1e-30)
        pulled = part * pull
        mean = centre + (pulled @ z / (pulled.sum() + 1e-30) - centre) * num / (num + 2)
        centred = z - mean
        trust = num / (num + 2 * dim)
        covariance = trust * (centred.T @ (centred * pulled[:, None])) / share + (1 - trust) * factor @ factor.T
        new = jnp.linalg.cholesky(covariance + 1e-9 * jnp.diag(jnp.diag(covariance)))
        good = possible & jnp.isfinite(new).all() & jnp.isfinite(mean).all()
        return share, jnp.where(good, mean, centre), jnp.where(good, new, factor)

    old = (mixture.centres[1:], mixture.factors[1:])
    share, centres, factors = jax.vmap(match)(belongs[1:], pull[1:], *old)
    num = len(share)
    share = (1 - LEAST_SHARE) * share / share.sum() + LEAST_SHARE / num
    picked = z[jax.random.categorical(key, jnp.log(weight), shape=(num,))]
    share, centres, factors = jax.tree.map(
        lambda a, b: jnp.where(first, a, b), (jnp.full(num, 1 / num), picked, old[1]), (share, centres, factors)
    )
    log_shares = jnp.log(jnp.concatenate([jnp.full(1, HOME_SHARE, share.dtype), (1 - HOME_SHARE) * share]))
    centres = jnp.concatenate([mixture.centres[:1], centres])
    return KernelEstimate(centres, jnp.concatenate([mixture.factors[:1], factors]), log_shares)
