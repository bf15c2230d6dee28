"""Operators with better ONNX nodes than the exporter would make from plain PyTorch.

attend            one com.microsoft.MultiHeadAttention node: ONNX Runtime, OpenVINO and TensorRT-RTX take it;
                  on ONNX Runtime's CPU every other attention stores the scores of all heads
attend_again      the same for a query that another attention has read
depth_to_space    one node
rows_from_images  tiling; computes the repeats, as the exporter cannot prove rows = branches x images
combine           the guidance sum, for the same reason

Shapes: rows = branches x images, branch-major; C, h, w of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20 as op
from torch import Tensor

from hyperrt.training.model import lora_layers


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention on [rows, tokens, heads x dim]; a single ONNX node in an export."""
    if not torch.onnx.is_in_onnx_export():
        return lora_layers.attend(query, key, value, heads)
    return _attention_node(query, key, value, {"num_heads": heads})


def attend_again(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """`attend` for a query that another attention also reads; the ONNX node reads a copy of the query.

    TensorRT-RTX 1.7.1 crashes while it compiles two attentions of one query, with any attention operator and
    with any of Identity, Reshape or a product with 1 between them. Half the query at twice the scale is
    another tensor, and gives the same bits because both factors are powers of two.
    """
    if not torch.onnx.is_in_onnx_export():
        return lora_layers.attend(query, key, value, heads)
    scale = 2 / math.sqrt(query.shape[-1] // heads)
    return _attention_node(query * 0.5, key, value, {"num_heads": heads, "scale": scale})


def _attention_node(query: Tensor, key: Tensor, value: Tensor, attributes: dict[str, int | float]) -> Tensor:
    return torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (query, key, value),
        attributes,
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def depth_to_space(x: Tensor) -> Tensor:
    """[n, 4 C, h, w] to [n, C, 2 h, 2 w]: channels (a, b, c) land on row a and column b of each 2 x 2."""
    n, channels, height, width = x.shape
    if not torch.onnx.is_in_onnx_export():
        grid = x.reshape(n, 2, 2, channels // 4, height, width)
        return grid.permute(0, 3, 4, 1, 5, 2).reshape(n, channels // 4, 2 * height, 2 * width)
    return torch.onnx.ops.symbolic(
        "DepthToSpace",
        (x,),
        {"blocksize": 2, "mode": "DCR"},
        dtype=x.dtype,
        shape=(n, channels // 4, 2 * height, 2 * width),
    )


@torch.library.custom_op("hyperrt::rows_from_images", mutates_args=())
def rows_from_images(images: Tensor, per_row: Tensor) -> Tensor:
    """[images, C, h, w] to [rows, C, h, w], branch-major; of `per_row` [rows] only the length is read."""
    return images.repeat(per_row.shape[0] // images.shape[0], 1, 1, 1)


@rows_from_images.register_fake
def _(images: Tensor, per_row: Tensor) -> Tensor:
    return images.new_empty((per_row.shape[0], *images.shape[1:]))


def _rows_from_images(images: Any, per_row: Any) -> Any:
    branches = op.Div(op.Shape(per_row), op.Shape(images, start=0, end=1))
    return op.Tile(images, op.Concat(branches, op.Constant(value_ints=[1, 1, 1]), axis=0))


@torch.library.custom_op("hyperrt::combine", mutates_args=())
def combine(rows: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """sum_b weights[b] rows[b]: [rows, C, h, w] and [branches] to the shape of `like`, [images, C, h, w]."""
    return (weights @ rows.reshape(weights.shape[0], -1)).reshape(like.shape)


@combine.register_fake
def _(rows: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like)


def _combine(rows: Any, weights: Any, like: Any) -> Any:
    shape = op.Concat(op.Shape(weights), op.Constant(value_ints=[-1]), axis=0)
    # A matrix, not a vector: backends expand a vector times a matrix into nodes of another precision.
    row = op.Reshape(weights, op.Constant(value_ints=[1, -1]))
    return op.Reshape(op.MatMul(row, op.Reshape(rows, shape)), op.Shape(like))


# PyTorch's operator -> its ONNX; the `custom_translation_table` of torch.onnx.export.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.hyperrt.rows_from_images.default: _rows_from_images,
    torch.ops.hyperrt.combine.default: _combine,
}
