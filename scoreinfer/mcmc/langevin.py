"""Langevin dynamics as NumPyro kernels: unadjusted, Metropolis-adjusted, underdamped.

All of them move in coordinates whitened by the mass matrix that warm-up estimates (NumPyro's windows), and tune their
step size to a target acceptance probability. Unadjusted kernels too apply the Metropolis test during warm-up, where
first steps may be wild; afterwards they compute its probability as a diagnostic only.
"""

import abc
import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree
from numpyro.infer.hmc_util import warmup_adapter
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import initialize_model
from numpyro.util import is_prng_key

from scoreinfer._tree import is_traced
from scoreinfer._typing import Key, Sites
from scoreinfer.mcmc.contract import (
    NO_START,
    Origin,
    Origins,
    any_chain,
    flatten_sites,
    layout,
    observe,
    same_bits,
    unconstrain,
)
from scoreinfer.model import from_numpyro
from scoreinfer.montecarlo.langevin import (
    TARGET_ACCEPT_PROB,
    Factor,
    LogDensity,
    Point,
    ValueAndGrad,
    colour,
    derivatives,
    differentiate,
    langevin_proposal,
    metropolis,
)
from scoreinfer.problem import Problem
from scoreinfer.training.simulations import blame

CONDITIONED = "_gibbs_sites"
"""The keyword by which `numpyro.infer.Gibbs` gives a block the values of all other sites."""


def _placeholder(leaf: Any) -> Any:
    return np.zeros(jnp.shape(leaf), jnp.result_type(leaf)) if is_traced(leaf) else leaf


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["num_warmup"])
class Schedule:
    """The length of the warm-up, part of the state's structure: another length is traced anew."""

    def __init__(self, num_warmup: int):
        self.num_warmup = num_warmup


class LangevinState(NamedTuple):
    """State of one chain, or of all of them when vectorised (then ``y`` alone has no chain axis).

    Args:
        i: iteration.
        z: unconstrained values of the latent sites.
        potential_energy: minus log p(z, y) in the unconstrained space.
        z_grad: its gradient.
        momentum: momentum in whitened coordinates (zeros for the overdamped kernels).
        accept_prob: acceptance probability of the last step; of a kernel that always accepts: what it would be.
        mean_accept_prob: its mean since the start, or since the end of warm-up.
        diverging: whether the last step met a density or gradient that is not finite.
        adapt_state: step size and mass matrix (NumPyro's ``HMCAdaptState``).
        settled: iterations since the mass matrix last changed.
        y: the observation for which ``potential_energy`` holds.
        schedule: length of the warm-up.
        origin: where the data come from.
        rng_key: random key of the chain.
    """

    i: Array
    z: PyTree
    potential_energy: Array
    z_grad: PyTree
    momentum: Array
    accept_prob: Array
    mean_accept_prob: Array
    diverging: Array
    adapt_state: Any
    settled: Array
    y: Sites
    schedule: Schedule
    origin: Origin
    rng_key: Array


class Space(NamedTuple):
    """The target on a flat vector, and the way between that vector and NumPyro's ``z``."""

    flatten: Callable[[PyTree], Float[Array, " dim"]]
    unflatten: Callable[[Float[Array, " dim"]], PyTree]
    log_density: LogDensity


