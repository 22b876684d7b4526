"""Score-based data assimilation on Lorenz-63 by the published protocol: figures of `accuracy.py --suite sda`.

Rozet and Louppe 2023, arXiv 2306.10574, section 4.1: 65 states, the first coordinate observed in units of the climate,
``lo`` every eighth state with a noise of .05, ``hi`` every state with .25. W1 is the earth mover's distance of whole
paths; the floor is that of two independent references, particle Gibbs from cold starts.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import lorenz63_sda as lorenz
import numpy as np
from measure import Clock
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

import scoreinfer as si

PROTOCOLS = {"lo": {"every": 8, "noise": 0.05}, "hi": {"every": 1, "noise": 0.25}}
SEQUENCES, NUM, NUM_REFERENCE = 4, 64, 64
GIBBS = si.samplers.ParticleGibbs(20, 256)
"""Observed sequences of each protocol, draws, draws of each reference, and how these are made."""


def learn(seed: int):
    """Learn windows of nine states; also return the CPU seconds."""
    with Clock() as clock:
        local = si.fit_local(jax.random.key(seed), lorenz.model, "x", k=4, num_steps=6000, progress_bar=False)
    return local, clock.times.cpu


def earth_mover(x, reference) -> float:
    """Compute W1 between draws and a multiple of their number of reference draws."""
    x, reference = (np.asarray(part, np.float64).reshape(len(part), -1) for part in (x, reference))
    x = np.repeat(x, len(reference) // len(x), axis=0)
    cost = cdist(x, reference)
    return float(cost[linear_sum_assignment(cost)].mean())


def sequence(local, key, kind: str) -> dict[str, float]:
    """Draw one sequence, unfinished and finished, beside two references."""
    for_truth, for_reference, for_draws = jax.random.split(key, 3)
    options = PROTOCOLS[kind]
    truth, y = lorenz.simulate(for_truth, **options)
    gibbs = si.SDA(lorenz.model, "x", finish=GIBBS).condition(y=y, **options)
    with Clock() as referring:
        reference = gibbs.sample(for_reference, 2 * NUM_REFERENCE)
    one, two = np.split(np.asarray(reference.sites["x"]), 2)
    published = si.SDA(lorenz.model, "x", local, finish=None, num_corrections=4).condition(y=y, **options)
    with Clock() as guiding:
        raw = published.sample(for_draws, NUM)
    with Clock() as finishing:
        finished = (
            si.SDA(lorenz.model, "x", local).condition(y=y, **options).sample(for_draws, NUM, explorers=truth[None])
        )
    print(f"  {kind}: {reference.certificate}\n  {finished.certificate}", flush=True)
    by, of = reference.certificate, finished.certificate
    return {
        "w1_unfinished": earth_mover(raw.sites["x"], two), "w1": earth_mover(finished.sites["x"], two),
        "w1_floor": earth_mover(one[:NUM], two), "certified": float(of.certified),
        "reference_certified": float(by.certified), "log_prior_gap": of.log_prior - by.log_prior,
        "log_likelihood_gap": of.log_likelihood - by.log_likelihood, "r_hat": of.r_hat,
        "reference_s": referring.times.cpu, "unfinished_s": guiding.times.cpu, "finished_s": finishing.times.cpu,
    }  # fmt: skip


def protocol(learned: Callable, seed: int, kind: str) -> dict[str, float]:
    """Run all sequences of a protocol: means, and the largest gap."""
    local, seconds = learned()
    keys = jax.random.split(jax.random.key(1000 + seed), SEQUENCES)
    found = [sequence(local, key, kind) for key in keys]
    for one in found:
        print("  " + ", ".join(f"{name} {value:.2f}" for name, value in one.items()), flush=True)
    figures = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    gaps = {name: max(abs(one[name]) for one in found) for name in ("log_prior_gap", "log_likelihood_gap")}
    return figures | gaps | {"w1_ratio": figures["w1"] / figures["w1_floor"], "training_s": seconds}


def hidden(seed: int) -> dict[str, float]:
    """See the third coordinate alone: both signs of the others have half of the posterior."""
    for_truth, for_draws = jax.random.split(jax.random.key(2000 + seed))
    _, y = lorenz.simulate(for_truth, coordinate=2)
    given = si.SDA(lorenz.model, "x", finish=si.samplers.ParticleGibbs(20, 512)).condition(y=y, coordinate=2)
    with Clock() as clock:
        draws = given.sample(for_draws, 256)
    print(f"  hidden: {draws.certificate}", flush=True)
    error = abs(float((np.asarray(draws.sites["x"])[:, lorenz.TIMES // 2, 0] > 0).mean()) - 0.5)
    certified = float(draws.certificate.certified)
    wrong = certified * (error > 0.05)
    return {"share_error": error, "certified": certified, "wrong_and_certified": wrong, "seconds": clock.times.cpu}


def rows(seed: int) -> Iterator:
    """Yield a name and a function for every row; the score is learned once, when it is needed."""
    kept: list = []

    def learned():
        kept[:] = kept or [learn(seed)]
        return kept[0]

    for kind in PROTOCOLS:
        yield f"lorenz63/{kind}", partial(protocol, learned, seed, kind)
    yield "lorenz63/hidden", partial(hidden, seed)
