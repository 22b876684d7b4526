"""Laws of processes, scores and bijections, and the registries of everything that has to keep them.

A new process, score or bijection is tested by one more line in its registry. Each law is a function that computes how
far a case is from keeping it. Cases are skewed and have no symmetry, so that errors of sign and of order show.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import multivariate_normal

from laws import disturbed, standard_errors
from scoreinfer.bijections.affine import Affine, identity
from scoreinfer.bijections.asinh import Tails
from scoreinfer.bijections.base import Chain, Change, pull
from scoreinfer.bijections.noncentring import Scales
from scoreinfer.nets import ConditionalMLP
from scoreinfer.process import (
    VE,
    VP,
    AbstractLinearSDE,
    AbstractProcess,
    Angular,
    CriticallyDamped,
    Noising,
    PhysicsProcess,
    SubVP,
)
from scoreinfer.process.base import square_root
from scoreinfer.process.physics import add_noise_stage
from scoreinfer.score import (
    AbstractLikelihood,
    AbstractScore,
    DensityLikelihood,
    EnsembleScore,
    GaussianLikelihood,
    GaussianScore,
    MixtureScore,
    MomentMatched,
    NeuralScore,
)


def distance(left: Any, right: Any) -> float:
    """Compute the largest difference of two trees of arrays, relative to the largest entry of each array."""

    def of_arrays(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (a.shape, b.shape)
        assert np.isfinite(a).all() and np.isfinite(b).all()
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3))

    return max(jax.tree.leaves(jax.tree.map(of_arrays, left, right)))


def as_matrix(block: Any) -> jax.Array:
    """Write a number as a 1 x 1 matrix."""
    return jnp.atleast_2d(jnp.asarray(block))


# --- processes: in 64 bits, so that errors of rounding are far below all others ------------------------------------

TIMES = (0.1, 0.25, 0.7, 1.0)


class ProcessCase(NamedTuple):
    """A linear SDE, and what its source says of it.

    Args:
        process: the process.
        drift: A(t), in dx = A x dt + G dW.
        noise: G(t) G(t)^T.
        mean: M(0), where x_t ~ N(M x_0, C).
        covariance: C(0).
    """

    process: AbstractLinearSDE
    drift: Callable[[Any], Any]
    noise: Callable[[Any], Any]
    mean: Any
    covariance: Any

    @property
    def start(self) -> jax.Array:
        """A state."""
        return jnp.arange(1.0, 4.0) if np.ndim(self.mean) == 0 else jnp.array([[1.0, 2.0, -1.5], [0.3, -0.4, 0.8]])


def linear_rate(t: Any, low: float = 0.1, high: float = 20.0, first: float = 1e-4) -> tuple[Any, Any]:
    """Compute beta at t and its integral up to t."""
    u = first + t * (1 - first)
    return (low + u * (high - low)) * (1 - first), low * u + 0.5 * (high - low) * u**2


def power_law(t: Any, low: float = 0.002, high: float = 10.0, power: float = 7.0) -> Any:
    """Compute d sigma^2 / dt for sigma of Karras et al. 2022, equation 5."""
    a, b = low ** (1 / power), high ** (1 / power)
    return 2 * power * (b - a) * (a + t * (b - a)) ** (2 * power - 1)


def turning(t: Any, low: float = 0.002, high: float = 10.0, power: float = 2.0) -> Any:
    """Compute d tan(angle)^2 / dt, with the angle on a power law."""
    a, b = np.arctan(low) ** (1 / power), np.arctan(high) ** (1 / power)
    root = a + t * (b - a)
    return 2 * jnp.tan(root**power) / jnp.cos(root**power) ** 2 * power * (b - a) * root ** (power - 1)


def processes() -> dict[str, ProcessCase]:
    """Name every linear SDE; drift and noise of VE and the VPs are equations 9, 11, 12 of Song et al. 2021."""
    beta, integral = (lambda t, n=n: linear_rate(t)[n] for n in (0, 1))
    first, damped = float(integral(0.0)), CriticallyDamped()
    b, m, friction = damped.beta, damped.mass, damped.friction
    rates = jnp.array([[0.0, 1 / m], [-1.0, -friction / m]])
    push = jnp.diag(jnp.array([0.0, 2 * friction]))
    faster = CriticallyDamped(growth=6.0, mass=0.4)
    keep, lost = np.exp(-0.5 * first), 1 - np.exp(-first)
    sub_noise = lambda t: beta(t) * (1 - jnp.exp(-2 * integral(t)))  # noqa: E731
    return {
        "VE": ProcessCase(Noising(VE()), lambda t: 0.0 * t, power_law, 1.0, 0.002**2),
        "angular": ProcessCase(Noising(Angular()), lambda t: 0.0 * t, turning, 1.0, 0.002**2),
        "VP": ProcessCase(Noising(VP()), lambda t: -0.5 * beta(t), beta, keep, lost),
        "sub-VP": ProcessCase(Noising(SubVP()), lambda t: -0.5 * beta(t), sub_noise, keep, lost**2),
        "critically damped": ProcessCase(
            damped, lambda t: b * rates, lambda t: b * push, jnp.eye(2), jnp.diag(jnp.array([0.0, 0.04 * m]))
        ),
        "critically damped, faster": ProcessCase(
            faster,
            lambda t: (4.0 + 6.0 * t) * jnp.array([[0.0, 2.5], [-1.0, -2.5 * faster.friction]]),
            lambda t: (4.0 + 6.0 * t) * jnp.diag(jnp.array([0.0, 2 * faster.friction])),
            jnp.eye(2),
            jnp.diag(jnp.array([0.0, 0.04 * 0.4])),
        ),
    }


def noisings() -> dict[str, ProcessCase]:
    """Name every process whose levels the samplers walk down."""
    return {name: case for name, case in processes().items() if isinstance(case.process, Noising)}


def moments_of(case: ProcessCase, t: Any) -> tuple[jax.Array, jax.Array]:
    """Compute M(t) and C(t) as matrices."""
    marginal = case.process.marginal(jnp.asarray(t))
    return as_matrix(marginal.mean), as_matrix(marginal.covariance)


def marginal_is_off(case: ProcessCase) -> float:
    """M' = A M and C' = A C + C A^T + G G^T, from M(0) and C(0): coefficients and start are the source's."""
    worst = distance(moments_of(case, 0.0), (as_matrix(case.mean), as_matrix(case.covariance)))
    for t in TIMES:
        mean, covariance = moments_of(case, t)
        changes = jax.jacfwd(lambda t: moments_of(case, t))(jnp.asarray(t))
        drift, noise = as_matrix(case.drift(t)), as_matrix(case.noise(t))
        moved = drift @ covariance
        worst = max(worst, distance(changes, (drift @ mean, moved + moved.T + noise)))
    return worst


