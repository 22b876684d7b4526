"""Control variates from the noise of earlier steps: what a path knows of a score beyond its last step.

One step's noise says little of the score at its end, as it hardly decides where that is. The noise of all steps before
says far more, and every path tells it that has come from the process itself.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.process import PhysicsProcess


@eqx.filter_jit
def path_controls(process: PhysicsProcess, paths: Float[Array, "num times dim"]) -> Float[Array, "num steps dim"]:
    """Compute the part of x_k minus reverse physics that the noise of earlier steps tells, its sign turned round.

    With xi_k the noise of step k in units of its scale, and J the Jacobian of the physics at x_k, partial integration
    over p(x_k | x_{k+1}) gives

        E[ S_k(x_k) + J^T xi_k / sqrt(Q) | x_{k+1} ] = 0,

    and whatever has the mean S_k given x_k may stand for it. Noise does, and so do, from the second step on,

        delta_k = T_k + J^T xi_k / sqrt(Q),    T_{k+1} = -xi_k / sqrt(Q) + a delta_k.

    The a of least variance makes of T_{k+1} a mean of all noise so far. A share of delta_k, found likewise, is added to
    x_k where kernels are learned from it: the mean given x_{k+1} is the same, most of the noise is gone. (Toy process
    of 500 steps: from the twentieth step on T - S has .03 to .7 of the score's size, one step's noise 2.5 to 8 times
    that size.) At the first step there is no earlier noise: zeros.

    Exactness: mean zero given x_{k+1} and nothing else, for independent paths of this very process. The shares of a
        path are found on the others, whose own have found a little of it: O(1 / num^2).

    Good values: paths by the thousand. Of few paths what is left of the noise stays with each for many steps, while
    learning from the plain steps reproduces where these very paths began.

    References: De Bortoli et al. 2024, arXiv 2402.08667 (scores from targets other than the last noise; here for
    noise in steps, with no score of the start known).
    """

    def step(target: Array, k: Array) -> tuple[Array, Array]:
        def pulled(old: Array, new: Array) -> tuple[Array, Array, Array]:
            mean, pull = jax.vjp(lambda x: process.forward(k, x), old)
            noise = (new - mean) / process.scale[k] ** 2
            return noise, pull(noise)[0], old - process.reverse(k, new)

        noise, back, rest = jax.vmap(pulled)(paths[:, k], paths[:, k + 1])
        delta = jnp.where(k == 0, 0.0, jnp.nan_to_num(target + back))
        return _share(noise, delta) * delta - noise, -_share(rest - rest.mean(0), delta) * delta

    start = jnp.zeros_like(paths[:, 0])
    return jax.lax.scan(step, start, jnp.arange(process.num_steps))[1].swapaxes(0, 1)


def _share(x: Float[Array, "num dim"], control: Float[Array, "num dim"]) -> Float[Array, "num dim"]:
    """Regress on a control variate, component by component, for every path on all others."""
    product, square = x * control, control**2
    others = square.sum(0) - square
    return (product.sum(0) - product) / jnp.where(others > 0, others, jnp.inf)
