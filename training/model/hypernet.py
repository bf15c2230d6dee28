"""The weight decoder: image features to the LoRA of every cross-attention.

Two kinds, which differ in how the features become one token per LoRA factor, Z [B, M, d].
Closed category (`WeightDecoder`), HyperDreamBooth's way:

    C  = LN(Linear((features - mean) / std))      memory                                [B, T, d]
    T0 = 0                                        one token per LoRA factor             [B, M, d]
    K times, with shared weights:
        H = T + P                                 P: learned position                   [M, d]
        L pre-LN blocks on H                      self-attention, cross-attention to C, MLP
        T = T + Linear(LN(H))
    Z = LN(T)

Open category (`ResamplerDecoder`): Z = Resampler((features - mean) / std), see training/model/resampler.py.

Then, for both:

    A_m = A0_m + head_m(Z_m),  B_m = head_m(Z_m)  A0 learned, head of B zero at the start

So a fresh decoder predicts B = 0, the base model, and its gradient is not zero (A = B = 0 would be a saddle).

Factors of one size share a batched product [G, d, n], so that hundreds of heads are a handful of operations.
Tokens are in the order of these groups, the output is in the packed order of `LoraLayout.slices`.

Shapes: B photos, T feature tokens, F feature width, M factors, d width, N numbers of LoRA.
Source: arXiv 2307.06949 (structure), arXiv 2511.03156 sections 5.1 (four blocks, four iterations) and B.2;
shared heads with an embedding of the layer: arXiv 2506.06105 (Text-to-LoRA).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperrt.lora.layout import VECTORS, LoraLayout, Site
from hyperrt.training.model.attention import attention
from hyperrt.training.model.decoder_config import DecoderConfig
from hyperrt.training.model.resampler import Resampler

Packed = dict[str, Tensor]  # "lora_q" [B, Nq], "lora_kv" [B, Nkv]

A_HEAD_SHARE = 0.3  # rms of the predicted part of a fresh A, over that of A0
EMBEDDING_STD = 0.02  # of a layer in front of shared heads; the tokens have unit scale


@dataclass(frozen=True)
class Factor:
    """One A or B: its packed vector, its size, its site, and d_in for an A."""

    vector: str
    numel: int
    site: Site
    d_in: int | None

    @property
    def kind(self) -> tuple[int, str, int, bool]:
        """Factors of one kind may share a head: equal size, projection, width, and A or B."""
        return self.numel, self.site.projection, self.site.d_out, self.d_in is None


def factors_of(layout: LoraLayout) -> list[Factor]:
    """All factors in packed order: lora_q, then lora_kv; per site A, then B."""
    return [
        factor
        for name in VECTORS
        for site, part_a, part_b in layout.slices(name)
        for factor in (
            Factor(name, part_a.stop - part_a.start, site, site.d_in),
            Factor(name, part_b.stop - part_b.start, site, None),
        )
    ]


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, tokens, d] to [B, heads, tokens, d / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention on [B, heads, tokens, d / heads]; returns [B, tokens, d]."""
    return attention(query, key, value).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Self-attention, cross-attention, MLP, each pre-LN with a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_self = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.self_out = nn.Linear(dim, dim)
        self.norm_cross = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.cross_out = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)

    def memory(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the image features; the same at every iteration."""
        key, value = self.key_value(c).chunk(2, dim=-1)
        return _heads(key, self.heads), _heads(value, self.heads)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (
            _heads(part, self.heads) for part in self.qkv(self.norm_self(x)).chunk(3, dim=-1)
        )
        x = x + self.self_out(_attend(query, key, value))
        query = _heads(self.query(self.norm_cross(x)), self.heads)
        x = x + self.cross_out(_attend(query, *memory))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))


@dataclass(frozen=True)
class Grouping:
    """The order of tokens, in which the factors of one group are neighbours, and the way back.

    >>> grouping = Grouping.by([8, 2, 8, 4])
    >>> grouping.groups          # factors of each group, by their number in packed order
    [[1], [3], [0, 2]]
    >>> grouping.factor_of_token
    [1, 3, 0, 2]
    >>> grouping.token_of_factor
    [2, 0, 3, 1]
    """

    groups: list[list[int]]

    @classmethod
    def by(cls, keys: Sequence[Any]) -> Grouping:
        """Groups factors with equal keys; the groups are in the order of their keys."""
        return cls([[k for k, other in enumerate(keys) if other == key] for key in sorted(set(keys))])

    @property
    def factor_of_token(self) -> list[int]:
        return [factor for group in self.groups for factor in group]

    @property
    def token_of_factor(self) -> list[int]:
        tokens = self.factor_of_token
        return sorted(range(len(tokens)), key=tokens.__getitem__)


class FactorHeads(nn.Module):
    """One linear head per factor, those of one size as one batched product; or one head per kind of factor.

    tokens [B, M, d] in the order of a `Grouping` (or [B, sites, d], one for the A and the B of a site) to one
    vector [B, N] per name in packed order.
    """

    def __init__(self, layout: LoraLayout, dim: int, config: DecoderConfig) -> None:
        super().__init__()
        factors = factors_of(layout)
        self.shared = config.shared_heads
        grouping = Grouping.by([factor.kind if self.shared else factor.numel for factor in factors])
        factor_of, token_of = grouping.factor_of_token, grouping.token_of_factor
        self.counts = [len(group) for group in grouping.groups]
        # For each vector, the tokens whose outputs it consists of.
        self.order = {
            name: [token_of[k] for k, factor in enumerate(factors) if factor.vector == name]
            for name in VECTORS
        }
        # For each head the token that it reads, if a site has one token: A and B are neighbours.
        self.reads = [factor // 2 for factor in factor_of] if config.queries == "site" else None
        if self.shared:
            layers = [factor.site.path.rpartition(".")[0] for factor in factors]
            number = {layer: n for n, layer in enumerate(dict.fromkeys(layers))}
            self.layer_of = [number[layers[factor]] for factor in factor_of]
            self.layer = nn.Parameter(EMBEDDING_STD * torch.randn(len(number), dim))
        width = config.head_dim or dim
        self.squeeze = nn.Linear(dim, width, bias=False) if config.head_dim else nn.Identity()
        if config.head_dim:
            nn.init.normal_(self.squeeze.weight, std=dim**-0.5)
        members = [[factors[k] for k in group] for group in grouping.groups]
        self.weights = nn.ParameterList(_head_weights(group, width, self.shared) for group in members)

    def forward(self, tokens: Tensor) -> Packed:
        if self.reads is not None:
            tokens = tokens[:, self.reads]
        if self.shared:
            tokens = tokens + self.layer[self.layer_of]
        groups = self.squeeze(tokens).split(self.counts, dim=1)
        outputs = [
            output
            for group, weight in zip(groups, self.weights, strict=True)
            for output in self._products(group.transpose(0, 1), weight).unbind(0)
        ]
        return {
            name: torch.cat([outputs[token] for token in order], dim=1) for name, order in self.order.items()
        }

    def _products(self, group: Tensor, weight: Tensor) -> Tensor:
        """[G, B, d] times [G, d, n], or [1, d, n] if shared: [G, B, n]."""
        if not self.shared:
            return torch.bmm(group, weight)
        # As one matrix: else PyTorch takes another product, of other bits, where no gradient is wanted.
        return (group.flatten(0, 1) @ weight[0]).unflatten(0, (group.shape[0], -1))


def _head_weights(group: Sequence[Factor], width: int, shared: bool) -> Tensor:
    """Fresh weights of a group's heads [G, width, n], or [1, width, n] if shared; 0 for B."""
    heads = group[:1] if shared else group
    weights = torch.zeros(len(heads), width, heads[0].numel)
    for weight, factor in zip(weights, heads, strict=True):
        if factor.d_in is not None:
            weight.normal_(std=A_HEAD_SHARE / math.sqrt(factor.d_in * width))
    return weights


class Decoder(nn.Module, abc.ABC):
    """features [B, T, F] to {"lora_q": [B, Nq], "lora_kv": [B, Nkv]}; the base of both kinds.

    A subclass makes its parts, then calls `_add_heads`; its `encode` makes the tokens that the heads read.
    """

    def __init__(self, layout: LoraLayout, feature_dim: int, config: DecoderConfig) -> None:
        super().__init__()
        self.layout = layout
        self.feature_dim = feature_dim
        self.config = config
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))

    def _add_heads(self, width: int) -> None:
        self.heads = FactorHeads(self.layout, width, self.config)
        self.offsets = nn.ParameterDict(_offsets(self.layout))
        for name, mask in _a_masks(self.layout).items():
            self.register_buffer(f"{name}_is_a", mask, persistent=False)

    def set_feature_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation of the features, each [F]; part of the weights from then on."""
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp_min(1e-6))

    @abc.abstractmethod
    def encode(self, features: Tensor) -> Tensor:
        """features [B, T, F] to tokens of unit scale [B, M, d]."""

    def normalised(self, features: Tensor) -> Tensor:
        """Features [B, T, F], normalised by the statistics of the training data."""
        return (features - self.feature_mean) / self.feature_std

    def forward(self, features: Tensor) -> Packed:
        return {
            name: vector + self.offsets[name] for name, vector in self.heads(self.encode(features)).items()
        }

    def deltas(self, packed: Packed) -> Packed:
        """The predicted LoRA without the static A0, in the shapes of `packed`; R(h) is computed on it."""
        return {
            name: vector - self.offsets[name] * self.get_buffer(f"{name}_is_a")
            for name, vector in packed.items()
        }


class WeightDecoder(Decoder):
    """The decoder of the closed category; see the module."""

    def __init__(self, layout: LoraLayout, feature_dim: int, config: DecoderConfig) -> None:
        super().__init__(layout, feature_dim, config)
        dim = config.dim
        self.project = nn.Linear(feature_dim, dim)
        self.norm_memory = nn.LayerNorm(dim)
        self.position = nn.Parameter(torch.randn(2 * len(layout.sites), dim))
        self.blocks = nn.ModuleList(Block(dim, config.heads) for _ in range(config.layers))
        self.norm_delta = nn.LayerNorm(dim)
        self.delta = nn.Linear(dim, dim)
        nn.init.normal_(self.delta.weight, std=0.02)
        nn.init.zeros_(self.delta.bias)
        self.norm_out = nn.LayerNorm(dim)
        self._add_heads(dim)

    def encode(self, features: Tensor) -> Tensor:
        """features [B, T, F] to Z [B, M, d], one token per factor."""
        c = self.norm_memory(self.project(self.normalised(features)))
        memories = [block.memory(c) for block in self.blocks]
        tokens = torch.zeros_like(self.position).expand(features.shape[0], -1, -1)
        for _ in range(self.config.iterations):
            hidden = tokens + self.position
            for block, memory in zip(self.blocks, memories, strict=True):
                hidden = block(hidden, memory)
            tokens = tokens + self.delta(self.norm_delta(hidden))
        return self.norm_out(tokens)


class ResamplerDecoder(Decoder):
    """The decoder of the open category: a resampler with one query per factor or site."""

    def __init__(self, layout: LoraLayout, feature_dim: int, config: DecoderConfig) -> None:
        super().__init__(layout, feature_dim, config)
        queries = len(layout.sites) * (1 if config.queries == "site" else 2)
        width = config.output_dim or config.dim
        self.resampler = Resampler(
            feature_dim, width, queries, config.dim, config.heads, config.dim // config.heads, config.layers
        )
        self._add_heads(width)

    def encode(self, features: Tensor) -> Tensor:
        """features [B, T, F] to Z [B, M, width], or one token per site."""
        return self.resampler(self.normalised(features))


def decoder_of(layout: LoraLayout, feature_dim: int, config: DecoderConfig) -> Decoder:
    """A fresh decoder of the kind that the configuration names."""
    kind = ResamplerDecoder if config.kind == "resampler" else WeightDecoder
    return kind(layout, feature_dim, config)


def _offsets(layout: LoraLayout) -> dict[str, nn.Parameter]:
    """A0 ~ N(0, 1 / d_in) where an A lies, the zero bias of the head where a B lies."""
    offsets = {}
    for name in VECTORS:
        offset = torch.zeros(layout.size(name))
        for site, part_a, _ in layout.slices(name):
            offset[part_a].normal_(std=site.d_in**-0.5)
        offsets[name] = nn.Parameter(offset)
    return offsets


def _a_masks(layout: LoraLayout) -> Packed:
    """1 where an A lies in a packed vector, 0 where a B lies.

    On the CPU even if the decoder is built on "meta", because no checkpoint holds them.
    """
    masks = {}
    for name in VECTORS:
        masks[name] = torch.zeros(layout.size(name), device="cpu")
        for _, part_a, _ in layout.slices(name):
            masks[name][part_a] = 1.0
    return masks
