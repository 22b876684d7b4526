"""One iteration of `ScoreSDE`, as pure functions on its state. `scoreinfer.mcmc.score_sde` is the NumPyro kernel.

The importance weight of a draw z with path u is

    w(z, u) = pi(z) r(u | z) / q(z, u),    log w = problem.log_joint(z, y) - log_q.

pi is the posterior. u is the path by which the sampler reached z (empty for the flow). q(z, u) is the density of the
sampler, and r(u | z) is the density of the forward (noising) path from z. The sampler's proposals are independent of
the chain, and w makes the chain exact.

Every move leaves pi(z) r(u | z) invariant, so it leaves the z-marginal pi(z) invariant. The moves depend on the path
only through w, so the state holds log w and not u.

- *Global* move, from N fresh proposals with S = sum_j w_j: pick one with probability w_j / S, and accept it with
  probability min(1, S / (S - w_pick + w_current)). Proof: with the other proposals fixed, the flow between current and
  pick is proportional to w_current w_pick min(1 / S, 1 / (S - w_pick + w_current)) under q x q. It is symmetric in the
  two, which is detailed balance. The move is accepted at least as often as that of i-SIR, which picks among all N + 1
  (Peskun). N = 1 is independence Metropolis on paths.
- *Local* move, optional: MALA steps on pi(z), which do not depend on u. Then u is drawn again from r(u | z). This is an
  exact Gibbs step, and it gives the weight of the new z. Step sizes adapt only during warm-up. Their preconditioner
  comes from proposals that the chain never uses.

References: Liu, Liang and Wong 2000, "The multiple-try method", section 3; Andrieu, Lee and Vihola 2018, "Uniform
ergodicity of the iterated conditional SMC"; Roberts and Rosenthal 1998 (MALA and its 0.574).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt
from numpyro.util import is_prng_key

from scoreinfer._keys import keys_of
from scoreinfer._memory import each
from scoreinfer._program import run_once
from scoreinfer._tree import is_traced
from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.base import spread
from scoreinfer.mcmc.contract import Origin, any_chain, flatten_sites, layout, same_bits
from scoreinfer.montecarlo.langevin import TARGET_ACCEPT_PROB, differentiate, metropolis_langevin_step
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted
from scoreinfer.samplers.batches import weigh_places, weigh_rows

NUM_LAST = 10
"""Iterations of warm-up in which a chain without local steps moves, besides the first. Chosen by judgement: the first
move picks a draw by weight, and a few more forget it."""


class Bank(NamedTuple):
    """Unused proposals of one chain. They are valid only if the chain's random key has the bits ``key_bits``."""

    proposals: Weighted
    used: Int[Array, ""]
    key_bits: UInt[Array, " words"]


class Adaptation(NamedTuple):
    """Tuning of local moves: step size, Cholesky factor of the preconditioner, last acceptance probability."""

    step_size: Float[Array, ""]
    factor: Float[Array, "dim dim"]
    accept_prob: Float[Array, ""]


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["fit"])
class Weights:
    """Arrays of the kernel's fit number ``fit``. Another number is another structure: JAX traces a loop again."""

    def __init__(self, arrays: tuple[Any, ...], fit: int):
        self.arrays, self.fit = arrays, fit


class ScoreSDEState(NamedTuple):
    """State of one chain, or of all chains if vectorised. ``y`` and ``weights`` never have a chain axis.

    Args:
        i: iteration.
        num_warmup: iteration after which step sizes are fixed.
        z: unconstrained values of the latent sites. For a bare density, its argument.
        potential_energy: minus log p(z, y) in the unconstrained space.
        log_weight: log p(z, y) - log_q of the current draw. Before the first draw, the lowest finite number.
        accept_prob: acceptance probability of the last global move.
        mean_accept_prob: mean of ``accept_prob`` since the start, or since the end of warm-up.
        adapt_state: tuning of the local moves.
        bank: unused proposals.
        y: the observation that ``log_weight`` and ``bank`` were computed for.
        weights: arrays of the learned sampler.
        origin: mark of the data's source.
        rng_key: random key of the chain.
    """

    i: Array
    num_warmup: Array
    z: PyTree
    potential_energy: Array
    log_weight: Array
    accept_prob: Array
    mean_accept_prob: Array
    adapt_state: Adaptation
    bank: Bank
    y: Sites
    weights: Weights
    origin: Origin
    rng_key: Array


