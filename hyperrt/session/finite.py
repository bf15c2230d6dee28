"""Refuses NaN and infinity, which would draw a black picture or noise without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.engines.dlpack import DeviceArray
from hyperrt.errors import NumericError


def check_finite(tensors: Mapping[str, NDArray[Any] | DeviceArray], what: str) -> None:
    """Refuse NaN and infinity. Arrays on a device are not checked: that would have to wait for them.

    Args:
        what: the tensors in words, for the message.

    Raises:
        NumericError: naming the tensor and how many of its numbers are not finite.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, DeviceArray):
            continue
        bad = tensor.size - int(np.count_nonzero(np.isfinite(tensor)))
        if bad:
            raise NumericError(
                f"{what} is not a number everywhere",
                f"{bad} of {tensor.size} values of {name} are NaN or infinite",
                "try other settings; if it stays, check the bundle: hyperrt doctor",
            )
