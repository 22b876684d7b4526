"""Time the NPSE of the torch package `sbi` on two_moons; run by `against_sbi.py` in an environment of its own.

Default settings of `sbi` throughout, one torch thread. The draws answer for observation 1 of the benchmark.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from sbi.inference import NPSE
from sbi.utils import BoxUniform

OBSERVATION = (-0.6396706, 0.16234657)
"""Observation 1 of the two_moons task."""


def simulate(theta: torch.Tensor) -> torch.Tensor:
    """Simulate two_moons observations, one per row of theta."""
    num = theta.shape[0]
    angle = math.pi * (torch.rand(num) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(num)
    shift = torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2.0)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1) + shift


def main() -> None:
    """Train, draw, print and save the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-simulations", type=int, default=10_000)
    parser.add_argument("--num-draws", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--draws", type=Path)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)

    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample((args.num_simulations,))
    trainer = NPSE(prior, show_progress_bars=False)
    start = time.process_time()
    trainer.append_simulations(theta, simulate(theta)).train()
    train = time.process_time() - start

    posterior = trainer.build_posterior()
    start = time.process_time()
    draws = posterior.sample((args.num_draws,), x=torch.tensor([OBSERVATION]), show_progress_bars=False)
    draw = time.process_time() - start

    figures = {
        "num_simulations": args.num_simulations,
        "num_draws": args.num_draws,
        "epochs": int(trainer.summary["epochs_trained"][-1]),
        "train_cpu_seconds": round(train, 1),
        "draw_cpu_seconds": round(draw, 1),
    }
    print(json.dumps(figures, indent=2))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")
    if args.draws:
        np.savez(args.draws, theta=draws.reshape(args.num_draws, 2).numpy())


if __name__ == "__main__":
    main()
