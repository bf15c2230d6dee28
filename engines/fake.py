"""The fake backend runs a Python function instead of a graph, to test everything above an engine.

A test either creates the engine:

    FakeEngine(lambda t: {"y": t["x"] * t["gain"]}, inputs=(...), outputs=(...))

or writes a file that the code under test opens.  The file is JSON: `inputs` and `outputs` are lists of
{name, shape, dtype}, and `function` is a key of `FUNCTIONS`, where the test puts the function: files hold no
code.  It may have `weights`, filled with zeros or with their number `value`.

A function gets every input and weight by name and returns every output.  To stage a fault it raises an
`EngineError` or returns NaN; `refit_faults` stages those of a refit.
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
        weights: constants that the function gets as well, and that `refit` can replace.

    Attributes:
        uploads: name of every input that was bound, in order.
        refit_faults: for each of the next writes of constants (refits and write-backs), how many constants
            are replaced before it fails; None if it succeeds.
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
        self._current = dict(self._constants)  # what the function gets
        self.weights = tuple(TensorSpec(n, w.shape, w.dtype.name) for n, w in self._current.items())

    def _run(self, arrays: dict[str, Array], resident: Mapping[str, Any]) -> dict[str, Array]:
        # Copies in and out: a function must not keep, return or change the caller's arrays.
        tensors = {n: np.array(a) for n, a in (self._current | dict(resident) | arrays).items()}
        results = self._function(tensors)
        missing = [spec.name for spec in self.outputs if spec.name not in results]
        if missing:
            raise EngineError(f"the fake graph returned no {missing[0]!r}", f"it returned: {listed(results)}")
        return {name: np.array(result) for name, result in checked(self.outputs, results, "output").items()}

    def _upload(self, arrays: dict[str, Array]) -> dict[str, Any]:
        self.uploads.extend(arrays)
        return {name: np.array(array) for name, array in arrays.items()}

    def _borrow(self, arrays: dict[str, Array]) -> dict[str, Array]:
        self.uploads.extend(arrays)
        return arrays

    def _refit(self, arrays: dict[str, Array]) -> None:
        written = self.refit_faults.pop(0) if self.refit_faults else None
        self._current = self._current | {name: np.array(arrays[name]) for name in list(arrays)[:written]}
        if written is not None:
            raise EngineError("the fake refit failed", f"{written} of {len(arrays)} constants were written")

    def _release(self) -> None:
        """Nothing to free: a run that has started still needs the constants."""


def open(path: Path, threads: int | None = None, sizes: Mapping[str, int] | None = None) -> FakeEngine:
    """Open a file of the fake backend; `sizes` enter its shapes, `threads` is checked and ignored.

    Raises:
        EngineInputError: `threads` is less than 1.
        EngineLoadError: the file is malformed, or its function is not in `FUNCTIONS`.
    """
    thread_count(threads)
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
        sides = (graph[side] for side in ("inputs", "outputs"))
        inputs, outputs = ([_spec(entry, sizes or {}) for entry in side] for side in sides)
        weights = {entry["name"]: _weight(entry) for entry in graph.get("weights", [])}
        function = FUNCTIONS[graph["function"]]
    except (ValueError, TypeError, KeyError) as error:
        raise EngineLoadError(
            f"cannot open the graph {path}",
            f"it is not a graph of the fake backend: {error!r}",
            f"see engines/fake.py; functions are: {listed(FUNCTIONS)}",
        ) from error
    return FakeEngine(function, inputs, outputs, weights)


def _weight(entry: dict[str, Any]) -> Array:
    return np.full(entry["shape"], entry.get("value", 0), entry["dtype"])


def _spec(entry: dict[str, Any], sizes: Mapping[str, int]) -> TensorSpec:
    shape = tuple(sizes.get(dim, dim) for dim in entry["shape"])
    return TensorSpec(entry["name"], shape, np.dtype(entry["dtype"]).name)
