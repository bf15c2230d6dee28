"""LoRA by row inside a diffusers UNet: one attention processor for training and for export.

Every row of a batch carries its own LoRA, and a gate that scales it or turns it off, so one call of the
UNet mixes subjects with the plain base model:

    y = x W^T + ((x A) m) B          A [1|rows, d_in, r], B [1|rows, r, d_out], gate m [rows, 1, 1]

LoRA and image prompt are passed as an argument (`cross_attention_kwargs={"rows": Rows(...)}`), never as an
attribute of a module: an exporter would make that a constant of the graph.

A row may also have an image prompt (training/model/image_prompt.py), a second attention with the same
query: out = Attn(q, K_text, V_text) + Attn(q, K_image, s V_image). The scale s of the row lies in V_image,
so a row of scale 0 adds exact zeros.

Shapes: rows = branches x images, L text tokens, I image tokens, D text width, r rank, inner = heads x head
size, W = sum over attn2 of 2 x inner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.training.model.attention import attention

Factors = Mapping[str, tuple[Tensor, Tensor]]
KeyValues = Mapping[str, tuple[Tensor, Tensor]]  # path of an attn2 -> (K, V), each [rows, tokens, inner]
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]

PROJECTIONS = ("to_q", "to_k", "to_v")
# Options of diffusers' Attention that Stable Diffusion UNets leave off and RowAttention does not compute.
UNSUPPORTED = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")


@dataclass(frozen=True)
class Rows:
    """The arguments of one UNet call that differ by row.

    factors: path of a projection -> (A [1|rows, d_in, r], B [1|rows, r, d_out]); an absent path has no LoRA.
    gate:    LoRA strength of each row, [rows, 1, 1]; 0 makes it a row of the base model.
    context: path of an attn2 -> (K, V), each [rows, L, inner]; replaces the projection of the text.
    image:   the same of the image prompt, [rows, I, inner], V times the scale of its row; an absent path has
             no image prompt.
    """

    factors: Factors
    gate: Tensor
    context: KeyValues = field(default_factory=dict)
    image: KeyValues = field(default_factory=dict)


def row_lora(x: Tensor, A: Tensor, B: Tensor, gate: Tensor) -> Tensor:
    """The LoRA's part of a projection of x [rows, tokens, d_in]; returns [rows, tokens, d_out].

    The gate is applied in rank space, where it costs r multiplications per token instead of d_out.
    """
    return ((x @ A) * gate) @ B


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention on [rows, tokens, heads x dim]; returns the shape of `query`."""
    rows, tokens, inner = query.shape
    query, key, value = (
        x.unflatten(-1, (heads, inner // heads)).transpose(1, 2) for x in (query, key, value)
    )
    return attention(query, key, value).transpose(1, 2).reshape(rows, tokens, inner)


def project(linear: nn.Module, path: str, x: Tensor, rows: Rows | None) -> Tensor:
    """`linear(x)`, plus the row LoRA of `path` if the rows have one."""
    y: Tensor = linear(x)
    if rows is None or path not in rows.factors:
        return y
    return y + row_lora(x, *rows.factors[path], rows.gate)


class RowAttention:
    """Processor for `attn1` and `attn2`: attention with the LoRA, K/V and image prompt in `rows`.

    name:         path of the attention module in the UNet, the key into `Rows`.
    attend:       the attention operator; export passes one that becomes a single ONNX node.
    attend_image: the operator for the image prompt, called with the same query; by default `attend`.
    """

    def __init__(self, name: str, attend: Attend = attend, attend_image: Attend | None = None) -> None:
        self.name = name
        self.attend = attend
        self.attend_image = attend_image or attend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError(
                f"{self.name}: attention masks are not supported; pad the prompt to its full length"
            )
        query = project(attn.to_q, f"{self.name}.to_q", hidden_states, rows)
        if rows is not None and self.name in rows.context:
            key, value = rows.context[self.name]
        else:
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key = project(attn.to_k, f"{self.name}.to_k", text, rows)
            value = project(attn.to_v, f"{self.name}.to_v", text, rows)
        hidden_states = self.attend(query, key, value, attn.heads)
        if rows is not None and self.name in rows.image:
            hidden_states = hidden_states + self.attend_image(query, *rows.image[self.name], attn.heads)
        return attn.to_out[0](hidden_states) / attn.rescale_output_factor  # to_out[1] is dropout


def attentions(unet: nn.Module, suffix: str = "") -> Iterator[tuple[str, Attention]]:
    """The attention modules of a UNet in module order: (path, module); suffix "attn2": cross-attention."""
    for path, module in unet.named_modules():
        if isinstance(module, Attention) and path.endswith(suffix):
            yield path, module


def install(unet: nn.Module, attend: Attend = attend, attend_image: Attend | None = None) -> None:
    """Makes every attention of the UNet a `RowAttention`; without `rows` its output does not change.

    attend, attend_image: see `RowAttention`.

    Raises:
        ValueError: an attention has options that a Stable Diffusion UNet does not use.
    """
    for path, module in attentions(unet):
        used = [name for name in UNSUPPORTED if getattr(module, name, None)]
        if used or module.residual_connection:
            raise ValueError(f"{path}: attention with {used or 'a residual connection'} is not supported")
        module.set_processor(RowAttention(path, attend, attend_image))


def layout_of(unet: nn.Module, rank: int) -> LoraLayout:
    """The adapted projections (to_q, to_k, to_v of every attn2) in UNet module order."""
    sites = []
    for path, module in attentions(unet, "attn2"):
        for name in PROJECTIONS:
            linear = getattr(module, name)
            sites.append(Site(f"{path}.{name}", linear.in_features, linear.out_features))
    return LoraLayout(tuple(sites), rank)


def unpack(layout: LoraLayout, packed: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Packed vectors [1|rows, N], one or both, to factors by path: (A [·, d_in, r], B [·, r, d_out])."""
    factors = {}
    for name, vectors in packed.items():
        slices = layout.slices(name)
        # One split, not a slice per factor: the gradient of each slice would be as large as `vectors`.
        parts = iter(vectors.split([part.stop - part.start for _, *both in slices for part in both], dim=1))
        for site, _, _ in slices:
            A, B = next(parts), next(parts)
            factors[site.path] = (
                A.unflatten(1, (site.d_in, layout.rank)),
                B.unflatten(1, (layout.rank, site.d_out)),
            )
    return factors


def context(
    unet: nn.Module,
    hidden_states: Tensor,
    gate: Tensor,
    lora_kv: Tensor,
    layout: LoraLayout,
    image: KeyValues | None = None,
) -> Tensor:
    """Keys and values of every cross-attention, K/V LoRA included, for one prompt per row.

    hidden_states [rows, L, D], gate [rows] or [rows, 1, 1], lora_kv [1|rows, N]; image as `Rows.image`, of
    every attn2: what `ImagePrompt.key_values` makes. Of the UNet only to_k and to_v of every attn2 are used.
    Returns [rows, L, W], with an image prompt [rows, L + I, W], its tokens last: per attn2 in UNet order K
    then V, side by side on the last axis.
    """
    rows = Rows(unpack(layout, {"lora_kv": lora_kv}), gate.reshape(-1, 1, 1))
    paths = []
    parts = []
    for path, module in attentions(unet, "attn2"):
        paths.append(path)
        for name in ("to_k", "to_v"):
            parts.append(project(getattr(module, name), f"{path}.{name}", hidden_states, rows))
    text = torch.cat(parts, dim=-1)
    if image is None:
        return text
    return torch.cat([text, torch.cat([part for path in paths for part in image[path]], dim=-1)], dim=1)


def split_context(unet: nn.Module, packed: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The inverse of `context`'s packing: [rows, L, W] to path of attn2 -> (K, V), for `Rows.context`."""
    modules = list(attentions(unet, "attn2"))
    widths = [width for _, m in modules for width in (m.to_k.out_features, m.to_v.out_features)]
    parts = packed.split(widths, dim=-1)
    return {path: (parts[2 * i], parts[2 * i + 1]) for i, (path, _) in enumerate(modules)}


def split_text_and_image(
    unet: nn.Module, packed: Tensor, image_tokens: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    """[rows, L + I, W] to `Rows.context` and `Rows.image`.

    image_tokens: I; 0 without an image prompt.
    """
    if not image_tokens:
        return split_context(unet, packed), {}
    text, image = packed[:, :-image_tokens], packed[:, -image_tokens:]
    return split_context(unet, text), split_context(unet, image)
