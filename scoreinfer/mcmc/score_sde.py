"""ScoreSDE: the learned sampler as a NumPyro kernel. The moves and the proof are in `scoreinfer.mcmc.transition`.

Without a fitted posterior, the kernel learns a sampler of one posterior before its first iteration
(`scoreinfer.samplers.single`). For other data it learns again.

The state holds everything that a compiled loop needs: the sampler's network weights as arrays, the number of their fit,
and the observation that the proposals in the bank were drawn for. So one kernel can be used with any number of fits,
observations, chain methods and `MCMC` objects, and never uses outdated data.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from scoreinfer._tree import evaluated_at_once, is_traced, own_broadcasting
from scoreinfer._typing import Key, Sites
from scoreinfer.errors import UnsupportedModel
from scoreinfer.evidence.bank import Outliers
from scoreinfer.mcmc.contract import NO_START, Origins, check_density, layout, observe, unconstrain
from scoreinfer.mcmc.known import problem_of_model, problem_of_potential
from scoreinfer.mcmc.transition import ScoreSDEState, Weights, refresh, start, transition, weigh_starts
from scoreinfer.posterior.npse import NPSE
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import AbstractProposal, Target, bounded_target
from scoreinfer.samplers.explorer import Effort
from scoreinfer.samplers.single import Evidence, Taught, learn
from scoreinfer.samplers.tuned import TunedProposal

PROPOSALS, ENOUGH = (1, 2, 4, 8), 0.7
"""Numbers of proposals in each iteration that the kernel chooses from by itself: the smallest one that makes this many
effective proposals. Chosen by judgement."""
LOCAL_SHARE, NUM_LOCAL_STEPS = 0.1, 5
"""Below this effective share the kernel makes this number of local steps by itself. Above, eight proposals are nearly
one effective one, and are cheaper than weighing a moved state. Chosen by judgement."""
NO_DENSITY = "ScoreSDE needs a density, but the model has no density: use `posterior.sample`."


class Fit(NamedTuple):
    """A learned sampler and the problem that it was learned for.

    Args:
        problem: the problem.
        proposal: the sampler.
        evidence: results of the explorer, for a sampler of one observation. None means that the sampler is amortised.
        outliers: simulations by which an outlying observation is detected, for an amortised sampler. None means that
            there are none.
        taught: the rounds of the training, for a sampler of one observation.
        max_memory: bytes for values that are weighed together. None means the default of `ScoreSDE`.
    """

    problem: Problem
    proposal: AbstractProposal
    evidence: Evidence | None = None
    outliers: Outliers | None = None
    taught: Taught | None = None
    max_memory: int | None = None

    def target(self, args: tuple, kwargs: dict[str, Any]) -> Target:
        """Read the observation in these model arguments.

        Raises:
            ValueError: if the arguments do not fit the problem.
        """
        return bounded_target(self.problem, observe(self.problem, args, kwargs), self.max_memory)


def amortised_fit(posterior: Any, max_memory: int | None = None) -> Fit:
    """Make the `Fit` of a fitted posterior.

    Raises:
        ValueError: if the posterior is tuned to every observation anew: a kernel needs one fixed proposal.
    """
    if isinstance(posterior.proposal, TunedProposal):
        raise ValueError(
            "Expected a posterior with a fixed proposal, got one that is tuned to every observation anew: give "
            "`posterior.condition(...).focus(key).posterior`."
        )
    outliers = getattr(posterior, "outliers", None)
    return Fit(posterior.problem, posterior.proposal, outliers=outliers, max_memory=max_memory)


class ScoreSDE(MCMCKernel):
    """The learned sampler as a Markov kernel: global moves by independent proposals alternate with local moves.

    *With a fitted* ``posterior`` the kernel works for every observation of the same design, without learning. With
    ``MCMC(..., jit_model_args=True)`` other observed values also reuse the compiled loop.

    *With only a* ``model`` *or a* ``potential_fn`` the kernel learns this one posterior before its first iteration.
    Particles explore the posterior by tempering. Their shape makes a Gaussian sampler. If it is not good enough, they
    train a score (`scoreinfer.samplers.single.learn`).
    ``num_warmup`` sets the budget: 16 particles (rounded up to a power of two, 512 to 8192) and at most twenty
    optimiser steps for each iteration. Training stops when the weights are good enough. All chains share the learned
    sampler. Other data need new learning. Sampling then uses a fixed, exact kernel. `certify` judges the result.

    A chain starts from one of ``bank_size`` proposals, picked by weight, unless ``init_params`` are given. A run on
    other data than those of the warm-up also starts from a proposal.

    Args:
        model: NumPyro model. With a ``posterior``, the model that ArviZ and a pickled kernel use.
        potential_fn: minus the log density, a function of a pytree like ``init_params``.
        posterior: the fitted posterior (`scoreinfer.fit`).
        num_proposals: number of fresh proposals in each iteration. None means one with a ``posterior``, else 1, 2, 4 or
            8: about one effective proposal, by the effective share that the learning has reached.
        num_local_steps: MALA steps after each global move. None means none with a ``posterior`` or where the effective
            share is at least .1, else five.
        step_size: initial step size of MALA, in units of the proposals' standard deviation.
        bank_size: number of proposals that are drawn at once. A multiple of ``num_proposals``.
        start_scale: scale of the t distribution from which the explorer starts, in the unconstrained space. It is used
            only without a prior to draw from (bare densities, improper priors, factors). It should cover all modes.
        key: random key of the learning. None means the key of the first chain.
        progress_bar: show the progress of the learning on a terminal.
        max_memory: bytes that the arrays of values that are weighed together may take, in learning, sampling (for each
            chain) and `certify`. Fewer bytes mean smaller batches, not other draws (but for the rounding of sums). None
            means one gibibyte, or a quarter of the device's memory where that is less. On the CPU batches also stay as
            small as is fastest. Every weight uses all data: rows are never left out or subsampled.

    Raises:
        ValueError: if none of ``model``, ``potential_fn`` and ``posterior`` is given, if ``potential_fn`` is given with
            another one, if the posterior is tuned to every observation anew (`NPSE`, ``tune=True``), or if
            ``bank_size`` is no positive multiple of ``num_proposals``.

    Exactness: exact: every move leaves the posterior invariant, for any learned sampler. The quality of the sampler
        decides how fast the chain forgets its start. No chain finds a mode that neither the proposals nor the local
        moves visit.

    Good values: the defaults suit proposals with an ESS above 0.3 N for N draws. For a smaller ESS, raise
        ``num_proposals`` to about N / ESS, or use 2 to 10 local steps with a few hundred iterations of warm-up.

    References: Liu, Liang and Wong 2000; Andrieu, Lee and Vihola 2018 (see `scoreinfer.mcmc.transition`); Gabrie,
    Rotskoff and Vanden-Eijnden 2022, PNAS 119 (learned global moves between local ones).
    """

    sample_field = "z"
    diagnostics = ("accept_prob",)
    default_fields = ("z", "log_weight", "accept_prob", "potential_energy")

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        posterior: Any = None,
        num_proposals: int | None = None,
        num_local_steps: int | None = None,
        step_size: float = 1.0,
        bank_size: int = 128,
        start_scale: float = 5.0,
        key: Key | None = None,
        progress_bar: bool = True,
        max_memory: int | None = None,
    ):
        if model is None and posterior is None and potential_fn is None:
            raise ValueError("Expected a `model`, a `potential_fn` or a fitted `posterior`, got none: give one.")
        if potential_fn is not None and not (model is None and posterior is None):
            raise ValueError("Expected only `potential_fn`, got it with a `model` or a `posterior`: leave one out.")
        each = 1 if num_proposals is None else num_proposals
        if each < 1 or bank_size < each or bank_size % each:
            raise ValueError(f"`bank_size` must be a positive multiple of num_proposals={each}, got {bank_size}.")
        self.model = posterior.problem.model if model is None and posterior is not None else model
        self.potential_fn = potential_fn
        self.num_proposals, self.num_local_steps = num_proposals, num_local_steps
        self.step_size, self.bank_size, self.start_scale = step_size, bank_size, start_scale
        self.key, self.progress_bar, self.max_memory = key, progress_bar, max_memory
        self._fits = [] if posterior is None else [amortised_fit(posterior, max_memory)]
        self._latest = 0
        self._origins = Origins()
        self._is_block = False
        self._sample_fn: Callable[..., ScoreSDEState] | None = None

    @own_broadcasting
    def fit(self, key: Key, *args: Any, **kwargs: Any) -> Any:
        """Fit the amortised `Posterior` for these model arguments now. Later runs with the same covariates use it.

        Raises:
            ValueError: if the kernel has no model; and everything that `NPSE.fit` raises.
        """
        if self.model is None:
            raise ValueError("Expected a ScoreSDE with a model to fit, this one has no model: give ScoreSDE a `model`.")
        with evaluated_at_once():
            posterior = NPSE(self.model, progress_bar=self.progress_bar, max_memory=self.max_memory).fit(
                key, *args, **kwargs
            )
        self._keep(amortised_fit(posterior, self.max_memory))
        return posterior

    @own_broadcasting
    def learn(self, key: Key, num_warmup: int, *args: Any, init_params: PyTree = None, **kwargs: Any) -> None:
        """Learn the posterior of these model arguments now, as ``num_warmup`` iterations of warm-up would.

        It is needed only if a run cannot learn: if random keys are traced (``chain_method`` "parallel") and the kernel
        was made without a ``key``.

        Args:
            key: random key.
            num_warmup: the budget, in iterations of warm-up (see the class).
            *args: arguments of the model, including the data.
            init_params: with ``potential_fn``, an example of its argument.
            **kwargs: keyword arguments of the model.

        Raises:
            ValueError: if ``num_warmup`` is not positive, or ``init_params`` is missing for a ``potential_fn``.
            UnsupportedModel: if the model has no density.
            FloatingPointError: if the density is finite at no draw of the explorer's start.

        Exactness: exact sampling does not depend on this learning (see the class).
        """
        if num_warmup < 1:
            raise ValueError(f"`num_warmup` must be at least 1, got {num_warmup}: it is the budget of the learning.")
        problem = self._read(args, kwargs, init_params)
        if not problem.has_density:
            raise UnsupportedModel(NO_DENSITY)
        target = bounded_target(problem, observe(problem, args, kwargs), self.max_memory)
        num_particles = min(max(1 << (16 * num_warmup - 1).bit_length(), 512), 8192)
        effort = Effort(num_particles=num_particles, num_steps=20 * num_warmup)
        with evaluated_at_once():
            learned = learn(key, target, effort, start_scale=self.start_scale, progress_bar=self.progress_bar)
        self._keep(Fit(problem, learned.proposal, learned.evidence, taught=learned.taught, max_memory=self.max_memory))

    def _keep(self, fit: Fit) -> None:
        self._latest = len(self._fits)
        self._fits.append(fit)

    def _read(self, args: tuple, kwargs: dict[str, Any], example: PyTree) -> Problem:
        """Read the problem. A problem of the same design that was read before is used again, with its programs.

        Raises:
            ValueError: if ``example`` is missing for a ``potential_fn``.
        """
        if self.potential_fn is not None:
            if example is None:
                raise ValueError("Expected `init_params` with `potential_fn`, got none: give an example argument.")
            return problem_of_potential(self.potential_fn, example)
        return problem_of_model(self.model, args, kwargs, (fit.problem for fit in self._fits))

    def _find(self, args: tuple, kwargs: dict[str, Any], any_data: bool = False) -> tuple[Fit, Target]:
        """Find the sampler for these arguments, the latest first, and read the observation in them.

        With ``any_data`` only the design has to be the same.

        Raises:
            ValueError: if there is no sampler for these arguments.
        """
        error = None
        for number in sorted(range(len(self._fits)), key=lambda number: number != self._latest):
            fit = self._fits[number]
            try:
                target = fit.target(args, kwargs)
            except ValueError as mismatch:
                error = error or mismatch
                continue
            if any_data or fit.evidence is None or _same(target.y, fit.evidence.y):
                self._latest = number
                return fit, target
            error = error or ValueError("ScoreSDE has learned the posterior of other data only.")
        raise error or ValueError("ScoreSDE has learned nothing yet.")

    def _find_or_learn(
        self, args: tuple, kwargs: dict[str, Any], rng_key: Array, num_warmup: int, example: PyTree
    ) -> tuple[Fit, Target]:
        """Find the sampler for these arguments. Learn one if there is none.

        Raises:
            ValueError: if the kernel cannot learn: arguments or keys are traced, or ``num_warmup`` is 0.
        """
        try:
            return self._find(args, kwargs, any_data=self._is_block)  # a block's data always change
        except ValueError as error:
            if self.model is None and self.potential_fn is None:
                raise
            if is_traced((args, kwargs)):
                raise ValueError(
                    "ScoreSDE cannot learn from traced model arguments: call `kernel.fit(key, ...)` first."
                ) from error
            key = rng_key if self.key is None else self.key
            if is_traced(key):
                raise ValueError(
                    "ScoreSDE cannot learn with the traced key of this chain method: give ScoreSDE `key=`, or call "
                    "`kernel.learn(key, num_warmup, ...)` first."
                ) from error
            if num_warmup == 0:
                raise ValueError(
                    f"{error} It learns in warm-up, but `num_warmup` is 0: raise `num_warmup`, give a fitted "
                    "`posterior`, or call `kernel.learn(key, num_warmup, ...)` first."
                ) from error
            first = self.key is not None or is_prng_key(key)
            self.learn(key if first else key[0], num_warmup, *args, init_params=example, **kwargs)
            return self._find(args, kwargs, any_data=self._is_block)

    @own_broadcasting
    def init(
        self, rng_key: Array, num_warmup: int, init_params: PyTree, model_args: tuple, model_kwargs: dict | None
    ) -> ScoreSDEState:
        """Make the first state of one chain, or of all chains if ``rng_key`` is a batch. Learn a sampler if needed.

        Raises:
            ValueError: if the kernel cannot learn: arguments or keys are traced, or ``num_warmup`` is 0.
            UnsupportedModel: if the model has no density.
            RuntimeError: if the density is not finite at ``init_params``, or NaN at all draws from the prior.
        """
        model_kwargs = model_kwargs or {}
        one = is_prng_key(rng_key)
        example = init_params if one else jax.tree.map(lambda leaf: leaf[0], init_params)
        fit, target = self._find_or_learn(model_args, model_kwargs, rng_key, num_warmup, example)
        if not fit.problem.has_density:
            raise UnsupportedModel(NO_DENSITY)
        local = self.moves_of(fit)[1] > 0
        check_density(target.problem, target.y, gradient=local)
        sizes = jnp.array(num_warmup, jnp.int32), jnp.array(self.step_size), self.bank_size
        if self._is_block and init_params is not None:
            init_params = unconstrain(fit.problem, rng_key, init_params)
        given = None if init_params is None else weigh_starts(rng_key, fit.proposal, target, init_params)
        state = start(fit.proposal, target, *sizes, local, rng_key, given)
        if init_params is not None and not is_traced(state.z) and not np.isfinite(state.potential_energy).all():
            raise RuntimeError(f"{NO_START} at the start that is given by `init_params`.")
        self._sample_fn = self.sample
        arrays = jax.tree.leaves(eqx.filter(fit.proposal, eqx.is_array))
        origin = self._origins.begin(fit.problem, model_args, model_kwargs)
        return state._replace(y=target.y, weights=Weights(tuple(arrays), self._latest), origin=origin)

    @own_broadcasting
    def sample(self, state: ScoreSDEState, model_args: tuple, model_kwargs: dict | None) -> ScoreSDEState:
        """Move one chain, or all chains of a vectorised state, by one iteration."""
        model_kwargs = model_kwargs or {}
        proposal, target = self._restore(state, model_args, model_kwargs)
        return _each_chain(partial(transition, proposal, target, *self.moves_of(self.fit_of(state))), state)

    def _restore(self, state: ScoreSDEState, args: tuple, kwargs: dict[str, Any]) -> tuple[AbstractProposal, Target]:
        """Put the network weights in the state back into their sampler, and read the observation."""
        fit = self._fits[state.weights.fit]
        self._latest = state.weights.fit
        arrays, static = eqx.partition(fit.proposal, eqx.is_array)
        arrays = jax.tree.unflatten(jax.tree.structure(arrays), state.weights.arrays)
        return eqx.combine(arrays, static), fit.target(args, kwargs)

    @own_broadcasting
    def refresh(self, state: ScoreSDEState, model_args: tuple, model_kwargs: dict | None) -> ScoreSDEState:
        """Weigh the current draw again after `Gibbs` has changed the values of the other sites.

        Exactness: exact, see `scoreinfer.mcmc.transition.refresh`.
        """
        proposal, target = self._restore(state, model_args, model_kwargs or {})
        return _each_chain(partial(refresh, proposal, target), state)

    def wrap_model(self, wrapper: Callable) -> "ScoreSDE":
        """Copy the kernel with another model and no learned sampler, as a block of `Gibbs`.

        The ``init_params`` of the copy are constrained values.

        Raises:
            ValueError: if the kernel has no model or an amortised sampler.
        """
        if self.model is None or any(fit.evidence is None for fit in self._fits):
            raise ValueError("A block needs a ScoreSDE without a `posterior`: make it from the `model` only.")
        kernel = copy.copy(self)
        kernel.model, kernel._fits, kernel._sample_fn = wrapper(self.model), [], None
        kernel._latest, kernel._is_block, kernel._origins = 0, True, Origins()
        return kernel

    def fit_of(self, state: ScoreSDEState) -> Fit:
        """Return the fit whose sampler moved a state."""
        return self._fits[state.weights.fit]

    def moves_of(self, fit: Fit) -> tuple[int, int]:
        """Return the numbers of fresh proposals and of local steps in each iteration with a fit."""
        share = 1.0 if fit.taught is None else fit.taught.best.share
        share = 0.0 if self._is_block else share  # it was measured at other data
        num_proposals, num_local_steps = self.num_proposals, self.num_local_steps
        if num_proposals is None:
            able = [n for n in PROPOSALS if self.bank_size % n == 0]
            num_proposals = 1 if self._is_block else next((n for n in able if n * share >= ENOUGH), able[-1])
        if num_local_steps is None:
            num_local_steps = NUM_LOCAL_STEPS if share < LOCAL_SHARE else 0
        return num_proposals, num_local_steps

    def postprocess_fn(self, args: tuple, kwargs: dict | None) -> Callable[[Sites], Sites]:
        """Make the function from unconstrained values to constrained latent and deterministic sites.

        Raises:
            ValueError: if there is no sampler of this design, or if the data have changed since the latest chain began.
        """
        if self.potential_fn is not None:
            return lambda z: z
        if self._is_block:  # `Gibbs` wants only the block's own sites, and gives no other values
            problem = self._fits[self._latest].problem
            return lambda z: _latent_sites(problem, z)
        fit, target = self._find(args, kwargs or {}, any_data=True)
        self._origins.check(fit.problem, args, kwargs or {})
        return lambda z: _constrained(fit.problem, z, target.y)

    def get_diagnostics_str(self, state: ScoreSDEState) -> str:
        """Describe the chain for the progress bar."""
        text = f"acc. prob={state.mean_accept_prob:.2f}"
        if self.moves_of(self.fit_of(state))[1]:
            tuned = state.adapt_state
            text += f", local step size {tuned.step_size:.2e}, acc. prob={tuned.accept_prob:.2f}"
        return text

    def num_evaluations(self, num_iterations: int, state: ScoreSDEState) -> float:
        """Count evaluations of the density in ``num_iterations`` iterations and in the learning before them."""
        fit = self.fit_of(state)
        num_proposals, num_local_steps = self.moves_of(fit)
        local = num_local_steps + 2 if num_local_steps else 0
        learning = 0 if fit.evidence is None else fit.evidence.num_gradients
        return float(num_iterations * (num_proposals + local) + learning)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the attributes that are valid in this process only."""
        return self.__dict__ | {"_origins": Origins(), "_sample_fn": None}


def _same(y: Sites, other: Sites) -> bool:
    """Say whether two observations are the same. Traced observations count as different."""
    return not is_traced((y, other)) and all(
        np.asarray(y[name]).tobytes() == np.asarray(other[name]).tobytes() for name in y
    )


@eqx.filter_jit
def _latent_sites(problem: Problem, z: PyTree) -> Sites:
    return problem.latent_sites(layout(problem).flatten(z))


@eqx.filter_jit
def _constrained(problem: Problem, z: PyTree, y: Sites) -> Sites:
    return problem.sites(layout(problem).flatten(z), y)


def _each_chain(move: Callable[[ScoreSDEState], ScoreSDEState], state: ScoreSDEState) -> ScoreSDEState:
    """Apply a move to one chain, or to all chains of a vectorised state."""
    if is_prng_key(state.rng_key):
        return move(state)
    mapped: dict[str, Any] = dict.fromkeys(state._fields, 0) | {"y": None, "weights": None, "origin": None}
    axes = ScoreSDEState(**mapped)
    return jax.vmap(move, in_axes=(axes,), out_axes=axes)(state)
