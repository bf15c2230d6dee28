"""What only the fake backend does: it calls a function, counts, and can be refitted."""

from __future__ import annotations

import numpy as np
import pytest

from hyperrt.engines import EngineError, EngineInputError, EngineMemoryError, EngineUnusable, TensorSpec
from hyperrt.engines.fake import FakeEngine

X, Y, GAIN = (TensorSpec(name, ("n",), "float32") for name in ("x", "y", "gain"))
ONES = np.ones(2, np.float32)


def times_gain(tensors):
    return {"y": tensors["x"] * tensors["gain"]}


def refittable():
    return FakeEngine(times_gain, [X], [Y], weights={"gain": ONES, "spare": ONES})


def test_the_function_stands_for_the_graph():
    engine = FakeEngine(times_gain, [X, GAIN], [Y])
    np.testing.assert_array_equal(engine.run({"x": ONES, "gain": 3 * ONES})["y"], 3 * ONES)


def test_uploads_are_counted_so_that_a_test_can_see_what_stays_resident():
    engine = FakeEngine(times_gain, [X, GAIN], [Y])
    engine.bind({"gain": ONES})
    engine.run({"x": ONES})
    engine.run({"x": ONES})
    assert engine.uploads == ["gain"]


def test_a_function_cannot_reach_the_callers_arrays():
    kept = []

    def careless(tensors):
        kept.append(tensors["x"])
        tensors["x"][:] = 0
        return {"y": tensors["x"]}

    x = ONES.copy()
    result = FakeEngine(careless, [X], [Y]).run({"x": x})["y"]
    kept[0][:] = 5
    assert x.tolist() == [1, 1]
    assert result.tolist() == [0, 0]


def test_a_result_that_breaks_the_specs_is_an_error():
    with pytest.raises(EngineError, match="returned no 'y'"):
        FakeEngine(lambda t: {}, [X], [Y]).run({"x": ONES})
    with pytest.raises(EngineInputError, match="output 'y' is float64"):
        FakeEngine(lambda t: {"y": t["x"].astype(float)}, [X], [Y]).run({"x": ONES})


def test_a_fault_is_staged_by_raising_it_and_the_engine_stays_usable():
    def fails_on_nan(tensors):
        if np.isnan(tensors["x"]).any():
            raise EngineMemoryError("memory ran out")
        return {"y": tensors["x"]}

    engine = FakeEngine(fails_on_nan, [X], [Y])
    with pytest.raises(EngineMemoryError):
        engine.run({"x": ONES * np.nan})
    assert engine.run({"x": ONES})["y"].tolist() == [1, 1]


def test_refit_replaces_a_constant_by_a_copy():
    engine = refittable()
    gain = 4 * ONES
    engine.refit({"gain": gain})
    gain[:] = 0
    np.testing.assert_array_equal(engine.run({"x": ONES})["y"], 4 * ONES)


@pytest.mark.parametrize("wrong", [{"gone": ONES}, {"spare": np.ones(3, np.float32)}], ids=["name", "shape"])
def test_a_refit_that_fails_changes_nothing(wrong):
    engine = refittable()
    with pytest.raises(EngineInputError, match="weight"):
        engine.refit({"gain": 4 * ONES} | wrong)
    np.testing.assert_array_equal(engine.run({"x": ONES})["y"], ONES)


def test_refitting_there_and_back_gives_the_same_bits():
    engine = refittable()
    first = engine.run({"x": ONES})["y"].tobytes()
    engine.refit({"gain": 4 * ONES})
    engine.refit({"gain": ONES})
    assert engine.run({"x": ONES})["y"].tobytes() == first


# Faults of a refit: how many constants it replaces before it fails


def test_after_a_refit_that_fails_the_old_constants_are_written_back():
    engine = refittable()
    engine.refit({"gain": 2 * ONES})
    for done in (0, 1, 2):
        engine.refit_faults = [done]
        with pytest.raises(EngineError, match=f"{done} of 2 constants were written"):
            engine.refit({"gain": 4 * ONES, "spare": ONES})
        assert engine.run({"x": ONES})["y"].tolist() == [2, 2]


def test_the_first_refit_that_fails_leaves_the_constants_of_the_graph():
    engine = refittable()
    engine.refit_faults = [1]
    with pytest.raises(EngineError, match="the fake refit failed"):
        engine.refit({"gain": 4 * ONES})
    assert engine.run({"x": ONES})["y"].tolist() == [1, 1]


def broken():
    """An engine that holds mixture of old and new constants: gain 4 of the new one, and the old spare."""
    engine = refittable()
    engine.refit({"gain": 2 * ONES, "spare": 2 * ONES})
    engine.refit_faults = [1, 0]
    message = r"mixture of old and new constants\n.*1 of 2(?s:.*)0 of 2(?s:.*)again"
    with pytest.raises(EngineUnusable, match=message):
        engine.refit({"gain": 4 * ONES, "spare": 4 * ONES})
    return engine


def test_an_engine_that_cannot_be_brought_back_refuses_to_run():
    engine = broken()
    for _ in range(2):
        with pytest.raises(EngineUnusable, match="1 of 2"):
            engine.run({"x": ONES})


def test_the_next_refit_that_succeeds_writes_the_other_constants_too():
    engine = broken()
    engine.refit({"spare": 8 * ONES})
    assert engine.run({"x": ONES})["y"].tolist() == [2, 2]


def test_one_that_fails_and_is_taken_back_brings_the_old_constants_too():
    engine = broken()
    engine.refit_faults = [1]
    with pytest.raises(EngineError, match="the fake refit failed"):
        engine.refit({"spare": 8 * ONES})
    assert engine.run({"x": ONES})["y"].tolist() == [2, 2]


def test_one_that_fails_again_leaves_it_unusable():
    engine = broken()
    engine.refit_faults = [0, 1]
    with pytest.raises(EngineUnusable):
        engine.refit({"spare": 8 * ONES})
    with pytest.raises(EngineUnusable):
        engine.run({"x": ONES})


def test_a_refit_that_is_interrupted_is_taken_back(monkeypatch):
    engine, write = refittable(), FakeEngine._refit

    def interrupted(self, arrays):
        monkeypatch.setattr(FakeEngine, "_refit", write)
        write(self, arrays)
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeEngine, "_refit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.refit({"gain": 4 * ONES})
    assert engine.run({"x": ONES})["y"].tolist() == [1, 1]
