"""Simulations: joint draws of parameters and observations, and the scale on which networks see them."""

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scoreinfer._tree import in_batches
from scoreinfer._typing import Key, Sites
from scoreinfer.montecarlo.langevin import LogDensity, derivatives, differentiate
from scoreinfer.problem import Problem


class Simulations(NamedTuple):
    """Joint draws from a problem; the draw axis comes first.

    Args:
        z: unconstrained latent vectors.
        x: observed sites, encoded to real numbers (`Problem.encode`).
        gradient: gradient of the log joint density with respect to z; None where it was not asked for.
    """

    z: Float[Array, "num dim"]
    x: Sites
    gradient: Float[Array, "num dim"] | None = None

    @property
    def num(self) -> int:
        """Number of joint draws."""
        return self.z.shape[0]


BATCH = 4096
"""Simulations per compiled call."""


def simulate_joint(key: Key, problem: Problem, num: int, *, gradient: bool = False) -> Simulations:
    """Draw ``num`` joint draws (z, x) from prior and simulator, in batches of bounded memory.

    Draw i depends on ``key`` and i alone. With ``gradient`` every draw also carries the gradient of the log joint
    density there.

    Exactness: exact draws from the model's joint distribution.
    """

    def rows(i):
        z, y, x = _simulate_rows(key, problem, i)
        return Simulations(z, x, _gradients(problem, z, y) if gradient else None)

    return in_batches(rows, num, BATCH)


@eqx.filter_jit
def _simulate_rows(key, problem, rows):
    def one(row):
        z, y = problem.simulate(jax.random.fold_in(key, row))
        return z, y, encode(problem, y)

    return jax.vmap(one)(rows)


@eqx.filter_jit
def _gradients(problem, z, y):
    def one(z, y):
        return differentiate(lambda z: problem.log_joint(z, y), z)(z)[1]

    return jax.vmap(one)(z, y)


def has_gradient(problem: Problem) -> bool:
    """Say whether the joint density of a problem that can be simulated has a gradient (nothing is computed)."""
    assert problem.simulate is not None
    z, shapes = jax.eval_shape(problem.simulate, jax.random.key(0))
    y = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return problem.has_density and derivatives(lambda z: problem.log_joint(z, y), z) != "none"


def blame(problem: Problem, z: Float[Array, " dim"], y: Sites) -> str:
    """Say which parts of a log joint density are not finite at one place, and what to do; nothing where all are."""
    faults = "; ".join(_faults(problem, z, y))
    if not faults:
        return ""
    return (
        f" There {faults}. Look at what the model divides by and takes logarithms and roots of; where `jnp.where` "
        "chooses between values, the branch not taken must be finite too, for the gradient."
    )


def _faults(problem: Problem, z: Float[Array, " dim"], y: Sites) -> list[str]:
    found = []
    for name, log_density in _parts(problem, y).items():
        value, gradient = jax.jit(differentiate(log_density, z))(z)  # NumPyro checks parameters outside jit
        if not bool(jnp.isfinite(value)):
            found.append(f"the log density of {name} is {float(value)}")
        elif not bool(jnp.isfinite(gradient).all()):
            sizes = [site.size for site in problem.latents] or [problem.dim]
            names = np.repeat([site.name for site in problem.latents] or ["z"], sizes)
            where = dict.fromkeys(names[~np.isfinite(np.asarray(gradient))].tolist())
            found.append(f"the gradient of the log density of {name} with respect to {', '.join(where)} is not finite")
    return found


def _parts(problem: Problem, y: Sites) -> dict[str, LogDensity]:
    """Split the joint density: the prior, and every observed site where these are known one by one."""
    pointwise = problem.pointwise_log_likelihood
    if pointwise is None:
        return {"the prior": problem.log_prior, "the likelihood": lambda z: problem.log_likelihood(z, y)}
    sites = {site.name: partial(lambda name, z: pointwise(z, y)[name].sum(), site.name) for site in problem.observed}
    return {"the prior": problem.log_prior, **sites}


def finite_rows(simulations: Simulations) -> Bool[Array, " num"]:
    """Flag the joint draws in which every number is finite."""
    flags = [jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(1) for leaf in jax.tree.leaves(simulations)]
    return jnp.stack(flags).all(0)


def check_finite(simulations: Simulations) -> None:
    """Raise a ValueError that says which sites are not finite, and how often (training does without gradients)."""
    finite = finite_rows(simulations._replace(gradient=None))
    if bool(finite.all()):
        return
    sites = {"latent values": simulations.z, **simulations.x}
    bad = [name for name, value in sites.items() if not bool(jnp.isfinite(value).all())]
    share = 1.0 - float(finite.mean())
    raise ValueError(
        f"The model simulates numbers that are not finite in {', '.join(bad)}: {share:.2%} of {simulations.num} "
        "draws. Dropping them silently would bias the posterior. Restrict the prior to where the simulator works, or "
        "make the simulator return a finite value (a clipped state, say) where it fails."
    )


def encode(problem: Problem, y: Sites) -> Sites:
    """Encode the observed sites; a model without any observes one constant."""
    return problem.encode(y) or {"nothing": jnp.zeros(1)}


@eqx.filter_jit
def encoded(problem: Problem, z: Float[Array, "num dim"], y: Sites) -> Simulations:
    """Make simulations of given pairs, draw axis first."""
    return Simulations(z, jax.vmap(lambda y: encode(problem, y))(y))


class Standardiser(eqx.Module):
    """A robust affine scale for encoded observations, with logarithmic tails beyond ``bend`` scale units.

    Linear in the bulk, so that linear problems stay linear; logarithmic in the tails, so that a heavy-tailed
    simulator does not flood the network.
    """

    centre: Sites
    scale: Sites
    bend: float = eqx.field(static=True, default=4.0)

    def __call__(self, x: Sites) -> Sites:
        """Standardise one encoded observation to float32."""

        def one(x, centre, scale):
            x = ((x - centre) / scale).astype(jnp.float32)
            excess = jnp.maximum(jnp.abs(x) - self.bend, 0.0)
            return jnp.clip(x, -self.bend, self.bend) + jnp.sign(x) * jnp.log1p(excess)

        return {name: one(x[name], self.centre[name], self.scale[name]) for name in sorted(self.centre)}


@eqx.filter_jit
def standardiser(x: Sites) -> Standardiser:
    """Make the standardiser of encoded observations ``x`` (draw axis first) from their medians and quantiles."""

    def spread(value):
        low, high = jnp.quantile(value, jnp.array([0.1, 0.9]), axis=0)
        wide = jnp.where(high > low, (high - low) / 2.5631, value.std(axis=0))
        return jnp.where(wide > 0, wide, 1.0)

    return Standardiser(
        {name: jnp.median(value, axis=0) for name, value in x.items()},
        {name: spread(value) for name, value in x.items()},
    )