def coefficients_are_off(case: ProcessCase) -> float:
    """The process's own drift and diffusion are the source's."""
    worst, start = 0.0, case.start
    for t in map(jnp.asarray, TIMES):
        amplitude = as_matrix(case.process.diffusion(t))
        drift = as_matrix(case.drift(t)) @ start if start.ndim == 2 else case.drift(t) * start
        found = case.process.drift(t, start), amplitude @ amplitude.T
        worst = max(worst, distance(found, (drift, as_matrix(case.noise(t)))))
    return worst


def composition_is_off(case: ProcessCase) -> float:
    """Chapman and Kolmogorov: transitions in a row lead from marginal to marginal, and are one transition."""
    mean, covariance = moments_of(case, TIMES[0])
    whole_mean, whole_covariance = jnp.eye(len(mean)), jnp.zeros_like(covariance)
    for t0, t1 in itertools.pairwise(map(jnp.asarray, TIMES)):
        transition = case.process.transition(t0, t1)
        move, extra = as_matrix(transition.mean), as_matrix(transition.covariance)
        mean, covariance = move @ mean, move @ covariance @ move.T + extra
        whole_mean, whole_covariance = move @ whole_mean, move @ whole_covariance @ move.T + extra
    whole = case.process.transition(jnp.asarray(TIMES[0]), jnp.asarray(TIMES[-1]))
    found = (mean, covariance), (as_matrix(whole.mean), as_matrix(whole.covariance))
    return distance(found, (moments_of(case, TIMES[-1]), (whole_mean, whole_covariance)))