def cleaned(drawn: Weighted) -> Weighted:
    """Set the weight of draws to zero if their density is not finite or their weight is NaN."""
    fails = jnp.isnan(drawn.log_weight) | ~jnp.isfinite(drawn.log_target)
    return drawn._replace(log_weight=jnp.where(fails, -jnp.inf, drawn.log_weight))


def weigh_anew(key: Key, proposal: AbstractProposal, target: Target, z: Float[Array, " dim"]) -> Weighted:
    """Weigh any ``z``, with a fresh path if the weight is one of paths.

    The weight is infinite if the proposal density of ``z`` is zero.

    Exactness: exact: the path is drawn from r(u | z).
    """
    return cleaned(proposal.weigh(key, target, proposal.context(target), z))


def draw_proposals(key: Key, proposal: AbstractProposal, target: Target, num: int) -> Weighted:
    """Draw and weigh ``num`` independent proposals.

    Exactness: exact weights, for any sampler.
    """
    context = proposal.context(target)
    return each(lambda key: cleaned(proposal.sample(key, target, context)), target)(random.split(key, num))


def refill(key: Key, proposal: AbstractProposal, target: Target, bank: Bank, stale: Bool[Array, ""]) -> Bank:
    """Replace the bank if it is stale. The sampler runs only if the bank is stale for some chain."""

    def drawn() -> Weighted:
        fresh = draw_proposals(key, proposal, target, bank.proposals.log_weight.size)
        return jax.tree.map(partial(jnp.where, stale), fresh, bank.proposals)

    proposals = lax.cond(any_chain(stale), drawn, lambda: bank.proposals)
    return bank._replace(proposals=proposals, used=jnp.where(stale, 0, bank.used))


def multiple_try(key: Key, proposals: Weighted, current: Weighted) -> tuple[Weighted, Float[Array, ""]]:
    """Pick one of the proposals by weight, and accept or reject it.

    Returns:
        The next draw, and the acceptance probability of the pick.

    Exactness: exact: multiple-try Metropolis with independent proposals. The module's docstring has the proof.
    """
    key_pick, key_accept = random.split(key)
    pick = random.categorical(key_pick, proposals.log_weight)
    others = proposals.log_weight.at[pick].set(current.log_weight)
    log_ratio = logsumexp(proposals.log_weight) - logsumexp(others)  # NaN if all weights are zero: then reject
    accept_prob = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))
    accept = random.uniform(key_accept, dtype=accept_prob.dtype) < accept_prob
    return jax.tree.map(lambda new, old: jnp.where(accept, new[pick], old), proposals, current), accept_prob


def current_draw(target: Target, state: ScoreSDEState) -> Weighted:
    """Read the current draw from the state."""
    return Weighted(layout(target.problem).flatten(state.z), state.log_weight, -state.potential_energy)


def with_draw(target: Target, state: ScoreSDEState, draw: Weighted) -> ScoreSDEState:
    """Write the current draw into the state."""
    z = layout(target.problem).unflatten(draw.z)
    return state._replace(z=z, log_weight=draw.log_weight, potential_energy=-draw.log_target)


def global_move(key: Key, proposal: AbstractProposal, target: Target, state: ScoreSDEState, num: int) -> ScoreSDEState:
    """Try the next ``num`` proposals of the bank.

    If a chain has no weight yet, or if its observation has changed, it starts again: it picks one draw from a whole
    bank by weight (importance resampling) and uses up that bank.

    Exactness: exact, see `multiple_try`. The first draw is consistent as the bank's size grows.
    """
    key_bank, key_select = random.split(key)
    size = state.bank.proposals.log_weight.size
    changed = ~jnp.array([same_bits(target.y[name], state.y[name]) for name in target.y], bool).all()
    current = current_draw(target, state)
    first = current.log_weight <= jnp.finfo(current.log_weight.dtype).min
    current = current._replace(log_weight=jnp.where(changed | first, -jnp.inf, current.log_weight))
    other_key = ~same_bits(state.bank.key_bits, random.key_data(state.rng_key))
    bank = refill(key_bank, proposal, target, state.bank, changed | other_key | (state.bank.used >= size))
    ahead, fresh = jnp.arange(size) - bank.used, current.log_weight == -jnp.inf
    tried = jnp.where(fresh | (ahead >= 0) & (ahead < num), bank.proposals.log_weight, -jnp.inf)
    draw, accept_prob = multiple_try(key_select, bank.proposals._replace(log_weight=tried), current)
    bank = bank._replace(used=jnp.where(fresh, size, bank.used + num))
    return with_draw(target, state._replace(accept_prob=accept_prob, bank=bank, y=target.y), draw)


