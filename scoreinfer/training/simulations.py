"""Simulations: joint draws of parameters and observations, and their standardisation for the networks."""

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scoreinfer._memory import footprint, map_rows, rows_at_once
from scoreinfer._program import over_devices
from scoreinfer._tree import in_batches
from scoreinfer._typing import PRESENT, Key, Sites
from scoreinfer.montecarlo.langevin import Differentiation, LogDensity, derivatives, differentiate
from scoreinfer.problem import Problem


class Simulations(NamedTuple):
    """Joint draws from a problem; the draw axis comes first.

    Args:
        z: unconstrained latent vectors.
        x: observed sites, encoded as real numbers (`Problem.encode`).
        gradient: gradient of the log joint density with respect to z. None means it was not computed.
    """

    z: Float[Array, "num dim"]
    x: Sites
    gradient: Float[Array, "num dim"] | None = None

    @property
    def num(self) -> int:
        """Number of joint draws."""
        return self.z.shape[0]


BATCH = 4096
"""Simulations per compiled call. Chosen by judgement."""


def simulate_joint(key: Key, problem: Problem, num: int, *, gradient: bool = False, batch: int = BATCH) -> Simulations:
    """Draw (z, x) ``num`` times from prior and simulator, in batches of bounded memory.

    Draw i depends only on ``key`` and i, not on the number ``batch`` of simulations per compiled call. With
    ``gradient``, the gradient of the log joint density at every draw is computed too.

    Exactness: exact draws from the model's joint distribution.
    """
    return simulate_with_data(key, problem, num, gradient=gradient, batch=batch)[0]


def simulate_with_data(
    key: Key, problem: Problem, num: int, *, gradient: bool = False, batch: int = BATCH
) -> tuple[Simulations, Sites]:
    """Draw as `simulate_joint` does; return the observations, as the model draws them, too.

    Exactness: as for `simulate_joint`.
    """

    def rows(i):
        z, y, x = _simulate_rows(key, problem, i)
        return Simulations(z, x, _gradients(problem, z, y) if gradient else None), y

    return in_batches(rows, num, batch)


@over_devices
def _simulate_rows(key, problem, rows):
    def one(row):
        z, y = problem.simulate(jax.random.fold_in(key, row))
        return z, y, encode(problem, y)

    return map_rows(one, None)(rows)


@over_devices
def _gradients(problem, z, y):
    def one(z, y):
        return differentiate(lambda z: problem.log_joint(z, y), z)(z)[1]

    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), (z, y))
    return map_rows(one, rows_at_once(footprint(lambda row: one(*row), first)))(z, y)


def has_gradient(problem: Problem) -> bool:
    """Return whether the joint density has a gradient. The problem must have ``simulate``; nothing is computed."""
    assert problem.simulate is not None
    z, shapes = jax.eval_shape(problem.simulate, jax.random.key(0))
    y = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return problem.has_density and derivatives(lambda z: problem.log_joint(z, y), z) is not Differentiation.NONE


