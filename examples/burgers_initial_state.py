"""Stochastic Burgers equation: the field from which a noisy, steepened one came.

    python examples/burgers_initial_state.py --figure burgers.png   # minutes: truth, observation, draws, spectra
    python examples/burgers_initial_state.py --judge                # a quarter of an hour: more cases, particles, NUTS
    python examples/burgers_initial_state.py --smoke                # about a minute, everything runs, little is learned

u_t + u u_x = 0.1 u_xx + 0.1 dW on a periodic grid, t in [0, 1]: 64 points and 16 steps, or 128 and 32 with --judge
(pseudo-spectral Runge-Kutta steps, exact viscosity, then noise), from a Gaussian random field with power |k|^-4; the
end is seen with noise of 0.05 at every point. Waves steepen and merge: unlike with heat the way back is not linear.
The reverse physics is advection turned round; regression, wavenumber by wavenumber, puts viscosity and score on top; a
convolutional network, which sees the field and the physics' own increment, learns the rest. Both are judged on fresh
cases: *reconstruction*, the mean squared difference of noise-free ends; *spectral error*, the mean absolute difference
of log spectra of drawn and true start; how often central intervals of draws, without weights, hold the truth.

On a coarse grid (16 points, 16 steps, waves half as high, noise of 0.2) the weighted draws are held against a bootstrap
particle smoother of 200,000 paths, and against NUTS on the same model's path.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.infer import MCMC, NUTS

import scoreinfer as si
from scoreinfer.paths import draw_path
from scoreinfer.process.physics import hartley

VISCOSITY, NOISE, END_TIME, NUM_SUBSTEPS = 0.1, 0.1, 1.0, 2


class FromWaves(Transform):
    """Hartley coefficients to a field: orthogonal."""

    domain = codomain = constraints.real_vector

    def __call__(self, x):
        """Transform."""
        return hartley(x, 1)

    _inverse = __call__

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        """Return 0."""
        return jnp.zeros(jnp.shape(x)[:-1])

    def tree_flatten(self):
        """Hold nothing."""
        return (), ((), {})


class Burgers(NamedTuple):
    """The process on ``size`` points, its end seen with noise ``blur``, its start of size ``amplitude``."""

    size: int = 128
    num_steps: int = 32
    blur: float = 0.05
    amplitude: float = 1.0

    @property
    def wavenumber(self):
        """Wavenumber of every Hartley coefficient."""
        return np.abs(np.fft.fftfreq(self.size, 1 / self.size))

    @property
    def start_sd(self):
        """Standard deviation of every Hartley coefficient of the start: power |k|^-4, sd ``amplitude`` in space."""
        power = np.maximum(self.wavenumber, 1.0) ** -4.0
        return self.amplitude * np.sqrt(power * self.size / power.sum())

    def advect(self, h, x):
        """Take a Runge-Kutta step of fourth order, two thirds of the waves, no viscosity; ``h`` may be negative."""
        k = np.arange(self.size // 2 + 1)
        slope_of_flux = jnp.asarray(-0.5j * k * (k < self.size / 3), jnp.complex64)

        def slope(u):
            return jnp.fft.irfft(slope_of_flux * jnp.fft.rfft(u**2), self.size)

        first = slope(x)
        second = slope(x + 0.5 * h * first)
        third = slope(x + 0.5 * h * second)
        return x + h / 6 * (first + 2 * second + 2 * third + slope(x + h * third))

    def step(self, t0, t1, x):
        """Advect, then diffuse exactly."""
        for _ in range(NUM_SUBSTEPS):
            x = self.advect((t1 - t0) / NUM_SUBSTEPS, x)
        k = np.arange(self.size // 2 + 1)
        decay = jnp.exp(-VISCOSITY * jnp.asarray(k**2, jnp.float32) * (t1 - t0))
        return jnp.fft.irfft(decay * jnp.fft.rfft(x), self.size)

    def back(self, t0, t1, x):
        """Advect backwards; viscosity is not turned round, which no noise would survive.

        Fields are cut at four standard deviations, beyond which the Runge-Kutta step is not stable.
        """
        x = jnp.clip(x, -4 * self.amplitude, 4 * self.amplitude)
        for _ in range(NUM_SUBSTEPS):
            x = self.advect((t0 - t1) / NUM_SUBSTEPS, x)
        return x

    def model(self, y=None):
        """A random field, Burgers' equation, a noisy look at its end."""
        waves = dist.Normal(0.0, jnp.asarray(self.start_sd, jnp.float32)).to_event(1)
        start = dist.TransformedDistribution(waves, FromWaves())
        scale = NOISE * np.sqrt(END_TIME / self.num_steps)
        ts = np.linspace(0.0, END_TIME, self.num_steps + 1)
        x = numpyro.sample("x", si.PhysicsPath(self.step, scale, ts, start))
        numpyro.sample("y", dist.Normal(x[-1], self.blur).to_event(1), obs=y)

    def evolve(self, x):
        """Run the physics without noise to the end."""
        h = END_TIME / self.num_steps
        return jax.lax.fori_loop(0, self.num_steps, lambda _, x: self.step(0.0, h, x), x)

    def spectrum(self, x):
        """Compute the mean power of wavenumbers 1 to 10."""
        power = np.asarray(hartley(jnp.asarray(x), 1), np.float64) ** 2
        ks = range(1, min(10, self.size // 2 - 1) + 1)
        return np.stack([power[..., self.wavenumber == k].mean(-1) for k in ks], axis=-1)


def simulate(key, burgers, num):
    """Simulate paths and what is seen of their ends."""
    drawn = jax.jit(lambda key: numpyro.infer.Predictive(burgers.model, num_samples=num)(key))(key)
    return drawn["x"], drawn["y"]


def learn(key, burgers, num_steps=1000, width=16, progress_bar=False):
    """Learn the reverse: regression of every wavenumber, and a convolutional network (none with no steps)."""
    net = si.nets.ConvNet(jax.random.fold_in(key, 1), (burgers.size,), width=width, dilations=(1, 2, 4))
    return si.SMDP(
        burgers.model, "x", reverse=burgers.back, waves=True, net=net, num_steps=num_steps, batch_size=128,
        learning_rate=2e-3, progress_bar=progress_bar,
    ).fit(key)  # fmt: skip


@eqx.filter_jit
def starts(key, backward, y, num):
    """Draw ``num`` starts for every observation, without weights."""
    process, rows = backward.process, jnp.repeat(y, num, axis=0)

    def one(inputs):
        key, y = inputs
        return process.unflatten(draw_path(key, backward, process.flatten(y))[0][0])

    drawn = jax.lax.map(one, (jax.random.split(key, len(rows)), rows), batch_size=500)
    return drawn.reshape(len(y), num, -1)


def coverage(drawn, truth):
    """Compute how often the central 50 % and 90 % of 39 draws hold the true value (by ranks: exact for exact draws)."""
    rank = (drawn < truth[:, None]).sum(1)
    return {
        "coverage_50": float(np.mean((rank >= 10) & (rank < 30))),
        "coverage_90": float(np.mean((rank >= 2) & (rank < 38))),
    }


def measure(key, burgers, posterior, num=200):
    """Compute all figures over fresh cases."""
    for_cases, for_starts, for_draws = jax.random.split(key, 3)
    paths, y = simulate(for_cases, burgers, num)
    truth = np.asarray(paths[:, 0])
    drawn = np.asarray(starts(for_starts, posterior.backward, y, 39))
    evolve = jax.jit(jax.vmap(burgers.evolve))
    spectra = np.log(burgers.spectrum(drawn[:, 0])) - np.log(burgers.spectrum(truth))
    draws = posterior.sample(for_draws, 1000, y=y[0])
    return {
        "reconstruction": float(np.mean((evolve(drawn[:, 0]) - evolve(truth)) ** 2)),
        "reconstruction_mean": float(np.mean((evolve(drawn.mean(1)) - evolve(truth)) ** 2)),
        "error": float(np.mean((drawn.mean(1) - truth) ** 2)),
        "spectral": float(np.abs(spectra).mean()),
        "spectral_mean": float(
            np.abs(np.log(burgers.spectrum(drawn.mean(1))) - np.log(burgers.spectrum(truth))).mean()
        ),
        **coverage(drawn, truth),
        "ess_share": draws.certificate.ess / draws.num,
    }


class Moments(NamedTuple):
    """Weighted mean and standard deviation of the start, log evidence and effective sample size."""

    mean: np.ndarray
    sd: np.ndarray
    log_evidence: float
    ess: float


def moments(x, log_weight):
    """Compute the moments of weighted draws."""
    x, log_weight = np.asarray(x, np.float64), np.asarray(log_weight, np.float64)
    weight = np.exp(log_weight - log_weight.max())
    log_evidence = log_weight.max() + np.log(weight.mean())
    ess = weight.sum() ** 2 / (weight**2).sum()
    weight /= weight.sum()
    mean = weight @ x
    return Moments(mean, np.sqrt(weight @ (x - mean) ** 2), float(log_evidence), float(ess))


def bootstrap(key, burgers, y, num=200_000, batch=10_000):
    """Run the bootstrap particle smoother: paths of the model, weighed by how likely they make the observation."""

    def some(key):
        paths = numpyro.infer.Predictive(burgers.model, num_samples=batch)(key)["x"]
        return paths[:, 0], dist.Normal(paths[:, -1], burgers.blur).to_event(1).log_prob(y)

    first, log_weight = jax.jit(lambda keys: jax.lax.map(some, keys))(jax.random.split(key, num // batch))
    return moments(first.reshape(num, -1), log_weight.ravel())


def disagreement(found, truth):
    """Compute the largest difference of means and of standard deviations, in standard deviations."""
    off = np.abs(found.mean - truth.mean) / truth.sd, np.abs(found.sd / truth.sd - 1)
    return {"mean_error": float(off[0].max()), "sd_error": float(off[1].max())}


def compare(key, burgers, posterior, num=10_000, num_particles=200_000, num_nuts=500):
    """Hold weighted draws for one observation against particles and NUTS."""
    keys = jax.random.split(key, 4)
    y = simulate(keys[0], burgers, 1)[1][0]
    truth = bootstrap(keys[1], burgers, y, num_particles)
    began = time.perf_counter()
    draws = posterior.sample(keys[2], num, y=y)
    seconds = time.perf_counter() - began
    found = moments(draws.sites["x"][:, 0], draws.log_weight)
    figures = disagreement(found, truth) | {
        "log_evidence_error": abs(found.log_evidence - truth.log_evidence),
        "ess_share": found.ess / num,
        "seconds_per_1000": 1000 * seconds / found.ess,
        "certified": float(draws.certificate.certified),
        "particles_ess": truth.ess,
    }
    if num_nuts:
        began = time.perf_counter()
        mcmc = MCMC(NUTS(burgers.model), num_warmup=num_nuts, num_samples=num_nuts, progress_bar=False)
        mcmc.run(keys[3], y=y)
        first = np.asarray(mcmc.get_samples()["x"])[:, 0]
        seconds = time.perf_counter() - began
        ess = min(numpyro.diagnostics.effective_sample_size(first[None]))
        of_nuts = disagreement(moments(first, np.zeros(num_nuts)), truth)
        figures |= {f"nuts_{name}": value for name, value in of_nuts.items()}
        figures |= {"nuts_seconds_per_1000": 1000 * seconds / float(ess)}
    return figures


def plot(key, burgers, posterior, file):
    """Plot truth, observation and draws, a drawn path, spectra."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    paths, y = simulate(key, burgers, 1)
    draws = posterior.sample(key, 200, y=y[0])
    drawn, truth = np.asarray(draws.sites["x"]), np.asarray(paths[0])
    x = np.linspace(0, 2 * np.pi, burgers.size, endpoint=False)
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.5), layout="constrained")
    axes[0].plot(x, drawn[:40, 0].T, color="tab:blue", alpha=0.15)
    axes[0].plot([], color="tab:blue", label="40 draws, without weights")
    axes[0].plot(x, truth[0], color="black", label="truth")
    axes[0].set(title="start", xlabel="x", ylabel="u")
    axes[1].plot(x, y[0], ".", color="tab:red", label="observation")
    axes[1].plot(x, truth[-1], color="black", label="truth")
    axes[1].set(title="end", xlabel="x", ylabel="u")
    high, extent = np.abs(drawn[0]).max(), (0, 2 * np.pi, 0, END_TIME)
    image = axes[2].imshow(drawn[0], aspect="auto", origin="lower", extent=extent, cmap="RdBu_r", vmin=-high, vmax=high)
    figure.colorbar(image, label="u")
    axes[2].set(title="one drawn path", xlabel="x", ylabel="t")
    k = np.arange(1, burgers.spectrum(truth[0]).size + 1)
    axes[3].loglog(k, burgers.spectrum(drawn[:40, 0]).T, color="tab:blue", alpha=0.15)
    axes[3].loglog(k, burgers.spectrum(truth[0]), color="black", label="truth")
    axes[3].loglog(k, burgers.spectrum(drawn[:, 0].mean(0)), color="tab:red", label="mean of the draws")
    axes[3].set(title="power of the start", xlabel="wavenumber")
    for ax in (axes[0], axes[1], axes[3]):
        ax.legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)


COARSE = Burgers(16, 16, 0.2, 0.5)


def show(title, figures):
    """Print figures."""
    print(title)
    for name, value in figures.items():
        print(f"  {name:24s} {value:10.3g}")


def main():
    """Learn, draw, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, help="optimiser steps: 200, or 1000 with --judge")
    parser.add_argument("--judge", action="store_true", help="128 points, not 64; particles and NUTS on a coarse grid")
    parser.add_argument("--figure", type=Path, help="where to save a figure")
    parser.add_argument("--smoke", action="store_true", help="a smaller grid, few cases")
    args = parser.parse_args()
    key, smoke, width = jax.random.key(args.seed), args.smoke, 16 if args.judge else 8
    num_steps = args.num_steps or (20 if smoke else 1000 if args.judge else 200)
    fine = Burgers(32, 8) if smoke else Burgers() if args.judge else Burgers(64, 16)
    for title, steps in (("regression alone", 0), ("with a network", num_steps)):
        began = time.perf_counter()
        posterior = learn(key, fine, steps, width, progress_bar=True)
        seconds = time.perf_counter() - began
        cases = 200 if args.judge else 20
        show(f"{fine.size} points, {title}, {seconds:.0f} s", measure(key, fine, posterior, cases))
    if args.figure:
        plot(jax.random.fold_in(key, 1), fine, posterior, args.figure)
    if smoke or args.judge:
        posterior = learn(key, COARSE, num_steps, width, progress_bar=True)
        sizes = (1000, 20_000, 0) if smoke else (10_000, 200_000, 500)
        show(f"{COARSE.size} points, against particles and NUTS", compare(key, COARSE, posterior, *sizes))


if __name__ == "__main__":
    main()
