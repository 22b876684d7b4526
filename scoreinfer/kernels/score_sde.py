"""ScoreSDE: the learned sampler as a NumPyro kernel. The moves and the proof are in `scoreinfer.kernels.transition`.

What a compiled loop needs travels in the state: the weights of the sampler as arrays, labelled by the number of the
fit they come from, and the observation that the proposals in the bank were drawn for. So one kernel serves any number
of fits, observations, chain methods and `MCMC` objects, and nothing it answers is stale.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from scoreinfer._errors import UnsupportedModel
from scoreinfer._tree import is_traced
from scoreinfer._typing import Key, Sites
from scoreinfer.kernels.contract import layout, observe
from scoreinfer.kernels.transition import ScoreSDEState, Weights, start, transition
from scoreinfer.model import from_numpyro
from scoreinfer.posterior import fit
from scoreinfer.problem import Problem
from scoreinfer.proposal import Proposer


class Fit(NamedTuple):
    """A fitted sampler, and model arguments of its design (None where the kernel has not seen any).

    A pickled one is ``stripped`` of its problem until the kernel is next run.
    """

    proposer: Proposer
    arguments: tuple[tuple, dict[str, Any]] | None
    stripped: bool = False


def with_problem(proposer: Any, problem: Problem | None) -> Any:
    """Copy a sampler, and the samplers it is made of, with another problem.

    (An Equinox module is frozen, and its problem is static.)
    """
    copy = object.__new__(type(proposer))
    for field in dataclasses.fields(proposer):
        value = getattr(proposer, field.name)
        if field.name == "problem":
            value = problem
        elif isinstance(value, Proposer):
            value = with_problem(value, problem)
        object.__setattr__(copy, field.name, value)
    return copy


class ScoreSDE(MCMCKernel):
    """The learned sampler as a Markov kernel: global moves by independent proposals, local ones on request.

    Give it a fitted ``posterior``, or a ``model`` and a ``key``: then it fits when first run, and again only where
    covariates, shapes or constants of the model have changed; other observed values reuse the fit. With
    ``MCMC(..., jit_model_args=True)`` they reuse the compiled loop as well.

    A chain starts from one of ``bank_size`` proposals, picked by weight, unless ``init_params`` say where; so does a
    run on other data than the warm-up's. Pickling leaves out the problem, which is read from the (importable) model
    again when the kernel is next run.

    Args:
        model: NumPyro model; beside ``posterior``, what ArviZ and a pickled kernel read.
        posterior: the fitted posterior (`scoreinfer.fit`).
        num_proposals: fresh proposals tried in each iteration.
        num_local_steps: MALA steps after each global move.
        step_size: first step size of MALA, in units of the proposals' spread.
        bank_size: proposals drawn at a time, a multiple of ``num_proposals``.
        key: random key of the training; needed only where the kernel itself has to fit.

    Exactness: exact: every move leaves the posterior invariant, whatever the quality of the fit. The fit decides how
        fast the chain forgets its start, and no chain finds a mode that the proposals never visit.

    Good values: the defaults suit an importance ESS above 0.3 of the draws. Below, raise ``num_proposals`` to about
        1 / (ESS / N), or add 2 to 10 local steps with a few hundred iterations of warm-up.

    References: Liu, Liang and Wong 2000; Andrieu, Lee and Vihola 2018 (see `scoreinfer.kernels.transition`).
    """

    sample_field = "z"
    default_fields = ("z", "log_weight", "accept_prob", "potential_energy")

    def __init__(
        self,
        model: Callable | None = None,
        *,
        posterior: Any = None,
        num_proposals: int = 1,
        num_local_steps: int = 0,
        step_size: float = 1.0,
        bank_size: int = 128,
        key: Key | None = None,
    ):
        if model is None and posterior is None:
            raise ValueError("Expected a `model` or a fitted `posterior`, got neither.")
        if num_proposals < 1 or bank_size < num_proposals or bank_size % num_proposals:
            raise ValueError(f"`bank_size` {bank_size} must be a positive multiple of `num_proposals` {num_proposals}.")
        self.model = posterior.problem.model if model is None else model
        self.num_proposals, self.num_local_steps = num_proposals, num_local_steps
        self.step_size, self.bank_size, self.key = step_size, bank_size, key
        self._fits = [] if posterior is None else [Fit(posterior.proposal, None)]
        self._latest = 0
        self._sample_fn: Callable[..., ScoreSDEState] | None = None

    def fit(self, key: Key, *args: Any, **kwargs: Any) -> Any:
        """Fit the posterior for these model arguments now; later runs with the same covariates use it."""
        if self.model is None:
            raise ValueError("ScoreSDE(posterior=...) has no model to fit: give ScoreSDE the model.")
        with jax.ensure_compile_time_eval():
            posterior = fit(key, self.model, *args, **kwargs)
        self._latest = len(self._fits)
        self._fits.append(Fit(posterior.proposal, (args, kwargs)))
        return posterior

    def _proposer(self, number: int, args: tuple, kwargs: dict[str, Any]) -> Proposer:
        """Look up a fit; one that has been pickled reads its problem from the model again."""
        proposer, arguments, stripped = self._fits[number]
        if stripped:
            if self.model is None:
                raise ValueError("A pickled ScoreSDE has lost its problem: give ScoreSDE the model as well.")
            args, kwargs = arguments or (args, kwargs)
            with jax.ensure_compile_time_eval():
                proposer = with_problem(proposer, from_numpyro(self.model, *args, **kwargs))
            self._fits[number] = Fit(proposer, arguments)
        self._latest = number
        return proposer

    def _find(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Proposer, Sites]:
        """Look up the fit that answers for these arguments, the latest first, and the observation in them."""
        error = None
        for number in sorted(range(len(self._fits)), key=lambda number: number != self._latest):
            try:
                proposer = self._proposer(number, args, kwargs)
                return proposer, observe(proposer.problem, args, kwargs)
            except ValueError as mismatch:
                error = error or mismatch
        raise error or ValueError("ScoreSDE has not been fitted: give ScoreSDE `key=`, or call `kernel.fit(key, ...)`.")

    def _find_or_fit(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Proposer, Sites]:
        """Look up the fit that answers for these arguments; make one where there is none and a key is at hand."""
        try:
            return self._find(args, kwargs)
        except ValueError:
            if self.key is None:
                raise
        if is_traced((args, kwargs)):
            raise ValueError("ScoreSDE cannot fit to traced model arguments: call `kernel.fit(key, ...)` before.")
        self.fit(self.key, *args, **kwargs)
        return self._find(args, kwargs)

    def init(
        self, rng_key: Array, num_warmup: int, init_params: Sites | None, model_args: tuple, model_kwargs: dict | None
    ) -> ScoreSDEState:
        """Make the first state, of one chain or (given a batch of keys) of all; fit where no fit answers yet."""
        model_kwargs = model_kwargs or {}
        proposer, y = self._find_or_fit(model_args, model_kwargs)
        if not proposer.problem.has_density:
            raise UnsupportedModel("The model has no density to correct with: use `posterior.sample` instead.")
        sizes = jnp.array(num_warmup, jnp.int32), jnp.array(self.step_size), self.bank_size
        begin = partial(start, proposer, y, *sizes, self.num_local_steps > 0)
        state = begin(rng_key, init_params) if is_prng_key(rng_key) else jax.vmap(begin)(rng_key, init_params)
        if self._fits[self._latest].arguments is None and not is_traced((model_args, model_kwargs)):
            self._fits[self._latest] = Fit(proposer, (model_args, model_kwargs))
        self._sample_fn = self.sample
        arrays = jax.tree.leaves(eqx.filter(proposer, eqx.is_array))
        return state._replace(y=y, weights=Weights(tuple(arrays), self._latest))

    def sample(self, state: ScoreSDEState, model_args: tuple, model_kwargs: dict | None) -> ScoreSDEState:
        """Move one chain, or all chains of a vectorised state, by one iteration."""
        model_kwargs = model_kwargs or {}
        proposer = self._proposer(state.weights.fit, model_args, model_kwargs)
        y = observe(proposer.problem, model_args, model_kwargs)
        arrays, static = eqx.partition(proposer, eqx.is_array)
        arrays = jax.tree.unflatten(jax.tree.structure(arrays), state.weights.arrays)
        proposer = eqx.combine(arrays, static)
        move = partial(transition, proposer, y, self.num_proposals, self.num_local_steps)
        if is_prng_key(state.rng_key):
            return move(state)
        mapped: dict[str, Any] = dict.fromkeys(state._fields, 0) | {"y": None, "weights": None}
        axes = ScoreSDEState(**mapped)
        return jax.vmap(move, in_axes=(axes,), out_axes=axes)(state)

    def postprocess_fn(self, args: tuple, kwargs: dict | None) -> Callable[[Sites], Sites]:
        """Make the function from unconstrained values to constrained latent and deterministic sites."""
        kwargs = kwargs or {}
        problem = self._find(args, kwargs)[0].problem
        return lambda z: problem.constrain(layout(problem).flatten(z))

    def get_diagnostics_str(self, state: ScoreSDEState) -> str:
        """Describe the chain for the progress bar."""
        text = f"acc. prob={state.mean_accept_prob:.2f}"
        if self.num_local_steps:
            tuned = state.adapt_state
            text += f", local step size {tuned.step_size:.2e}, acc. prob={tuned.accept_prob:.2f}"
        return text

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the problems, which hold closures."""
        fits = [Fit(with_problem(proposer, None), arguments, stripped=True) for proposer, arguments, _ in self._fits]
        return self.__dict__ | {"_fits": fits, "_sample_fn": None}