def blame(problem: Problem, z: Float[Array, " dim"], y: Sites) -> str:
    """Describe which parts of the log joint density are not finite at ``z``, and what to do; empty if all are."""
    faults = "; ".join(_faults(problem, z, y))
    if not faults:
        return ""
    return (
        f" At one such point {faults}. Check the model's divisions, logarithms and roots. In `jnp.where`, the branch "
        "that is not taken must be finite too, or the gradient is not finite."
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
    """Split the log joint density into the prior and every observed site, or the whole likelihood."""
    pointwise = problem.pointwise_log_likelihood
    if pointwise is None:
        return {"the prior": problem.log_prior, "the likelihood": lambda z: problem.log_likelihood(z, y)}
    sites = {site.name: partial(lambda name, z: pointwise(z, y)[name].sum(), site.name) for site in problem.data}
    return {"the prior": problem.log_prior, **sites}


@eqx.filter_jit
def finite_rows(simulations: Simulations) -> Bool[Array, " num"]:
    """Flag the joint draws in which every number is finite."""
    flags = [jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(1) for leaf in jax.tree.leaves(simulations)]
    return jnp.stack(flags).all(0)


def check_finite(simulations: Simulations) -> None:
    """Check that all latent values and observed sites are finite; gradients are not checked.

    Raises:
        ValueError: if some are not finite. The message names the sites and the share of such draws.
    """
    finite = finite_rows(simulations._replace(gradient=None))
    if bool(np.all(finite)):
        return
    sites = {"latent values": simulations.z, **simulations.x}
    bad = [name for name, value in sites.items() if not bool(jnp.isfinite(value).all())]
    share = 1.0 - float(np.mean(finite))
    raise ValueError(
        f"Simulations must be finite, but the model's are not finite in {', '.join(bad)}: {share:.2%} of "
        f"{simulations.num} draws. Leaving these draws out would bias the posterior. Restrict the prior to values for "
        "which the simulator works, or let the simulator return a finite value (such as a clipped state) if it fails."
    )


def encode(problem: Problem, y: Sites) -> Sites:
    """Encode the observed sites. A model without observed sites gets one constant, zero."""
    return problem.encode(y) or {"nothing": jnp.zeros(1)}


@eqx.filter_jit
def encoded(problem: Problem, z: Float[Array, "num dim"], y: Sites) -> Simulations:
    """Make `Simulations` from given pairs (z, y); the draw axis comes first."""
    return Simulations(z, jax.vmap(lambda y: encode(problem, y))(y))


class Standardiser(eqx.Module):
    """Standardise encoded observations: linear within ``bend`` scale units of the centre, logarithmic beyond.

    With v = (x - centre) / scale the result is sign(v) (min(|v|, bend) + log(1 + max(|v| - bend, 0))). Linear problems
    therefore stay linear, and heavy tails of a simulator give the network inputs of moderate size. Missing entries
    become zero (see `Problem.encode`).
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

        units = {name: one(x[name], self.centre[name], self.scale[name]) for name in sorted(self.centre)}
        return {name: value * _alongside(units[name + PRESENT], value) if name + PRESENT in units else value
                for name, value in units.items()}  # fmt: skip


def _alongside(mask: Float[Array, "*shape"], value: Array) -> Array:
    """Give a mask the trailing axes that encoding added to a value."""
    return mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))


@eqx.filter_jit
def standardiser(x: Sites, row_axes: tuple[int, ...] = ()) -> Standardiser:
    """Make a standardiser from the medians and quantiles of encoded observations ``x`` (draw axis first).

    The scale is the range between the quantiles 0.1 and 0.9, divided by its value for a standard normal distribution.
    Missing entries do not count. Masks stay as they are.

    Args:
        x: encoded observations.
        row_axes: lengths of the first axes of the sites along which all entries have the same centre and scale.
    """

    def one(name: str, value: Array) -> tuple[Array, Array]:
        if name.endswith(PRESENT):
            return jnp.zeros(value.shape[1:]), jnp.ones(value.shape[1:])
        alike = [value.shape[1 : i + 2] == row_axes[: i + 1] for i in range(len(row_axes))]
        axes = (0, *(i + 1 for i, same in enumerate(alike) if same))
        if name + PRESENT in x:
            value = jnp.where(_alongside(x[name + PRESENT], value) > 0, value, jnp.nan)
            centre, (low, high) = jnp.nanmedian(value, axes), jnp.nanquantile(value, jnp.array([0.1, 0.9]), axes)
            centre, deviation = jnp.nan_to_num(centre), jnp.nan_to_num(jnp.nanstd(value, axes))
        else:
            centre, (low, high) = jnp.median(value, axes), jnp.quantile(value, jnp.array([0.1, 0.9]), axes)
            deviation = value.std(axes)
        wide = jnp.where(high > low, (high - low) / 2.5631, deviation)
        scale = jnp.where(wide > 0, wide, 1.0)
        return jnp.broadcast_to(centre, value.shape[1:]), jnp.broadcast_to(scale, value.shape[1:])

    both = {name: one(name, value) for name, value in x.items()}
    return Standardiser(
        {name: centre for name, (centre, _) in both.items()}, {name: scale for name, (_, scale) in both.items()}
    )
