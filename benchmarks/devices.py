"""Speed and memory against the number of devices, on the CPU: simulate, draw, explore, filter, calibrate, train.

    python benchmarks/devices.py                            # 1, 2 and 4 forced host devices; half an hour on two cores
    python benchmarks/devices.py --devices 1 2 --rounds 5
    python benchmarks/devices.py --devices 1 2 --core-each  # a process gets as many cores as it has devices

Every number of devices has processes of its own. Rounds alternate between the numbers, and the best counts. Host
devices share the cores of the machine: more than there are cores gain nothing. ``cores`` is CPU seconds by wall
seconds; one device alone may keep more than one core busy, since XLA splits large operations over threads. Memory is
what the compiled simulations ask of each device beside arguments and results. ``off`` is the largest difference from
the results of one device, relative to the largest number.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import scoreinfer as si
from scoreinfer._devices import mesh_in_use, splitting
from scoreinfer._memory import map_rows
from scoreinfer.montecarlo.moves import LangevinMoves
from scoreinfer.montecarlo.population import first_population
from scoreinfer.montecarlo.reference import Prior, reference_rows
from scoreinfer.montecarlo.tempering import begin
from scoreinfer.nets import Concatenate
from scoreinfer.samplers.amortised import Architecture, Size, untrained
from scoreinfer.samplers.base import bounded_target
from scoreinfer.samplers.batches import weighted_draws
from scoreinfer.samplers.diffusion import ProbabilityFlow
from scoreinfer.score.network import score_module
from scoreinfer.training.loop import Budget, train
from scoreinfer.training.losses import ScoreBatch, denoising_loss
from scoreinfer.training.simulations import simulate_joint

STATES, STEPS = 40, 100


def lorenz(x):
    """Take one Runge-Kutta step of Lorenz-96."""

    def slope(x):
        return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + 8.0

    h = 0.01
    a = slope(x)
    b = slope(x + h / 2 * a)
    c = slope(x + h / 2 * b)
    return x + h / 6 * (a + 2 * b + 2 * c + slope(x + h * c))


def weather(y=None):
    """Four unknowns of the first state; the last state is seen."""
    shift = numpyro.sample("shift", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    start = 8.0 + jnp.resize(shift, STATES) + 0.1 * jnp.sin(jnp.arange(STATES))
    x, _ = jax.lax.scan(lambda x, _: (lorenz(x), None), start, length=STEPS)
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def problem_and_proposal(key):
    """Read the model, and make a proposal that nobody has trained."""
    problem = si.from_numpyro(weather)
    architecture = Architecture(Size(32, 2), Size(128, 4), ProbabilityFlow(num_steps=8))
    return problem, untrained(key, key, problem, architecture, Concatenate())


def target_of(problem, key):
    return bounded_target(problem, {"y": np.asarray(problem.simulate(key)[1]["y"])})


def simulate(key):
    problem = si.from_numpyro(weather)
    return lambda: simulate_joint(key, problem, 16_384)


def draw(key):
    problem, proposal = problem_and_proposal(key)
    target = target_of(problem, key)
    return lambda: weighted_draws(key, proposal, target, 1024, None, 0, 4096)


def explore(key):
    problem = si.from_numpyro(weather)
    reference, target = Prior(problem), target_of(problem, key)
    moves = LangevinMoves(reference, target, np.array(16), short=True)
    start = first_population(reference_rows(key, reference, jnp.arange(1024)), 1024)
    now, starts = begin(moves, start, np.array(0.01)), jnp.arange(0, 1024, 2)
    return lambda: moves.move(key, now.power, now.values, now.seen, starts, now.adapted)


def filtering(key):
    space = si.StateSpace(
        initial=dist.Normal(8.0 * jnp.ones(STATES), 1.0).to_event(1),
        transition=lambda t0, t1, x: dist.Normal(jax.lax.fori_loop(0, 100, lambda _, x: lorenz(x), x), 0.1).to_event(1),
        observation=lambda t, x: dist.Normal(x[::4], 1.0).to_event(1),
    )
    method, y = si.filters.BootstrapFilter(), jnp.full((4, STATES // 4), 8.0)
    return lambda: si.filter(key, space, method=method, num_members=2048, y=y).cycles.analysis.members


def calibrate(key):
    posterior, sizes = Fitted(*problem_and_proposal(key)), {"num_proposals": 64, "num_draws": 31}
    return lambda: si.calibration.sbc(key, posterior, 64, **sizes, progress_bar=False).joint


def training(key):
    u = jax.random.normal(key, (4096, 16))
    batch = ScoreBatch(u, {"x": u}, jnp.zeros_like(u))
    module = score_module(key, 16, Concatenate(), batch.x, width=256, depth=4)
    return lambda: train(key, module, loss, lambda key: batch, None, Budget(20, 2048, 20), progress_bar=False)[0]


WORKS = {
    "simulate": simulate, "draw": draw, "explore": explore, "filter": filtering, "calibrate": calibrate,
    "train": training,
}  # fmt: skip


class Fitted:
    """What calibration asks of a posterior."""

    def __init__(self, problem, proposal):
        self.problem, self.proposal = problem, proposal


def loss(module, batch, key):
    """Compute the denoising loss."""
    return denoising_loss(module, batch, key, precision=None)


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array | np.ndarray)]


def memory(key):
    """Compute the temporary bytes of each device in a program of 4096 simulations."""
    simulate = si.from_numpyro(weather).simulate
    with splitting(mesh_in_use()):
        program = jax.jit(map_rows(lambda row: simulate(jax.random.fold_in(key, row)), None))
        return program.lower(jnp.arange(4096)).compile().memory_analysis().temp_size_in_bytes


def measure(names, repeats, output):
    """Measure in this process, on all its devices; write results and figures down."""
    found, figures = {}, {}
    with si.use_devices():
        for name in names or WORKS:
            work = WORKS[name](jax.random.key(0))
            found[name] = arrays(work())
            for _ in range(repeats):
                wall, cpu = time.perf_counter(), time.process_time()
                jax.block_until_ready(work())
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                figures[name] = min(figures.get(name, (np.inf, 0.0)), (wall, cpu / wall))
        figures["memory"] = memory(jax.random.key(0))
    np.savez(output, **{f"{name}/{i}": leaf for name, leaves in found.items() for i, leaf in enumerate(leaves)})
    print(json.dumps(figures))


def child(num, names, repeats, output, core_each):
    """Measure in a process with so many devices; on as many cores, where asked."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num}"
    command = [sys.executable, __file__, "--measure", str(output), "--repeats", str(repeats), "--only", *names]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    pinned = (lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num])) if core_each else None
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=pinned)
    return json.loads(done.stdout.splitlines()[-1])


