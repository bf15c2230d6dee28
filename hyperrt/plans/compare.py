"""Random inputs for a graph, and the relative error of two results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.engines.tensors import TensorSpec

Arrays = dict[str, NDArray[Any]]

# Ranges of random inputs that are not Gaussian: sums must not cancel, or relative errors mean nothing.
UNIFORM = {
    "timestep": (1.0, 999.0),
    "coefficients": (0.5, 1.0),
    "guidance": (0.5, 1.0),
    "gate": (0.0, 1.0),
    "image_scale": (0.0, 1.0),
    "time_ids": (64.0, 1024.0),
}


def random_feeds(
    specs: Iterable[TensorSpec], sizes: Mapping[str, int], seed: int, integers: int = 2
) -> Arrays:
    """Random inputs for a graph of a bundle.

    Args:
        specs: the inputs of the graph.
        sizes: value of each named size.
        seed: seed of the random numbers.
        integers: integer inputs are smaller than this.
    """
    rng = np.random.default_rng(seed)
    feeds: Arrays = {}
    for spec in specs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        if spec.dtype == "int64":
            feeds[spec.name] = rng.integers(integers, size=shape)
        elif spec.name in UNIFORM:
            feeds[spec.name] = rng.uniform(*UNIFORM[spec.name], shape).astype(np.float32)
        else:
            # LoRA factors of unit size would saturate the softmax, and rounding would become large.
            scale = np.float32(0.2 if "lora_" in spec.name else 1)
            feeds[spec.name] = scale * rng.standard_normal(shape, np.float32)
    return feeds


def relative(actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> float:
    """Largest relative error, max |actual - expected| / max |expected|; infinite if a value is not finite."""
    worst = 0.0
    for name, right in expected.items():
        error = float(np.abs(actual[name] - right).max()) / (float(np.abs(right).max()) or 1.0)
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst
