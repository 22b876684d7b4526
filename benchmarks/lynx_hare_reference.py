"""Long NUTS on the lynx-hare model with a tight adaptive ODE solver in float64: the reference figures.

    python benchmarks/lynx_hare_reference.py      # about six minutes on one core

Writes benchmarks/data/lynx_hare_reference.json: mean, sd, quantiles, effective sample size and split R-hat of each
parameter, and everything needed to make them again.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from diffrax import ODETerm, PIDController, SaveAt, Tsit5, diffeqsolve
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS, init_to_median

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lynx_hare

QUANTILES = (0.025, 0.05, 0.25, 0.5, 0.75, 0.95, 0.975)


def accurate(rates, initial):
    """Solve for the log populations to a relative and absolute tolerance of 1e-8."""
    times = lynx_hare.YEARS
    solution = diffeqsolve(
        ODETerm(lynx_hare.growth), Tsit5(), times[0], times[-1], 0.05, jnp.log(initial), args=rates,
        saveat=SaveAt(ts=times), stepsize_controller=PIDController(rtol=1e-8, atol=1e-8), max_steps=4096, throw=False,
    )  # fmt: skip
    return solution.ys


def model(pelts=None):
    """The lynx-hare model with the tight solver."""
    lynx_hare.model(pelts, solve=accurate)


def summarise(samples: dict[str, np.ndarray]) -> dict[str, dict]:
    """Summarise draws of shape (chain, draw, ...) per scalar parameter."""
    figures = {}
    for site, values in samples.items():
        values = np.asarray(values).reshape(*values.shape[:2], -1)
        for i in range(values.shape[-1]):
            chains = values[..., i]
            figures[site if values.shape[-1] == 1 else f"{site}[{i}]"] = {
                "mean": float(chains.mean()),
                "sd": float(chains.std(ddof=1)),
                "quantiles": [float(q) for q in np.quantile(chains, QUANTILES)],
                "ess": float(effective_sample_size(chains)),
                "r_hat": float(split_gelman_rubin(chains)),
            }
    return figures


def main() -> None:
    """Run the chains and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-warmup", type=int, default=1000)
    parser.add_argument("--num-samples", type=int, default=5000)
    parser.add_argument("--num-chains", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data" / "lynx_hare_reference.json")
    args = parser.parse_args()
    numpyro.enable_x64()

    start = time.perf_counter()
    mcmc = MCMC(
        NUTS(model, init_strategy=init_to_median, dense_mass=True, target_accept_prob=0.9),
        num_warmup=args.num_warmup, num_samples=args.num_samples, num_chains=args.num_chains,
        chain_method="sequential", progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(args.seed), lynx_hare.PELTS, extra_fields=("diverging", "num_steps"))
    fields = mcmc.get_extra_fields()
    record = {
        "command": "python benchmarks/lynx_hare_reference.py",
        "method": f"NUTS, {args.num_chains} chains x {args.num_samples} draws after {args.num_warmup}, float64, "
        "dense mass matrix, target_accept_prob 0.9, Tsit5 with rtol = atol = 1e-8",
        "seed": args.seed,
        "versions": {"jax": jax.__version__, "numpyro": numpyro.__version__},
        "divergences": int(fields["diverging"].sum()),
        "mean_leapfrog_steps": float(fields["num_steps"].mean()),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "quantile_levels": list(QUANTILES),
        "parameters": summarise(mcmc.get_samples(group_by_chain=True)),
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    mcmc.print_summary()


if __name__ == "__main__":
    main()
