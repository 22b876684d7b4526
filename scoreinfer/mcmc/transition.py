"""One iteration of `ScoreSDE`, as pure functions on its state. NumPyro's contract is in `scoreinfer.mcmc.score_sde`.

The learned sampler draws proposals that are independent of the chain; the model's density makes the chain exact. Let
u be the path by which the sampler reached z (empty for the flow), q(z, u) its density, r(u | z) the density of the
path run forwards from z (the noising), and

    w(z, u) = pi(z) r(u | z) / q(z, u),    log w = problem.log_joint(z, y) - log_q.

Every move below leaves pi(z) r(u | z) invariant, so its z-marginal, the posterior, too. Since the moves read the path
through w alone, the state keeps log w and forgets u.

- *Global*, from N fresh proposals: pick one with probability w_j / S, S = sum_j w_j, and accept it with probability
  min(1, S / (S - w_pick + w_current)). With the other proposals held fixed, the flow between current and pick is
  proportional to w_current w_pick min(1 / S, 1 / (S - w_pick + w_current)) under q x q, symmetric in the two:
  detailed balance. It moves at least as often as i-SIR, which picks among the N + 1 (Peskun); N = 1 is independence
  Metropolis on paths.
- *Local*, on request: MALA steps on pi(z), blind to u; then u is drawn anew from r(u | z), an exact Gibbs step, which
  gives the new z its weight. Step sizes adapt during warm-up only, and their preconditioner comes from proposals that
  the chain never sees.

References: Liu, Liang and Wong 2000, "The multiple-try method", section 3; Andrieu, Lee and Vihola 2018, "Uniform
ergodicity of the iterated conditional SMC"; Roberts and Rosenthal 1998 (MALA and its 0.574).
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax, random
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

from scoreinfer._typing import Key, Sites
from scoreinfer.bijections.base import spread
from scoreinfer.mcmc.contract import Origin, any_chain, flatten_sites, layout, same_bits
from scoreinfer.montecarlo.langevin import TARGET_ACCEPT_PROB, differentiate, metropolis_langevin_step
from scoreinfer.samplers.base import AbstractProposal, Target, Weighted


class Bank(NamedTuple):
    """Proposals waiting for one chain, which must arrive with the random key of these bits."""

    proposals: Weighted
    used: Int[Array, ""]
    key_bits: UInt[Array, " words"]


class Adaptation(NamedTuple):
    """Local moves: step size, Cholesky factor of the preconditioner, last acceptance probability."""

    step_size: Float[Array, ""]
    factor: Float[Array, "dim dim"]
    accept_prob: Float[Array, ""]


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["fit"])
class Weights:
    """Arrays of the kernel's fit number ``fit``; another fit is another tree structure, so a loop is traced anew."""

    def __init__(self, arrays: tuple[Any, ...], fit: int):
        self.arrays, self.fit = arrays, fit


