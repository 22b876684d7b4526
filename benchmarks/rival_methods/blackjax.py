"""Adaptive tempered SMC (BlackJAX) with HMC moves, whose step size and masses follow the particles."""

from collections.abc import Callable
from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc import adaptive_tempered, extend_params, resampling

from rival_methods import Outcome

SETTINGS = {"num_particles": 4096, "num_moves": 10, "num_leapfrog_steps": 10, "target_ess": 0.8, "accept_prob": 0.8}
TUNED = {
    "funnel_10": {"num_moves": 20},
    "two_moons": {"num_moves": 20},
    "slcp": {"num_moves": 50, "num_leapfrog_steps": 20},
}
FLOOR = -1e5
"""Least log likelihood: behind a crescent it is minus infinity, which times a temperature of zero is no number."""
MOST = 500
"""Most temperatures."""


def prepare(target) -> Callable[[int], Outcome]:
    """Make the whole run one program."""
    own = SETTINGS | TUNED.get(target.name, {})

    def log_likelihood(z):
        return jnp.maximum(jnp.nan_to_num(target.unconstrained(z)[1], nan=FLOOR), FLOOR)

    kernel = adaptive_tempered.build_kernel(
        lambda z: target.unconstrained(z)[0], log_likelihood,
        partial(blackjax.hmc.build_kernel(), num_integration_steps=own["num_leapfrog_steps"]), blackjax.hmc.init,
        resampling.systematic, own["target_ess"],
    )  # fmt: skip

    def step(carry):
        key, state, step_size, log_evidence, num = carry
        key, own_key = jax.random.split(key)
        parameters = {"step_size": step_size, "inverse_mass_matrix": jnp.var(state.particles, axis=0) + 1e-12}
        state, info = kernel(own_key, state, own["num_moves"], extend_params(parameters))
        accepted = jnp.nan_to_num(info.update_info.acceptance_rate).mean()
        step_size = step_size * jnp.exp(jnp.clip(2 * (accepted - own["accept_prob"]), -1.0, 0.5))
        return key, state, step_size, log_evidence + info.log_likelihood_increment, num + 1

    @jax.jit
    def temper(key):
        for_start, key = jax.random.split(key)
        particles = target.start(for_start, own["num_particles"])
        state = adaptive_tempered.init(particles)._replace(tempering_param=jnp.zeros(()))
        carry = jax.lax.while_loop(
            lambda carry: (carry[1].tempering_param < 1.0) & (carry[4] < MOST),
            step, (key, state, jnp.asarray(0.2), jnp.zeros(()), 0),
        )  # fmt: skip
        last = step(carry)  # resampled and moved at the last temperature: equal weights
        return jax.vmap(lambda z: target.constrain(z)[0])(last[1].particles), carry[3], last[4]

    def run(seed: int) -> Outcome:
        theta, log_evidence, num = jax.device_get(temper(jax.random.key(seed)))
        evaluations = int(num) * own["num_particles"] * own["num_moves"] * own["num_leapfrog_steps"]
        return Outcome(np.asarray(theta, float), log_evidence=float(log_evidence), num_evaluations=evaluations,
                       extra={"num_temperatures": int(num)})  # fmt: skip

    return run
