"""ScoreSDE: the learned sampler as a NumPyro kernel. The moves and the proof are in `scoreinfer.mcmc.transition`.

Without a fitted posterior the kernel learns a sampler of the one posterior at hand before its first iteration
(`scoreinfer.samplers.single`), and again for other data.

What a compiled loop needs travels in the state: the weights of the sampler as arrays, labelled by the number of the
fit they come from, and the observation that the proposals in the bank were drawn for. So one kernel serves any number
of fits, observations, chain methods and `MCMC` objects, and nothing it answers is stale.
"""

import contextlib
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
from scoreinfer.mcmc.transition import ScoreSDEState, Weights, refresh, start, transition
from scoreinfer.model import from_numpyro
from scoreinfer.posterior.npse import NPSE
from scoreinfer.problem import Problem, from_potential
from scoreinfer.samplers.base import AbstractProposal, Target
from scoreinfer.samplers.single import Effort, Evidence, learn


class Fit(NamedTuple):
    """A sampler, and model arguments of its design (None where the kernel has not seen any).

    Args:
        problem: the problem that it is for.
        proposal: the sampler.
        arguments: model arguments; of a bare density, an example of what it takes.
        evidence: what the explorer found, where the sampler answers for one observation only.
        outliers: simulations by which an outlying observation is told, where it answers for any.
    """

    problem: Problem
    proposal: AbstractProposal
    arguments: tuple[tuple, dict[str, Any]] | None
    evidence: Evidence | None = None
    outliers: Outliers | None = None

    def target(self, args: tuple, kwargs: dict[str, Any]) -> Target:
        """Read the observation in these model arguments."""
        return Target(self.problem, observe(self.problem, args, kwargs))


def amortised_fit(posterior: Any, arguments: tuple[tuple, dict[str, Any]] | None) -> Fit:
    """Take the sampler of a fitted posterior."""
    return Fit(posterior.problem, posterior.proposal, arguments, outliers=getattr(posterior, "outliers", None))


