"""Validity: the learned probability v(z) that a foreign simulator succeeds at the parameters z.

Valid rows have the joint density p(z) v(z) p(y | z), up to a constant. A posterior learned from them is corrected by
dividing the importance weights by v(z), which gives p(z) p(y | z). The correction is right if, given z, failure does
not depend on the data y.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key
from scoreinfer.nets import ResidualMLP
from scoreinfer.training.loop import Budget, train

WIDTH, DEPTH = 64, 2
"""Units per layer and number of blocks of the classifier. Chosen by judgement."""


class Validity(eqx.Module):
    """The learned probability of success v(z).

    Args:
        centre: mean of the parameters.
        scale: standard deviation of the parameters.
        network: the classifier. Its input is standardised.

    Exactness: biased by the error of the trained classifier. If v(z) is zero, nothing can be learned at z, and the
        learned posterior has no mass there.
    """

    centre: Float[Array, " dim"]
    scale: Float[Array, " dim"]
    network: ResidualMLP

    def logit(self, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute log(v(z) / (1 - v(z)))."""
        centre, scale = jax.lax.stop_gradient((self.centre, self.scale))
        return self.network(((z - centre) / scale).astype(jnp.float32))[0]

    def log_prob(self, z: Float[Array, " dim"]) -> Float[Array, ""]:
        """Compute log v(z)."""
        return jax.nn.log_sigmoid(self.logit(z))


def validity_network(key: Key, dim: int) -> ResidualMLP:
    """Make the untrained classifier."""
    return ResidualMLP(key, dim, 1, width=WIDTH, depth=DEPTH)


def validity_loss(module: Validity, batch: tuple, key: Key) -> Float[Array, ""]:
    """Compute the mean logistic loss: the mean of log(1 + exp(l)) - valid * l, where l is the logit."""
    del key
    z, valid = batch
    logit = jax.vmap(module.logit)(z)
    return (jax.nn.softplus(logit) - valid * logit).mean()


def learn_validity(
    key: Key, z: Float[Array, "num dim"], valid: Float[Array, " num"], *, progress_bar: bool = True
) -> Validity:
    """Train the classifier.

    The first tenth of the rows is held out. Training takes at most 3000 steps of at most 256 rows. Chosen by judgement.

    Args:
        key: random key.
        z: unconstrained parameters of all rows.
        valid: 1 if the simulator succeeded in the row, else 0.
        progress_bar: show a progress bar on a terminal.

    Exactness: see `Validity`.
    """
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
    """Compute -log v(z) of every draw, the log weight that corrects for failures. Exactness: see `Validity`."""
    return -jax.vmap(validity.log_prob)(values)
