"""NUTS (NumPyro)."""

from collections.abc import Callable

import jax
import numpy as np
from numpyro.infer import MCMC, NUTS

from rival_methods import Outcome

SETTINGS = {"num_warmup": 500, "num_samples": 1000, "num_chains": 4}


def prepare(target) -> Callable[[int], Outcome]:
    """Make one `MCMC` object, which is run again. Evaluations of warm-up are taken to be as many as in sampling."""
    kernel = NUTS(target.model) if target.potential_fn is None else NUTS(potential_fn=target.potential_fn)
    mcmc = MCMC(kernel, chain_method="vectorized", progress_bar=False, **SETTINGS)
    num_chains, share = SETTINGS["num_chains"], 1 + SETTINGS["num_warmup"] / SETTINGS["num_samples"]

    def run(seed: int) -> Outcome:
        key, first = jax.random.key(seed), None
        if target.potential_fn is not None:
            first = 2.0 * jax.random.normal(key, (num_chains, target.dim))
        mcmc.run(key, **target.data, init_params=first, extra_fields=("num_steps",))
        rows = target.join(mcmc.get_samples() if first is None else {"x": mcmc.get_samples()})
        num = share * float(np.sum(mcmc.get_extra_fields()["num_steps"]))
        return Outcome(rows, num_evaluations=num, chains=rows.reshape(num_chains, -1, target.dim))

    return run
