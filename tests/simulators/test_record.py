"""Simulations made elsewhere: the same store as if they had been made here, and refusals of what does not belong."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import scoreinfer as si
from scoreinfer.simulators.dataset import stored_simulations

NUM = 200


def prior():
    numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    numpyro.sample("shares", dist.Uniform(2.0, 5.0).expand([2]).to_event(1))


def simulator(parameters, seed):
    return {"flow": np.outer(parameters["shares"], [1.0, 2.0, 3.0]) * parameters["rate"], "level": parameters["rate"]}


@pytest.fixture(scope="module")
def problem():
    return si.from_numpyro(prior)


@pytest.fixture(scope="module")
def here(problem, tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    return si.simulators.simulate(jax.random.key(0), problem, simulator, NUM, store=folder, progress_bar=False)


@pytest.fixture(scope="module")
def arrays(problem, here):
    """Parameters and outputs as somebody else would bring them."""
    rows = here.read()
    sites = jax.vmap(problem.latent_sites)(np.asarray(rows.z, np.float32))
    return {name: np.asarray(value, np.float64) for name, value in sites.items()}, rows.outputs


def test_same_store_as_if_made_here(problem, here, arrays, tmp_path):
    store = si.simulators.record(problem, *arrays, store=tmp_path)
    ours, theirs = here.read(), store.read()
    assert np.array_equal(theirs.number, np.arange(NUM)) and (theirs.status == "ok").all()
    assert np.allclose(theirs.z, ours.z, atol=1e-4)
    assert all(np.array_equal(theirs.outputs[name], ours.outputs[name]) for name in ("flow", "level"))
    learned = stored_simulations(jax.random.key(1), problem, store)
    assert [site.name for site in learned.problem.observed] == ["flow", "level"] and len(learned.z) == NUM
    assert str(store) == f"{NUM} of {NUM} simulations ({NUM} ok, 0 invalid, 0 failed, 0 timeout)"


def test_interrupted_recording_goes_on(problem, arrays, tmp_path, monkeypatch):
    monkeypatch.setattr("scoreinfer.simulators.run.FLUSH_ROWS", 60)
    store = si.simulators.record(problem, *arrays, store=tmp_path)
    shards = sorted(tmp_path.glob("*.npz"))
    assert len(shards) == 4
    whole = store.read()
    shards[1].unlink()
    again = si.simulators.record(problem, *arrays, store=tmp_path).read()
    assert np.array_equal(again.z, whole.z) and np.array_equal(again.outputs["flow"], whole.outputs["flow"])
    assert sorted(tmp_path.glob("*.npz")) == shards


def test_rows_without_numbers_count_as_failed(problem, arrays, tmp_path):
    parameters, outputs = arrays
    broken = outputs["level"].copy()
    broken[[3, 7]] = np.nan, np.inf
    store = si.simulators.record(problem, parameters, outputs | {"level": broken}, store=tmp_path)
    assert np.flatnonzero(~store.read().valid).tolist() == [3, 7]
    with pytest.raises(ValueError, match="without failures, but 2 of 200 failed"):
        si.NPSE(problem, simulations=store, invalid="raise", progress_bar=False).fit(jax.random.key(0))


def test_masked_entries_count_as_failed(problem, arrays, tmp_path):
    """As netCDF readers return them: the fill value is no data."""
    parameters, outputs = arrays
    flow = np.ma.array(outputs["flow"], fill_value=9.97e36)
    flow[5, 1, 2] = np.ma.masked
    rows = si.simulators.record(problem, parameters, outputs | {"flow": flow}, store=tmp_path).read()
    assert np.flatnonzero(~rows.valid).tolist() == [5] and rows.error[5] == "masked: 'flow' (1 of 6 entries)"
    assert np.isnan(rows.outputs["flow"][5, 1, 2]) and np.isfinite(rows.outputs["flow"]).sum() == 6 * NUM - 1
    assert set(rows.error[rows.valid]) == {""}


def test_other_arrays_in_the_same_folder_are_refused(problem, arrays, tmp_path):
    si.simulators.record(problem, *arrays, store=tmp_path)
    parameters, outputs = arrays
    with pytest.raises(ValueError, match="holds other simulations: `key`"):
        si.simulators.record(problem, parameters, outputs | {"level": -outputs["level"]}, store=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, o: ({"rate": p["rate"]}, o), r"Expected parameters of shapes .*'shares': \(200, 2\)"),
        (lambda p, o: ({**p, "rate": p["rate"][:-1]}, o), r"got .*'rate': \(199,\)"),
        (lambda p, o: (p, {**o, "level": o["level"][:-1]}), "the same number of rows"),
        (lambda p, o: (p, 3.0), r"at least one; got shapes {'y': \(\)}"),
        (
            lambda p, o: (p, {**o, "level": 1j * o["level"]}),
            "Output 'level' must be real or whole numbers, got complex128",
        ),
        (
            lambda p, o: (p, {**o, "level": o["level"].astype(str)}),
            "Output 'level' must be real or whole numbers, got <U",
        ),
        (
            lambda p, o: ({**p, "rate": p["rate"] + 0j}, o),
            "Parameter 'rate' must be real or whole numbers, got complex128",
        ),
        (lambda p, o: ({**p, "rate": np.ma.array(p["rate"], mask=p["rate"] > 3)}, o), "has rate = nan, where"),
        (lambda p, o: (p, {}), "at least one; got shapes {}"),
        (lambda p, o: ({**p, "rate": np.r_[p["rate"][:5], -1.0, p["rate"][6:]]}, o), "Row 5 has rate = -1.0"),
        (lambda p, o: ({**p, "shares": p["shares"] + 1.0}, o), "has shares = .*, where the prior has no density"),
        (lambda p, o: ({**p, "shares": np.full((NUM, 2), 5.0)}, o), "Row 0 lies on the edge"),
        (lambda p, o: ({**p, "rate": np.full(NUM, np.nan)}, o), "Row 0 has rate = nan"),
        (lambda p, o: ({**p, "rate": 2.0 * p["rate"]}, o), "distributed as draws of this prior"),
    ],
)
def test_what_does_not_belong_is_refused(problem, arrays, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        si.simulators.record(problem, *change(*arrays), store=tmp_path)
    assert not list(tmp_path.iterdir())
