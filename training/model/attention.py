"""Softmax attention with the operator that is fastest on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 256 * 256  # pairs of tokens; more attention weights would need too much memory


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention on [rows, heads, tokens, dim]; returns the shape of `query`.

    With a gradient on a CPU, PyTorch's fused operator takes ten times as long as the two products
    (docs/log.md, "What a step spends").
    """
    needs_gradient = any(x.requires_grad for x in (query, key, value))
    if query.device.type != "cpu" or not needs_gradient or query.shape[-2] * key.shape[-2] > FEW:
        return F.scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
