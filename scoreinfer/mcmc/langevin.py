"""Langevin dynamics as NumPyro kernels: unadjusted, Metropolis-adjusted, underdamped.

All kernels move in coordinates whitened by the mass matrix that warm-up estimates (in NumPyro's windows). They tune the
step size to a target acceptance probability. Unadjusted kernels also apply the Metropolis test during warm-up, because
the first steps may be too large. After warm-up they compute the acceptance probability only as a diagnostic.
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
from scoreinfer.mcmc.known import problem_of_model
from scoreinfer.montecarlo.langevin import (
    TARGET_ACCEPT_PROB,
    Differentiation,
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
"""The keyword argument by which `numpyro.infer.Gibbs` passes the values of all other sites to a block."""


def _placeholder(leaf: Any) -> Any:
    return np.zeros(jnp.shape(leaf), jnp.result_type(leaf)) if is_traced(leaf) else leaf


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["num_warmup"])
class Schedule:
    """The length of the warm-up. It is part of the state's structure: another length makes JAX trace a loop again."""

    def __init__(self, num_warmup: int):
        self.num_warmup = num_warmup


class LangevinState(NamedTuple):
    """State of one chain, or of all chains if vectorised. Only ``y`` never has a chain axis.

    Args:
        i: iteration.
        z: unconstrained values of the latent sites.
        potential_energy: minus log p(z, y) in the unconstrained space.
        z_grad: gradient of ``potential_energy``.
        momentum: momentum in whitened coordinates. The overdamped kernels do not use it.
        accept_prob: Metropolis acceptance probability of the last step, also if the kernel does not apply the test.
        mean_accept_prob: mean of ``accept_prob`` since the start, or since the end of warm-up.
        diverging: whether the density or its gradient was not finite at the last proposed point.
        adapt_state: step size and mass matrix (NumPyro's ``HMCAdaptState``).
        settled: iterations since the mass matrix last changed.
        y: the observation that ``potential_energy`` was computed for.
        schedule: length of the warm-up.
        origin: mark of the data's source.
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
    """The target log density of a flat vector, and the maps between that vector and NumPyro's ``z``."""

    flatten: Callable[[PyTree], Float[Array, " dim"]]
    unflatten: Callable[[Float[Array, " dim"]], PyTree]
    log_density: LogDensity


