"""Weights as fp16 in the file, fp32 in the arithmetic.

`round_weights` rounds the model itself, before anything is exported or compared, so that parity is measured
against the very numbers that are stored. `store_half` then stores as fp16 + Cast those initialisers that lose
nothing by it; what the exporter worked out in fp32 (tables of the timestep embedding) stays as it is. ONNX
Runtime folds the Casts when it loads the graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from export.errors import ExportError

SMALLEST = 256  # numbers; below, a Cast is larger than what it saves


def round_weights(module: nn.Module, name: str) -> None:
    """Round every floating-point parameter and buffer to the nearest fp16 number, in place.

    Raises:
        ExportError: a weight is beyond fp16 (65504), NaN or infinite.
    """
    with torch.no_grad():
        for key, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            rounded = tensor.half().to(tensor.dtype)
            if not torch.isfinite(rounded).all():
                why = f"{key} holds values up to {tensor.abs().max().item():.3g}; fp16 ends at 65504"
                raise ExportError(f"the weights of {name} cannot be stored", why, "check the training")
            tensor.copy_(rounded)


def store_half(model: ir.Model) -> None:
    """Store fp32 initialisers of at least `SMALLEST` numbers as fp16 and a Cast, where that is exact."""
    graph = model.graph
    casts = []
    for name, value in list(graph.initializers.items()):
        half = _half(value.const_value)
        if half is None:
            continue
        stored = ir.Value(
            name=f"{name}.fp16",
            shape=ir.Shape(half.shape),
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(half, name=f"{name}.fp16"),
        )
        del graph.initializers[name]
        value.const_value = None
        graph.register_initializer(stored)
        casts.append(ir.Node("", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.FLOAT)], outputs=[value]))
    if casts:
        graph.insert_before(graph[0], casts)


def _half(tensor: ir.TensorProtocol | None) -> np.ndarray | None:
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST:
        return None
    array = tensor.numpy()
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else None
