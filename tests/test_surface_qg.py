"""The surface quasi-geostrophic flow of the example, against theory."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import surface_qg as qg


def blocks_of_forecast(flow, num_steps):
    """Linearise a forecast about rest: waves do not mix, so two points give all their 2 x 2 blocks."""
    rest, columns = jnp.zeros(2 * flow.size**2), []
    for level in range(2):
        point = rest.at[level * flow.size**2].set(1.0)
        moved = jax.jvp(partial(qg.forecast, flow, num_steps), (rest,), (point,))[1]
        columns.append(np.fft.rfft2(np.asarray(moved).reshape(2, flow.size, flow.size)))
    return np.stack(columns, axis=-1).transpose(1, 2, 0, 3)


def test_waves_grow_as_eady_found():
    """Both modes of every wave: i k c = +-(k/K) sqrt((coth(K/2) - K/2)(K/2 - tanh(K/2))), real or imaginary."""
    flow = qg.Flow(size=24, width=7.82, damping=0.1, decay=3.0, dt=0.05)
    num_steps, (along_x, _, size, kept) = 10, flow.waves
    found = np.log(np.linalg.eigvals(blocks_of_forecast(flow, num_steps)[kept]).astype(complex)) / num_steps / flow.dt
    half = size[kept] / 2
    growth = np.sqrt(((1 / np.tanh(half) - half) * (half - np.tanh(half))).astype(complex))
    growth *= np.broadcast_to(along_x, size.shape)[kept] / size[kept]
    damped = flow.damping + flow.decay * (size[kept] * flow.width / (2 * np.pi) / (flow.size / 3)) ** 8
    order = lambda pair: np.take_along_axis(pair, np.argsort(pair.real + 10 * pair.imag, axis=1), axis=1)  # noqa: E731
    expected = np.stack([growth, -growth], axis=1) - damped[:, None]
    assert growth.real.max() == pytest.approx(0.3098, abs=1e-3) and (growth.imag > 0.5).any()
    assert order(found) == pytest.approx(order(expected), abs=2e-3)


def test_energy_and_temperature_variance_are_kept_without_shear_and_damping():
    flow = qg.Flow(size=24, width=10.0, shear=0.0, damping=0.0, decay=0.0, dt=0.05)
    _, _, size, kept = flow.waves
    noise = jnp.fft.rfft2(jax.random.normal(jax.random.key(0), (2, flow.size, flow.size)))
    start = 3.0 * noise * kept * np.exp(-0.3 * size**2)
    end = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, x: qg.advance(flow, x), x))(start)
    on_grid = lambda theta: jnp.fft.irfft2(theta, s=(flow.size, flow.size))  # noqa: E731
    assert jnp.std(on_grid(end - start)) > 0.5 * jnp.std(on_grid(start))  # it moved
    assert float(qg.energy(flow, end)) == pytest.approx(float(qg.energy(flow, start)), rel=1e-3)
    variance = lambda theta: np.asarray((on_grid(theta) ** 2).mean((1, 2)))  # noqa: E731
    assert variance(end) == pytest.approx(variance(start), rel=1e-3)


def test_spectrum_is_the_kinetic_energy_and_falls():
    """Turbulence whose waves grow at a few deformation radii: beyond them energy falls between K^(-5/3) and K^(-4)."""
    flow = qg.Flow(size=64, width=20.0)
    states = jax.jit(partial(qg.climate, flow), static_argnums=1)(jax.random.key(0), 10)
    theta = flow.waves[3] * jnp.fft.rfft2(states.reshape(-1, 2, flow.size, flow.size))
    along_x, along_y, _, _ = flow.waves
    psi = qg.invert(flow, theta[0])
    winds = jnp.fft.irfft2(jnp.stack([-along_y * psi, along_x * psi]) * 1j, s=(flow.size, flow.size))
    outside = float(qg.spectrum(flow, theta[0]).sum()) / float((winds**2).mean())
    mean = np.asarray(jax.vmap(partial(qg.spectrum, flow))(theta).mean(0))
    assert 0.98 < outside < 1.0001
    assert 2 <= mean.argmax() <= 6
    slope = np.polyfit(np.log(np.arange(6, 17)), np.log(mean[6:17]), 1)[0]
    assert -4.0 < slope < -5 / 3


@pytest.mark.slow
def test_surface_qg_runs(tmp_path):
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, qg.__file__, "--smoke", "--figure", str(tmp_path / "qg.png")], capture_output=True, text=True,
        check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.count("ScoreFilter") == 2 and (tmp_path / "qg.png").stat().st_size > 1000