def simulation_is_off(case: ProcessCase, num: int = 20_000) -> float:
    """Draws from the first marginal, moved by `step`, have the last marginal; in standard errors."""
    start, times = case.start, tuple(map(jnp.asarray, TIMES))

    def walk(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(times))
        x = case.process.marginal(times[0]).given(start).sample(keys[0])
        for t0, t1, key in zip(times, times[1:], keys[1:], strict=False):
            x = case.process.step(t0, t1, x).sample(key)
        return x

    drawn = jax.jit(jax.vmap(walk))(jax.random.split(jax.random.key(0), num)).reshape(num, -1)
    end, (_, covariance) = case.process.marginal(times[-1]).given(start), moments_of(case, times[-1])
    centred = np.asarray(drawn - end.mean.reshape(-1))
    products = centred[:, :, None] * centred[:, None, :] - np.kron(covariance, np.eye(3))
    return standard_errors(np.concatenate([centred, products.reshape(num, -1)], axis=1))


def density_is_off(case: ProcessCase) -> float:
    """The log density of a marginal and of a step are those of a multivariate normal, written out."""
    start, worst = case.start, 0.0
    t0, t1 = jnp.asarray(TIMES[0]), jnp.asarray(TIMES[2])
    for conditional in (case.process.marginal(t1), case.process.transition(t0, t1)):
        law, covariance = conditional.given(start), as_matrix(conditional.covariance)
        whole = jnp.kron(covariance, jnp.eye(3))
        x = law.mean + 0.7 * jnp.cos(start)
        expected = multivariate_normal.logpdf(x.reshape(-1), law.mean.reshape(-1), whole)
        worst = max(worst, distance(law.log_density(x), expected))
    return worst


class StepCase(NamedTuple):
    """A process, a time from which it steps, and a state."""

    process: AbstractProcess
    t: Any
    x: Any


def pendulum(t0: Any, t1: Any, x: Any) -> Any:
    """Make an Euler step of a driven pendulum, (angle, velocity)."""
    return x + (t1 - t0) * jnp.stack([x[1], -jnp.sin(x[0]) - 0.2 * x[1] + jnp.cos(t0)])


def driven_pendulum() -> PhysicsProcess:
    """Make a physical process with noise that differs between steps and components."""
    ts, scale = jnp.array([0.0, 0.1, 0.3, 0.35]), jnp.array([[0.1, 0.2], [0.3, 0.1], [0.2, 0.4]])
    return PhysicsProcess(ts, scale, pendulum, lambda t0, t1, x: x, (2,))


def steps() -> dict[str, StepCase]:
    """Name every process whose `step` may be as short as one likes: the linear ones, and physics by Euler steps."""
    angle = jnp.array([0.8, -0.3])
    noisy = add_noise_stage(driven_pendulum(), jnp.array([0.5, 0.7]))
    linear = {name: StepCase(case.process, 0.4, case.start) for name, case in processes().items()}
    return linear | {
        "pendulum": StepCase(driven_pendulum(), 0.1, angle),
        "pendulum, noise stage": StepCase(noisy, 0.35, angle),
    }


def short_step_is_off(case: StepCase, size: float = 1e-6) -> float:
    """Drift and squared diffusion are the derivatives of the mean and the covariance of `step` by its length."""
    t, x = jnp.asarray(case.t), jnp.asarray(case.x)
    moved = case.process.step(t, t + size, x)
    square = lambda factor: factor @ factor.T if factor.ndim == 2 else factor**2  # noqa: E731
    found = (moved.mean - x) / size, square(moved.factor) / size
    return distance(found, (case.process.drift(t, x), square(case.process.diffusion(t))))


def physics() -> dict[str, PhysicsProcess]:
    """Name every physical process on a grid."""
    return {
        "pendulum": driven_pendulum(),
        "pendulum, noise stage": add_noise_stage(driven_pendulum(), jnp.array([0.5, 0.7])),
    }


