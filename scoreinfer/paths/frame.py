"""Frames: linear regression of every backward step on simulated paths and on the conditions of the kernels."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scoreinfer.montecarlo.langevin import colour
from scoreinfer.paths.gaussian import State
from scoreinfer.process import PhysicsProcess
from scoreinfer.process.base import LOG_2PI

Context = Float[Array, " context"]
"""Standardised numbers that kernels are conditioned on in addition to the next state: parameters, observations."""


class Moments(eqx.Module):
    """Gaussians with the moments of the state at every step. Their means are linear in the conditions of the kernels.

    Args:
        centre: mean for conditions that are zero.
        spread: standard deviation of the residuals of the regression.
        lean: regression coefficients of the conditions. None means no conditions.
        root: Cholesky factor of the residuals' correlation matrix. None means independent components.
    """

    centre: Float[Array, "*steps dim"]
    spread: Float[Array, "*steps dim"]
    lean: Float[Array, "*steps dim context"] | None = None
    root: Float[Array, "*steps dim dim"] | None = None

    def log_density(self, k: Int[Array, ""] | int, x: State, context: Context) -> Float[Array, ""]:
        """Compute the log density of a state.

        Exactness: biased if the distribution of the state is not Gaussian, or its mean is not linear.
        """
        centre = self.centre[k] if self.lean is None else self.centre[k] + self.lean[k] @ context
        v, log_det = (x - centre) / self.spread[k], jnp.log(self.spread[k]).sum()
        if self.root is not None:
            v = jax.scipy.linalg.solve_triangular(self.root[k], v, lower=True)
            log_det += jnp.log(self.root[k].diagonal()).sum()
        return -0.5 * (v**2 + LOG_2PI).sum() - log_det


class Frame(eqx.Module):
    """Linear regression of every backward step. The network learns its residuals, in the frame's units.

    The regressed quantity is x_k minus the reverse physics of x_{k+1}.

    Args:
        centre: mean of the state at the end of the step, x_{k+1}.
        spread: its standard deviation.
        shift: mean of the regressed quantity.
        slope: its regression coefficients of the standardised state. A vector per step means that each component is
            regressed on itself only.
        factor: Cholesky factor of the residuals' covariance. A vector per step holds their standard deviations.
        tilt: its regression coefficients of the conditions. None means no conditions.
        before: moments of x_k, given the information in the conditions that x_{k+1} does not contain (see
            `linear_frame`). None means not computed.
        after: moments of x_{k+1}, given the same information.
    """

    centre: Float[Array, "*steps dim"]
    spread: Float[Array, "*steps dim"]
    shift: Float[Array, "*steps dim"]
    slope: Float[Array, "*steps dim dim"] | Float[Array, "*steps dim"]
    factor: Float[Array, "*steps dim dim"] | Float[Array, "*steps dim"]
    tilt: Float[Array, "*steps dim context"] | None = None
    before: Moments | None = None
    after: Moments | None = None

    def standardise(self, k: Int[Array, ""] | int, x: State) -> State:
        """Compute the standardised state at the end of step k."""
        return (x - self.centre[k]) / self.spread[k]

    def bounds(self, k: Int[Array, ""]) -> tuple[State, State]:
        """Compute the lower and upper bounds of a kernel's mean, `FARTHEST` standard deviations from the centre."""
        reach = FARTHEST * self.spread[k]
        return self.centre[k] - reach, self.centre[k] + reach

    def mean(self, process: PhysicsProcess, k: Int[Array, ""], x: State, context: Context) -> State:
        """Compute the mean of x_k: reverse physics plus regression."""
        mean = process.reverse(k, x) + self.shift[k] + colour(self.slope[k], self.standardise(k, x))
        return mean if self.tilt is None else mean + self.tilt[k] @ context


FARTHEST = 10.0
"""Bound of kernels' means, in standard deviations of the simulated states. Paths beyond it have negligible weights, and
the physics may not be finite there. Chosen by judgement."""
MAX_DENSE = 64
"""Largest dimension in which every component is regressed on all components. Chosen by judgement."""
ENOUGH_PATHS = 4000
"""Fewest paths for a regression at every step; with fewer, only the network learns. Chosen by judgement."""
ENOUGH_WAVES = 100
"""The same for Fourier coefficients, which are regressed on themselves only. Chosen by judgement."""
SURE = 3.5
"""Entries of the regression below this number of standard errors are set to zero. Chosen by judgement."""
MAX_CONTEXT = 256
"""Largest number of conditions in the regression; with more, only the network uses them. Chosen by judgement."""
FAINT = 0.1
"""Shift of a kernel's mean by observations, as a share of its spread, below which moments ignore it. By judgement."""


