"""Control variates from the noise of earlier steps, for learning backward kernels with less variance.

The noise of one step contains little information on the score at its end, because it hardly changes the state. The
noise of all earlier steps contains much more. It can be computed from every path that was simulated by the process.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer.process import PhysicsProcess


@eqx.filter_jit
def path_controls(process: PhysicsProcess, paths: Float[Array, "num times dim"]) -> Float[Array, "num steps dim"]:
    """Compute control variates for x_k minus the reverse physics, to be added to it. Their mean given x_{k+1} is zero.

        E[ S_k(x_k) + J^T xi_k / sqrt(Q) | x_{k+1} ] = 0                                  (1)
        delta_k = T_k + J^T xi_k / sqrt(Q),    T_{k+1} = -xi_k / sqrt(Q) + a delta_k      (2)

    S_k is the score, xi_k the noise of step k in units of its scale, and J the Jacobian of the physics at x_k. Equation
    (1) follows by partial integration over p(x_k | x_{k+1}). It remains true if S_k is replaced by any T_k whose mean
    given x_k is S_k. The noise of the step before is such a T_k, and so are the T_k of (2). The coefficient a minimises
    the variance, so that T_{k+1} averages all noise so far.

    The control variate is a multiple of delta_k, whose coefficient is found in the same way. It leaves the mean given
    x_{k+1} unchanged and removes most of the noise. (Toy process of 500 steps, from the twentieth step on: T - S is .03
    to .7 times as large as the score; the noise of one step is 2.5 to 8 times as large.) The first step has no earlier
    noise and gets zeros.

    Exactness: mean zero given x_{k+1} only (no other conditions), for independent paths of this process. The
        coefficients of a path come from the other paths, whose own coefficients depend on it a little; the bias is
        O(1 / num^2).

    Good values: thousands of paths. With few paths, each keeps some of its noise for many steps. Learning without
    control variates then reproduces the first states of these paths better.

    References: De Bortoli et al. 2024, arXiv 2402.08667 (other targets for scores than the last noise; this function
    is for noise in steps and needs no score of the start).
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
    """Regress each component of ``x`` on its control variate; the coefficient of a path comes from all other paths."""
    product, square = x * control, control**2
    others = square.sum(0) - square
    return (product.sum(0) - product) / jnp.where(others > 0, others, jnp.inf)
