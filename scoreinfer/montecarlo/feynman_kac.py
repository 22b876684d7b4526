r"""Feynman-Kac models and the one particle loop that runs them.

A model has a first draw M_0, moves M_k and potentials G_k. They define unnormalised densities of paths,

    gamma_n(x_0, ..., x_n) = M_0(x_0) G_0(x_0) prod_(k=1..n) M_k(x_k | x_(k-1)) G_k(x_(k-1), x_k),

whose normalising constant Z is the evidence. Particles draw from M and are weighed by G. In between they are resampled
where their weights have become uneven. Three examples, f the law of a state given the one before, g the likelihood of
an observation:

- bootstrap filter: M_k = f, and G_k = g(y_k | x_k);
- guided filter: M_k = q, and G_k = f(x_k | x_(k-1)) g(y_k | x_k) / q(x_k | x_(k-1));
- twisted particles: M_k = q, and G_k = f(x_k | x_(k-1)) psi_k(x_k) / (q(x_k | x_(k-1)) psi_(k-1)(x_(k-1))).

A density that weighs whole paths, and cannot be written as a product, is multiplied in after the loop
(`Population.weighed` of the last particles, with the paths of `trace_back`).

References: Del Moral 2004, Feynman-Kac Formulae, chapter 2; Chopin and Papaspiliopoulos 2020, An Introduction to
Sequential Monte Carlo, chapters 5 and 10.
"""

import abc
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from scoreinfer._typing import Key
from scoreinfer.montecarlo.population import Population, first_population, resample
from scoreinfer.montecarlo.resampling import Scheme, conditional_multinomial, multinomial

LEAST_SHARE = 0.5
"""Effective share of the particles below which they are resampled. A half is the usual choice (Del Moral, Doucet and
Jasra 2006)."""

State = TypeVar("State", bound=PyTree)


class AbstractFeynmanKac(eqx.Module, Generic[State]):
    """A first draw, moves and potentials, for one particle each.

    A state is any tree of arrays. Besides x_k it may hold whatever was computed with it, such as the log density it was
    drawn with or the moments of its next move, so that nothing is computed twice.
    """

    num_steps: eqx.AbstractVar[int]
    """Number n of moves."""

    @abc.abstractmethod
    def initial(self, key: Key) -> State:
        """Draw x_0 from M_0."""

    @abc.abstractmethod
    def log_initial(self, first: State) -> Float[Array, ""]:
        """Compute log G_0(x_0)."""

    @abc.abstractmethod
    def propagate(self, key: Key, k: Int[Array, ""], old: State) -> State:
        """Draw x_k from M_k, given x_(k-1); k = 1, ..., n."""

    @abc.abstractmethod
    def log_potential(self, k: Int[Array, ""], old: State, new: State) -> Float[Array, ""]:
        """Compute log G_k(x_(k-1), x_k); k = 1, ..., n."""


class Run(NamedTuple):
    """What a run leaves.

    Args:
        last: the last particles, with their weights since the last resampling; ``last.log_evidence`` is log Z.
        states: the particles of all times as they were drawn: times first, then particles.
        log_weight: their log weights since the resampling before, times first.
        ancestors: row k - 1 holds, for every particle of time k, the number of its ancestor among those of time k - 1.
    """

    last: Population
    states: Any
    log_weight: Float[Array, "times num"]
    ancestors: Int[Array, "steps num"]