def local_move(key: Key, proposal: AbstractProposal, target: Target, state: ScoreSDEState, num: int) -> ScoreSDEState:
    """Move ``z`` by ``num`` MALA steps, and weigh it over a fresh path. A move to weight zero is undone.

    If the proposal density of the new ``z`` is zero, its weight is infinite. Then only local moves leave that region.

    Exactness: exact: MALA leaves pi(z) invariant and does not depend on u. Drawing u again from r(u | z) is a Gibbs
        step.
    """
    key_steps, key_path = random.split(key)
    tuned, current = state.adapt_state, current_draw(target, state)
    value_and_grad = differentiate(target, current.z)

    def step(point: tuple[Array, Array, Array], key: Key) -> tuple[tuple[Array, Array, Array], Array]:
        return metropolis_langevin_step(key, value_and_grad, point, tuned.factor, tuned.step_size)

    start = (current.z, *value_and_grad(current.z))
    (z, *_), accept_prob = lax.scan(step, start, random.split(key_steps, num))
    moved = weigh_anew(key_path, proposal, target, z)
    moved = jax.tree.map(partial(jnp.where, moved.log_weight > -jnp.inf), moved, current)
    state = state._replace(adapt_state=adapt(tuned, accept_prob.mean(), state.i, state.num_warmup))
    return with_draw(target, state, moved)


def adapt(tuned: Adaptation, accept_prob: Float[Array, ""], i: Array, num_warmup: Array) -> Adaptation:
    """Move the step size towards the target acceptance probability (Robbins-Monro). Only during warm-up."""
    dtype = tuned.step_size.dtype
    gain = jnp.where(i < num_warmup, lax.rsqrt(1.0 + i), 0.0)
    step_size = tuned.step_size * jnp.exp(gain * (accept_prob - TARGET_ACCEPT_PROB))
    return tuned._replace(step_size=step_size.astype(dtype), accept_prob=accept_prob.astype(dtype))


def refresh(proposal: AbstractProposal, target: Target, state: ScoreSDEState) -> ScoreSDEState:
    """Weigh the current draw for another observation, over a fresh path. Discard the proposals for the old one.

    Exactness: exact: drawing the path again from r(u | z) is a Gibbs step.
    """
    rng_key, key_path = random.split(state.rng_key)
    draw = weigh_anew(key_path, proposal, target, current_draw(target, state).z)
    bank = state.bank._replace(used=jnp.full_like(state.bank.used, state.bank.proposals.log_weight.size))
    return with_draw(target, state._replace(y=target.y, bank=bank, rng_key=rng_key), draw)


def transition(
    proposal: AbstractProposal, target: Target, num_proposals: int, num_local_steps: int, state: ScoreSDEState
) -> ScoreSDEState:
    """Move one chain by one iteration: a global move, then ``num_local_steps`` local steps.

    Without local steps there is nothing to adapt, and the chain rests in warm-up: it makes the first move and the last
    `NUM_LAST` of it.

    Exactness: exact: both moves leave the posterior invariant.
    """

    def move(state: ScoreSDEState) -> ScoreSDEState:
        rng_key, key_global, key_local = random.split(state.rng_key, 3)
        new = global_move(key_global, proposal, target, state, num_proposals)
        if num_local_steps:
            new = local_move(key_local, proposal, target, new, num_local_steps)
        count = 1 + jnp.where(state.i < state.num_warmup, state.i, state.i - state.num_warmup)
        return new._replace(
            mean_accept_prob=state.mean_accept_prob + (new.accept_prob - state.mean_accept_prob) / count,
            bank=new.bank._replace(key_bits=random.key_data(rng_key)),
            rng_key=rng_key,
        )

    if num_local_steps:
        return move(state)._replace(i=state.i + 1)
    awake = (state.i == 0) | (state.i >= state.num_warmup - NUM_LAST)
    moved = lax.cond(any_chain(awake), move, lambda state: state, state)
    return moved._replace(i=state.i + 1)