def paths_are_off(process: PhysicsProcess, num: int = 20_000) -> float:
    """Paths make the steps of the grid: residuals over their scale are independent and normal; in standard errors."""
    start = jnp.array([0.8, -0.3])
    paths = jax.vmap(lambda key: process.simulate(key, start))(jax.random.split(jax.random.key(0), num))

    def residuals(path: jax.Array) -> jax.Array:
        moves = [process.step(process.ts[k], process.ts[k + 1], path[k]) for k in range(process.num_steps)]
        return jnp.stack([(path[k + 1] - move.mean) / move.factor for k, move in enumerate(moves)])

    unit = np.asarray(jax.vmap(residuals)(paths)).reshape(num, -1)
    products = unit[:, :, None] * unit[:, None, :] - np.eye(unit.shape[1])
    return standard_errors(np.concatenate([unit, products.reshape(num, -1)], axis=1))


# --- scores ------------------------------------------------------------------------------------------------------

LEVELS = (0.5, 1.0, 4.0)
POINT = (0.4, -0.7)


class ScoreCase(NamedTuple):
    """The exact score of a mixture of Gaussians in the plane; of points, where the covariances are zero.

    Args:
        score: the score.
        weights: of the components, ``(num,)``.
        means: of the components, ``(num, 2)``.
        covariances: of the components, ``(num, 2, 2)``.
    """

    score: AbstractScore
    weights: Any
    means: Any
    covariances: Any

    def log_marginal(self, level: Any, x: Any) -> jax.Array:
        """Compute the log density of x_0 + level e."""
        noisy = self.covariances + level**2 * jnp.eye(2)
        return jax.nn.logsumexp(multivariate_normal.logpdf(x, self.means, noisy), b=self.weights)

    def posterior(self, level: float, x: Any, num: int = 60) -> tuple[np.ndarray, np.ndarray]:
        """Compute mean and covariance of x_0 given x_0 + level e = x, by Gauss-Hermite quadrature."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(num)
        grid = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
        roots = np.stack([np.asarray(square_root(jnp.asarray(c))) for c in self.covariances])
        points = np.asarray(self.means)[:, None] + np.einsum("nij,gj->ngi", roots, grid)
        prior = np.asarray(self.weights)[:, None] * np.outer(weights, weights).reshape(-1)
        joint = prior * np.exp(-0.5 * ((points - np.asarray(x)) ** 2).sum(-1) / level**2)
        joint, points = (joint / joint.sum()).reshape(-1), points.reshape(-1, 2)
        mean = joint @ points
        return mean, (points - mean).T @ ((points - mean) * joint[:, None])


def exact_network(mean: Any, variance: Any) -> NeuralScore:
    """Make a learned score that is exact for N(mean, diag variance): its network undoes the preconditioning."""

    def network(scaled: Any, log_level: Any, context: Any) -> jax.Array:
        level = jnp.exp(log_level)
        total = 1 + level**2
        x = scaled * jnp.sqrt(total)
        denoised = mean + variance / (variance + level**2) * (x - mean)
        posterior = variance * level**2 / (variance + level**2)
        return jnp.concatenate(
            [(denoised - x / total) * jnp.sqrt(total) / level, jnp.log(posterior * total / level**2)]
        )

    return NeuralScore(network)


def guided(seen: Callable[[Any, Any, Any], AbstractLikelihood]) -> ScoreCase:
    """Make the score of a Gaussian posterior: its prior's score, guided by y = A x + scale e."""
    mean, covariance = jnp.array([0.5, -0.3]), jnp.array([[1.0, 0.6], [0.6, 0.8]])
    rows, scale, y = jnp.array([[1.0, -0.5], [0.3, 0.8], [0.2, 0.0]]), jnp.array([0.5, 0.9, 0.3]), jnp.arange(3.0)
    gain = covariance @ rows.T @ jnp.linalg.inv(rows @ covariance @ rows.T + jnp.diag(scale**2))
    posterior = mean + gain @ (y - rows @ mean), covariance - gain @ rows @ covariance
    score = MomentMatched(GaussianScore(mean, covariance), seen(rows, scale, y))
    return ScoreCase(score, jnp.ones(1), posterior[0][None], posterior[1][None])


def as_density(rows: Any, scale: Any, y: Any) -> DensityLikelihood:
    """Write a Gaussian likelihood as any density."""
    return DensityLikelihood(lambda x: x, lambda x: -0.5 * (((y - rows @ x) / scale) ** 2).sum())


