"""A little of everything that several devices share. ``device_work.py OUTPUT [PROCESS PORT]`` writes it to a file.

With a number and a port, the process is one of two.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import scoreinfer as si
from doubles import Y1, fake_posterior, location_scale_problem
from scoreinfer.montecarlo.first_draws import draw_first, first_power, resample_first
from scoreinfer.montecarlo.langevin import move_all
from scoreinfer.montecarlo.moves import DifferenceMoves, LangevinMoves
from scoreinfer.montecarlo.reference import Prior
from scoreinfer.montecarlo.tempering import advance, begin
from scoreinfer.samplers.base import Target, bounded_target
from scoreinfer.samplers.batches import draw_rows, weigh_places, weighted_draws
from scoreinfer.training.loop import Budget, train
from scoreinfer.training.simulations import simulate_joint


def same_key():
    """Make the key of everything. Nothing is computed while this module is imported: JAX is not started yet."""
    return jax.random.key(0)


def walk():
    """Make a state space."""
    return si.StateSpace(
        initial=dist.Normal(0.0, 1.0),
        transition=lambda t0, t1, x: dist.Normal(0.9 * jnp.sin(x), 0.5),
        observation=lambda t, x: dist.Normal(x, 0.3),
    )


def drawn():
    """Simulate, draw, weigh: rows that know nothing of each other."""
    key = same_key()
    problem, proposal = location_scale_problem(), fake_posterior(path=True)
    target = bounded_target(problem, {"y": jnp.asarray(Y1)})
    few = Target(problem, target.y, at_once=32)
    draws = weighted_draws(key, proposal, target, 512, None, 0, 1030)
    return {
        "simulated": simulate_joint(key, problem, 301, batch=64),
        "drawn": draws,
        "a few at a time": draw_rows(key, proposal, few, jnp.arange(100)),
        "weighed": weigh_places(key, proposal, target, draws.z[:37]),
    }


def moved():
    """Move particles, whose step size is common to all, and members of a filter, and train."""
    key = same_key()
    target = bounded_target(location_scale_problem(), {"y": jnp.asarray(Y1)})
    start = jax.random.normal(key, (51, 2))
    y = jnp.array([0.3, 0.8, jnp.nan, -0.2])
    run = si.filter(key, walk(), method=si.filters.BootstrapFilter(), num_members=51, y=y)
    return {"rejuvenated": move_all(key, target, start, jnp.eye(2), 5), "members": run.cycles} | trained()


def trained():
    """Take eight steps of least squares: their gradients are sums over all devices."""
    key = same_key()
    x = jax.random.normal(key, (256, 3))

    def loss(w, batch, key):
        return ((batch[0] @ w + 0.1 * jax.random.normal(key, batch[1].shape) - batch[1]) ** 2).mean()

    budget = Budget(8, 64, 4, 0.1)
    pair = x, jnp.sin(x).sum(1)
    weights, _ = train(key, jnp.zeros(3), loss, lambda key: pair, None, budget, progress_bar=False)
    return {"trained": weights}


def explored():
    """Explore by both kinds of moves, and calibrate."""
    key = same_key()
    target = bounded_target(location_scale_problem(), {"y": jnp.asarray(Y1)})
    reference = Prior(target.problem)
    first = draw_first(key, reference, target, 8192)
    power = first_power(first, 64)
    particles = resample_first(key, first, power, 64)
    found = {"first": first, "gradients": simulate_joint(key, target.problem, 301, gradient=True, batch=64)}
    for moves in (LangevinMoves(reference, target, np.array(16)), DifferenceMoves(reference, target, np.array(10))):
        found[type(moves).__name__] = advance(key, moves, begin(moves, particles, power), np.array(0.7))
    ranks = si.calibration.sbc(key, fake_posterior(), 21, num_draws=7, num_proposals=16, progress_bar=False)
    return found | {"ranks": (ranks.ranks, ranks.joint, ranks.effective_share)}


def named(found):
    """Name every array."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def main(output, process="", port=""):
    """Run everything on all devices, and write it down."""
    if port:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    with si.use_devices():
        found = named(drawn() | moved() | explored())
    assert all(isinstance(leaf, np.ndarray) or len(leaf.devices()) == 1 for leaf in found.values())
    np.savez(output, **{name: np.asarray(leaf) for name, leaf in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
