"""Batches of bounded memory: what one evaluation takes, how many are made at once, and that results stay the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from doubles import location_scale_problem
from scoreinfer._memory import CACHED, LEAST_CACHED, MANY, Footprint, each, footprint, rows_at_once
from scoreinfer.model import from_numpyro
from scoreinfer.montecarlo.first_draws import draw_first
from scoreinfer.montecarlo.moves import DifferenceMoves, LangevinMoves
from scoreinfer.montecarlo.population import Population
from scoreinfer.montecarlo.reference import start_of
from scoreinfer.montecarlo.tempering import advance, begin
from scoreinfer.nets import Concatenate
from scoreinfer.posterior.npse import LEAST_SIMULATIONS, NPSE, _most_simulations
from scoreinfer.problem import Problem
from scoreinfer.samplers.base import LARGE, Target, bounded_target
from scoreinfer.training.whitening import regressed, untrained_whitening

NUM = 64


def regression(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def logistic(rows):
    """Make the problem and the data of a logistic regression."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    y = (rng.uniform(size=rows) < 0.5).astype(np.int32)
    return from_numpyro(regression, x, y=y), {"y": jnp.asarray(y)}


@pytest.fixture(scope="module")
def wide():
    """A logistic regression of 2000 rows."""
    return logistic(2000)


def particles(dim):
    z = 0.1 * jax.random.normal(jax.random.key(0), (NUM, dim))
    return Population(z, jnp.zeros(NUM), jnp.arange(NUM), jnp.zeros(()))


def taken(target):
    return footprint(jax.value_and_grad(target), jax.ShapeDtypeStruct((target.problem.dim,), jnp.float32))


def test_bytes_grow_with_the_rows(wide):
    """One evaluation of 2000 rows makes float32 arrays of 2000 numbers, and needs several of them at once."""
    small, large = taken(Target(*logistic(1000))), taken(Target(*wide))
    assert large.widest == 2 * small.widest == 4 * 2000
    assert large.total / small.total == pytest.approx(2.0, rel=0.02)
    assert 3 * large.widest < large.total < 20 * large.widest


def test_bytes_of_loops_count_what_they_keep():
    """A loop's gradient keeps a state of every step; no single operation makes an array of that size."""
    loop = lambda z: jax.lax.scan(lambda c, _: (jnp.sin(c), None), z, length=1000)[0].sum()  # noqa: E731
    found = footprint(jax.grad(loop), jnp.zeros(4))
    assert found.total >= 1000 * 16 and found.widest < 200


def test_what_all_rows_share_does_not_count():
    matrix = jnp.ones((500, 500))
    assert footprint(lambda z: (jnp.sin(matrix) ** 2).sum() + z.sum(), jnp.zeros(2)).total < 100
    scanned = lambda z: jax.lax.scan(lambda c, _: (c + jnp.sin(matrix).sum(), None), z, length=3)[0].sum()  # noqa: E731
    assert footprint(scanned, jnp.zeros(2)).total < 100


