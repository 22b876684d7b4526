"""Saved posteriors of paths: the same draws back, and nothing but errors from anything else."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from test_saving import mutants, refuse_all, same_arrays

import scoreinfer as si
from modes import UnknownRate, ornstein_uhlenbeck, ring
from scoreinfer.paths.build import read_reversal
from scoreinfer.posterior.checkpoint import CONFIG, WEIGHTS
from scoreinfer.posterior.checkpoint_paths import read_paths
from scoreinfer.posterior.paths import PathPosterior
from scoreinfer.process import Physics

# Nothing is learned here, so that any end may seem far.
pytestmark = pytest.mark.filterwarnings("ignore::scoreinfer.errors.MisspecificationWarning")
MODES = ornstein_uhlenbeck()
PHYSICS = Physics("x")
END = jnp.array([-1.0, 0.5])
SEEN = np.array([[0.6], [0.3], [0.4], [-0.2]], np.float32)
SMALL = {"num_steps": 20, "width": 8, "depth": 1, "progress_bar": False}


@pytest.fixture(scope="module")
def posterior():
    return si.SMDP(MODES.model, "x", num_simulations=200, **SMALL).fit(jax.random.key(0))


@pytest.fixture(scope="module")
def folder(posterior, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "paths"
    posterior.save(path)
    return path


def same(a, b):
    """Say whether two posteriors of paths are the same to the last bit."""
    equal = same_arrays(*((p.paths, p.known_end, p.bank, p.outliers) for p in (a, b)))
    told = [[*map(str, p.history), p.num_particles, type(p.paths), type(p.known_end)] for p in (a, b)]
    return equal and told[0] == told[1]


def check(saved, loaded, **data):
    """Hold what was loaded against what was saved, draws included."""
    assert same(loaded, saved)
    end = data.pop("end_state", None)
    given = (each.condition(**data) if end is None else each.condition_on_end(end) for each in (saved, loaded))
    ours, theirs = (each.sample(jax.random.key(1), 200) for each in given)
    for name in ("unconstrained", "log_weight", "log_q"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert str(ours.certificate) == str(theirs.certificate)


@pytest.mark.parametrize("known", [True, False], ids=["known end", "noisy end"])
def test_loaded_paths_are_drawn_the_same(posterior, folder, known):
    check(posterior, si.SMDP(MODES.model, "x").load(folder), **{"end_state" if known else "y": END})


def test_particles_and_replacement(posterior, folder, tmp_path):
    posterior.save(tmp_path / "p")
    posterior.resampled(8).save(tmp_path / "p")
    assert si.SMDP(MODES.model, "x").load(tmp_path / "p").num_particles == 8
    (tmp_path / "p" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        posterior.save(tmp_path / "p")
    with pytest.raises(ValueError, match=r"expected|differ"):
        eqx.tree_at(lambda p: p.bank.log_share, posterior, jnp.zeros((3, 3))).save(tmp_path / "q")


@pytest.mark.slow
def test_parameters_and_learned_starts_come_back(tmp_path):
    """Kernels conditioned on a rate and on states seen on the way, with what draws their start."""
    rate = UnknownRate(ornstein_uhlenbeck(6)._replace(rates=np.ones(1), start_sd=np.ones(1)), (0, 2, 4, 6))
    for model, data in ((rate.model, {"y": SEEN}), (rate.path_model, {"end_state": np.array([0.3], np.float32)})):
        saved = si.SMDP(model, "x", **SMALL).fit(jax.random.key(0)).resampled(4)
        saved.save(tmp_path / "p")
        check(saved, si.SMDP(model, "x").load(tmp_path / "p"), **data)


class Halves(eqx.Module):
    """A network that the package does not know."""

    scale: jax.Array

    def __call__(self, seen, log_time, context):
        return jnp.concatenate([self.scale * seen, jnp.zeros_like(seen)])


@pytest.mark.slow
def test_networks_of_fields_and_of_ones_own_come_back(tmp_path):
    """In pixels and on waves; a network of the user's own has to be passed again."""
    field, net = ring(12, 2), si.nets.ConvNet(jax.random.key(1), (12,), width=4, dilations=(1, 2), levels=2)
    for waves in (False, True):
        physics = {"reverse": lambda t0, t1, x: x, "waves": waves, "separate": waves}
        saved = si.SMDP(field.model, "x", **physics, net=net, num_steps=2, progress_bar=False).fit(jax.random.key(0))
        saved.save(tmp_path / "p")
        check(saved, si.SMDP(field.model, "x", **physics).load(tmp_path / "p"), y=0.4 * jnp.sin(jnp.arange(12.0)))
    own = si.SMDP(MODES.model, "x", net=Halves(jnp.ones(2)), num_steps=2, progress_bar=False).fit(jax.random.key(0))
    own.save(tmp_path / "p")
    with pytest.raises(ValueError, match=r"network of your own, .*Halves.*net=module"):
        si.SMDP(MODES.model, "x").load(tmp_path / "p")
    check(own, si.SMDP(MODES.model, "x", net=Halves(jnp.zeros(2))).load(tmp_path / "p"), y=END)


def test_other_models_and_physics_are_told_apart(folder):
    def load(path, reverse=None):
        def model(y=None):
            x = numpyro.sample("x", path)
            numpyro.sample("y", dist.Normal(x[-1], MODES.noise).to_event(1), obs=y)

        return si.SMDP(model, "x", reverse=reverse).load(folder)

    own = MODES.path()
    load(own)
    with pytest.raises(ValueError, match="`reverse` of its physics differs"):
        load(own, lambda t0, t1, x: x)
    with pytest.raises(ValueError, match="learned by joint updates"):
        si.SMDP(MODES.model, "x", separate=True).load(folder)
    longer = si.PhysicsPath(own.step, own.noise_scale[0], np.append(own.ts, 1.5), own.init_dist)
    with pytest.raises(ValueError, match=r"'x' has shape \[10, 2\], was \[9, 2\]"):
        load(longer)
    louder = si.PhysicsPath(own.step, 1.2 * own.noise_scale, own.ts, own.init_dist)
    with pytest.raises(ValueError, match=r"another model|other densities"):
        load(louder)
    with pytest.raises(ValueError, match=r"posterior of paths, not a posterior: `load` it .* by `SMDP\(model, site"):
        si.load(folder, MODES.model)


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_hostile_files_are_refused(posterior, folder, tmp_path, every):
    """Every mutant: a clear error within a second and bounded memory; none loads wrong, none executes anything."""
    spoilt = mutants(folder, np.random.default_rng(0), "backward.network.first.weight")

    reversal = read_reversal(PHYSICS, MODES.model)

    def load(path):
        built, parts = read_paths(path, reversal, None)
        problems = posterior.problem, posterior.end_problem
        return PathPosterior(*problems, *built, parts.bank, parts.outliers, parts.history, parts.num_particles)

    few = (spoil for number, spoil in enumerate(spoilt) if number % every == 0)
    assert refuse_all(few, folder, tmp_path, load, posterior, same) >= 200 // every
    assert sorted(entry.name for entry in folder.iterdir()) == [CONFIG, WEIGHTS]