def scores() -> dict[str, Callable[[], ScoreCase]]:
    """Name every score that can be exact."""
    one, zero, mean = jnp.ones(1), jnp.zeros(2), jnp.array([0.5, -0.3])
    covariance, eye = jnp.array([[1.0, 0.6], [0.6, 0.8]]), jnp.eye(2)
    shares, centres, scales = jnp.array([0.3, 0.7]), jnp.array([[-1.0, 0.0], [1.0, 0.5]]), jnp.array([0.3, 0.5])
    points, log_weight = jax.random.normal(jax.random.key(0), (20, 2)), jnp.linspace(-2.0, 1.0, 20)
    variance = jnp.array([0.4, 1.7])
    blank = NeuralScore(lambda x, log_level, context: jnp.zeros(4))
    return {
        "Gaussian": lambda: ScoreCase(GaussianScore(mean, covariance), one, mean[None], covariance[None]),
        "mixture": lambda: ScoreCase(
            MixtureScore(shares, centres, scales), shares, centres, scales[:, None, None] ** 2 * eye
        ),
        "ensemble": lambda: ScoreCase(
            EnsembleScore(points, log_weight), jax.nn.softmax(log_weight), points, jnp.zeros((20, 2, 2))
        ),
        "neural, silent": lambda: ScoreCase(blank, one, zero[None], eye[None]),
        "neural, exact": lambda: ScoreCase(exact_network(mean, variance), one, mean[None], jnp.diag(variance)[None]),
        "guided": lambda: guided(lambda rows, scale, y: GaussianLikelihood(lambda x: rows @ x, y, scale)),
        "guided by a density": lambda: guided(as_density),
    }


def learned_scores() -> dict[str, Callable[[], AbstractScore]]:
    """Name every score that nobody has trained."""
    network = ConditionalMLP(jax.random.key(0), 2, 0, 4, width=8, depth=1)
    without = lambda net: lambda x, log_level, context: net(x, log_level, jnp.zeros(0))  # noqa: E731
    return {"neural, random": lambda: NeuralScore(without(disturbed(network, 0, 0.2)))}


def at_levels(law: Callable[[Any, Any], tuple[Any, Any]]) -> float:
    """Compute the largest distance between the two sides of a law, over the levels."""
    return max(distance(*law(jnp.float32(level), jnp.array(POINT))) for level in LEVELS)


def tweedie_is_off(case: ScoreCase) -> float:
    """The score is the gradient of the log marginal density (Tweedie)."""
    return at_levels(lambda level, x: (case.score(level, x), jax.grad(case.log_marginal, 1)(level, x)))


def posterior_is_off(case: ScoreCase) -> float:
    """Denoiser, s^2 Jacobian and `moments` are the posterior's mean, covariance and variances, by quadrature."""

    def law(level: Any, x: Any) -> tuple[Any, Any]:
        mean, covariance = case.posterior(float(level), x)
        own = case.score.denoise(level, x), level**2 * case.score.jacobian(level, x), case.score.moments(level, x)
        whole, expected = case.score.gaussian(level, x), (mean, covariance, (mean, covariance.diagonal()))
        return (own, whole.mean, whole.covariance), (expected, mean, covariance)

    return at_levels(law)


def moments_are_off(case: ScoreCase) -> float:
    """`moments` agrees with the Jacobian of the denoiser by finite differences."""

    def law(level: Any, x: Any) -> tuple[Any, Any]:
        move = 0.01 * jnp.eye(2)
        ahead, behind = (jnp.stack([case.score.denoise(level, x + sign * m) for m in move]) for sign in (1, -1))
        variance = level**2 * ((ahead - behind) / 0.02).diagonal()
        return case.score.moments(level, x), (case.score.denoise(level, x), variance)

    return at_levels(law)


def jacobian_is_off(case: ScoreCase) -> float:
    """The Jacobian of an exact denoiser is symmetric, and has no negative eigenvalue."""

    def law(level: Any, x: Any) -> tuple[Any, Any]:
        jacobian = case.score.jacobian(level, x)
        values, vectors = jnp.linalg.eigh(0.5 * (jacobian + jacobian.T))
        return jacobian, (vectors * jnp.maximum(values, 0.0)) @ vectors.T

    return at_levels(law)


