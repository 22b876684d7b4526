"""Annealed Langevin dynamics: a NumPyro kernel that follows a score down its noise levels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from scoreinfer._typing import Key
from scoreinfer.mcmc.contract import Origin, Origins, layout, observe
from scoreinfer.posterior.amortised import Posterior
from scoreinfer.samplers.amortised import AmortisedProposal
from scoreinfer.samplers.base import Target
from scoreinfer.score import AbstractScore


class AnnealedState(NamedTuple):
    """State of one chain, or of all of them when vectorised.

    Args:
        i: iteration.
        z: unconstrained values of the latent sites. For a bare ``score``, a vector.
        origin: mark of the data's source.
        rng_key: random key of the chain.
    """

    i: Array
    z: PyTree
    origin: Origin
    rng_key: Array


class AnnealedLangevin(MCMCKernel):
    """Unadjusted Langevin steps down the noise levels of a score. Every iteration starts from noise.

    x' = x + a/2 score(s, x) + sqrt(a) noise,  a = ``step_size`` s^2.

    There are ``num_levels`` noise levels s, in geometric progression from ``max_level`` to ``min_level``. Each level
    takes ``num_steps`` steps. Iterations are independent of each other, of ``init_params`` and of warm-up.

    Args:
        posterior: a fitted posterior (not a focused one). Its learned score is used, in its whitened space. Or
        score: any `AbstractScore` of an unconditional density.
        dim: dimension of the vectors that ``score`` takes. Required with ``score``.
        max_level: first noise level. A few times the largest distance between modes (whitened for a ``posterior``).
        min_level: last noise level. A tenth of the smallest scale of the density.
        num_levels: number of levels.
        num_steps: steps at each level.
        step_size: the factor in a. Stability needs a value below 4 for any density; a small bias needs 0.2 or less.

    Raises:
        ValueError: if not exactly one of ``posterior`` and ``score`` is given, if only one of ``score`` and ``dim`` is
            given, or if the posterior is a focused one or one of paths.

    Exactness: biased, for four reasons: the error of the score, the noise of the last level, the finite step size (a
        level's Gaussian of variance v + s^2 gets a variance that is 1 / (1 - a / (4 (v + s^2))) times too large), and
        the end of each level before equilibrium. No Metropolis test and no weight corrects it. `ScoreSDE` is the
        corrected sampler.

    References: Song and Ermon 2019, arXiv 1907.05600, algorithm 1 (a is their alpha_i, with
    ``step_size`` = epsilon / sigma_L^2).

    >>> import jax, jax.numpy as jnp
    >>> from numpyro.infer import MCMC
    >>> from scoreinfer.score import GaussianScore
    >>> kernel = AnnealedLangevin(score=GaussianScore(jnp.ones(2), jnp.eye(2)), dim=2)
    >>> mcmc = MCMC(kernel, num_warmup=0, num_samples=500, progress_bar=False)
    >>> mcmc.run(jax.random.key(0))
    >>> [round(float(mean)) for mean in mcmc.get_samples().mean(0)]
    [1, 1]
    """

    sample_field = "z"

    def __init__(
        self,
        posterior: Posterior | None = None,
        *,
        score: AbstractScore | None = None,
        dim: int | None = None,
        max_level: float = 10.0,
        min_level: float = 0.01,
        num_levels: int = 20,
        num_steps: int = 50,
        step_size: float = 0.2,
    ):
        if (posterior is None) == (score is None) or (score is None) != (dim is None):
            raise ValueError("Expected either a `posterior`, or a `score` and its `dim`: give one of the two.")
        if posterior is not None and not isinstance(posterior.proposal, AmortisedProposal):
            raise ValueError(
                "Expected a posterior of parameters as `fit` returns it, got a focused posterior (its density is a "
                "mixture) or one of paths. Give the posterior that `fit` returned."
            )
        self.posterior, self.score, self.dim = posterior, score, dim
        self.max_level, self.min_level, self.num_levels = max_level, min_level, num_levels
        self.num_steps, self.step_size = num_steps, step_size
        self._origins = Origins()

    @property
    def model(self) -> Callable | None:
        """The posterior's NumPyro model. None means that the kernel was made from a bare ``score``."""
        return None if self.posterior is None else self.posterior.problem.model

    def init(
        self, rng_key: Array, num_warmup: int, init_params: PyTree, model_args: tuple, model_kwargs: dict | None
    ) -> AnnealedState:
        """Make the first state of one chain, or of all chains if ``rng_key`` is a batch. It already holds a draw."""
        model_kwargs, origin = model_kwargs or {}, Origin("")
        if self.posterior is not None:
            origin = self._origins.begin(self.posterior.problem, model_args, model_kwargs)

        def begin(key: Key) -> AnnealedState:
            key, for_draw = jax.random.split(key)
            # This zero depends on the key. So every array that NumPyro collects has a chain axis under any `vmap`.
            zero = 0 * jax.random.randint(key, (), 0, 1)
            return AnnealedState(zero, self._draw(for_draw, model_args, model_kwargs), origin, key)

        return begin(rng_key) if is_prng_key(rng_key) else jax.vmap(begin)(rng_key)

    def sample(self, state: AnnealedState, model_args: tuple, model_kwargs: dict | None) -> AnnealedState:
        """Make a new draw, for one chain or for all chains of a vectorised state.

        Raises:
            RuntimeError: if the kernel was pickled: its posterior was left out.
        """

        def draw(state: AnnealedState) -> AnnealedState:
            key, for_draw = jax.random.split(state.rng_key)
            z = self._draw(for_draw, model_args, model_kwargs or {})
            return state._replace(i=state.i + 1, z=z, rng_key=key)

        return draw(state) if is_prng_key(state.rng_key) else jax.vmap(draw)(state)

    def _draw(self, key: Key, args: tuple, kwargs: dict[str, Any]) -> PyTree:
        if self.posterior is None:
            if self.score is None or self.dim is None:
                raise RuntimeError("Pickling left out the posterior of this kernel: make the kernel again to run it.")
            return self._walk(key, self.score, self.dim, None)
        proposal, problem = self.posterior.proposal, self.posterior.problem
        assert isinstance(proposal, AmortisedProposal)
        context = proposal.context(Target(problem, observe(problem, args, kwargs)))
        u = self._walk(key, proposal.score, problem.dim, context.features)
        return layout(problem).unflatten(context.affine.forward(u).astype(jnp.result_type(float)))

    def _walk(self, key: Key, score: AbstractScore, dim: int, y: PyTree) -> Float[Array, " dim"]:
        """Take the Langevin steps of all levels; the class gives the formula."""
        for_start, for_steps = jax.random.split(key)
        levels = jnp.geomspace(self.max_level, self.min_level, self.num_levels, dtype=jnp.float32)

        def step(x, inputs):
            level, key = inputs
            size = self.step_size * level**2
            noise = jax.random.normal(key, x.shape, x.dtype)
            return x + 0.5 * size * score(level, x, y) + jnp.sqrt(size) * noise, None

        start = self.max_level * jax.random.normal(for_start, (dim,), jnp.float32)
        keys = jax.random.split(for_steps, self.num_levels * self.num_steps)
        return jax.lax.scan(step, start, (jnp.repeat(levels, self.num_steps), keys))[0]

    def postprocess_fn(self, args: tuple, kwargs: dict | None) -> Callable[[PyTree], PyTree]:
        """Make the function from unconstrained values to constrained latent and deterministic sites.

        Raises:
            ValueError: if the data have changed since the latest chain began.
        """
        if self.posterior is None:
            return lambda z: z
        problem = self.posterior.problem
        self._origins.check(problem, args, kwargs or {})
        y = observe(problem, args, kwargs or {})
        return lambda z: problem.sites(layout(problem).flatten(z), y)

    def get_diagnostics_str(self, state: AnnealedState) -> str:
        """Describe the chain for the progress bar."""
        return f"{self.num_levels} levels of {self.num_steps} steps of size {self.step_size:.2g}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the posterior: its problem holds closures, which cannot be pickled."""
        return self.__dict__ | {"posterior": None}
