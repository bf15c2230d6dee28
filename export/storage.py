"""Stores the weights of a graph as fp16, or as int8 with a scale per output channel.

A graph is traced without weights (export/parts.py). `fill` gives each initialiser the tensor of its name,
which is read and converted when the file is written. The weights of fp32 arithmetic are stored as fp16 and a
Cast, which backends fold when they load the graph. int8 weights are stored with a Cast and a multiplication;
LoRA and embeddings stay floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

SMALLEST = 256  # numbers; for smaller tensors a Cast takes more space than it saves
SMALLEST_INT8 = 4096
TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}


@dataclass(frozen=True)
class Weight:
    """The source of an initialiser: the name of a tensor, and how its axes are permuted."""

    key: str
    perm: tuple[int, ...] | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor as the initialiser holds it."""
        tensor = tensors[self.key].detach()
        return tensor if self.perm is None else tensor.permute(self.perm)


def fill(
    model: ir.Model, weights: Mapping[str, Weight], tensors: Mapping[str, Tensor], int8: bool = False
) -> None:
    """Gives every initialiser of `weights` (by name) its tensor, which is read when the file is written.

    int8: whether matrices and convolutions are stored in eight bits.
    """
    nodes: list[ir.Node] = []
    for name, weight in weights.items():
        value = model.graph.initializers[name]
        size = int(np.prod(value.shape.numpy()))
        summed = _summed_axes(value) if int8 and size >= SMALLEST_INT8 else None
        if summed is not None:
            nodes += _store_int8(model.graph, value, weight, tensors, summed)
        elif value.dtype == ir.DataType.FLOAT and size >= SMALLEST:
            nodes += _store_half(model.graph, value, weight, tensors)
        else:
            value.const_value = _lazy(value, weight, tensors)
    if nodes:
        model.graph.insert_before(model.graph[0], nodes)


def _store_half(
    graph: ir.Graph, value: ir.Value, weight: Weight, tensors: Mapping[str, Tensor]
) -> list[ir.Node]:
    stored = _initializer(graph, value, "fp16", ir.DataType.FLOAT16)
    stored.const_value = _lazy(stored, weight, tensors)
    del graph.initializers[value.name]
    return [ir.Node("", "Cast", [stored], [ir.AttrInt64("to", value.dtype)], outputs=[value])]


def _store_int8(
    graph: ir.Graph, value: ir.Value, weight: Weight, tensors: Mapping[str, Tensor], summed: tuple[int, ...]
) -> list[ir.Node]:
    """Stores w as scale * q, with signed q and scale = max |w| / 127 for each output channel."""

    def scale_of(tensor: Tensor) -> Tensor:
        return tensor.float().abs().amax(dim=summed, keepdim=True).clamp_min(1e-12) / 127

    def quantized() -> ir.TensorProtocol:
        tensor = weight.of(tensors)
        rounded = torch.round(tensor.float() / scale_of(tensor)).to(torch.int8)
        return ir.tensor(rounded.numpy(), name=stored.name)

    stored = _initializer(graph, value, "int8", ir.DataType.INT8)
    stored.const_value = ir.LazyTensor(quantized, dtype=stored.dtype, shape=stored.shape, name=stored.name)
    scale = _initializer(graph, value, "scale", value.dtype)
    scales = scale_of(weight.of(tensors)).to(TORCH_TYPES[value.dtype])
    scale.shape = ir.Shape(scales.shape)
    scale.const_value = ir.tensor_adapters.TorchTensor(scales, name=scale.name)
    del graph.initializers[value.name]
    cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", value.dtype)])
    return [cast, ir.Node("", "Mul", [cast.outputs[0], scale], outputs=[value])]


def _initializer(graph: ir.Graph, value: ir.Value, suffix: str, dtype: ir.DataType) -> ir.Value:
    """A new initialiser with the shape of `value`, without data."""
    name = f"{value.name}.{suffix}"
    new = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
    new.const_value = ir.tensor([0.0])  # an initialiser must have data; the caller replaces it
    graph.register_initializer(new)
    return new


def _lazy(value: ir.Value, weight: Weight, tensors: Mapping[str, Tensor]) -> ir.TensorProtocol:
    dtype = TORCH_TYPES[value.dtype]

    def read() -> ir.TensorProtocol:
        return ir.tensor_adapters.TorchTensor(weight.of(tensors).to(dtype).contiguous(), name=value.name)

    return ir.LazyTensor(read, dtype=value.dtype, shape=value.shape, name=value.name)


def _summed_axes(value: ir.Value) -> tuple[int, ...] | None:
    """The axes over which products sum, if only products read the weight; else None."""
    axes = {_summed_by(use.node, use.idx, len(value.shape)) for use in value.uses()}
    return axes.pop() if len(axes) == 1 else None


def _summed_by(node: ir.Node, index: int, rank: int) -> tuple[int, ...] | None:
    if index != 1:
        return None
    if node.op_type == "MatMul" and rank >= 2:
        return (rank - 2,)
    if node.op_type == "Conv":
        return tuple(range(1, rank))
    if node.op_type == "Gemm":
        return (1,) if node.attributes.get_int("transB", 0) else (0,)
    return None
