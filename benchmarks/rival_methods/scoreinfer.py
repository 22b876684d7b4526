"""scoreinfer: ``MCMC(ScoreSDE(...))``, then `certify`."""

from collections.abc import Callable

import jax
from measure import Clock
from numpyro.infer import MCMC

import scoreinfer as si
from rival_methods import Outcome

SETTINGS = {"num_warmup": 500, "num_samples": 1000, "num_chains": 4}


def prepare(target) -> Callable[[int], Outcome]:
    """Make a kernel for every run, which learns anew; the certificate's seconds stand apart in the row."""
    num_chains, num_iterations = SETTINGS["num_chains"], SETTINGS["num_warmup"] + SETTINGS["num_samples"]

    def run(seed: int) -> Outcome:
        key, first, options = jax.random.key(seed), None, {"model": target.model}
        if target.potential_fn is not None:
            options = {"potential_fn": target.potential_fn, "start_scale": target.start_scale}
            first = 2.0 * jax.random.normal(key, (num_chains, target.dim))
        kernel = si.ScoreSDE(**options, progress_bar=False)
        mcmc = MCMC(kernel, chain_method="vectorized", progress_bar=False, **SETTINGS)
        mcmc.run(key, **target.data, init_params=first)
        rows = target.join(mcmc.get_samples() if first is None else {"x": mcmc.get_samples()})
        with Clock() as clock:
            found = si.certify(mcmc)
        return Outcome(
            rows, log_evidence=float(found.weights.log_evidence),
            num_evaluations=kernel.num_evaluations(num_chains * num_iterations, mcmc.last_state),
            chains=rows.reshape(num_chains, -1, target.dim), certifying=clock.times,
            extra={"certified": bool(found.certified), "reason": found.reason, "ess": float(found.weights.ess)},
        )  # fmt: skip

    return run
