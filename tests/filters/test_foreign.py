"""Foreign solvers: members that move outside of JAX, in threads, reach the Kalman filter."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import scoreinfer as si
from filters.linear import PARTLY


def solver(t0, t1, x, seed):
    assert t1 == t0 + 1 and x.shape == (2,)
    return PARTLY.move @ x + PARTLY.noise * np.random.default_rng(seed).standard_normal(2)


def test_members_move_in_threads():
    y, num = PARTLY.simulate(0, 5), 2000
    means, covs, log_evidence = PARTLY.kalman(y)
    options = {"method": si.filters.LETKF(), "num_members": num, "y": y}
    with ThreadPoolExecutor(2) as pool:
        move = si.simulators.foreign_transition(solver, executor=pool)
        space = si.StateSpace(PARTLY.space().initial, move, PARTLY.space().observation)
        run = si.filter(jax.random.key(0), space, **options)
    sd = np.sqrt(np.diagonal(covs, axis1=1, axis2=2))
    assert np.abs((np.asarray(run.mean()) - means) / sd).max() < 5 * np.sqrt(3 / num)
    assert float(run.log_evidence) == pytest.approx(log_evidence, abs=5 * np.sqrt(5 / num))
    alone = si.StateSpace(space.initial, si.simulators.foreign_transition(solver), space.observation)
    np.testing.assert_array_equal(si.filter(jax.random.key(0), alone, **options).analysis.x, run.analysis.x)


def test_a_solver_that_fails_may_say_so():
    def fragile(t0, t1, x, seed):
        return np.full(2, np.nan) if seed % 10 == 0 else solver(t0, t1, x, seed)

    space = si.StateSpace(PARTLY.space().initial, si.simulators.foreign_transition(fragile), PARTLY.space().observation)
    with pytest.warns(si.errors.DivergenceWarning, match="They were replaced by others"):
        run = si.filter(jax.random.key(0), space, method=si.filters.EnKF(), num_members=100, y=PARTLY.simulate(0, 3))
    assert 0 < int(run.replaced.sum()) < 100 and np.isfinite(run.analysis.x).all()
