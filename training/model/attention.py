"""Softmax attention, by the operator that is fastest where it is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 256 * 256  # pairs of tokens whose weights may lie in memory


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention on [rows, heads, tokens, dim]; returns the shape of `query`.

    PyTorch's fused operator takes ten times the time of its two products on a CPU, where it has a gradient to
    compute: docs/log.md, "What a step spends".
    """
    learns = any(x.requires_grad for x in (query, key, value))
    if query.device.type != "cpu" or not learns or query.shape[-2] * key.shape[-2] > FEW:
        return F.scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
