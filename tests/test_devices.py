"""Several devices, and several processes, give what one gives."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scoreinfer as si
from compilations import Compilations
from device_work import drawn, explored, moved, named
from scoreinfer._devices import at_home, num_devices, split, splitting
from scoreinfer._memory import map_rows
from scoreinfer._program import over_devices

EXACT = {"['simulated'].z", "['simulated'].x['y']", "['drawn'].z", "['weighed'].z", "['first'].values"}
"""What is drawn row by row. Members, ranks and ancestors are whole numbers, or follow from such draws."""


@pytest.fixture(scope="module")
def alone():
    return named(drawn() | moved())


def check_same(found, alone):
    """Draws and whole numbers to the last bit, what is computed of them to rounding.

    The compiler rounds parts of another length otherwise. Only trained weights are sums over devices.
    """
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for name in alone.keys() & EXACT | {name for name, value in alone.items() if value.dtype.kind in "biu"}:
        np.testing.assert_array_equal(found[name], alone[name], err_msg=name)


def test_two_devices_give_what_one_gives(alone):
    with si.use_devices(jax.devices()[:2]):
        assert num_devices() == 2
        check_same(named(drawn() | moved()), alone)
    assert num_devices() == 1


def start(folder, num_devices, *more):
    """Run `device_work.py` in a process with forced CPU devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}"
    output = folder / f"found-{len(more) and more[0]}.npz"
    command = [sys.executable, str(Path(__file__).with_name("device_work.py")), str(output), *more]
    return output, subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": flags})


@pytest.mark.slow
def test_four_devices_and_two_processes_give_what_one_gives(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    alone = alone | named(explored())
    for runs in ([(4,)], [(1, str(number), port) for number in range(2)]):
        for output, process in [start(tmp_path, *run) for run in runs]:
            with process:
                assert process.wait(timeout=600) == 0
            check_same(np.load(output), alone)


def test_nothing_is_compiled_twice_without_devices_in_use():
    drawn()
    with Compilations() as compilations, si.use_devices(jax.devices()[:1]):
        drawn()
    assert compilations.count == 0


def test_every_device_has_its_part():
    """The function sees a part of the rows, the last row fills up, and inside of it nothing is split again."""
    seen = []

    def double(rows):
        seen.append(rows.shape[0])
        return split(lambda rows: 2 * rows)(rows)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    with splitting(mesh):
        found = jax.jit(split(double))(jnp.arange(5))
    assert seen == [3]
    np.testing.assert_array_equal(found, 2 * np.arange(5))
    assert {device.id for device in found.devices()} == {0, 1}
    key = jax.random.key(0)
    free = at_home((found, jax.device_put(key, jax.devices()[1]), "text"))
    assert not free[0].committed and len(free[0].devices()) == 1
    assert jax.random.bits(free[1]) == jax.random.bits(key)


def test_arrays_bound_to_a_device_are_taken_along():
    bound = jax.device_put(jnp.arange(3.0), jax.devices()[1])
    with si.use_devices(jax.devices()[:2]):
        found = over_devices(lambda rows: map_rows(jnp.square, None)(rows))(bound)
    np.testing.assert_array_equal(found, np.arange(3.0) ** 2)
    assert not found.committed


def test_programs_of_others_are_left_alone():
    """A program of NumPyro, or the user's own, may run on any device, or on each by itself (`jax.pmap`)."""
    mine = over_devices(lambda rows: map_rows(jnp.square, None)(rows))
    with si.use_devices(jax.devices()[:2]):
        assert "shard_map" not in str(jax.make_jaxpr(mine)(jnp.arange(3.0)))


@pytest.mark.parametrize("num", [0, 2])
def test_devices_must_be_different(num):
    chosen = num * jax.devices()[:1]
    with pytest.raises(ValueError, match="one or more different devices"), si.use_devices(chosen):
        pass
