"""Random-walk Metropolis on parameters whose likelihood is an unbiased estimate, such as a particle filter's.

The chain runs on (theta, U), with U the random numbers of the estimate L(theta, U) >= 0. The proposal is theta' from a
random walk and fresh U', and is accepted with probability

    min(1, p(theta') L(theta', U') / p(theta) L(theta, U)).

This leaves p(theta) L(theta, U) p(U) invariant, whose marginal in theta is the posterior, since E L(theta, U) is the
likelihood. So the estimate of the current theta is kept, and never made again.

References: Andrieu and Roberts 2009, Annals of Statistics 37(2); Andrieu, Doucet and Holenstein 2010, JRSS B 72(3),
section 2.4.2 (particle marginal Metropolis-Hastings).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree
from numpyro.handlers import seed
from numpyro.infer.hmc_util import warmup_adapter
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import initialize_model, potential_energy
from numpyro.util import is_prng_key

from scoreinfer._typing import Key
from scoreinfer.mcmc.langevin import Schedule
from scoreinfer.montecarlo.langevin import colour, metropolis

LEAST_STEP = 0.5
"""Least step size times the root of the dimension. Shorter steps do not help where the estimates are noisy."""


class ParticleMarginalState(NamedTuple):
    """State of one chain.

    Args:
        i: iteration.
        z: unconstrained values of the latent sites.
        potential_energy: minus the log prior and the estimated log likelihood at ``z``, as it was when ``z`` came.
        accept_prob: acceptance probability of the last step.
        mean_accept_prob: its mean since the start, or since the end of warm-up.
        adapt_state: step size and covariance of the random walk (NumPyro's ``HMCAdaptState``).
        schedule: length of the warm-up.
        rng_key: random key of the chain.
    """

    i: Int[Array, ""]
    z: PyTree
    potential_energy: Float[Array, ""]
    accept_prob: Float[Array, ""]
    mean_accept_prob: Float[Array, ""]
    adapt_state: Any
    schedule: Schedule
    rng_key: Array


class ParticleMarginal(MCMCKernel):
    """Random-walk Metropolis for models with ``numpyro.factor("y", filter(numpyro.prng_key(), ...).log_evidence)``.

    Warm-up tunes the step size, and the covariance of the random walk.

    Args:
        model: a NumPyro model. Each random number of a factor must come from ``numpyro.prng_key()``, and the
            exponentials of the factors must be unbiased estimates of likelihoods, as those of `BootstrapFilter` and
            `GuidedFilter` are for known parameters.
        step_size: first scale of the random walk.
        target_accept_prob: acceptance probability that warm-up aims at.
        init_strategy: where chains start, as for NumPyro's kernels.

    Exactness: exact in the limit of many iterations, for any number of particles. Few particles only make it slow: the
        chain waits where an estimate was too high.

    Good values: as many particles as bring the standard deviation of the log evidence near the posterior's mode to 1 to
        1.5 (Doucet et al. 2015, Biometrika 102(2)); it grows with the length of the series. A state can be drawn
        afterwards, by `scoreinfer.filter` and `scoreinfer.smooth` at the parameters drawn.

    >>> import numpyro, numpyro.distributions as dist
    >>> from numpyro.infer import MCMC
    >>> def model():
    ...     theta = numpyro.sample("theta", dist.Normal())
    ...     noise = 0.5 * jax.random.normal(numpyro.prng_key())
    ...     numpyro.factor("y", noise - 0.125)  # an unbiased estimate of the likelihood 1
    >>> mcmc = MCMC(ParticleMarginal(model), num_warmup=100, num_samples=50, progress_bar=False)
    >>> mcmc.run(jax.random.key(0))
    >>> mcmc.get_samples()["theta"].shape
    (50,)
    """

    sample_field = "z"
    default_fields = ("z", "accept_prob", "potential_energy")

    def __init__(
        self,
        model: Callable,
        *,
        step_size: float = 1.0,
        target_accept_prob: float = 0.15,
        init_strategy: Callable = init_to_uniform,
    ):
        self.model, self.init_strategy = model, init_strategy
        self.step_size, self.target_accept_prob = step_size, target_accept_prob
        self._postprocess: Callable | None = None

    def init(
        self, rng_key: Array, num_warmup: int, init_params: PyTree, model_args: tuple, model_kwargs: dict | None
    ) -> ParticleMarginalState:
        """Make the first state of a chain.

        Raises:
            ValueError: if chains are to run vectorised.
            RuntimeError: if no start with a finite log density is found.
        """
        if not is_prng_key(rng_key):
            raise ValueError(
                'ParticleMarginal expected one random key, got a batch: use `chain_method="parallel"` or "sequential".'
            )
        for_start, for_first, for_adapter, for_chain = jax.random.split(rng_key, 4)

        def fixed(*args: Any, **kwargs: Any) -> Any:
            return seed(self.model, for_first)(*args, **kwargs)

        found = initialize_model(
            for_start, fixed, init_strategy=self.init_strategy, dynamic_args=True, model_args=model_args,
            model_kwargs=model_kwargs, validate_grad=False,
        )  # fmt: skip
        self._postprocess = found.postprocess_fn
        z = found.param_info.z if init_params is None else init_params
        flat = ravel_pytree(z)[0]
        tuned = self._adapter(num_warmup)[0]((flat,), for_adapter, jnp.array(self.step_size, flat.dtype))
        potential = self._potential(for_first, z, model_args, model_kwargs)
        none = jnp.zeros_like(potential)
        tuned = tuned._replace(rng_key=None)
        return ParticleMarginalState(
            jnp.zeros((), int), z, potential, none, none, tuned, Schedule(num_warmup), for_chain
        )

    def sample(
        self, state: ParticleMarginalState, model_args: tuple, model_kwargs: dict | None
    ) -> ParticleMarginalState:
        """Move one chain by one iteration."""
        rng_key, for_walk, for_estimate, for_accept = jax.random.split(state.rng_key, 4)
        (flat, unravel), tuned, num_warmup = ravel_pytree(state.z), state.adapt_state, state.schedule.num_warmup
        step_size = jnp.maximum(tuned.step_size, LEAST_STEP / jnp.sqrt(flat.size))
        noise = step_size * jax.random.normal(for_walk, flat.shape, flat.dtype)
        proposed = unravel(flat + colour(tuned.mass_matrix_sqrt_inv, noise, transpose=True))
        potential = self._potential(for_estimate, proposed, model_args, model_kwargs)
        log_ratio = jnp.where(jnp.isnan(potential), -jnp.inf, state.potential_energy - potential)
        old = state.z, state.potential_energy
        (z, potential), accept_prob = metropolis(for_accept, (proposed, potential), old, log_ratio)
        warming, i, point = state.i < num_warmup, state.i + 1, (ravel_pytree(z)[0],)
        update = lambda: self._adapter(num_warmup)[1](state.i, accept_prob, point, tuned)  # noqa: E731
        tuned = jax.lax.cond(warming, update, lambda: tuned)
        num = jnp.where(warming, i, i - num_warmup)
        mean = jnp.where(num > 1, state.mean_accept_prob, 0.0)
        mean = mean + (accept_prob - mean) / num
        return ParticleMarginalState(i, z, potential, accept_prob, mean, tuned, state.schedule, rng_key)

    def postprocess_fn(self, args: tuple, kwargs: dict | None) -> Callable[[PyTree], PyTree]:
        """Make the function from unconstrained values to constrained latent and deterministic sites."""
        assert self._postprocess is not None
        return self._postprocess(*args, **(kwargs or {}))

    def get_diagnostics_str(self, state: ParticleMarginalState) -> str:
        """Say step size and acceptance probability."""
        return f"step size {state.adapt_state.step_size:.2e}. acc. prob={state.mean_accept_prob:.2f}"

    def _adapter(self, num_warmup: int) -> tuple[Callable, Callable]:
        return warmup_adapter(num_warmup, dense_mass=True, target_accept_prob=self.target_accept_prob)

    def _potential(self, key: Key, z: PyTree, args: tuple, kwargs: dict | None) -> Float[Array, ""]:
        """Compute minus the log prior and an estimated log likelihood."""
        return potential_energy(seed(self.model, key), args, kwargs or {}, z)
