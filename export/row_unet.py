"""Runs the UNet with less work for the same result: rows share what is equal, and upsampling is cheaper.

Before the first cross-attention, the rows of an image are equal: the same latents, the same timestep. So the
first convolution, the first residual block and the first self-attention (one of the five largest of SD1.5)
are computed once per image, and then tiled to rows. All rows share one time embedding. (SDXL adds the pooled
text to it, so its rows differ from the start.)

A nearest-neighbour upsampling and the 3 x 3 convolution after it equal four 2 x 2 convolutions of the small
picture, one for each phase of the large one: 16 multiplications in place of 36. Their weights are sums of the
original ones, which backends compute when they load the graph.

Measurements: docs/log.md. Comparison with diffusers' forward: tests/export/test_row_unet.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from hyperrt.export import operators
from hyperrt.training.model.lora_layers import Rows

Tile = Callable[[Tensor], Tensor]  # [images, C, h, w] to [rows, C, h, w]


def predict(unet: Any, x: Tensor, timestep: Tensor, rows: Rows, tile: Tile, added: Tensor | None) -> Tensor:
    """The UNet's output [rows, C, h, w].

    Args:
        x: scaled latents [images, C, h, w].
        timestep: [].
        rows: LoRA, gates, keys and values of every row; these contain the text.
        added: SDXL's addition to the time embedding, [rows, E].
    """
    options = {"cross_attention_kwargs": {"rows": rows}}
    if not _rows_share(unet):
        condition = None if added is None else {"added": added}
        return unet(tile(x), timestep, None, added_cond_kwargs=condition, return_dict=False, **options)[0]
    emb = unet.time_embedding(unet.time_proj(timestep.reshape(1)).to(x.dtype))  # [1, E]
    x, skips = _first_block(unet, x, emb, tile, options)
    for block in unet.down_blocks[1:]:
        x, more = block(hidden_states=x, temb=emb, **_of(block, options))
        skips += more
    if unet.mid_block is not None:  # tiny-sd has none
        x = unet.mid_block(x, emb, **_of(unet.mid_block, options))
    for block in unet.up_blocks:
        count = len(block.resnets)
        x = block(hidden_states=x, temb=emb, res_hidden_states_tuple=skips[-count:], **_of(block, options))
        skips = skips[:-count]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def install(module: nn.Module) -> None:
    """Makes every upsampling with a convolution in `module` compute the four phases."""
    for part in module.modules():
        plain = isinstance(part, Upsample2D) and part.norm is None and not part.use_conv_transpose
        if plain and part.use_conv:
            part.forward = functools.partial(_upsampled, part)


def _rows_share(unet: Any) -> bool:
    """Whether rows differ only after the first cross-attention, and `predict` covers diffusers' forward."""
    config = unet.config
    usual = not config.center_input_sample and unet.time_embed_act is None and unet.conv_norm_out is not None
    first = unet.down_blocks[0]
    return usual and config.addition_embed_type is None and isinstance(first, CrossAttnDownBlock2D)


def _of(block: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a block with cross-attention; {} for a block without."""
    return {"encoder_hidden_states": None, **options} if getattr(block, "has_cross_attention", False) else {}


def _first_block(
    unet: Any, x: Tensor, emb: Tensor, tile: Tile, options: dict[str, Any]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs conv_in and the first down block, once per image up to the first cross-attention.

    Returns [rows, C, h, w] and the skips.
    """
    block = unet.down_blocks[0]
    x = unet.conv_in(x)
    skips = (tile(x),)
    x = _first_transformer(block.attentions[0], block.resnets[0](x, emb), tile, options)
    skips += (x,)
    for resnet, attention in zip(block.resnets[1:], block.attentions[1:], strict=True):
        x = attention(resnet(x, emb), return_dict=False, **options)[0]
        skips += (x,)
    for downsampler in block.downsamplers or ():
        x = downsampler(x)
        skips += (x,)
    return x, skips


def _first_transformer(transformer: Any, x: Tensor, tile: Tile, options: dict[str, Any]) -> Tensor:
    """diffusers' Transformer2DModel on x [images, C, h, w]; returns [rows, C, h, w]."""
    block, *others = transformer.transformer_blocks
    tokens, inner = transformer._operate_on_continuous_inputs(x)  # with its group norm
    tokens = tokens + block.attn1(block.norm1(tokens))
    tokens = tile(tokens.unsqueeze(1)).squeeze(1)
    tokens = tokens + block.attn2(block.norm2(tokens), **options["cross_attention_kwargs"])
    tokens = tokens + block.ff(block.norm3(tokens))
    for other in others:
        tokens = other(tokens, **options)
    _, _, height, width = x.shape
    return transformer._get_output_for_continuous_inputs(
        hidden_states=tokens, residual=tile(x), batch_size=tokens.shape[0],
        height=height, width=width, inner_dim=inner,
    )  # fmt: skip


def _upsampled(module: Upsample2D, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """x [n, C, h, w] to [n, C', 2 h, 2 w]: phase (a, b) becomes row a and column b of each 2 x 2."""
    conv = module.conv
    phases = []
    for a in (0, 1):
        rows = _two_taps(conv.weight, 2, a)
        for b in (0, 1):
            padded = F.pad(x, (1 - b, b, 1 - a, a))
            phases.append(F.conv2d(padded, _two_taps(rows, 3, b), conv.bias))
    return operators.depth_to_space(torch.cat(phases, dim=1))


def _two_taps(weight: Tensor, axis: int, phase: int) -> Tensor:
    """Three taps as two: in an upsampled signal two neighbours are equal, so their taps are added."""
    first, middle, last = weight.split(1, dim=axis)
    pair = (first, middle + last) if phase == 0 else (first + middle, last)
    return torch.cat(pair, dim=axis)
