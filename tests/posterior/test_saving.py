"""Saved posteriors: the same draws back, and nothing but errors from anything else."""

import dataclasses
import json
import os
import shutil
import sys
import time
import tracemalloc
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from doubles import Y1, location_scale
from scoreinfer import files as storage
from scoreinfer.files import read_arrays, read_record, seal, write_arrays, write_record
from scoreinfer.posterior.checkpoint import CONFIG, SCHEMA, WEIGHTS
from scoreinfer.process import VP, Noising
from scoreinfer.samplers.focused import FocusedProposal
from scoreinfer.samplers.refined import RefinedProposal
from scoreinfer.samplers.tuned import THOROUGH, TunedProposal
from scoreinfer.score import GaussianScore, NeuralScore
from scoreinfer.score.network import score_module
from scoreinfer.training.whitening import whitening_network

ARTEFACT = Path(__file__).parents[1] / "artefacts" / "location_scale"


@pytest.fixture(scope="module")
def posterior():
    """A trained posterior; the artefact, because that costs no training."""
    return si.load(ARTEFACT, location_scale)


def untrained(posterior, embedding, sampler):
    """Make a posterior with other networks, as fit would before its first step."""
    first, key = posterior.proposal, jax.random.key(3)
    x = {"y": jnp.zeros((1, 5), jnp.float32)}
    size = jax.eval_shape(embedding, {"y": x["y"][0]}).size
    module = eqx.filter_jit(score_module)(key, 2, embedding, x, width=8, depth=2)
    network = eqx.filter_jit(whitening_network)(key, 2, size, width=16, depth=1)
    proposal = dataclasses.replace(
        first, sampler=sampler, embedding=embedding, score=module.score,
        whitening=dataclasses.replace(first.whitening, embedding=embedding, network=network),
    )  # fmt: skip
    return si.Posterior(posterior.problem, proposal, None)


@pytest.fixture(scope="module")
def folder(posterior, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "posterior"
    posterior.save(path)
    return path


def same_arrays(a, b):
    """Say whether two trees hold the same arrays to the last bit."""
    leaves = [jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (a, b)]
    return all(np.array_equal(x, y, equal_nan=True) and x.dtype == y.dtype for x, y in zip(*leaves, strict=True))


def same(a, b):
    """Say whether two posteriors are the same to the last bit."""
    equal = same_arrays(*((p.proposal, p.outliers) for p in (a, b)))
    samplers = [getattr(p.proposal, "original", p.proposal).sampler for p in (a, b)]
    told = [[[run._asdict() | {"loss": list(run.loss), "validation": list(run.validation)} for run in p.history[:2]],
             p.history.budget] if p.history else None for p in (a, b)]  # fmt: skip
    return equal and samplers[0] == samplers[1] and type(a.proposal) is type(b.proposal) and told[0] == told[1]


def test_loaded_posterior_draws_the_same(posterior, folder):
    loaded = si.load(folder, posterior.problem)
    assert same(loaded, posterior)
    ours, theirs = (p.sample(jax.random.key(1), 512, Y1) for p in (posterior, loaded))
    for name in ("unconstrained", "log_weight", "log_q"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name), equal_nan=True)
    assert str(ours.certificate) == str(theirs.certificate)


def test_history_and_budget_come_back(posterior, folder):
    history, loaded = posterior.history, si.load(folder, posterior.problem).history
    assert loaded.budget == history.budget
    for part in ("whitening", "score"):
        ours, theirs = getattr(history, part), getattr(loaded, part)
        assert np.array_equal(ours.loss, theirs.loss) and np.array_equal(ours.validation, theirs.validation)
        assert ours[2:] == theirs[2:]
    record = json.loads((folder / CONFIG).read_text())
    assert record["versions"]["jax"] == jax.__version__
    assert len(history.score.loss) > 1 and np.isfinite(history.score.loss).all()
    assert [site["name"] for site in record["model"]["latents"]] == ["mu", "sigma"]


@pytest.mark.parametrize("kind", ["focused", "refined", "tuned"])
def test_adapted_proposals_are_saved_too(posterior, kind, tmp_path):
    first = posterior.proposal
    moved = dataclasses.replace(first, adjustment=jax.tree.map(lambda leaf: 1.1 * leaf, first.adjustment))
    x = jnp.zeros(posterior.outliers.features.shape[1])
    proposal = {
        "focused": FocusedProposal(first, moved),
        "refined": RefinedProposal(first, moved, x),
        "tuned": TunedProposal(moved, jax.random.key_data(jax.random.key(8)), THOROUGH),
    }[kind]
    adapted = si.Posterior(posterior.problem, proposal, posterior.outliers, posterior.history)
    adapted.save(tmp_path / "p")
    loaded = si.load(tmp_path / "p", posterior.problem)
    assert same(loaded, adapted)


