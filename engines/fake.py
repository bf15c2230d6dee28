"""The fake backend: a Python function in place of a graph, for tests of everything above an engine.

In a test, either build the engine:

    FakeEngine(lambda t: {"y": t["x"] * t["gain"]}, inputs=(...), outputs=(...))

or open a file, where the code under test does the opening.  The file is JSON: `inputs` and `outputs` as lists
of {name, shape, dtype}, and `function`, a key of `FUNCTIONS`, where the test puts it (a file holds no code).
There may be `weights`, too, of zeros or of a number that each has as its `value`.

A function gets every input (and weight) by name and returns every output.  It may raise an `EngineError` or
return NaN: that is how faults are staged; those of a refit by `refit_faults`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyperrt.engines.base import Engine
from hyperrt.engines.cpu import thread_count
from hyperrt.engines.errors import EngineError, EngineLoadError, listed
from hyperrt.engines.tensors import Array, Tensors, TensorSpec, checked

Function = Callable[[dict[str, Array]], Tensors]

FUNCTIONS: dict[str, Function] = {}


class FakeEngine(Engine):
    """An engine that calls a function.

    Args:
        function: all inputs and weights by name -> all outputs by name.
        inputs: what the function takes.
        outputs: what it returns; its results are checked against these.
        weights: constants that it gets too, and that `refit` can replace.

    Attributes:
        uploads: names of the inputs that were bound, in order, one entry an upload.
        refit_faults: for each of the next times that constants are written, by a refit or back after one, how
            many it replaces before it fails; None: it succeeds.
    """

    def __init__(
        self,
        function: Function,
        inputs: Iterable[TensorSpec],
        outputs: Iterable[TensorSpec],
        weights: Tensors | None = None,
    ) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.uploads: list[str] = []
        self._function = function
        self.refit_faults: list[int | None] = []
        self._constants = {name: np.array(weight) for name, weight in (weights or {}).items()}
        self._held = dict(self._constants)  # what the graph computes with
        self.weights = tuple(TensorSpec(n, w.shape, w.dtype.name) for n, w in self._held.items())

    def _run(self, arrays: dict[str, Array], resident: Mapping[str, Any]) -> dict[str, Array]:
        # Copies in and out: what a function keeps, returns or changes must not be the caller's array.
        tensors = {n: np.array(a) for n, a in (self._held | dict(resident) | arrays).items()}
        results = self._function(tensors)
        missing = [spec.name for spec in self.outputs if spec.name not in results]
        if missing:
            raise EngineError(f"the fake graph returned no {missing[0]!r}", f"it returned: {listed(results)}")
        return {name: np.array(result) for name, result in checked(self.outputs, results, "output").items()}

    def _upload(self, arrays: dict[str, Array]) -> dict[str, Any]:
        self.uploads.extend(arrays)
        return {name: np.array(array) for name, array in arrays.items()}

    def _lent(self, arrays: dict[str, Array]) -> dict[str, Array]:
        self.uploads.extend(arrays)
        return arrays

    def _refit(self, arrays: dict[str, Array]) -> None:
        done = self.refit_faults.pop(0) if self.refit_faults else None
        self._held = self._held | {name: np.array(arrays[name]) for name in list(arrays)[:done]}
        if done is not None:
            raise EngineError("the fake refit failed", f"{done} of {len(arrays)} constants were written")

    def _release(self) -> None:
        """Nothing to give up: a run that has started still needs the constants."""


def open(path: Path, threads: int | None = None, sizes: Mapping[str, int] | None = None) -> FakeEngine:
    """Open a recipe; `threads` is checked, as in every backend, and not used; `sizes` enter its shapes.

    Raises:
        EngineInputError: `threads` is less than 1.
        EngineLoadError: the file is not a recipe, or names a function that is not in `FUNCTIONS`.
    """
    thread_count(threads)
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        sides = (recipe[side] for side in ("inputs", "outputs"))
        inputs, outputs = ([_spec(entry, sizes or {}) for entry in side] for side in sides)
        weights = {entry["name"]: _weight(entry) for entry in recipe.get("weights", [])}
        function = FUNCTIONS[recipe["function"]]
    except (ValueError, TypeError, KeyError) as error:
        raise EngineLoadError(
            f"cannot open the graph {path}",
            f"it is not a recipe of the fake backend: {error!r}",
            f"see engines/fake.py; functions are: {listed(FUNCTIONS)}",
        ) from error
    return FakeEngine(function, inputs, outputs, weights)


def _weight(entry: dict[str, Any]) -> Array:
    return np.full(entry["shape"], entry.get("value", 0), entry["dtype"])


def _spec(entry: dict[str, Any], sizes: Mapping[str, int]) -> TensorSpec:
    shape = tuple(sizes.get(dim, dim) for dim in entry["shape"])
    return TensorSpec(entry["name"], shape, np.dtype(entry["dtype"]).name)