def parts_are_off(score: AbstractScore) -> float:
    """Of any score, exact or not: it is (D - x) / s^2, and the first of the moments is D."""

    def law(level: Any, x: Any) -> tuple[Any, Any]:
        denoised = score.denoise(level, x)
        return (score(level, x), score.moments(level, x)[0]), ((denoised - x) / level**2, denoised)

    return at_levels(law)


# --- bijections --------------------------------------------------------------------------------------------------


def bijections() -> dict[str, Change]:
    """Name every bijection, in three dimensions."""
    factor = jnp.array([[1.3, 0.0, 0.0], [0.4, -0.6, 0.0], [-0.2, 0.1, 0.8]])
    affine = Affine(jnp.array([0.1, -0.3, 0.2]), factor)
    tails = Tails(jnp.array([1.0, 2.0, -1.0]), jnp.array([0.0, 2.0, 0.5]))
    mean, log_scale = jnp.array([[0.3, 0.0, -0.2], [0.1, 0.0, 0.6]]), jnp.array([[0.1, 0.0, 0.2], [-0.7, 0.0, 0.4]])
    scales = Scales(jnp.array([1]), jnp.array([0.5]), jnp.array([2.0]), mean, log_scale)
    narrow = Scales(jnp.array([1]), jnp.array([0.5]), jnp.array([0.01]), mean, 0.1 * log_scale)
    return {
        "identity": identity(3),
        "affine": affine,
        "tails": tails,
        "scales": scales,
        "scales, far out": narrow,
        "chain": Chain((affine, tails, scales)),
        "chain of chains": Chain((Chain((scales, affine)), tails)),
        "empty chain": Chain(()),
    }


def inputs() -> jax.Array:
    """Make points, with two batch axes."""
    return jax.random.normal(jax.random.key(1), (2, 3, 3)) * jnp.array([0.5, 1.2, 1.0]) + jnp.array([0.5, -0.2, 0.3])


def log_density(x: jax.Array) -> jax.Array:
    """Compute the log density of a point, skewed, without its constant."""
    return (jnp.sin(x[0]) - 0.1 * x[1] ** 2 * x[2] - jnp.logaddexp(x[1] - x[0], x[2])).sum()


def worst_input(law: Callable[[jax.Array], tuple[Any, Any]]) -> float:
    """Compute the largest distance between the two sides of a law, over points."""
    return max(distance(*law(w)) for w in inputs().reshape(-1, 3))


def inverse_is_off(change: Change) -> float:
    """`inverse` undoes `forward`, and `forward` undoes `inverse`."""
    return worst_input(lambda w: ((change.inverse(change.forward(w)), change.forward(change.inverse(w))), (w, w)))


def log_det_is_off(change: Change) -> float:
    """`log_det` is log |det| of the Jacobian of `forward`."""
    return worst_input(lambda w: (change.log_det(w), jnp.linalg.slogdet(jax.jacfwd(change.forward)(w))[1]))


def pull_is_off(change: Change) -> float:
    """`pull` gives the gradient of log p(z(w)) + log |dz/dw|."""

    def law(w: jax.Array) -> tuple[Any, Any]:
        z = change.forward(w)
        jacobian = lambda w: jnp.linalg.slogdet(jax.jacfwd(change.forward)(w))[1]  # noqa: E731
        expected = jax.grad(lambda w: log_density(change.forward(w)) + jacobian(w))(w)
        return pull(change, w, jax.grad(log_density)(z)), expected

    return worst_input(law)


def everything(change: Change, w: jax.Array) -> tuple[jax.Array, ...]:
    """Compute all that can be asked of a bijection."""
    maps = change.forward(w), change.inverse(w), change.log_det(w)
    return *maps, pull(change, w, jnp.cos(w))


def batch_is_off(change: Change) -> float:
    """Batch axes are loops."""
    w = inputs()
    return distance(everything(change, w), jax.vmap(jax.vmap(lambda w: everything(change, w)))(w))


def vmap_is_off(change: Change) -> float:
    """Bijections stacked along an axis of their arrays work under `vmap`."""
    w = inputs()[0]
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf, 0.9 * leaf]).astype(leaf.dtype), change)
    rows = [everything(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), w[i]) for i in range(len(w))]
    return distance(jax.vmap(everything)(stacked, w), jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))