class AbstractLangevin(MCMCKernel):
    """Shared part of the Langevin kernels: reading the model, adaptation, chains and diagnostics."""

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
            raise ValueError("Expected either a `model` or a `potential_fn`, got both or neither: give one of them.")
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
        """Propose one step. Return the new point, the new momentum, and the Metropolis-Hastings log ratio."""

    def _observe(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Problem | None, Sites]:
        """Read the model and the data in its arguments. The model is read again only if its design has changed."""
        if self.model is None:
            return None, {}
        for problem in reversed(self._problems):
            try:
                return problem, observe(problem, args, kwargs)
            except ValueError:
                continue
        given = kwargs
        if self._is_block and CONDITIONED in kwargs:  # these are data: the problem needs only their shapes
            given = kwargs | {CONDITIONED: jax.tree.map(_placeholder, kwargs[CONDITIONED])}
        if is_traced((args, given)):
            raise ValueError(
                f"{type(self).__name__} expected concrete model arguments to read its model, got traced ones: run it "
                "once outside `jit` and `vmap`, on any data of this design."
            )
        problem = problem_of_model(self.model, args, given)
        self._problems.append(problem)
        return problem, observe(problem, args, kwargs)

    def _differentiate(self, log_density: LogDensity, x: Float[Array, " dim"]) -> ValueAndGrad:
        return differentiate(log_density, x, self._in_forward_mode(log_density, x))

    def _in_forward_mode(self, log_density: LogDensity, x: Float[Array, " dim"] | jax.ShapeDtypeStruct) -> bool:
        """Say whether to differentiate in forward mode: as the user chose, or if only forward mode works.

        Raises:
            ValueError: if neither mode works.
        """
        if self.forward_mode_differentiation is not None:
            return self.forward_mode_differentiation
        mode = derivatives(log_density, x)
        if mode is Differentiation.NONE:
            raise ValueError(
                f"{type(self).__name__} needs the gradient of the log density, which JAX can differentiate in neither "
                "reverse nor forward mode (does the model call out of JAX?). Write that part in JAX, give it a "
                "`jax.custom_jvp`, or use `ScoreSDE`, which needs no gradient."
            )
        return mode is Differentiation.FORWARD

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
            adapt_step_size=False,  # its dual averaging ends about a tenth above the target
            adapt_mass_matrix=self.adapt_mass_matrix,
            dense_mass=self.dense_mass,
        )

    def init(
        self, rng_key: Array, num_warmup: int, init_params: PyTree, model_args: tuple, model_kwargs: dict | None
    ) -> LangevinState:
        """Make the first state of one chain, or of all chains if ``rng_key`` is a batch of keys.

        Raises:
            ValueError: if ``init_params`` is missing for a ``potential_fn`` or has wrong sizes, if the gradient does
                not exist, or if the model has to be read from traced arguments.
            RuntimeError: if the density or its gradient is not finite at the start.
        """
        model_kwargs = model_kwargs or {}
        if self.model is None and init_params is None:
            raise ValueError("Expected `init_params` with `potential_fn`, got none: give the start of the chain.")
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
            # This zero depends on the key. So every array that NumPyro collects has a chain axis under any `vmap`.
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
        """Find a start at which the density and its gradient are finite, as NumPyro's own kernels do."""
        anywhere = jax.ShapeDtypeStruct((problem.dim,), jnp.result_type(float))
        one = is_prng_key(rng_key)
        keys = random.split(rng_key, 4)[1] if one else jax.vmap(lambda key: random.split(key, 4)[1])(rng_key)
        try:
            info, *_ = initialize_model(
                keys, self.model, init_strategy=self.init_strategy, model_args=args, model_kwargs=kwargs,
                forward_mode_differentiation=self._in_forward_mode(lambda x: problem.log_joint(x, y), anywhere),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:  # NumPyro's error names no site
            x = random.uniform(keys if one else keys[0], (problem.dim,), minval=-2.0, maxval=2.0)
            faults = blame(problem, x, y)
            if not faults:
                raise
            raise RuntimeError(f"{NO_START} at any point that was tried.{faults}") from error
        return info.z

    def _check_start(self, problem: Problem | None, y: Sites, state: LangevinState) -> None:
        """Raise an error if the density or its gradient is not finite at a start: no step would be accepted there."""
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
        """Update the mass matrix and the step size. A new mass matrix resets the gain of the step size."""
        old = state.adapt_state
        new = self._adapter(num_warmup)[1](state.i, accept_prob, (x,), old)
        if self.adapt_step_size:
            gain = (1.0 + state.settled) ** -0.75
            step_size = old.step_size * jnp.exp(gain * (accept_prob - self.target_accept_prob))
            new = new._replace(step_size=step_size.astype(old.step_size.dtype))
        same = (new.inverse_mass_matrix == old.inverse_mass_matrix).all()
        return new, jnp.where(same, state.settled + 1, 0)

    def _rejected_momentum(self, momentum: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Compute the momentum after a rejected step."""
        return momentum

    def refresh(self, state: LangevinState, model_args: tuple, model_kwargs: dict | None) -> LangevinState:
        """Compute density and gradient again after `Gibbs` has changed the values of the other sites."""
        problem, y = self._observe(model_args, model_kwargs or {})
        space = self._space(problem, y, state.z)
        x = space.flatten(state.z)
        value, gradient = self._differentiate(space.log_density, x)(x)
        return state._replace(potential_energy=-value, z_grad=space.unflatten(-gradient), y=y)

    def wrap_model(self, wrapper: Callable) -> "AbstractLangevin":
        """Copy the kernel with another model, as a block of `Gibbs`. Its ``init_params`` are then constrained values.

        Raises:
            ValueError: if the kernel was made from a ``potential_fn``.
        """
        if self.model is None:
            raise ValueError(f"A block needs a {type(self).__name__} of a `model`, got one of a `potential_fn`.")
        kernel = copy.copy(self)
        kernel.model, kernel._problems, kernel._origins = wrapper(self.model), [], Origins()
        kernel._sample_fn, kernel._is_block = None, True
        return kernel

    def postprocess_fn(self, args: tuple, kwargs: dict | None) -> Callable[[PyTree], PyTree]:
        """Make the function from unconstrained values to constrained latent and deterministic sites.

        Raises:
            ValueError: if the data have changed since the latest chain began.
        """
        if self._is_block:  # `Gibbs` wants only the block's own sites, and gives no other values
            block = self._problems[-1]
            return lambda z: block.latent_sites(layout(block).flatten(z))
        problem, y = self._observe(args, kwargs or {})
        if problem is None:
            return lambda z: z
        self._origins.check(problem, args, kwargs or {}, self._problems.index(problem))
        return lambda z: problem.sites(layout(problem).flatten(z), y)

    def num_evaluations(self, num_iterations: int, state: LangevinState) -> float:
        """Count evaluations of the density in ``num_iterations`` iterations: one each."""
        return float(num_iterations)

    def get_diagnostics_str(self, state: LangevinState) -> str:
        """Describe the chain for the progress bar."""
        return f"step size {state.adapt_state.step_size:.2e}. acc. prob={state.mean_accept_prob:.2f}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the problems: they hold closures, which cannot be pickled."""
        return self.__dict__ | {"_problems": [], "_origins": Origins(), "_sample_fn": None}


class AbstractOverdamped(AbstractLangevin):
    """The Langevin step without momentum. `ULA` always takes it, `MALA` uses it as a proposal."""

    def _step(self, key, value_and_grad, point, momentum, factor, step_size):
        new, log_ratio = langevin_proposal(key, value_and_grad, point, factor, step_size)
        return new, momentum, log_ratio


class ULA(AbstractOverdamped):
    """Unadjusted Langevin: x' = x + e^2/2 Sigma grad log p(x) + e N(0, Sigma).

    e is the step size, and Sigma is the adapted covariance. Warm-up applies the Metropolis test. It tunes the step size
    so that the test accepts with probability ``target_accept_prob``. After warm-up there is no test.

    Args:
        model: NumPyro model. Or
        potential_fn: minus the log density, a function of a pytree like ``init_params``.
        step_size: initial e. It stays fixed if ``adapt_step_size`` is False.
        adapt_step_size: tune the step size in warm-up.
        adapt_mass_matrix: estimate Sigma in warm-up. Otherwise Sigma is the identity.
        dense_mass: estimate the full matrix Sigma, not only its diagonal.
        target_accept_prob: acceptance probability that warm-up tunes to. None means 0.95.
        init_strategy: how chains find their start (`numpyro.infer.initialization`).
        forward_mode_differentiation: differentiate in forward mode. None means only if reverse mode does not work: for
            models with loops whose length depends on values.

    Raises:
        ValueError: if not exactly one of ``model`` and ``potential_fn`` is given.

    Exactness: biased, for chains of any length. A Gaussian of variance s^2 along an axis, in units of Sigma, is sampled
        with variance s^2 / (1 - e^2 / (4 s^2)). Steps to points with a density that is not finite are rejected.

    References: Roberts and Tweedie 1996, Bernoulli 2(4), section 1.4.1.
    """

    adjusted = False
    default_target = 0.95


class MALA(AbstractOverdamped):
    """Metropolis-adjusted Langevin: the step of `ULA` is a proposal of a Metropolis test.

    Args:
        model: NumPyro model. Or
        potential_fn: minus the log density, a function of a pytree like ``init_params``.
        step_size: initial e. It stays fixed if ``adapt_step_size`` is False.
        adapt_step_size: tune the step size in warm-up to ``target_accept_prob``.
        adapt_mass_matrix: estimate Sigma in warm-up. Otherwise Sigma is the identity.
        dense_mass: estimate the full matrix Sigma, not only its diagonal.
        target_accept_prob: None means 0.574, which is optimal in high dimension.
        init_strategy: how chains find their start (`numpyro.infer.initialization`).
        forward_mode_differentiation: differentiate in forward mode. None means only if reverse mode does not work: for
            models with loops whose length depends on values.

    Raises:
        ValueError: if not exactly one of ``model`` and ``potential_fn`` is given.

    Exactness: exact: each step leaves the posterior invariant.

    References: Roberts and Tweedie 1996; Roberts and Rosenthal 1998, JRSS B 60(1) (0.574).
    """

    default_target = TARGET_ACCEPT_PROB


class UnderdampedLangevin(AbstractLangevin):
    """Underdamped Langevin by the BAOAB splitting, with or without a Metropolis test. One gradient per step.

    In whitened coordinates, with momentum p and step size h, one step is B, A, O, A, B:

    - B: p += h/2 grad log p(x)
    - A: x += h/2 p
    - O: p = c p + sqrt(1 - c^2) noise, c = exp(-friction h)

    O leaves N(0, I) invariant. So the log ratio of the step is the change of the log density minus the change of the
    kinetic energy in the B parts. A rejected step reverses the momentum.

    Args:
        model: NumPyro model. Or
        potential_fn: minus the log density, a function of a pytree like ``init_params``.
        adjusted: apply the Metropolis test.
        friction: decay rate of the momentum, per unit of whitened time.
        step_size: initial h. It stays fixed if ``adapt_step_size`` is False.
        adapt_step_size: tune the step size in warm-up to ``target_accept_prob``.
        adapt_mass_matrix: estimate the mass matrix in warm-up. Otherwise it is the identity.
        dense_mass: estimate the full matrix, not only its diagonal.
        target_accept_prob: None means 0.8 with the test (a rejection reverses the momentum), and 0.95 without it.
        init_strategy: how chains find their start (`numpyro.infer.initialization`).
        forward_mode_differentiation: differentiate in forward mode. None means only if reverse mode does not work: for
            models with loops whose length depends on values.

    Raises:
        ValueError: if not exactly one of ``model`` and ``potential_fn`` is given.

    Exactness: exact with the test: each step leaves the posterior invariant. Without the test, biased by O(h^2); only
        the variance of a Gaussian in x is exact.

    References: Leimkuhler and Matthews 2013, AMRX 2013(1) (BAOAB); Sivak, Chodera and Crooks 2013, PRX 3, 011007
    (the work of the splitting); Horowitz 1991 (reversal of the momentum).
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