def run(
    key: Key,
    model: AbstractFeynmanKac[State],
    num: int,
    reference: State | None = None,
    *,
    scheme: Scheme = multinomial,
    least_share: float = LEAST_SHARE,
) -> Run:
    """Run ``num`` particles of a Feynman-Kac model, all free or one of them held to a reference.

    Args:
        key: random key.
        model: the model.
        num: number of particles.
        reference: states of a path, times first. The first particle follows them, and is its own ancestor. The model
            weighs it as it does the others.
        scheme: how particles are resampled. A run around a reference knows no scheme but the multinomial one.
        least_share: effective share below which particles are resampled.

    Raises:
        ValueError: where a reference is given together with another scheme.

    Exactness: without a reference Z is an unbiased estimate of the evidence, for any number of particles. Given a path
        of gamma_n / evidence as a reference, a path drawn from the last particles by weight has that law too (a Gibbs
        step). 1 / Z of that run is then an unbiased estimate of 1 / evidence. Chains that alternate between free runs,
        accepted by their Z, and runs around a reference are exact only where both resample alike: Z has another law
        under another scheme. Both are multinomial unless told otherwise.

    References: Del Moral 2004, Feynman-Kac Formulae, section 7.4 (Z is unbiased); Andrieu, Doucet and Holenstein 2010,
        JRSS B 72(3), sections 4.2 (chains of free runs) and 4.5 (Gibbs steps).
    """
    if reference is not None and scheme is not multinomial:
        raise ValueError("A run around a reference resamples by `multinomial`, got another `scheme`: leave it out.")
    for_initial, for_steps = jax.random.split(key)
    drawing = scheme if reference is None else conditional_multinomial

    def held(states: State, k: Int[Array, ""] | int) -> State:
        return states if reference is None else jax.tree.map(lambda a, b: a.at[0].set(b[k]), states, reference)

    def step(now: Population, inputs: tuple[Array, Key]) -> tuple[Population, tuple[State, Array, Array]]:
        k, key = inputs
        for_rows, for_states = jax.random.split(key)
        now, rows = resample(for_rows, now, drawing, least_share)
        keys = jax.random.split(for_states, num)
        new = held(jax.vmap(model.propagate, (0, None, 0))(keys, k, now.values), k)
        log_potential = jax.vmap(model.log_potential, (None, 0, 0))(k, now.values, new)
        weighed = now._replace(values=new).weighed(log_potential)
        return weighed, (new, weighed.log_weight, rows)

    first = held(jax.vmap(model.initial)(jax.random.split(for_initial, num)), 0)
    begun = first_population(first, num).weighed(jax.vmap(model.log_initial)(first))
    steps = jnp.arange(1, model.num_steps + 1), jax.random.split(for_steps, model.num_steps)
    last, (states, log_weight, ancestors) = jax.lax.scan(step, begun, steps)
    whole = lambda a, b: jnp.concatenate([a[None], b])  # noqa: E731
    return Run(last, jax.tree.map(whole, first, states), whole(begun.log_weight, log_weight), ancestors)


def trace_back(run: Run) -> Any:
    """Follow every last particle back to its first state; return whole paths, particles first, then times."""

    def earlier(rows: Array, inputs: tuple[PyTree, Array]) -> tuple[Array, PyTree]:
        states, ancestors = inputs
        return ancestors[rows], jax.tree.map(lambda leaf: leaf[rows], states)

    later = jax.tree.map(lambda leaf: leaf[1:], run.states)
    start = jnp.arange(run.last.log_weight.size)
    rows, paths = jax.lax.scan(earlier, start, (later, run.ancestors), reverse=True)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[:1, rows], b]).swapaxes(0, 1), run.states, paths)


def draw_backwards(
    key: Key,
    states: State,
    log_weight: Float[Array, "times num"],
    log_move: Callable[[Int[Array, ""], State, State], Float[Array, ""]],
) -> State:
    """Draw a path through weighed particles, the last state first.

    Given the state x_k, particle i of time k - 1 is drawn with probability proportional to its weight times
    M_k(x_k | x_(k-1)^i) G_k(x_(k-1)^i, x_k), as far as that depends on x_(k-1)^i.

    Args:
        key: random key.
        states: the particles of all times, times first.
        log_weight: their log weights.
        log_move: computes log M_k G_k as ``(k, old, new)``.

    Exactness: consistent as the number of particles grows. Around a reference (`run`) a Gibbs step for any number.

    References: Godsill, Doucet and West 2004, JASA 99(465), algorithm 1; Whiteley 2010, JRSS B 72(3), discussion of
        Andrieu et al. (Gibbs steps).
    """
    for_last, for_rest = jax.random.split(key)
    pick = lambda tree, row: jax.tree.map(lambda leaf: leaf[row], tree)  # noqa: E731
    last = pick(pick(states, -1), jax.random.categorical(for_last, log_weight[-1]))

    def earlier(later: State, inputs: tuple[Key, Array, State, Array]) -> tuple[State, State]:
        key, k, now, log_weight = inputs
        ahead = jax.vmap(log_move, (None, 0, None))(k, now, later)
        x = pick(now, jax.random.categorical(key, log_weight + ahead))
        return x, x

    num = len(log_weight) - 1
    before = jax.tree.map(lambda leaf: leaf[:-1], (states, log_weight))
    inputs = (jax.random.split(for_rest, num), jnp.arange(1, num + 1), *before)
    rest = jax.lax.scan(earlier, last, inputs, reverse=True)[1]
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), rest, last)