def weigh_starts(key: Array, proposal: AbstractProposal, target: Target, sites: PyTree) -> Weighted:
    """Weigh the unconstrained values from which one chain starts, or all chains if ``key`` is a batch.

    Exactness: as for `weigh_anew`.
    """
    read = partial(flatten_sites, target.problem)
    z = read(sites)[None] if is_prng_key(key) else jax.vmap(read)(sites)
    *_, for_paths = keys_of(key if is_prng_key(key) else key[0])
    z = z.astype(jnp.result_type(float))
    if is_traced(z):
        weighed = weigh_rows(for_paths, proposal, target, jnp.arange(len(z)), z)
    else:
        weighed = weigh_places(for_paths, proposal, target, z)
    return jax.tree.map(lambda leaf: leaf[0], weighed) if is_prng_key(key) else weighed


@run_once
def start(
    proposal: AbstractProposal, target: Target, num_warmup: Array, step_size: Array, bank_size: int, local: bool,
    key: Array, given: Weighted | None,
) -> ScoreSDEState:  # fmt: skip
    """Make the state before the first iteration, of one chain or of all chains if ``key`` is a batch.

    The bank is empty. Without a ``given`` draw, ``z`` is zero and has no weight yet.
    """
    begin = partial(_start, proposal, target, num_warmup, step_size, bank_size, local)
    return begin(key, given) if is_prng_key(key) else jax.vmap(begin)(key, given)


def _start(
    proposal: AbstractProposal, target: Target, num_warmup: Array, step_size: Array, bank_size: int, local: bool,
    key: Key, given: Weighted | None,
) -> ScoreSDEState:  # fmt: skip
    key, key_factor, _ = random.split(key, 3)
    shapes = jax.eval_shape(lambda key: draw_proposals(key, proposal, target, bank_size), key)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # These zeros depend on the key. So every array that NumPyro collects has a chain axis under any `vmap`.
    # "No weight yet" is the lowest finite number: NumPyro multiplies it by zero, and minus infinity would give NaN.
    zero = 0 * random.uniform(key, dtype=empty.log_weight.dtype)
    nothing = zero + jnp.finfo(zero.dtype).min
    draw = Weighted(empty.z[0] + zero.astype(empty.z.dtype), nothing, empty.log_target[0] + zero)
    if given is not None:
        draw = cleaned(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), given, draw))
        lost = draw.log_weight == jnp.inf  # zero proposal density: the chain starts from a proposal instead
        draw = draw._replace(log_weight=jnp.where(lost, nothing, draw.log_weight))
    factor = preconditioner(key_factor, proposal, target) if local else jnp.eye(draw.z.size, dtype=draw.z.dtype)
    state = ScoreSDEState(
        i=jnp.zeros((), jnp.int32),
        num_warmup=num_warmup,
        z={},
        potential_energy=zero,
        log_weight=zero,
        accept_prob=zero,
        mean_accept_prob=zero,
        adapt_state=Adaptation(step_size.astype(draw.z.dtype), factor, zero.astype(draw.z.dtype)),
        bank=Bank(empty, jnp.array(bank_size, jnp.int32), random.key_data(key)),
        y=target.y,
        weights=Weights((), 0),
        origin=Origin(""),
        rng_key=key,
    )
    return with_draw(target, state, draw)


def preconditioner(key: Key, proposal: AbstractProposal, target: Target) -> Float[Array, "dim dim"]:
    """Compute the Cholesky factor of the covariance of proposals that the chain never uses."""
    dim = target.problem.dim
    return spread(draw_proposals(key, proposal, target, 64 + 8 * dim).z)
