"""Validity: the probability that a foreign simulator succeeds, learned from the rows in which it did and did not.

Rows that failed say nothing about their data, so the posterior is learned from the others: from
p(z) v(z) p(y | z), v the probability of success. Where failing has nothing to do with the data that would have come
out, dividing the weights by v(z) gives p(z) p(y | z) back.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.nets import ResidualMLP
from scoreinfer.training.loop import Budget, train

WIDTH, DEPTH = 64, 2


class Validity(eqx.Module):
    """The learned probability of success v(z).

    Exactness: biased: as good as the training of a classifier. Where v is zero nothing can be learned, and the
        posterior has no mass there.
    """

    centre: Float[Array, " dim"]
    scale: Float[Array, " dim"]
    network: ResidualMLP

    def logit(self, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute log v / (1 - v)."""
        centre, scale = jax.lax.stop_gradient((self.centre, self.scale))
        return self.network(((z - centre) / scale).astype(jnp.float32))[0]

    def log_prob(self, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute log v(z)."""
        return jax.nn.log_sigmoid(self.logit(z))


def validity_network(key: Key, dim: int) -> ResidualMLP:
    """Make the untrained classifier."""
    return ResidualMLP(key, dim, 1, width=WIDTH, depth=DEPTH)


def validity_loss(module: Validity, batch: tuple, key: Key) -> Float[Array, ""]:
    """Compute the mean logistic loss of success."""
    del key
    z, valid = batch
    logit = jax.vmap(module.logit)(z)
    return (jax.nn.softplus(logit) - valid * logit).mean()


def learn_validity(
    key: Key, z: Float[Array, "num dim"], valid: Float[Array, " num"], *, progress_bar: bool = True
) -> Validity:
    """Train the classifier on parameters and on whether (1 or 0) the simulator succeeded there."""
    for_net, for_training = jax.random.split(key)
    module = Validity(z.mean(axis=0), z.std(axis=0) + 1e-12, validity_network(for_net, z.shape[1]))
    held_out = max(len(z) // 10, 1)
    validation, training = ((z[rows], valid[rows]) for rows in (slice(None, held_out), slice(held_out, None)))
    batch_size = min(256, len(z) - held_out)
    epoch_steps = max(2 * len(z) // batch_size, 10)
    budget = Budget(3000, batch_size, min(epoch_steps, 250), 2e-3, patience=20)
    return train(
        for_training, module, validity_loss, lambda key: training, validation, budget, progress_bar=progress_bar,
        title="validity",
    )[0]  # fmt: skip


@eqx.filter_jit
def failure_weights(validity: Validity, values: Float[Array, "num dim"]) -> Float[Array, " num"]:
    """Compute - log v of every draw: the weight that undoes the failures."""
    return -jax.vmap(validity.log_prob)(values)
