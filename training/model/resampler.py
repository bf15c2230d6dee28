"""The Perceiver resampler of IP-Adapter-Plus: image features to a fixed number of tokens.

    Q = latents                                        learned                           [1, N, d]
    X = Linear(features)                               bias                              [B, T, d]
    depth times:
        Q = Q + Attn(LN Q; LN X, LN Q)                 keys and values: T + N tokens     no biases
        Q = Q + Linear(GELU(Linear(LN Q)))             four times as wide inside         no biases
    tokens = LN(Linear(Q))                             bias                              [B, N, output]

The image prompt and the weight decoder of the open category both use it. Parameters have the names in
IP-Adapter's published files (`image_proj.*`), which therefore load unchanged.

Shapes: B photos, T feature tokens, F feature width, N queries, d width.
Source: arXiv 2308.06721 (IP-Adapter), arXiv 2204.14198 (Flamingo's resampler).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperrt.training.model.lora_layers import Attend, attend


class PerceiverAttention(nn.Module):
    """Attention of the latents to the features and to themselves.

    x [B, T, d], latents [B, N, d]; returns [B, N, d], without the residual.
    """

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.attend: Attend = attend
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        key, value = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(self.attend(self.to_q(latents), key, value, self.heads))


class Resampler(nn.Module):
    """features [B, T, F] to tokens [B, queries, output_dim]; see the module."""

    def __init__(
        self,
        feature_dim: int,
        output_dim: int,
        queries: int,
        dim: int,
        heads: int,
        dim_head: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(feature_dim, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, heads, dim_head), _feed_forward(dim)])
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)

    def forward(self, features: Tensor) -> Tensor:
        x = self.proj_in(features)
        latents = self.latents.expand(features.shape[0], -1, -1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


def _feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
    )


def use_attention(module: nn.Module, attend: Attend) -> None:
    """Makes every resampler in `module` use this attention operator; export's becomes a single ONNX node."""
    for part in module.modules():
        if isinstance(part, PerceiverAttention):
            part.attend = attend
