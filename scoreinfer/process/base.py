"""Forward processes: SDEs dx = f(t, x) dt + G(t) dW whose noise does not depend on the state.

A *linear* SDE has the drift f(t, x) = A(t) x. Given x_0, its state at time t is then Gaussian, N(M(t) x_0, C(t)), with

    dM/dt = A M,        dC/dt = A C + C A^T + G G^T.

A state is a vector ``(dim,)``, or k vectors ``(k, dim)``: position and velocity, say. M, C, A and G are one number in
the first case. In the second they are k x k blocks, which act on the first axis in the same way for each of the ``dim``
columns.

The noise is additive. The Ito and the Stratonovich integral are therefore the same, and every solver of diffrax is
allowed.

References: Sarkka and Solin 2019, "Applied Stochastic Differential Equations", section 6.1 (moments and transitions of
linear SDEs); Dockhorn, Vahdat and Kreis 2021, arXiv 2112.07068 (a linear SDE in position and velocity).
"""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scoreinfer._typing import Key

Time = Float[Array, ""]
State = Float[Array, "*rows dim"]
Block = Float[Array, ""] | Float[Array, "k k"]
"""One number, for states ``(dim,)``; or a k x k matrix, for states ``(k, dim)``."""
LOG_2PI = 1.8378770664093453


class Gaussian(NamedTuple):
    """The normal distribution N(mean, F F^T) of one state.

    Args:
        mean: the mean.
        factor: F. One number; or one number for each component of a state ``(dim,)``, the diagonal of F; or a k x k
            block for a state ``(k, dim)``.

    Exactness: exact.
    """

    mean: State
    factor: Block | Float[Array, " dim"]

    def sample(self, key: Key) -> State:
        """Draw mean + F e, e ~ N(0, I)."""
        return self.mean + apply(self.factor, jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def log_density(self, x: State) -> Float[Array, ""]:
        """Compute log N(x; mean, F F^T)."""
        if self.factor.ndim == 2:
            noise = jnp.linalg.solve(self.factor, x - self.mean)
            log_det = x.shape[-1] * jnp.linalg.slogdet(self.factor)[1]
        else:
            noise = (x - self.mean) / self.factor
            log_det = jnp.broadcast_to(jnp.log(jnp.abs(self.factor)), x.shape).sum()
        return -0.5 * (noise**2 + LOG_2PI).sum() - log_det


class LinearGaussian(NamedTuple):
    """The conditional distribution N(M x_0, F F^T) of a state given an earlier one, x_0.

    Args:
        mean: M, the map from x_0 to the mean.
        factor: F, a factor of the covariance.

    >>> noisy = LinearGaussian(jnp.array(0.5), jnp.array(2.0))
    >>> noisy.given(jnp.array([4.0])).mean.tolist(), float(noisy.covariance)
    ([2.0], 4.0)
    """

    mean: Block
    factor: Block

    @property
    def covariance(self) -> Block:
        """The covariance F F^T."""
        return apply(self.factor, self.factor.T)

    def given(self, start: State) -> Gaussian:
        """Compute the distribution given x_0 = ``start``."""
        return Gaussian(apply(self.mean, start), self.factor)


class AbstractProcess(eqx.Module):
    """A forward SDE with additive noise."""

    @abc.abstractmethod
    def drift(self, t: Time, x: State) -> State:
        """Compute the drift f(t, x)."""

    @abc.abstractmethod
    def diffusion(self, t: Time) -> Block | Float[Array, " dim"]:
        """Compute the noise amplitude G(t): one number, one number for each component, or a k x k block."""

    @abc.abstractmethod
    def step(self, t0: Time, t1: Time, x: State) -> Gaussian:
        """Compute the distribution of the state at ``t1`` given the state ``x`` at ``t0 < t1``."""


class AbstractLinearSDE(AbstractProcess):
    """A linear SDE, defined by its Gaussian marginals; everything else follows from them.

    A subclass gives ``marginal`` alone. ``factor`` may be any matrix F with F F^T = C. M must be invertible. Both must
    be differentiable at the times where the drift and the diffusion are asked for.

    Exactness: exact: transitions are those of the SDE, at any length of the step.
    """

    @abc.abstractmethod
    def marginal(self, t: Time) -> LinearGaussian:
        """Compute M(t) and a factor of C(t), of the state at ``t`` given x_0.

        C(0) need not be zero: a process may start from x_0 plus noise (a small noise level; a random velocity).
        """

    def transition(self, t0: Time, t1: Time) -> LinearGaussian:
        """Compute the state at ``t1`` given that at ``t0``: P = M(t1) M(t0)^{-1}, covariance C(t1) - P C(t0) P^T.

        The difference loses digits in short steps. With noise on the velocity alone, the position's variance is of
        order (t1 - t0)^3: in float32, critically damped with beta = 4, it is off by 0.01 percent at a step of 0.03, 0.3
        percent at 0.01, and 11 percent at 0.003. A subclass may override this method by a closed form.
        """
        start, end = self.marginal(t0), self.marginal(t1)
        move = apply(end.mean, inverse(start.mean))
        return LinearGaussian(move, square_root(end.covariance - apply(apply(move, start.covariance), move.T)))

    def step(self, t0, t1, x):
        """Compute the distribution of the state at ``t1`` given the state ``x`` at ``t0 < t1``, in closed form."""
        return self.transition(t0, t1).given(x)

    def drift(self, t, x):
        """Compute A(t) x, A = dM/dt M^{-1}."""
        return apply(self._rate(t), x)

    def diffusion(self, t):
        """Compute a square root of G G^T = dC/dt - A C - C A^T."""
        covariance, change = jax.jvp(lambda time: self.marginal(time).covariance, (t,), (jnp.ones_like(t),))
        moved = apply(self._rate(t), covariance)
        return square_root(change - moved - moved.T)

    def _rate(self, t: Time) -> Block:
        mean, change = jax.jvp(lambda time: self.marginal(time).mean, (t,), (jnp.ones_like(t),))
        return apply(change, inverse(mean))


def apply(factor: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiply ``x`` by a matrix; or by one number, or by one number for each component."""
    return factor @ x if factor.ndim == 2 else factor * x


def inverse(block: Block) -> Block:
    """Compute the inverse of a matrix or of a number."""
    return jnp.linalg.inv(block) if block.ndim == 2 else 1.0 / block


def square_root(covariance: Block) -> Block:
    """Compute the symmetric square root of a positive semi-definite matrix or number.

    The matrix may be singular: noise may act on the velocity alone. Eigenvalues that rounding makes negative count as
    zero.
    """
    if covariance.ndim < 2:
        return jnp.sqrt(jnp.maximum(covariance, 0.0))
    values, vectors = jnp.linalg.eigh(covariance)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T
