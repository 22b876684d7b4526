"""SLCP (four modes, five parameters) under four kernels, one table: `scoreinfer.compare` with reference draws.

python benchmarks/compare_slcp.py --observation 2
"""

import argparse

import jax
import numpy as np
from numpyro.infer import NUTS
from tasks import TASKS, slcp

import scoreinfer as si


def modes(sites):
    """Number the four modes by the signs of the third and fourth parameter."""
    theta = np.asarray(sites["theta"])
    return 2 * (theta[:, 2] > 0) + (theta[:, 3] > 0)


def main():
    """Compare and print; the reference's own shares of the modes first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--observation", type=int, default=2)
    parser.add_argument("--num-warmup", type=int, default=500)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task = next(task for task in TASKS if task.name == "slcp")
    reference = {"theta": task.reference(args.observation)}
    shares = np.bincount(modes(reference), minlength=4) / len(reference["theta"])
    print("reference's modes:", ", ".join(f"{share:.3f}" for share in shares))
    kernels = {
        "score": si.ScoreSDE(slcp),
        "nuts": NUTS(slcp),
        "mala": si.mcmc.MALA(slcp),
        "underdamped": si.mcmc.UnderdampedLangevin(slcp),
    }
    comparison = si.Comparison(
        slcp, kernels, num_warmup=args.num_warmup, num_samples=args.num_samples, reference=reference, modes=modes
    )
    print(comparison.run(jax.random.key(args.seed), y=task.observation(args.observation)))


if __name__ == "__main__":
    main()
