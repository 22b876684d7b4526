"""Foreign simulators, importable by spawned processes."""

import math
import subprocess
import time

import numpy as np


def noisy(parameters, seed):
    """Two noisy looks at a; whole numbers of a seed make it reproducible anywhere."""
    return parameters["a"] + 0.5 * np.random.default_rng(seed).normal(size=2)


def slow(parameters, seed):
    time.sleep(0.02)
    return noisy(parameters, seed)


def unreliable(parameters, seed):
    """Fail in every way, each in its own region."""
    a = float(parameters["a"])
    if a > 1.2:
        raise OverflowError(f"blew up at {a:.2f}")
    if a > 0.8:
        return np.array([np.nan, a])
    if a < -1.2:
        return np.zeros(3)
    return noisy(parameters, seed)


def fails_by_chance(parameters, seed):
    """Succeed with probability 1 / (1 + exp(-3 a)), whatever the data would have been."""
    rng = np.random.default_rng(seed)
    if rng.uniform() > 1 / (1 + math.exp(-3 * float(parameters["a"]))):
        raise RuntimeError("did not converge")
    return parameters["a"] + 0.5 * rng.normal(size=2)


def by_subprocess(parameters, seed):
    """Ask another program."""
    text = f"{np.float64(parameters['a']):.17g} {seed}"
    done = subprocess.run(["awk", "{ print $1 + 0.5, $1 * 2 }"], input=text, capture_output=True, text=True, check=True)
    return {"y": [float(word) for word in done.stdout.split()]}


def complex_or_masked(parameters, seed):
    """Return what is no real number: complex numbers of odd seeds, a masked entry of even ones."""
    h = np.array([1.0, 9.97e36])
    return {"h": h * 1j if seed % 2 else np.ma.array(h, mask=[False, True])}
