"""Specs of a graph's tensors, and the check that every feed passes.

Arrays are NumPy arrays on the host, or `DeviceArray` where an engine runs on a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.engines.dlpack import DeviceArray
from hyperrt.engines.errors import EngineInputError, listed, nearest

Array = NDArray[Any]
Tensors = Mapping[str, Array | DeviceArray]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a graph.

    Attributes:
        name: its name in the graph.
        shape: a number is a fixed size, a name stands for any size.
        dtype: NumPy's name, such as "float32".
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


def checked(specs: Iterable[TensorSpec], arrays: Tensors, role: str) -> dict[str, Any]:
    """`arrays`, checked against `specs`, as C-contiguous aligned arrays.

    Two dims of the same name need not have the same size: one may be 1 where the graph broadcasts.

    Args:
        specs: the tensors that are accepted.
        arrays: some or all of them.
        role: "input" or "weight", for the message.

    Raises:
        EngineInputError: a name is not among the specs, or a value is not an array of that shape and type.
    """
    by_name = {spec.name: spec for spec in specs}
    for name in arrays:
        if name not in by_name:
            raise EngineInputError(
                f"the graph has no {role} {name!r}",
                f"its {role}s are: {listed(by_name)}",
                nearest(name, by_name),
            )
    return {name: _checked(by_name[name], array, role) for name, array in arrays.items()}


def _checked(spec: TensorSpec, array: Any, role: str) -> Any:
    if not isinstance(array, (np.ndarray, np.generic, DeviceArray)):
        raise EngineInputError(
            f"{role} {spec.name!r} is a {type(array).__name__}", "the graph takes NumPy arrays"
        )
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(dim, str) or dim == size for dim, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise EngineInputError(
            f"{role} {spec.name!r} has shape {_sizes(array.shape)}", f"the graph takes {_sizes(spec.shape)}"
        )
    if array.dtype != np.dtype(spec.dtype):
        raise EngineInputError(f"{role} {spec.name!r} is {array.dtype}", f"the graph takes {spec.dtype}")
    if isinstance(array, DeviceArray):
        return array
    return np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED"])


def _sizes(shape: Iterable[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