@eqx.filter_jit
def linear_frame(
    process: PhysicsProcess,
    paths: Float[Array, "num times dim"],
    contexts: Float[Array, "num context"] | None = None,
    num_parameters: int = 0,
    known: Float[Array, "num steps dim"] | None = None,
) -> Frame:
    """Make the frame from simulated paths and the conditions of the kernels.

        p(x_k | x_{k+1}, c) = p(x_k | c_k) f(x_{k+1} | x_k) / p(x_{k+1} | c_k)

    `Frame.before` and `Frame.after` are Gaussian approximations of p(x_k | c_k) and p(x_{k+1} | c_k) in this equation.
    It is Bayes' formula if c_k contains the parameters and the observations that depend on no later state than x_k. The
    function does not know which observations these are. Instead it uses the observations times their tilt: the
    information on x_k that x_{k+1} does not contain.

    Entries of slope and covariance that are not significant are set to zero, so that independent components stay
    independent.

    Args:
        process: the physics.
        paths: simulated paths.
        contexts: conditions of the kernels for each path, parameters before observations. None means no conditions.
        num_parameters: number of parameters among the conditions.
        known: control variates that reduce the noise of the regressed quantity (`path_controls`). None means none.

    Exactness: biased as a density if the kernels are not linear and Gaussian; weights over the kernels stay exact.
    """
    num, dense = paths.shape[0], process.dim <= MAX_DENSE and not process.waves
    few = num < (ENOUGH_WAVES if process.waves else ENOUGH_PATHS)
    conditions = jnp.zeros((num, 0)) if contexts is None or few or contexts.shape[1] > MAX_CONTEXT else contexts
    usual = conditions.mean(0)
    parameters, observed = jnp.split(conditions - usual, [num_parameters], axis=1)

    def one(k: Array) -> Frame:
        old, new = paths[:, k], paths[:, k + 1]
        rest = old - jax.vmap(lambda x: process.reverse(k, x))(new)
        centre, spread = new.mean(0), jnp.maximum(new.std(0), process.scale[k])
        quiet = rest if known is None else rest + known[:, k]
        v, shift = (new - centre) / spread, quiet.mean(0)
        tilt = jnp.zeros((process.dim, usual.size))
        if few:
            shift = slope = jnp.zeros(process.dim)
            factor = process.scale[k]
        elif dense:
            regressors = jnp.concatenate([v, conditions - usual], axis=1)
            slopes = _regress(regressors, quiet - shift)
            slope, tilt = slopes[:, : process.dim], slopes[:, process.dim :]
            factor = _root(process, k, rest - shift - regressors @ slopes.T)
        else:
            slope = (v * (quiet - shift)).mean(0) / jnp.maximum((v**2).mean(0), 1e-6)
            error = rest - shift - slope * v
            tilt = _regress(conditions - usual, error)
            left = (error - (conditions - usual) @ tilt.T).std(0)
            factor = jnp.maximum(left, 1e-3 * process.scale[k])

        def moments(x: Float[Array, "num dim"], floor: Float[Array, " dim"]) -> Moments:
            lean = _lean(x - x.mean(0), parameters, observed, tilt[:, num_parameters:], factor)
            left = x - x.mean(0) - (conditions - usual) @ lean.T
            sd = jnp.maximum(left.std(0), floor)
            v = left / sd
            correlation = jnp.eye(process.dim) if few else v.T @ v / num + 1e-4 * jnp.eye(process.dim)
            root = jnp.linalg.cholesky(correlation) if dense else None
            return Moments(x.mean(0) - lean @ usual, sd, lean if usual.size else None, root)

        before, after = moments(old, 1e-3 * process.scale[k]), moments(new, process.scale[k])
        tilted = tilt if usual.size else None
        return Frame(centre, spread, shift - tilt @ usual, slope, factor, tilted, before, after)

    return jax.lax.map(one, jnp.arange(process.num_steps))


def _lean(
    x: Float[Array, "num dim"],
    parameters: Float[Array, "num parameters"],
    observed: Float[Array, "num observed"],
    tilt: Float[Array, "dim observed"],
    factor: Float[Array, "dim dim"] | Float[Array, " dim"],
) -> Float[Array, "dim context"]:
    """Regress a state on parameters and on the observations' shift of the kernel's mean, observed @ tilt.T.

    All inputs are centred. The coefficients shrink to zero if the shift is smaller than `FAINT` of the kernel's spread.
    """
    if not observed.shape[1]:
        return _regress(parameters, x)
    said = observed @ tilt.T
    of_x, of_said = _regress(parameters, x), _regress(parameters, said)
    x, said = x - parameters @ of_x.T, said - parameters @ of_said.T
    change = jnp.concatenate([-of_said, tilt], axis=1)
    if factor.ndim == 1:
        gain = (x * said).mean(0) / ((said**2).mean(0) + (FAINT * factor) ** 2)
        change = gain[:, None] * change
    else:
        noise = len(x) * FAINT**2 * factor @ factor.T
        change = x.T @ said @ jnp.linalg.solve(said.T @ said + noise, change)
    return change.at[:, : of_x.shape[1]].add(of_x)


def _root(process: PhysicsProcess, k: Array, error: Float[Array, "num dim"]) -> Float[Array, "dim dim"]:
    """Compute a Cholesky factor of the residuals' covariance; entries that are not significant are set to zero."""
    num = len(error)
    covariance = error.T @ error / num
    sd = jnp.sqrt(covariance.diagonal())
    certain = (jnp.abs(covariance) > SURE / jnp.sqrt(num) * sd[:, None] * sd) | jnp.eye(process.dim, dtype=bool)
    floor = 1e-6 * process.scale[k] ** 2 + 1e-5 * covariance.diagonal()
    factor = jnp.linalg.cholesky(jnp.where(certain, covariance, 0.0) + jnp.diag(floor))
    # A covariance whose uncertain entries are set to zero may not be positive definite.
    whole = jnp.linalg.cholesky(covariance + jnp.diag(floor))
    return jnp.where(jnp.isfinite(factor).all(), factor, whole)


def _regress(v: Float[Array, "num regressors"], rest: Float[Array, "num dim"]) -> Float[Array, "dim regressors"]:
    """Regress on centred numbers; coefficients that are not significant are set to zero."""
    num = v.shape[0]
    if not v.shape[1]:
        return jnp.zeros((rest.shape[1], 0))
    inverse = jnp.linalg.inv(v.T @ v / num + 1e-5 * jnp.eye(v.shape[1]))
    slope = rest.T @ v / num @ inverse
    variance = (rest - v @ slope.T).var(0)
    error = jnp.sqrt(variance[:, None] * inverse.diagonal() / num)
    return jnp.where(jnp.abs(slope) > SURE * error, slope, 0.0)
