"""Compares a plan with its graph once, and stores the result beside the plan.

A plan for this machine is compared before it is published, a plan for another one when it is first opened
there. Only this user can write the result, as with the plan. In a read-only cache it is not stored, and each
process compares again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from hyperrt import engines, files, strict_json
from hyperrt.bundle import memory
from hyperrt.bundle.bundle import Bundle
from hyperrt.engines.backends import BACKENDS
from hyperrt.engines.base import Engine
from hyperrt.engines.errors import EngineError
from hyperrt.engines.tensors import Array
from hyperrt.errors import HyperRTError, IntegrityError, NumericError
from hyperrt.plans import compare, private_folder
from hyperrt.plans.cache import Plan

log = logging.getLogger("hyperrt")

NOTE = "parity.json"
MAX_NOTE = 2**12  # bytes
# Largest relative error of a plan against another backend; TensorRT multiplies fp32 as TF32.
TOLERANCE = {"fp32": 1e-2, "fp16": 3e-2, "bf16": 8e-2}


@dataclass(frozen=True)
class Parity:
    """How a plan was compared.

    Attributes:
        against: the backend that ran the graph, "onnxruntime 1.32.0".
        error: largest relative error.
    """

    against: str
    error: float


@dataclass(frozen=True)
class _Note:
    sha256: str  # of the plan
    parity: Parity


def check(bundle: Bundle, name: str, engine: Engine, sizes: Mapping[str, int], do: str) -> Parity | None:
    """Run a plan and its graph on random inputs, and refuse the plan if the results differ.

    Args:
        name: name of the graph.
        engine: the open plan; its refittable weights are zero afterwards, as when it was opened.
        sizes: of the inputs.
        do: the next step if it is refused.

    Returns:
        None, after a warning, if no backend here can run the graph.

    Raises:
        NumericError: the error is larger than `TOLERANCE`.
        engines.EngineError: the plan cannot be run.
    """
    graph = bundle.graphs[name]
    feeds = compare.random_feeds(graph.inputs, sizes, seed=0)
    # Weights for a refit, large enough that a refit without effect exceeds the tolerance.
    lora = {key: 4 * array for key, array in compare.random_feeds(graph.weights, {}, seed=1).items()}
    reference = "onnxruntime" if bundle.precision == "fp32" else "openvino"
    try:
        expected = _expected(bundle, name, reference, feeds, lora)
    except EngineError as error:
        log.warning("the plan of %s is not compared with its graph: %s", name, error.what)
        return None
    worst = compare.relative(engine.run(feeds), expected[0])
    if len(expected) > 1:
        engine.refit(lora)
        worst = max(worst, compare.relative(engine.run(feeds), expected[1]))
        engine.refit({key: np.zeros_like(array) for key, array in lora.items()})
    parity = Parity(f"{reference} {_version(reference)}", worst)
    allowed = TOLERANCE[bundle.precision]
    if not worst <= allowed:
        why = f"its relative error against {parity.against} is {worst:.2g}; allowed is {allowed:g}"
        raise NumericError(f"the plan of {name} computes something else than the graph", why, do)
    return parity


def _expected(
    bundle: Bundle, name: str, reference: str, feeds: Mapping[str, Array], lora: Mapping[str, Array]
) -> list[dict[str, Array]]:
    """The results of a graph with its own constants, and with `lora` if it can be refitted.

    Raises:
        EngineError: the graph cannot be run here.
    """
    graph, left = bundle.graphs[name], memory.available()
    needed = graph.weight_bytes + graph.row_bytes * max(len(array) for array in feeds.values() if array.ndim)
    if left is not None and needed > left:
        raise EngineError(f"it takes about {needed / 1e9:.1f} GB of memory, and {left / 1e9:.1f} GB are left")
    with engines.open(bundle.graph(name), reference) as engine:
        expected = [engine.run(feeds)]
        if lora and engine.weights:
            engine.refit(lora)
            expected.append(engine.run(feeds))
        return expected


def _version(reference: str) -> str:
    return str(importlib.import_module(BACKENDS[reference].vendor).__version__)


def known(plan: Plan) -> Parity | None:
    """The stored result of a plan; None if this plan was not compared."""
    try:
        with private_folder.open_file(plan.folder / NOTE) as file:
            note = strict_json.read(_Note, strict_json.loads(file.read(MAX_NOTE)))
    except (OSError, IntegrityError, strict_json.StrictError):
        return None
    return note.parity if note.sha256 == plan.sha256 else None


def keep(plan: Plan, parity: Parity) -> None:
    """Store the result beside the plan, if the cache is writable."""
    content = json.dumps(strict_json.dump(_Note(plan.sha256, parity))).encode()

    def write(file: BinaryIO) -> None:
        if hasattr(os, "fchmod"):  # whatever the umask is: `known` ignores a file that others can write
            os.fchmod(file.fileno(), 0o600)
        file.write(content)

    with contextlib.suppress(OSError, HyperRTError):
        files.publish(plan.folder / NOTE, write, force=True)