def test_weights_of_another_posterior_are_refused(posterior, folder, tmp_path):
    """As when the process dies between the two files."""
    shutil.copytree(folder, tmp_path / "p")
    twice = jax.tree.map(lambda leaf: 2 * leaf, posterior.proposal.adjustment)
    other = dataclasses.replace(posterior.proposal, adjustment=twice)
    dataclasses.replace(posterior, proposal=other).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / "p" / WEIGHTS)
    with pytest.raises(si.errors.UnreadableFile, match="checksum"):
        si.load(tmp_path / "p", posterior.problem)


def test_saving_again_replaces_and_never_touches_strangers(posterior, tmp_path):
    posterior.save(tmp_path / "p")
    other = dataclasses.replace(posterior, outliers=None)
    other.save(tmp_path / "p")
    assert same(si.load(tmp_path / "p", posterior.problem), other)
    (tmp_path / "p" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        posterior.save(tmp_path / "p")
    with pytest.raises(ValueError, match="new folder"):
        posterior.save(tmp_path / "p" / "thesis.tex")
    assert sorted(entry.name for entry in (tmp_path / "p").iterdir()) == [CONFIG, "thesis.tex", WEIGHTS]


def test_other_networks_embeddings_and_samplers(posterior, tmp_path):
    """Permutation-invariant embedding, reverse SDE, another process."""
    embedding = si.nets.DeepSet(jax.random.key(3), 1, width=8, num_out=4)
    sampler = si.samplers.ReverseSDE(num_steps=7)
    sets = untrained(posterior, embedding, sampler)
    sets.save(tmp_path / "p")
    loaded = si.load(tmp_path / "p", location_scale)
    assert same(loaded, sets) and loaded.proposal.sampler == sampler
    assert isinstance(loaded.proposal.embedding, si.nets.DeepSet)
    process = Noising(VP(beta_max=15.0))
    series = untrained(
        posterior, si.nets.Series(jax.random.key(3), 5, 1, width=4, num_out=3), si.samplers.ReverseSDE(process)
    )
    series.save(tmp_path / "q")
    assert same(si.load(tmp_path / "q", posterior.problem), series)


class Halves(eqx.Module):
    """An embedding that the package does not know."""

    scale: jax.Array

    def __call__(self, sites):
        return self.scale * sites["y"][:2]


def test_own_embedding_has_to_be_passed(posterior, tmp_path):
    own = untrained(posterior, Halves(jnp.ones(2)), si.samplers.ProbabilityFlow())
    own.save(tmp_path / "p")
    with pytest.raises(ValueError, match=r"module of your own, .*Halves.*embedding=module"):
        si.load(tmp_path / "p", posterior.problem)
    assert same(si.NPSE(posterior.problem, embedding=Halves(jnp.zeros(2))).load(tmp_path / "p"), own)
    with pytest.raises(si.errors.UnreadableFile, match="shape"):
        si.NPSE(posterior.problem, embedding=Halves(jnp.zeros(()))).load(tmp_path / "p")


def test_what_data_cannot_describe_is_refused_when_saving(posterior, tmp_path):
    class Mine(si.samplers.ProbabilityFlow):
        pass

    class Own(VP):
        pass

    for sampler, name in ((Mine(), "Mine"), (si.samplers.ReverseSDE(Noising(Own())), "Own")):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(posterior, proposal=dataclasses.replace(posterior.proposal, sampler=sampler)).save(
                tmp_path
            )
    score = NeuralScore(GaussianScore(jnp.zeros(2), jnp.eye(2)))
    with pytest.raises(ValueError, match="GaussianScore"):
        dataclasses.replace(posterior, proposal=dataclasses.replace(posterior.proposal, score=score)).save(tmp_path)
    grown = dataclasses.replace(posterior.proposal.whitening, slope=jnp.zeros((2, 9)))
    with pytest.raises(ValueError, match=r"whitening\.slope"):
        dataclasses.replace(posterior, proposal=dataclasses.replace(posterior.proposal, whitening=grown)).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_models_are_told_apart(folder):
    def renamed(y=None):
        mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
        sigma = numpyro.sample("sigma", dist.Gamma(2.0, 1.0))
        with numpyro.plate("n", 5):
            numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    def longer(y=None):
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        sigma = numpyro.sample("sigma", dist.Gamma(2.0, 1.0))
        with numpyro.plate("n", 6):
            numpyro.sample("y", dist.Normal(mu, sigma), obs=y)

    def other_prior(y=None):
        mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
        sigma = numpyro.sample("sigma", dist.Gamma(2.0, 1.0))
        with numpyro.plate("n", 5):
            numpyro.sample("y", dist.Normal(mu, sigma), obs=y)

    with pytest.raises(ValueError, match=r"'mu' is missing.*'mean' is new"):
        si.load(folder, renamed)
    with pytest.raises(ValueError, match=r"'y' has shape \[6\], was \[5\]"):
        si.load(folder, longer)
    with pytest.raises(ValueError, match="log_prior"):
        si.load(folder, other_prior)


def test_artefact_of_an_earlier_version_loads():
    """It was trained long ago; a change of format has to read it, or to write it anew from the same arrays."""
    loaded = si.load(ARTEFACT, location_scale)
    draws = loaded.sample(jax.random.key(1), 512, Y1)
    expected = json.loads((ARTEFACT.parent / "location_scale.expected.json").read_text())
    z = jnp.asarray(expected["z"])
    proposal, target = loaded.proposal, loaded.condition(Y1).target
    log_q = jax.jit(lambda z: proposal.log_q(jax.random.key(0), proposal.context(target), z))
    assert np.allclose([log_q(point) for point in z], expected["log_q"], atol=2e-3)
    assert abs(draws.certificate.log_evidence - expected["log_evidence"]) < 0.2


# --- strangers and accidents


def mutants(folder, rng, weight="proposal.score.network.first.weight"):
    """Yield (name, function that spoils a copy of the folder)."""
    sizes = {name: (folder / name).stat().st_size for name in (CONFIG, WEIGHTS)}

    def truncate(name, length):
        return lambda path: (path / name).write_bytes((path / name).read_bytes()[:length])

    def flip(name, bit):
        def spoil(path):
            content = bytearray((path / name).read_bytes())
            content[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(content)

        return spoil

    for name, size in sizes.items():
        for length in [0, 1, 8, size - 1, *rng.integers(0, size, 30)]:
            yield f"truncate {name} {length}", truncate(name, length)
        for bit in [*range(0, 64, 9), *rng.integers(0, 8 * size, 40)]:
            yield f"flip {name} {bit}", flip(name, bit)
    yield from typed_mutants(folder)
    yield from array_mutants(weight)


def typed_mutants(folder):
    """Wrong types, huge sizes and paths in every field that is read, under a valid checksum."""
    record = read_record(folder / CONFIG)
    values = (None, -1, 2**70, 1e999, "../../etc/passwd", "__import__('os').system('false')", [], {"type": "Proposal"})

    def paths(tree, prefix=()):
        for name, value in tree.items():
            yield (*prefix, name)
            if isinstance(value, dict):
                yield from paths(value, (*prefix, name))

    def put(where, value):
        def spoil(path):
            changed = json.loads(json.dumps(record))
            inner = changed
            for name in where[:-1]:
                inner = inner[name]
            if isinstance(value, float):
                inner[where[-1]] = 0.0
                text = json.dumps(changed | {"sha256": "0"}).replace("0.0", "1e999")
                (path / CONFIG).write_text(text)
                return
            inner[where[-1]] = value
            write_record(path / CONFIG, changed)

        return spoil

    def drop(where):
        def spoil(path):
            changed = json.loads(json.dumps(record))
            inner = changed
            for name in where[:-1]:
                inner = inner[name]
            del inner[where[-1]]
            write_record(path / CONFIG, changed)

        return spoil

    read = [where for where in paths(record) if where[0] in ("format", "schema", "model", "network", "weights")]
    for number, where in enumerate(read):
        yield f"drop {where}", drop(where)
        for value in values[number % 2 :: 2]:
            yield f"put {value!r} at {where}", put(where, value)


def array_mutants(weight):
    """Arrays of other names, shapes and types, and headers that lie, under valid checksums."""

    def sealed(change):
        def spoil(path):
            arrays, note = read_arrays(path / WEIGHTS, 2**30)
            write_arrays(path / WEIGHTS, change(arrays), note)
            reseal(path)

        return spoil

    def reseal(path):
        write_record(path / CONFIG, read_record(path / CONFIG) | {"weights": seal(path / WEIGHTS)})

    def header(change):
        def spoil(path):
            content = (path / WEIGHTS).read_bytes()
            length = int.from_bytes(content[:8], "little")
            told = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
            (path / WEIGHTS).write_bytes(len(told).to_bytes(8, "little") + told + content[8 + length :])
            reseal(path)

        return spoil

    yield "missing", sealed(lambda a: {k: v for k, v in a.items() if k != weight})
    yield "too many", sealed(lambda a: a | {"../../evil": np.zeros(3, np.float32)})
    yield "renamed", sealed(lambda a: {"../" + k if k == weight else k: v for k, v in a.items()})
    yield "shape", sealed(lambda a: a | {weight: a[weight][:1]})
    yield "integers", sealed(lambda a: a | {weight: a[weight].astype(np.int32)})
    yield "booleans", sealed(lambda a: a | {weight: a[weight] > 0})
    yield "transposed", sealed(lambda a: a | {weight: a[weight].T})
    yield "large", sealed(lambda a: a | {weight: np.zeros((3000, 3000), np.float32)})
    for shape in ([2**40, 2**40], [10**9], [-1, 2], ["x"], None, [[1]]):
        yield f"header {shape}", header(lambda h, s=shape: h | {weight: h[weight] | {"shape": s}})
    for offsets in ([0, 2**60], [-5, 4], [4, 0], "all", None):
        yield f"offsets {offsets}", header(lambda h, o=offsets: h | {weight: h[weight] | {"data_offsets": o}})
    yield "no note", header(lambda h: h | {"__metadata__": {}})
    yield "nested note", header(lambda h: h | {"__metadata__": {"note": "[" * 100_000, "sha256": ""}})


WATCHED = ("pickle.find_class", "subprocess.Popen", "os.system", "socket.connect", "os.exec")
executed: list | None = None


def watch(event, args):
    if executed is not None and event in WATCHED:
        executed.append((event, args))


def test_hostile_files_are_refused(posterior, folder, tmp_path):
    """Every mutant: a clear error within a second and bounded memory; none loads wrong, none executes anything."""
    spoilt = mutants(folder, np.random.default_rng(0))
    assert refuse_all(spoilt, folder, tmp_path, lambda path: si.load(path, posterior.problem), posterior, same) >= 200
    assert sorted(entry.name for entry in folder.iterdir()) == [CONFIG, WEIGHTS]


def refuse_all(spoilt, folder, tmp_path, load, posterior, same):
    """Load every mutant; return how many of them were refused as unreadable."""
    global executed
    sys.addaudithook(watch)
    executed, loaded, other_models, seconds, number, refused = [], [], [], [], 0, 0
    for number, (name, spoil) in enumerate(spoilt):
        path = tmp_path / str(number)
        shutil.copytree(folder, path)
        spoil(path)
        tracemalloc.start()
        start = time.process_time()
        try:
            other = load(path)
        except si.errors.UnreadableFile:
            refused += 1
        except ValueError as error:
            other_models.append(str(error))
        else:
            assert same(other, posterior), name
            loaded.append(name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        seconds.append(time.process_time() - start)
        assert peak < 32 * 2**20, (name, peak)
        shutil.rmtree(path)
    assert all("another model" in message for message in other_models), other_models
    assert len(loaded) < 0.1 * number, loaded  # an indentation, or what is only told and not used
    assert np.median(seconds) < 1.0  # of the processor, under tracemalloc
    assert not executed
    executed = None
    return refused


def test_newer_foreign_and_missing_are_named(folder, posterior, tmp_path):
    shutil.copytree(folder, tmp_path / "newer")
    write_record(tmp_path / "newer" / CONFIG, read_record(folder / CONFIG) | {"schema": SCHEMA + 1})
    with pytest.raises(si.errors.UnreadableFile, match="newer scoreinfer"):
        si.load(tmp_path / "newer", posterior.problem)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / CONFIG).write_text('{"architectures": ["Llama"]}')
    with pytest.raises(si.errors.UnreadableFile, match="no checksum"):
        si.load(tmp_path / "foreign", posterior.problem)
    with pytest.raises(si.errors.UnreadableFile, match="no such folder"):
        si.load(tmp_path / "nowhere", posterior.problem)


def test_a_killed_writer_leaves_the_old_file(tmp_path, monkeypatch):
    """Whatever happens before the replacement, the old content stays whole, and nothing is left lying about."""
    path = tmp_path / "file"
    storage.write_file(path, b"old")
    monkeypatch.setattr(storage.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        storage.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    dead, alive = tmp_path / ".file-1.tmp", tmp_path / ".file-2.tmp"
    for left in (dead, alive):
        left.write_bytes(b"")
    os.utime(dead, (0, 0))
    storage.remove_leftovers(tmp_path, "file")
    assert not dead.exists() and alive.exists()