class ScoreSDE(MCMCKernel):
    """The learned sampler as a Markov kernel: global moves by independent proposals, alternating with local ones.

    *With a fitted* ``posterior`` it answers for every observation of that design at once. With ``MCMC(...,
    jit_model_args=True)`` other observed values reuse the compiled loop as well.

    *With a* ``model`` *or a* ``potential_fn`` *alone* it learns this one posterior before its first iteration:
    particles explore it by tempering and train the score (`scoreinfer.samplers.single.learn`), ``num_warmup`` being the
    budget: eight particles (256 to 8192) and ten optimiser steps for each iteration. All chains share what was
    learned; other data are learned anew. Sampling is a fixed, exact kernel. `certify` judges the result.

    A chain starts from one of ``bank_size`` proposals, picked by weight, unless ``init_params`` say where; so does a
    run on other data than the warm-up's.

    Args:
        model: NumPyro model; beside ``posterior``, what ArviZ and a pickled kernel read.
        potential_fn: minus the log density, of any pytree like ``init_params``.
        posterior: the fitted posterior (`scoreinfer.fit`).
        num_proposals: fresh proposals tried in each iteration.
        num_local_steps: MALA steps after each global move; None: none with a ``posterior``, else five.
        step_size: first step size of MALA, in units of the proposals' spread.
        bank_size: proposals drawn at a time, a multiple of ``num_proposals``.
        start_scale: scale, in the unconstrained space, of the t distribution from which the explorer starts where
             it cannot draw from the prior (bare densities, improper priors, factors). Make it cover all modes.
        key: random key of the learning; None: that of the first chain.
        progress_bar: show the progress of the learning on a terminal.

    Exactness: exact: every move leaves the posterior invariant, whatever was learned. That decides how fast the chain
        forgets its start, and no chain finds a mode that neither the proposals nor the local moves visit.

    Good values: the defaults suit an importance ESS above 0.3 of the draws. Below, raise ``num_proposals`` to about
        1 / (ESS / N), or take 2 to 10 local steps with a few hundred iterations of warm-up.

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
        num_proposals: int = 1,
        num_local_steps: int | None = None,
        step_size: float = 1.0,
        bank_size: int = 128,
        start_scale: float = 5.0,
        key: Key | None = None,
        progress_bar: bool = True,
    ):
        if model is None and posterior is None and potential_fn is None:
            raise ValueError("Expected a `model`, a `potential_fn` or a fitted `posterior`, got none.")
        if potential_fn is not None and not (model is None and posterior is None):
            raise ValueError("Expected `potential_fn` alone, got a `model` or a `posterior` beside it.")
        if num_proposals < 1 or bank_size < num_proposals or bank_size % num_proposals:
            raise ValueError(f"`bank_size` {bank_size} must be a positive multiple of `num_proposals` {num_proposals}.")
        self.model = posterior.problem.model if model is None and posterior is not None else model
        self.potential_fn = potential_fn
        if num_local_steps is None:
            num_local_steps = 5 if posterior is None else 0
        self.num_proposals, self.num_local_steps = num_proposals, num_local_steps
        self.step_size, self.bank_size, self.start_scale = step_size, bank_size, start_scale
        self.key, self.progress_bar = key, progress_bar
        self._fits = [] if posterior is None else [amortised_fit(posterior, None)]
        self._latest = 0
        self._origins = Origins()
        self._is_block = False
        self._sample_fn: Callable[..., ScoreSDEState] | None = None

    @own_broadcasting
    def fit(self, key: Key, *args: Any, **kwargs: Any) -> Any:
        """Fit the amortised `Posterior` for these model arguments now; later runs with the same covariates use it."""
        if self.model is None:
            raise ValueError("This ScoreSDE has no model to fit: give ScoreSDE the model.")
        with evaluated_at_once():
            posterior = NPSE(self.model, progress_bar=self.progress_bar).fit(key, *args, **kwargs)
        self._keep(amortised_fit(posterior, (args, kwargs)))
        return posterior

    @own_broadcasting
    def learn(self, key: Key, num_warmup: int, *args: Any, init_params: PyTree = None, **kwargs: Any) -> None:
        """Learn the posterior of these model arguments now, as ``num_warmup`` iterations of warm-up would.

        Needed only where a run cannot: where random keys are traced (``chain_method`` "parallel") and the kernel has
        none of its own.

        Args:
            key: random key.
            num_warmup: the budget.
            *args: the model's own arguments, with the data.
            init_params: beside ``potential_fn``, an example of what it takes.
            **kwargs: the model's own keyword arguments.
        """
        problem = self._read(args, kwargs, init_params)
        target = Target(problem, observe(problem, args, kwargs))
        num_particles = min(max(1 << (8 * num_warmup - 1).bit_length(), 256), 8192)
        effort = Effort(num_particles=num_particles, num_steps=10 * num_warmup)
        with evaluated_at_once():
            proposal, evidence = learn(
                key, target, effort, start_scale=self.start_scale, progress_bar=self.progress_bar
            )
        arguments = ((init_params,), {}) if self.model is None else (args, kwargs)
        self._keep(Fit(problem, proposal, arguments, evidence))

    def _keep(self, fit: Fit) -> None:
        self._latest = len(self._fits)
        self._fits.append(fit)

    def _read(self, args: tuple, kwargs: dict[str, Any], example: PyTree) -> Problem:
        """Read the problem; one of the same design that has been read before is used again, and its programs too."""
        if self.potential_fn is not None:
            if example is None:
                raise ValueError("Expected `init_params` beside `potential_fn`: they say what it takes.")
            shapes = jax.tree.map(lambda leaf: np.zeros(jnp.shape(leaf), jnp.result_type(leaf)), example)
            return from_potential(self.potential_fn, shapes)
        for fit in self._fits:
            with contextlib.suppress(ValueError):
                fit.target(args, kwargs)
                return fit.problem
        assert self.model is not None
        return from_numpyro(self.model, *args, **kwargs)

    def _find(self, args: tuple, kwargs: dict[str, Any], any_data: bool = False) -> tuple[Fit, Target]:
        """Look up the sampler that answers for these arguments, the latest first, and the observation in them.

        With ``any_data`` the design alone has to be the same.
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
            error = error or ValueError("ScoreSDE has learned the posterior of other data.")
        raise error or ValueError("ScoreSDE has learned nothing yet.")

    def _find_or_learn(
        self, args: tuple, kwargs: dict[str, Any], rng_key: Array, num_warmup: int, example: PyTree
    ) -> tuple[Fit, Target]:
        """Look up the sampler that answers for these arguments; learn one where there is none."""
        try:
            return self._find(args, kwargs, any_data=self._is_block)  # what a block is conditioned on changes anyway
        except ValueError as error:
            if self.model is None and self.potential_fn is None:
                raise
            if is_traced((args, kwargs)):
                raise ValueError(
                    "ScoreSDE cannot learn from traced model arguments: call `kernel.fit(key, ...)` before."
                ) from error
            key = rng_key if self.key is None else self.key
            if is_traced(key):
                raise ValueError(
                    "ScoreSDE cannot learn with a traced key, as this chain method gives: give ScoreSDE `key=`, or "
                    "call `kernel.learn(key, num_warmup, ...)` before."
                ) from error
            if num_warmup == 0:
                raise ValueError(
                    f"{error} It learns in warm-up, and `num_warmup` is 0: give it some, or a fitted `posterior`, or "
                    "call `kernel.learn(key, num_warmup, ...)` before."
                ) from error
            first = self.key is not None or is_prng_key(key)
            self.learn(key if first else key[0], num_warmup, *args, init_params=example, **kwargs)
            return self._find(args, kwargs, any_data=self._is_block)

    @own_broadcasting
    def init(
        self, rng_key: Array, num_warmup: int, init_params: PyTree, model_args: tuple, model_kwargs: dict | None
    ) -> ScoreSDEState:
        """Make the first state, of one chain or (given a batch of keys) of all; learn where nothing answers yet."""
        model_kwargs = model_kwargs or {}
        one = is_prng_key(rng_key)
        example = init_params if one else jax.tree.map(lambda leaf: leaf[0], init_params)
        fit, target = self._find_or_learn(model_args, model_kwargs, rng_key, num_warmup, example)
        if not fit.problem.has_density:
            raise UnsupportedModel("The model has no density to correct with: use `posterior.sample` instead.")
        check_density(target.problem, target.y, gradient=self.num_local_steps > 0)
        sizes = jnp.array(num_warmup, jnp.int32), jnp.array(self.step_size), self.bank_size
        begin = partial(start, fit.proposal, target, *sizes, self.num_local_steps > 0)
        if self._is_block and init_params is not None:
            init_params = unconstrain(fit.problem, rng_key, init_params)
        state = begin(rng_key, init_params) if one else jax.vmap(begin)(rng_key, init_params)
        if init_params is not None and not is_traced(state.log_weight) and not np.isfinite(state.log_weight).all():
            raise RuntimeError(f"{NO_START} where the chains were told to start, by `init_params`.")
        if fit.arguments is None and not is_traced((model_args, model_kwargs)):
            self._fits[self._latest] = fit._replace(arguments=(model_args, model_kwargs))
        self._sample_fn = self.sample
        arrays = jax.tree.leaves(eqx.filter(fit.proposal, eqx.is_array))
        origin = self._origins.begin(fit.problem, model_args, model_kwargs)
        return state._replace(y=target.y, weights=Weights(tuple(arrays), self._latest), origin=origin)

    @own_broadcasting
    def sample(self, state: ScoreSDEState, model_args: tuple, model_kwargs: dict | None) -> ScoreSDEState:
        """Move one chain, or all chains of a vectorised state, by one iteration."""
        model_kwargs = model_kwargs or {}
        proposal, target = self._restore(state, model_args, model_kwargs)
        return _each_chain(partial(transition, proposal, target, self.num_proposals, self.num_local_steps), state)

    def _restore(self, state: ScoreSDEState, args: tuple, kwargs: dict[str, Any]) -> tuple[AbstractProposal, Target]:
        """Put the weights that travel in the state back into their sampler; read the observation."""
        fit = self._fits[state.weights.fit]
        self._latest = state.weights.fit
        arrays, static = eqx.partition(fit.proposal, eqx.is_array)
        arrays = jax.tree.unflatten(jax.tree.structure(arrays), state.weights.arrays)
        return eqx.combine(arrays, static), fit.target(args, kwargs)

    @own_broadcasting
    def refresh(self, state: ScoreSDEState, model_args: tuple, model_kwargs: dict | None) -> ScoreSDEState:
        """Weigh the current draw for other values of what the model is conditioned on, as `Gibbs` asks."""
        proposal, target = self._restore(state, model_args, model_kwargs or {})
        return _each_chain(partial(refresh, proposal, target), state)

    def wrap_model(self, wrapper: Callable) -> "ScoreSDE":
        """Copy the kernel with another model and nothing learned; `Gibbs` gives it constrained first values."""
        if self.model is None or any(fit.evidence is None for fit in self._fits):
            raise ValueError("Only a ScoreSDE of a `model` alone can be a block of another kernel.")
        kernel = copy.copy(self)
        kernel.model, kernel._fits, kernel._sample_fn = wrapper(self.model), [], None
        kernel._latest, kernel._is_block, kernel._origins = 0, True, Origins()
        return kernel

    def fit_of(self, state: ScoreSDEState) -> Fit:
        """Return the sampler that a state was moved by."""
        return self._fits[state.weights.fit]

    def postprocess_fn(self, args: tuple, kwargs: dict | None) -> Callable[[Sites], Sites]:
        """Make the function from unconstrained values to constrained latent and deterministic sites."""
        if self.potential_fn is not None:
            return lambda z: z
        if self._is_block:  # asked without the values it is conditioned on, for its own sites alone
            problem = self._fits[self._latest].problem
            return lambda z: problem.latent_sites(layout(problem).flatten(z))
        problem = self._find(args, kwargs or {}, any_data=True)[0].problem
        self._origins.check(problem, args, kwargs or {})
        return lambda z: problem.constrain(layout(problem).flatten(z))

    def get_diagnostics_str(self, state: ScoreSDEState) -> str:
        """Describe the chain for the progress bar."""
        text = f"acc. prob={state.mean_accept_prob:.2f}"
        if self.num_local_steps:
            tuned = state.adapt_state
            text += f", local step size {tuned.step_size:.2e}, acc. prob={tuned.accept_prob:.2f}"
        return text

    def num_evaluations(self, num_iterations: int, state: ScoreSDEState) -> float:
        """Count evaluations of the density by so many iterations, and by the learning before them."""
        evidence = self.fit_of(state).evidence
        local = self.num_local_steps + 2 if self.num_local_steps else 0
        learning = 0 if evidence is None else evidence.num_gradients
        return float(num_iterations * (self.num_proposals + local) + learning)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        return self.__dict__ | {"_origins": Origins(), "_sample_fn": None}


def _same(y: Sites, other: Sites) -> bool:
    """Say whether two observations are the same; traced ones are not known to be."""
    return not is_traced((y, other)) and all(
        np.asarray(y[name]).tobytes() == np.asarray(other[name]).tobytes() for name in y
    )


def _each_chain(move: Callable[[ScoreSDEState], ScoreSDEState], state: ScoreSDEState) -> ScoreSDEState:
    """Apply a move to one chain, or to all chains of a vectorised state."""
    if is_prng_key(state.rng_key):
        return move(state)
    mapped: dict[str, Any] = dict.fromkeys(state._fields, 0) | {"y": None, "weights": None, "origin": None}
    axes = ScoreSDEState(**mapped)
    return jax.vmap(move, in_axes=(axes,), out_axes=axes)(state)