class AbstractLangevin(MCMCKernel):
    """What the Langevin kernels share: reading the model, adaptation, chains and diagnostics."""

    sample_field = "z"
    diagnostics = ("diverging", "accept_prob")
    default_fields = ("z", "diverging", "accept_prob", "potential_energy")
    adjusted = True
    default_target: float

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        step_size: float = 0.1,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        dense_mass: bool = False,
        target_accept_prob: float | None = None,
        init_strategy: Callable = init_to_uniform,
        forward_mode_differentiation: bool | None = None,
    ):
        if (model is None) == (potential_fn is None):
            raise ValueError("Expected either a `model` or a `potential_fn`, got both or neither.")
        self.model, self.potential_fn, self.init_strategy = model, potential_fn, init_strategy
        self.step_size, self.adapt_step_size = step_size, adapt_step_size
        self.target_accept_prob = self.default_target if target_accept_prob is None else target_accept_prob
        self.adapt_mass_matrix, self.dense_mass = adapt_mass_matrix, dense_mass
        self.forward_mode_differentiation = forward_mode_differentiation
        self._problems: list[Problem] = []
        self._origins = Origins()
        self._is_block = False
        self._sample_fn: Callable[..., LangevinState] | None = None

    @abc.abstractmethod
    def _step(
        self,
        key: Key,
        value_and_grad: ValueAndGrad,
        point: Point,
        momentum: Float[Array, " dim"],
        factor: Factor,
        step_size: Float[Array, ""],
    ) -> tuple[Point, Float[Array, " dim"], Float[Array, ""]]:
        """Take one step; return the new point and momentum, and the Metropolis-Hastings log ratio."""

    def _observe(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Problem | None, Sites]:
        """Read the model and the data in its arguments; a model is read again only where its design has changed."""
        if self.model is None:
            return None, {}
        for problem in reversed(self._problems):
            try:
                return problem, observe(problem, args, kwargs)
            except ValueError:
                continue
        given = kwargs
        if self._is_block and CONDITIONED in kwargs:  # data, of which the problem needs shapes alone
            given = kwargs | {CONDITIONED: jax.tree.map(_placeholder, kwargs[CONDITIONED])}
        if is_traced((args, given)):
            raise ValueError(
                f"{type(self).__name__} cannot read its model from traced arguments: run it once outside `jit` and "
                "`vmap`, on any data of this design."
            )
        problem = from_numpyro(self.model, *args, **given)
        self._problems.append(problem)
        return problem, observe(problem, args, kwargs)

    def _differentiate(self, log_density: LogDensity, x: Float[Array, " dim"]) -> ValueAndGrad:
        return differentiate(log_density, x, self._in_forward_mode(log_density, x))

    def _in_forward_mode(self, log_density: LogDensity, x: Float[Array, " dim"] | jax.ShapeDtypeStruct) -> bool:
        """Say whether to differentiate in forward mode: as told, or where that alone works."""
        if self.forward_mode_differentiation is not None:
            return self.forward_mode_differentiation
        mode = derivatives(log_density, x)
        if mode == "none":
            raise ValueError(
                f"{type(self).__name__} needs the gradient of the log density, which JAX can differentiate in neither "
                "reverse nor forward mode (does the model call out of JAX?). Write that part in JAX, give it a "
                "`jax.custom_jvp`, or use `ScoreSDE`, which does without."
            )
        return mode == "forward"

    def _space(self, problem: Problem | None, y: Sites, z: PyTree) -> Space:
        if problem is None:
            potential = self.potential_fn
            assert potential is not None
            unravel = ravel_pytree(z)[1]
            return Space(lambda z: ravel_pytree(z)[0], unravel, lambda x: -potential(unravel(x)))
        sites = layout(problem)
        return Space(sites.flatten, sites.unflatten, lambda x: problem.log_joint(x, y))

    def _adapter(self, num_warmup: int) -> tuple[Callable, Callable]:
        return warmup_adapter(
            num_warmup,
            adapt_step_size=False,  # its dual averaging settles a tenth above the target
            adapt_mass_matrix=self.adapt_mass_matrix,
            dense_mass=self.dense_mass,
        )

    def init(
        self, rng_key: Array, num_warmup: int, init_params: PyTree, model_args: tuple, model_kwargs: dict | None
    ) -> LangevinState:
        """Make the first state, of one chain or (given a batch of keys) of all."""
        model_kwargs = model_kwargs or {}
        if self.model is None and init_params is None:
            raise ValueError("Expected `init_params` beside `potential_fn`: they say where the chain starts.")
        problem, y = self._observe(model_args, model_kwargs)
        origin = Origin("")
        if problem is not None:
            origin = self._origins.begin(problem, model_args, model_kwargs, self._problems.index(problem))
            if init_params is None:
                init_params = self._find_start(problem, y, rng_key, model_args, model_kwargs)
            elif self._is_block:
                init_params = unconstrain(problem, rng_key, init_params)

        def begin(key: Key, params: PyTree) -> LangevinState:
            key, _, for_momentum, for_adaptation = random.split(key, 4)
            if problem is not None:
                params = layout(problem).unflatten(flatten_sites(problem, params))
            space = self._space(problem, y, params)
            x = space.flatten(params)
            value, gradient = self._differentiate(space.log_density, x)(x)
            adapt_state = self._adapter(num_warmup)[0]((x,), for_adaptation, jnp.array(self.step_size, x.dtype))
            # A zero that depends on the key: whatever NumPyro collects has a chain axis under any `vmap`.
            zero = 0 * random.uniform(key, dtype=x.dtype)
            return LangevinState(
                i=jnp.zeros((), jnp.int32),
                z=params,
                potential_energy=zero - value,
                z_grad=space.unflatten(-gradient),
                momentum=random.normal(for_momentum, x.shape, x.dtype),
                accept_prob=zero,
                mean_accept_prob=zero,
                diverging=zero > 0,
                adapt_state=adapt_state._replace(rng_key=None),
                settled=jnp.zeros((), jnp.int32),
                y=y,
                schedule=Schedule(num_warmup),
                origin=origin,
                rng_key=key,
            )

        self._sample_fn = self.sample
        state = begin(rng_key, init_params) if is_prng_key(rng_key) else jax.vmap(begin)(rng_key, init_params)
        self._check_start(problem, y, state)
        return state._replace(y=y)

    def _find_start(self, problem: Problem, y: Sites, rng_key: Array, args: tuple, kwargs: dict[str, Any]) -> PyTree:
        """Find where the density and its gradient are finite, as NumPyro's own kernels do."""
        anywhere = jax.ShapeDtypeStruct((problem.dim,), jnp.result_type(float))
        one = is_prng_key(rng_key)
        keys = random.split(rng_key, 4)[1] if one else jax.vmap(lambda key: random.split(key, 4)[1])(rng_key)
        try:
            info, *_ = initialize_model(
                keys, self.model, init_strategy=self.init_strategy, model_args=args, model_kwargs=kwargs,
                forward_mode_differentiation=self._in_forward_mode(lambda x: problem.log_joint(x, y), anywhere),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:  # NumPyro's, which names no site
            x = random.uniform(keys if one else keys[0], (problem.dim,), minval=-2.0, maxval=2.0)
            faults = blame(problem, x, y)
            if not faults:
                raise
            raise RuntimeError(f"{NO_START} anywhere that was tried.{faults}") from error
        return info.z

    def _check_start(self, problem: Problem | None, y: Sites, state: LangevinState) -> None:
        """Refuse to start where the density or its gradient is not finite: no step would ever be accepted."""
        if is_traced((state, y)):
            return
        one = is_prng_key(state.rng_key)
        starts = jax.tree.map(lambda leaf: leaf[None], state.z) if one else state.z
        known = state.potential_energy, state.z_grad
        rows = [np.asarray(leaf).reshape(1 if one else len(leaf), -1) for leaf in jax.tree.leaves(known)]
        bad = np.flatnonzero(~np.isfinite(np.concatenate(rows, axis=1)).all(1))
        if bad.size:
            first = jax.tree.map(lambda leaf: leaf[bad[0]], starts)
            faults = "" if problem is None else blame(problem, layout(problem).flatten(first), y)
            raise RuntimeError(f"{NO_START} where {bad.size} of {len(rows[0])} chains start.{faults}")

    def sample(self, state: LangevinState, model_args: tuple, model_kwargs: dict | None) -> LangevinState:
        """Move one chain, or all chains of a vectorised state, by one iteration."""
        problem, y = self._observe(model_args, model_kwargs or {})
        move = partial(self._move, problem, y)
        if is_prng_key(state.rng_key):
            return move(state)
        mapped: dict[str, Any] = dict.fromkeys(state._fields, 0) | {"y": None, "schedule": None, "origin": None}
        axes = LangevinState(**mapped)
        return jax.vmap(move, in_axes=(axes,), out_axes=axes)(state)

    def _move(self, problem: Problem | None, y: Sites, state: LangevinState) -> LangevinState:
        space, num_warmup = self._space(problem, y, state.z), state.schedule.num_warmup
        rng_key, for_step, for_accept = random.split(state.rng_key, 3)
        x, tuned = space.flatten(state.z), state.adapt_state
        value_and_grad = self._differentiate(space.log_density, x)
        known = -state.potential_energy, -space.flatten(state.z_grad)
        changed = ~jnp.array([same_bits(y[name], state.y[name]) for name in y], bool).all()
        fresh = lax.cond(any_chain(changed), lambda: value_and_grad(x), lambda: known)
        point = (x, *jax.tree.map(partial(jnp.where, changed), fresh, known))
        root = tuned.mass_matrix_sqrt_inv
        factor = root.T if root.ndim == 2 else root
        new, momentum, log_ratio = self._step(for_step, value_and_grad, point, state.momentum, factor, tuned.step_size)
        warming = state.i < num_warmup
        old, proposed = (point, self._rejected_momentum(state.momentum)), (new, momentum)
        tested, accept_prob = metropolis(for_accept, proposed, old, log_ratio)
        if not self.adjusted:
            taken = ~warming & (log_ratio > -jnp.inf)
            tested = jax.tree.map(partial(jnp.where, taken), proposed, tested)
        (x, value, gradient), momentum = tested
        tuned, settled = lax.cond(
            warming,
            lambda: self._adapt(num_warmup, state, accept_prob, x),
            lambda: (tuned, state.settled),
        )
        count = 1 + jnp.where(warming, state.i, state.i - num_warmup)
        return state._replace(
            i=state.i + 1,
            z=space.unflatten(x),
            potential_energy=-value,
            z_grad=space.unflatten(-gradient),
            momentum=momentum,
            accept_prob=accept_prob,
            mean_accept_prob=state.mean_accept_prob + (accept_prob - state.mean_accept_prob) / count,
            diverging=log_ratio == -jnp.inf,
            adapt_state=tuned,
            settled=settled,
            y=y,
            rng_key=rng_key,
        )

    def _adapt(self, num_warmup: int, state: LangevinState, accept_prob: Array, x: Array) -> tuple[Any, Array]:
        """Estimate the mass matrix; move the step size towards the target, faster again where the matrix is new."""
        old = state.adapt_state
        new = self._adapter(num_warmup)[1](state.i, accept_prob, (x,), old)
        if self.adapt_step_size:
            gain = (1.0 + state.settled) ** -0.75
            step_size = old.step_size * jnp.exp(gain * (accept_prob - self.target_accept_prob))
            new = new._replace(step_size=step_size.astype(old.step_size.dtype))
        same = (new.inverse_mass_matrix == old.inverse_mass_matrix).all()
        return new, jnp.where(same, state.settled + 1, 0)

    def _rejected_momentum(self, momentum: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Compute the momentum after a rejection."""
        return momentum

    def refresh(self, state: LangevinState, model_args: tuple, model_kwargs: dict | None) -> LangevinState:
        """Compute density and gradient for other values of what the model is conditioned on, as `Gibbs` asks."""
        problem, y = self._observe(model_args, model_kwargs or {})
        space = self._space(problem, y, state.z)
        x = space.flatten(state.z)
        value, gradient = self._differentiate(space.log_density, x)(x)
        return state._replace(potential_energy=-value, z_grad=space.unflatten(-gradient), y=y)

    def wrap_model(self, wrapper: Callable) -> "AbstractLangevin":
        """Copy the kernel with another model; `Gibbs` gives it constrained first values."""
        if self.model is None:
            raise ValueError(f"Only a {type(self).__name__} of a `model` can be a block of another kernel.")
        kernel = copy.copy(self)
        kernel.model, kernel._problems, kernel._origins = wrapper(self.model), [], Origins()
        kernel._sample_fn, kernel._is_block = None, True
        return kernel

    def postprocess_fn(self, args: tuple, kwargs: dict | None) -> Callable[[PyTree], PyTree]:
        """Make the function from unconstrained values to constrained latent and deterministic sites."""
        if self._is_block:  # asked without the values it is conditioned on, for its own sites alone
            block = self._problems[-1]
            return lambda z: block.latent_sites(layout(block).flatten(z))
        problem, _ = self._observe(args, kwargs or {})
        if problem is None:
            return lambda z: z
        self._origins.check(problem, args, kwargs or {}, self._problems.index(problem))
        return lambda z: problem.constrain(layout(problem).flatten(z))

    def num_evaluations(self, num_iterations: int, state: LangevinState) -> float:
        """Count evaluations of the density by so many iterations: one each."""
        return float(num_iterations)

    def get_diagnostics_str(self, state: LangevinState) -> str:
        """Describe the chain for the progress bar."""
        return f"step size {state.adapt_state.step_size:.2e}. acc. prob={state.mean_accept_prob:.2f}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the problems, which hold closures."""
        return self.__dict__ | {"_problems": [], "_origins": Origins(), "_sample_fn": None}


class AbstractOverdamped(AbstractLangevin):
    """The Langevin step without momentum, which `ULA` takes and `MALA` proposes."""

    def _step(self, key, value_and_grad, point, momentum, factor, step_size):
        new, log_ratio = langevin_proposal(key, value_and_grad, point, factor, step_size)
        return new, momentum, log_ratio


class ULA(AbstractOverdamped):
    """Unadjusted Langevin: x' = x + e^2/2 Sigma grad log p(x) + e N(0, Sigma), Sigma the adapted covariance.

    Warm-up applies the Metropolis test and tunes the step size until it accepts with probability
    ``target_accept_prob``; after warm-up every step is taken.

    Args:
        model: NumPyro model; or
        potential_fn: minus the log density, of any pytree like ``init_params``.
        step_size: the first e, or the only one.
        adapt_step_size: tune it in warm-up.
        adapt_mass_matrix: estimate Sigma in warm-up.
        dense_mass: estimate all of Sigma, not its diagonal alone.
        target_accept_prob: see above; None: 0.95.
        init_strategy: where chains start (`numpyro.infer.initialization`).
        forward_mode_differentiation: differentiate in forward mode; None: where the model has loops of a length that
            depends on values, which have forward derivatives alone.

    Exactness: biased, however long the chain: a Gaussian of variance s^2 along an axis, in units of Sigma, is sampled
        with variance s^2 / (1 - e^2 / (4 s^2)). Steps to where the density is not finite are not taken.

    References: Roberts and Tweedie 1996, Bernoulli 2(4), section 1.4.1.
    """

    adjusted = False
    default_target = 0.95


class MALA(AbstractOverdamped):
    """Metropolis-adjusted Langevin: the step of `ULA` as a proposal.

    Args:
        model: NumPyro model; or
        potential_fn: minus the log density, of any pytree like ``init_params``.
        step_size: the first e, or the only one.
        adapt_step_size: tune it in warm-up to ``target_accept_prob``.
        adapt_mass_matrix: estimate Sigma in warm-up.
        dense_mass: estimate all of Sigma, not its diagonal alone.
        target_accept_prob: None: 0.574, optimal in high dimension.
        init_strategy: where chains start (`numpyro.infer.initialization`).
        forward_mode_differentiation: differentiate in forward mode; None: where the model has loops of a length that
            depends on values, which have forward derivatives alone.

    Exactness: exact: leaves the posterior invariant.

    References: Roberts and Tweedie 1996; Roberts and Rosenthal 1998, JRSS B 60(1) (0.574).
    """

    default_target = TARGET_ACCEPT_PROB


class UnderdampedLangevin(AbstractLangevin):
    """Underdamped Langevin by the BAOAB splitting, one gradient a step, with or without a Metropolis test.

    In whitened coordinates, with p the momentum and h the step: B p += h/2 grad; A x += h/2 p; O p = c p +
    sqrt(1 - c^2) noise with c = exp(-friction h); A; B. O leaves N(0, I) invariant, so the log ratio of the whole step
    is the change of log density plus that of the kinetic energy outside O. A rejected step turns the momentum round.

    Args:
        model: NumPyro model; or
        potential_fn: minus the log density, of any pytree like ``init_params``.
        adjusted: apply the Metropolis test.
        friction: rate at which the momentum forgets, per unit of whitened time.
        step_size: the first h, or the only one.
        adapt_step_size: tune it in warm-up to ``target_accept_prob``.
        adapt_mass_matrix: estimate the mass matrix in warm-up.
        dense_mass: all of it, not its diagonal alone.
        target_accept_prob: None: 0.8 with the test (a rejection costs a turn), 0.95 without it.
        init_strategy: where chains start (`numpyro.infer.initialization`).
        forward_mode_differentiation: differentiate in forward mode; None: where the model has loops of a length that
            depends on values, which have forward derivatives alone.

    Exactness: exact with the test; without it biased by O(h^2), though a Gaussian's variance in x is exact.

    References: Leimkuhler and Matthews 2013, AMRX 2013(1) (BAOAB); Sivak, Chodera and Crooks 2013, PRX 3, 011007
    (the work of the splitting); Horowitz 1991 (the momentum's turn).
    """

    def __init__(
        self, model: Callable | None = None, potential_fn: Callable | None = None, *, adjusted: bool = True,
        friction: float = 1.0, **options: Any,
    ):  # fmt: skip
        self.adjusted, self.friction = adjusted, friction
        self.default_target = 0.8 if adjusted else 0.95
        super().__init__(model, potential_fn, **options)

    def _step(self, key, value_and_grad, point, momentum, factor, step_size):
        x, value, gradient = point
        half = 0.5 * step_size
        before = momentum + half * colour(factor, gradient, transpose=True)
        keep = jnp.exp(-self.friction * step_size)
        noise = random.normal(key, x.shape, x.dtype)
        after = keep * before + jnp.sqrt(1 - keep**2) * noise
        new = x + half * colour(factor, before + after)
        new_value, new_gradient = value_and_grad(new)
        end = after + half * colour(factor, new_gradient, transpose=True)
        kinetic = 0.5 * ((before @ before - momentum @ momentum) + (end @ end - after @ after))
        log_ratio = new_value - value - kinetic
        finite = jnp.isfinite(log_ratio) & jnp.isfinite(new_gradient).all()
        return (new, new_value, new_gradient), end, jnp.where(finite, log_ratio, -jnp.inf)

    def _rejected_momentum(self, momentum):
        return -momentum
