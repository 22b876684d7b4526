"""The heat equation of Holzschuh, Vegetti and Thuerey (2023): the field from which a diffused one came.

    python examples/heat_source_holzschuh2023.py                     # two minutes on one core
    python examples/heat_source_holzschuh2023.py --figure heat.png   # truth, end state, draws, posterior, spectra
    python examples/heat_source_holzschuh2023.py --size 64           # 64 x 64
    python examples/heat_source_holzschuh2023.py --size 64 --network 20000   # with a full-size network, on a GPU
    python examples/heat_source_holzschuh2023.py --smoke             # 16 x 16, everything runs

dx = Laplace x dt + 0.1 dW on a periodic 32 x 32 grid, t in [0, 0.2] in 32 steps (exact spectral step, then noise), from
a Gaussian random field with power |k|^-4. Small scales decay below the noise: a draw must invent them, in the right
amount. Two figures, as published: *reconstruction*, the mean squared difference between the noise-free evolution of the
drawn start and the noise-free end; *spectral error*, the mean absolute difference of log radial spectra of drawn and
true start, wavenumbers 1 to 10 (their spectrum, as their code has it, is the mean absolute real part of the Fourier
coefficients with that integer part of the wavenumber; with mean power the exact error is .176 instead of .134). The
posterior is Gaussian, mode by mode, so the exact figures stand beside ours.

Everything is linear, so what is learned here is a regression for every wavenumber, from 2500 simulations as in the
paper, without any network. ``--network`` trains one on top of it for so many steps, a U-Net of 300,000 weights, as many
as the paper's: it has nothing to add here, and shows what one costs.

Reference: Holzschuh et al. 2023, arXiv 2301.10250, section 4.2; figures marked published are read off theirs.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from scipy import stats

import scoreinfer as si
from scoreinfer.process.physics import hartley

NOISE, END_TIME, INPUT_NOISE = 0.1, 0.2, 0.01
NEXT_TO = {
    "sde_reconstruction": "published 5.3e-4",
    "sde_spectral": "published 0.22",
    "ode_spectral": "published 2.05",
}


class FromWaves(Transform):
    """Hartley coefficients to a field: orthogonal."""

    domain = codomain = constraints.real_matrix

    def __call__(self, x):
        """Transform."""
        return hartley(x, 2)

    _inverse = __call__

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        """Return 0."""
        return jnp.zeros(jnp.shape(x)[:-2])

    def tree_flatten(self):
        """Hold nothing."""
        return (), ((), {})


class Heat(NamedTuple):
    """The process on a grid of ``size`` x ``size`` points."""

    size: int = 32
    num_steps: int = 32

    @property
    def wavenumber(self):
        """Length of the wave vector of every mode."""
        one = np.fft.fftfreq(self.size, 1 / self.size)
        return np.hypot(one[:, None], one)

    @property
    def start_sd(self):
        """Standard deviation of every mode of the start: power |k|^-4, unit variance in space."""
        power = np.maximum(self.wavenumber, 1.0) ** -4.0
        power[0, 0] = 1e-6
        return np.sqrt(power * self.size**2 / power.sum())

    @property
    def ts(self):
        """Times of the states."""
        return np.linspace(0.0, END_TIME, self.num_steps + 1)

    @property
    def scale(self):
        """Noise of one step."""
        return NOISE * np.sqrt(END_TIME / self.num_steps)

    def step(self, t0, t1, x):
        """Diffuse exactly, in Fourier space."""
        decay = jnp.exp(-jnp.asarray(self.wavenumber**2, jnp.float32) * (t1 - t0))
        return hartley(hartley(x, 2) * decay, 2)

    def model(self):
        """A random field, then noisy diffusion."""
        waves = dist.Normal(0.0, jnp.asarray(self.start_sd, jnp.float32)).to_event(2)
        start = dist.TransformedDistribution(waves, FromWaves())
        numpyro.sample("x", si.PhysicsPath(self.step, self.scale, self.ts, start))

    def diffuse(self, x):
        """Evolve without noise to the end."""
        return self.step(0.0, END_TIME, x)

    def posterior(self):
        """Compute gain, standard deviation and flow factor of every mode of the start given the end (exactly)."""
        decay = np.exp(-(self.wavenumber**2) * END_TIME / self.num_steps)
        variance, total = self.start_sd**2, 1.0
        for _ in range(self.num_steps):
            variance, total = decay**2 * variance + self.scale**2, total * decay
        gain = self.start_sd**2 * total / variance
        return gain, np.sqrt(self.start_sd**2 * (1 - gain * total)), self.start_sd / np.sqrt(variance)

    def log_evidence(self, end):
        """Compute the log density of an end (exactly)."""
        sd = self.start_sd / self.posterior()[2]
        return float(stats.norm(0.0, sd).logpdf(np.asarray(hartley(end, 2), np.float64)).sum())


def simulate(key, heat, num):
    """Simulate paths."""
    return jax.jit(lambda key: numpyro.infer.Predictive(heat.model, num_samples=num)(key)["x"])(key)


def learn(key, heat, num=2500, network_steps=0):
    """Learn the reverse: regression of every wavenumber alone, or a network on top of it."""
    shape = (heat.size, heat.size)
    net = si.nets.ConvNet(jax.random.fold_in(key, 1), shape, levels=3, dilations=(1, 2)) if network_steps else None
    return si.SMDP(
        heat.model, "x", reverse=lambda t0, t1, x: x, waves=True, num_simulations=num, net=net,
        num_steps=network_steps, batch_size=64, learning_rate=1e-3,
    ).fit(key)  # fmt: skip


def spectrum(heat, x):
    """Compute the mean absolute real part of Fourier coefficients in rings of wavenumber 1 to 10."""
    size = np.abs(np.fft.fft2(np.asarray(x), norm="ortho").real)
    rings = heat.wavenumber.astype(int)
    return np.stack([size[..., rings == k].mean(-1) for k in range(1, min(10, heat.size // 2) + 1)], axis=-1)


def reconstruction(heat, drawn, truth):
    """Compute the mean squared difference of the noise-free ends."""
    return float(jnp.mean((heat.diffuse(jnp.asarray(drawn)) - heat.diffuse(jnp.asarray(truth))) ** 2))


def spectral_error(heat, drawn, truth):
    """Compute the mean absolute difference of log spectra."""
    return float(np.abs(np.log(spectrum(heat, drawn)) - np.log(spectrum(heat, truth))).mean())


def exact_draw(key, heat, ends):
    """Draw starts from the exact posterior."""
    gain, sd, _ = heat.posterior()
    noise = jax.random.normal(key, ends.shape)
    return hartley(jnp.asarray(gain, jnp.float32) * hartley(ends, 2) + jnp.asarray(sd, jnp.float32) * noise, 2)


def coverage(heat, key, posterior, paths, num_draws=39):
    """Compute how often the central 90 % of draws hold the true pixel (by ranks, exactly .9 for exact draws)."""
    inside = []
    for i in range(0, len(paths), 25):
        ends = jnp.repeat(paths[i : i + 25, -1], num_draws, axis=0)
        drawn = posterior.reverse_sde(jax.random.fold_in(key, i), ends)[:, 0]
        rank = (drawn.reshape(-1, num_draws, *drawn.shape[1:]) < paths[i : i + 25, 0][:, None]).sum(1)
        inside.append((rank >= 2) & (rank <= num_draws - 2))
    return float(np.concatenate(inside).mean())


def variance_error(heat, drawn, ends):
    """Compute the largest relative error of the draws' variance about the exact mean, over rings of wavenumber."""
    gain, sd, _ = heat.posterior()
    rest = np.asarray(hartley(drawn, 2), np.float64) - gain * np.asarray(hartley(ends, 2), np.float64)
    rings = np.rint(heat.wavenumber).astype(int)
    found = [(rest[:, rings == k] ** 2).mean() / (sd[rings == k] ** 2).mean() for k in range(1, heat.size // 2)]
    return float(np.abs(np.array(found) - 1).max())


def measure(key, heat, posterior, num=500):
    """Compute all figures on fresh fields."""
    keys = jax.random.split(key, 8)
    paths = simulate(keys[0], heat, num)
    truth, ends = paths[:, 0], paths[:, -1]
    inputs = jax.vmap(heat.diffuse)(truth) + INPUT_NOISE * jax.random.normal(keys[1], truth.shape)
    figures = {}
    for name, given, key in (("", inputs, keys[2]), ("true_end_", ends, keys[3])):
        drawn = posterior.reverse_sde(key, given)[:, 0]
        best = exact_draw(keys[4], heat, given)
        for label, starts in (("sde", drawn), ("exact", best)):
            figures[f"{name}{label}_reconstruction"] = reconstruction(heat, starts, truth)
            figures[f"{name}{label}_spectral"] = spectral_error(heat, starts, truth)
    figures["variance_error"] = variance_error(heat, drawn, ends)
    few = min(num, 100)
    flow = posterior.probability_flow(inputs[:few])[:, 0]
    best = hartley(jnp.asarray(heat.posterior()[2], jnp.float32) * hartley(inputs[:few], 2), 2)
    figures["ode_spectral"] = spectral_error(heat, flow, truth[:few])
    figures["exact_ode_spectral"] = spectral_error(heat, best, truth[:few])
    figures["coverage_90"] = coverage(heat, keys[5], posterior, paths)
    exact = heat.log_evidence(ends[0])
    for name, particles, draws in (("", 1, 2 * num), ("resampled_", 128 if num > 100 else 16, num // 8 + 2)):
        found = posterior.resampled(particles).condition_on_end(ends[0]).sample(keys[6], draws).certificate
        figures[f"{name}ess_share"] = found.ess / found.num
        figures[f"{name}log_evidence_error"] = abs(found.log_evidence - exact)
    return figures


def plot(key, heat, posterior, file):
    """Draw truth, end, draws, posterior mean and spread, and spectra."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    path = simulate(key, heat, 1)[0]
    drawn = np.asarray(posterior.reverse_sde(key, jnp.repeat(path[-1:], 200, axis=0))[:, 0])
    panels = {
        "true start": path[0], "end": path[-1], "draw": drawn[0], "another draw": drawn[1],
        "posterior mean": drawn.mean(0), "posterior sd": drawn.std(0),
    }  # fmt: skip
    names = list(panels)
    layout = [names[:4], [*names[4:], "spectrum", "spectrum"]]
    figure, axes = plt.subplot_mosaic(layout, figsize=(13, 6), layout="constrained")
    for title, field in panels.items():
        figure.colorbar(axes[title].imshow(field, cmap="viridis"), ax=axes[title], shrink=0.7)
        axes[title].set(title=title, xticks=[], yticks=[])
    spectra = axes["spectrum"]
    k = np.arange(1, spectrum(heat, path[0]).size + 1)
    spectra.loglog(k, spectrum(heat, drawn[:50]).T, color="tab:blue", alpha=0.1)
    spectra.loglog(k, spectrum(heat, path[0]), color="black", label="truth")
    spectra.loglog(k, spectrum(heat, drawn.mean(0)), color="tab:red", label="posterior mean")
    spectra.set(xlabel="wavenumber", title="spectrum")
    spectra.legend()
    figure.savefig(file)


def main():
    """Learn, draw, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=32, help="points along one axis of the grid")
    parser.add_argument("--network", type=int, default=0, metavar="STEPS", help="train a U-Net for so many steps")
    parser.add_argument("--figure", type=Path, help="where to save a figure")
    parser.add_argument("--smoke", action="store_true", help="a smaller grid, few fields")
    args = parser.parse_args()
    key = jax.random.key(args.seed)
    heat = Heat(16, 8) if args.smoke else Heat(args.size)
    start = time.perf_counter()
    posterior = learn(key, heat, 500 if args.smoke else 2500, args.network)
    print(f"learned in {time.perf_counter() - start:.0f} s")
    for name, value in measure(jax.random.fold_in(key, 1), heat, posterior, 25 if args.smoke else 200).items():
        print(f"  {name:28s} {value:10.3g}   {NEXT_TO.get(name, '')}".rstrip())
    if args.figure:
        plot(jax.random.fold_in(key, 2), heat, posterior, args.figure)


if __name__ == "__main__":
    main()