def off(one, other, name):
    """Compute the largest relative difference of the results of a work."""
    pairs = [(one[key], other[key]) for key in one if key.split("/")[0] == name and one[key].dtype.kind == "f"]
    return max(np.nanmax(np.abs(np.nan_to_num(a - b))) / np.nanmax(np.abs(np.nan_to_num(a))) for a, b in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--core-each", action="store_true", help="as many cores as devices")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.only, options.repeats, options.measure)
    else:
        compare(options)


def compare(options):
    """Measure in processes of their own, and print."""
    best, told = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for num in options.devices:
                output = Path(folder) / f"{num}.npz"
                figures = child(num, options.only, options.repeats, output, options.core_each)
                told[num] = figures.pop("memory")
                for name, figure in figures.items():
                    best[name, num] = min(best.get((name, num), (np.inf, 0.0)), tuple(figure))
        results = {num: dict(np.load(Path(folder) / f"{num}.npz")) for num in options.devices}
    first = options.devices[0]
    for name in dict.fromkeys(name for name, _ in best):
        for num in options.devices:
            seconds, cores = best[name, num]
            print(
                f"{name:<10} {num} devices  {seconds:7.3f} s  {cores:4.2f} cores  "
                f"speed-up {best[name, first][0] / seconds:4.2f}  off {off(results[first], results[num], name):.1e}"
            )
    for num, size in told.items():
        print(f"memory     {num} devices  {size / 2**20:7.1f} MiB a device")


if __name__ == "__main__":
    main()