class ScoreSDEState(NamedTuple):
    """State of one chain, or of all of them when vectorised (then ``y`` and ``weights`` have no chain axis).

    Args:
        i: iteration.
        num_warmup: iteration at which step sizes freeze.
        z: unconstrained values of the latent sites (of a bare density: what it takes).
        potential_energy: minus log p(z, y) in the unconstrained space.
        log_weight: log p(z, y) - log_q of the current draw; the lowest number before the first.
        accept_prob: acceptance probability of the last global move.
        mean_accept_prob: its mean since the start, or since the end of warm-up.
        adapt_state: tuning of the local moves.
        bank: proposals waiting to be tried.
        y: the observation for which ``log_weight`` and ``bank`` hold.
        weights: arrays of the learned sampler.
        origin: where the data come from.
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
    """Give draws at which the density fails the weight zero."""
    fails = jnp.isnan(drawn.log_weight) | ~jnp.isfinite(drawn.log_target)
    return drawn._replace(log_weight=jnp.where(fails, -jnp.inf, drawn.log_weight))


def weigh_anew(key: Key, proposal: AbstractProposal, target: Target, z: Float[Array, " dim"]) -> Weighted:
    """Weigh any ``z``, over a fresh path where the weight is one of paths; infinite where no proposal ever comes."""
    return cleaned(proposal.weigh(key, target, proposal.context(target), z))


def draw_proposals(key: Key, proposal: AbstractProposal, target: Target, num: int) -> Weighted:
    """Draw and weigh ``num`` independent proposals."""
    context = proposal.context(target)
    return jax.vmap(lambda key: cleaned(proposal.sample(key, target, context)))(random.split(key, num))


def refill(key: Key, proposal: AbstractProposal, target: Target, bank: Bank, stale: Bool[Array, ""]) -> Bank:
    """Replace the bank where it is stale; the sampler runs only when it is stale for some chain."""

    def drawn() -> Weighted:
        fresh = draw_proposals(key, proposal, target, bank.proposals.log_weight.size)
        return jax.tree.map(partial(jnp.where, stale), fresh, bank.proposals)

    proposals = lax.cond(any_chain(stale), drawn, lambda: bank.proposals)
    return bank._replace(proposals=proposals, used=jnp.where(stale, 0, bank.used))


def multiple_try(key: Key, proposals: Weighted, current: Weighted) -> tuple[Weighted, Float[Array, ""]]:
    """Try one of the proposals, picked by weight: the next draw, and the acceptance probability of the pick.

    Exactness: exact: multiple-try Metropolis with independent proposals (proof in the module's docstring).
    """
    key_pick, key_accept = random.split(key)
    pick = random.categorical(key_pick, proposals.log_weight)
    others = proposals.log_weight.at[pick].set(current.log_weight)
    log_ratio = logsumexp(proposals.log_weight) - logsumexp(others)  # NaN where nothing has weight: stay
    accept_prob = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))
    accept = random.uniform(key_accept, dtype=accept_prob.dtype) < accept_prob
    return jax.tree.map(lambda new, old: jnp.where(accept, new[pick], old), proposals, current), accept_prob


def current_draw(target: Target, state: ScoreSDEState) -> Weighted:
    """Read the current draw off the state."""
    return Weighted(layout(target.problem).flatten(state.z), state.log_weight, -state.potential_energy)


def with_draw(target: Target, state: ScoreSDEState, draw: Weighted) -> ScoreSDEState:
    """Write the current draw into the state."""
    z = layout(target.problem).unflatten(draw.z)
    return state._replace(z=z, log_weight=draw.log_weight, potential_energy=-draw.log_target)


def global_move(key: Key, proposal: AbstractProposal, target: Target, state: ScoreSDEState, num: int) -> ScoreSDEState:
    """Try the next ``num`` proposals of the bank.

    A chain that has no weight yet, or whose observation has changed, starts afresh: it picks from a whole bank by
    weight (importance resampling) and spends that bank.
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
    """Move ``z`` by ``num`` MALA steps and weigh it over a fresh path; undo a move to where the density fails.

    Where the proposals never come the weight is infinite, and only further local moves lead away from there.

    Exactness: exact: MALA leaves pi(z) invariant and does not see u; drawing u anew from r(u | z) is a Gibbs step.
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
    """Move the step size towards the target acceptance probability (Robbins-Monro), during warm-up only."""
    dtype = tuned.step_size.dtype
    gain = jnp.where(i < num_warmup, lax.rsqrt(1.0 + i), 0.0)
    step_size = tuned.step_size * jnp.exp(gain * (accept_prob - TARGET_ACCEPT_PROB))
    return tuned._replace(step_size=step_size.astype(dtype), accept_prob=accept_prob.astype(dtype))


def refresh(proposal: AbstractProposal, target: Target, state: ScoreSDEState) -> ScoreSDEState:
    """Weigh the current draw for another observation, over a fresh path; forget the proposals made for the old one.

    Exactness: exact: drawing the path anew from r(u | z) is a Gibbs step.
    """
    rng_key, key_path = random.split(state.rng_key)
    draw = weigh_anew(key_path, proposal, target, current_draw(target, state).z)
    bank = state.bank._replace(used=jnp.full_like(state.bank.used, state.bank.proposals.log_weight.size))
    return with_draw(target, state._replace(y=target.y, bank=bank, rng_key=rng_key), draw)


def transition(
    proposal: AbstractProposal, target: Target, num_proposals: int, num_local_steps: int, state: ScoreSDEState
) -> ScoreSDEState:
    """Move one chain by one iteration."""
    rng_key, key_global, key_local = random.split(state.rng_key, 3)
    new = global_move(key_global, proposal, target, state, num_proposals)
    if num_local_steps:
        new = local_move(key_local, proposal, target, new, num_local_steps)
    count = 1 + jnp.where(state.i < state.num_warmup, state.i, state.i - state.num_warmup)
    return new._replace(
        i=state.i + 1,
        mean_accept_prob=state.mean_accept_prob + (new.accept_prob - state.mean_accept_prob) / count,
        bank=new.bank._replace(key_bits=random.key_data(rng_key)),
        rng_key=rng_key,
    )


@eqx.filter_jit
def start(
    proposal: AbstractProposal, target: Target, num_warmup: Array, step_size: Array, bank_size: int, local: bool,
    key: Key, sites: PyTree | None,
) -> ScoreSDEState:  # fmt: skip
    """Make the state of one chain before its first iteration: the bank is empty, and without ``sites`` so is ``z``."""
    key, key_factor, key_path = random.split(key, 3)
    shapes = jax.eval_shape(lambda key: draw_proposals(key, proposal, target, bank_size), key)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # Zeros that depend on the key, so that whatever NumPyro collects has a chain axis under any `vmap` from the start.
    # No weight yet is the lowest number, since NumPyro multiplies it by zero, which `jax.debug_nans` would not like.
    zero = 0 * random.uniform(key, dtype=empty.log_weight.dtype)
    nothing = zero + jnp.finfo(zero.dtype).min
    draw = Weighted(empty.z[0] + zero.astype(empty.z.dtype), nothing, empty.log_target[0] + zero)
    if sites is not None:
        draw = weigh_anew(key_path, proposal, target, flatten_sites(target.problem, sites).astype(empty.z.dtype))
        lost = draw.log_weight == jnp.inf  # where the proposals never come: the chain starts from one of these instead
        draw = draw._replace(log_weight=jnp.where(lost, -jnp.inf, draw.log_weight))
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
    """Compute the Cholesky factor of the covariance of proposals that the chain never sees."""
    dim = target.problem.dim
    return spread(draw_proposals(key, proposal, target, 64 + 8 * dim).z)