@pytest.mark.parametrize(
    ("total", "widest", "memory", "expected"),
    [(1000, 100, 64_000, 64), (1000, 100, 127_000, 64), (1000, 100, 1, 1), (8, 8, 1 << 30, None)],
)
def test_rows_at_once_are_a_power_of_two(total, widest, memory, expected):
    assert rows_at_once(Footprint(total, widest, 1), memory) == expected


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="caches bound batches on the CPU only")
def test_rows_at_once_fit_in_a_cache():
    assert rows_at_once(Footprint(1, CACHED // 32, 1), 1 << 40) == 32
    assert rows_at_once(Footprint(1, CACHED, 1), 1 << 40) == LEAST_CACHED


def test_usual_models_are_not_cut_into_batches():
    """Their program is that of `jax.vmap`."""
    target = bounded_target(location_scale_problem(), {"y": jnp.zeros(5)})
    assert target.at_once is None
    z = jnp.zeros((MANY, 2))
    assert str(jax.make_jaxpr(each(target, target))(z)) == str(jax.make_jaxpr(jax.vmap(target))(z))


def test_compiled_programs_stay_within_the_memory(wide):
    """The compiler's own figure, for values and gradients of many rows; it is not met without batches."""
    z, memory = jax.ShapeDtypeStruct((1024, 3), jnp.float32), 2 << 20

    def bytes_of(target):
        program = jax.jit(each(jax.value_and_grad(target), target)).lower(z).compile()
        return program.memory_analysis().temp_size_in_bytes

    target = bounded_target(*wide, memory)
    assert 1 < target.at_once < 64
    assert bytes_of(target) <= memory < bytes_of(Target(*wide)) / 4


def test_large_covariates_are_arguments_of_programs():
    """They are no constants in the program's text, also if a compiled function was the first to ask for the target."""
    problem, y = logistic(100_000)
    z = jnp.array([0.1, -0.2, 0.3])
    inside = jax.jit(lambda z, y: bounded_target(problem, y)(z))(z, y)
    target = bounded_target(problem, y)
    assert sum(value.nbytes for value in target.constants) >= LARGE
    text = jax.jit(lambda target, z: target(z)).lower(target, z).as_text()
    assert len(text) < 100_000 < len(jax.jit(lambda z: problem.log_joint(z, y)).lower(z).as_text())
    np.testing.assert_allclose([target(z), inside], problem.log_joint(z, y), rtol=1e-5)
    given, expected = (jax.grad(density)(z) for density in (target, lambda z: problem.log_joint(z, y)))
    np.testing.assert_allclose(given, expected, rtol=1e-3)


@pytest.mark.parametrize("kind", [LangevinMoves, DifferenceMoves])
def test_moves_in_batches_are_the_same_moves(wide, kind):
    """The same key gives the same particles, seen by four or by all at once."""
    target = Target(*wide)

    def moved(target):
        moves = kind(start_of(target.problem), target, np.array(2))
        start = begin(moves, particles(3), np.array(0.01))
        return advance(jax.random.key(1), moves, start, np.array(0.7)).values

    np.testing.assert_allclose(moved(dataclasses.replace(target, at_once=4)), moved(target), rtol=1e-3, atol=1e-4)


def test_first_draws_in_batches_are_the_same_draws(wide):
    target = Target(*wide)
    reference = start_of(target.problem)
    some = draw_first(jax.random.key(0), reference, dataclasses.replace(target, at_once=256))
    every = draw_first(jax.random.key(0), reference, target)
    np.testing.assert_array_equal(some.values, every.values)
    np.testing.assert_allclose(some.log_ratio, every.log_ratio, rtol=1e-5)


def test_densities_without_reverse_mode_are_measured_by_their_value():
    problem = Problem(
        **vars(location_scale_problem())
        | {"log_likelihood": lambda z, y: jax.lax.while_loop(lambda c: c[0] < z[0], lambda c: c + 1.0, z).sum()}
    )
    assert bounded_target(problem, {"y": jnp.zeros(5)}, 1).at_once == 1


def test_large_simulations_are_fewer(wide):
    """2000 rows of four bytes, eight times, fit 1024 times in 2^26 bytes; small ones as often as ever."""
    problem, _ = wide
    assert _most_simulations(NPSE(problem, max_memory=1 << 26), problem) == 1024
    assert _most_simulations(NPSE(problem, max_memory=1), problem) == LEAST_SIMULATIONS
    assert _most_simulations(NPSE(location_scale_problem()), location_scale_problem()) >= 1 << 20


def test_regressions_on_many_features_have_the_same_slope():
    """Solved by features or by simulations, ridge regression is one formula."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 60)).astype(np.float32)
    z = (x[:, :2] + 0.1 * rng.normal(size=(40, 2))).astype(np.float32)
    blank = untrained_whitening(jax.random.key(0), 2, {"x": jnp.asarray(x[0])}, Concatenate(), width=8, depth=1)
    found = regressed(blank, jnp.asarray(z), {"x": jnp.asarray(x)})
    f, r = x - x.mean(0), z - z.mean(0)
    slope = np.linalg.solve(f.T.astype(np.float64) @ f / 40 + 1e-4 * np.eye(60), f.T @ r / 40).T
    np.testing.assert_allclose(found.slope, slope, atol=1e-3)
