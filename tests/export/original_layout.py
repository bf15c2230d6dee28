"""Saves models under the names of Stable Diffusion's first publication: each network below its prefix.

Names follow the structure of the networks: the original UNet counts its blocks through (`input_blocks.0` is
`conv_in`, a downsampler is a block of its own), its VAE counts the decoder's levels from the picture, and
OpenCLIP keeps q, k and v in one matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# A second text encoder is SDXL's, and the first has another prefix beside it.
CLIP, CLIP_XL, OPEN_CLIP = (
    "cond_stage_model.transformer.text_model.",
    "conditioner.embedders.0.transformer.text_model.",
    "conditioner.embedders.1.model.",
)
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def original(parts: Mapping[str, Any]) -> Tensors:
    """Every tensor of these networks (`unet`, `vae`, `text_encoder`, SDXL's `text_encoder_2`)."""
    xl = "text_encoder_2" in parts
    found = {UNET + key: tensor for key, tensor in of_unet(parts["unet"]).items()}
    found |= {VAE + key: tensor for key, tensor in of_vae(parts["vae"]).items()}
    clip = CLIP_XL if xl else CLIP
    found |= {clip + key.removeprefix("text_model."): t for key, t in state(parts["text_encoder"]).items()}
    # What files have beside the weights.
    found[clip + "embeddings.position_ids"] = torch.arange(77)[None]
    found |= {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.ones(1)}
    if xl:
        found |= {OPEN_CLIP + key: t for key, t in of_open_clip(parts["text_encoder_2"]).items()}
    return {key: tensor.contiguous() for key, tensor in found.items()}


def of_unet(unet: nn.Module) -> Tensors:
    """UNet, without the prefix."""
    names = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        **unet_resnet("mid_block.resnets.0", "middle_block.0"),
        "mid_block.attentions.0": "middle_block.1",
        **unet_resnet("mid_block.resnets.1", "middle_block.2"),
    }  # fmt: skip
    for number, modules in enumerate(down_path(unet), start=1):
        for place, module in enumerate(modules):
            names |= unet_module(module, f"input_blocks.{number}.{place}")
    for number, modules in enumerate(up_path(unet)):
        for place, module in enumerate(modules):
            names |= unet_module(module, f"output_blocks.{number}.{place}")
    return renamed(state(unet), names)


def down_path(unet: Any) -> Iterator[list[str]]:
    """Paths of the modules of each input block after the first."""
    for level, block in enumerate(unet.down_blocks):
        path = f"down_blocks.{level}"
        for k in range(len(block.resnets)):
            yield [f"{path}.resnets.{k}", *attention_of(block, path, k)]
        if block.downsamplers:
            yield [f"{path}.downsamplers.0"]


def up_path(unet: Any) -> Iterator[list[str]]:
    """Paths of the modules of each output block; an upsampler is at the end of its level's last."""
    for level, block in enumerate(unet.up_blocks):
        path = f"up_blocks.{level}"
        for k in range(len(block.resnets)):
            last = k == len(block.resnets) - 1
            upsampler = [f"{path}.upsamplers.0"] if last and block.upsamplers else []
            yield [f"{path}.resnets.{k}", *attention_of(block, path, k), *upsampler]


def attention_of(block: Any, path: str, k: int) -> list[str]:
    return [f"{path}.attentions.{k}"] if hasattr(block, "attentions") else []


def unet_module(path: str, new: str) -> dict[str, str]:
    if ".resnets." in path:
        return unet_resnet(path, new)
    return {f"{path}.conv": f"{new}.op"} if "downsamplers" in path else {path: new}


def unet_resnet(path: str, new: str) -> dict[str, str]:
    return {f"{path}.{old}": f"{new}.{name}" for old, name in RESNET.items()}


def of_vae(vae: Any) -> Tensors:
    """Autoencoder, without the prefix; its attention was made of convolutions."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half, blocks, sampler in (
        ("encoder", vae.encoder.down_blocks, "downsample"),
        ("decoder", vae.decoder.up_blocks, "upsample"),
    ):
        names |= {f"{half}.{old}": f"{half}.{new}" for old, new in ENDS.items()}
        for k in range(2):
            names |= vae_resnet(f"{half}.mid_block.resnets.{k}", f"{half}.mid.block_{k + 1}")
        attention = f"{half}.mid_block.attentions.0"
        names |= {f"{attention}.{old}": f"{half}.mid.attn_1.{new}" for old, new in VAE_ATTENTION.items()}
        way = sampler.removesuffix("sample")
        for level, block in enumerate(blocks):
            path = f"{half}.{way}_blocks.{level}"
            place = f"{half}.{way}.{level if way == 'down' else len(blocks) - 1 - level}"
            names[f"{path}.{sampler}rs.0.conv"] = f"{place}.{sampler}.conv"
            for k in range(len(block.resnets)):
                names |= vae_resnet(f"{path}.resnets.{k}", f"{place}.block.{k}")
    found = renamed(state(vae), names)
    return {
        key: tensor[:, :, None, None] if "attn_1" in key and tensor.ndim == 2 else tensor
        for key, tensor in found.items()
    }


def vae_resnet(path: str, new: str) -> dict[str, str]:
    same = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
    return {f"{path}.{old}": f"{new}.{name}" for old, name in (same | VAE_RESNET).items()}


def of_open_clip(encoder: Any) -> Tensors:
    """OpenCLIP's text encoder, without the prefix."""
    tensors = {key.removeprefix("text_model."): tensor for key, tensor in state(encoder).items()}
    found = {
        "positional_embedding": tensors.pop("embeddings.position_embedding.weight"),
        # Stable Diffusion 2's file has one, too, which its text encoder does not.
        "text_projection": tensors.pop("text_projection.weight", torch.ones(16, 16)).T,
        "logit_scale": torch.ones(()),
    }
    names = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    for k in range(encoder.config.num_hidden_layers):
        layer, new = f"encoder.layers.{k}", f"transformer.resblocks.{k}"
        names |= {f"{layer}.{old}": f"{new}.{name}" for old, name in LAYER.items()}
        for kind in ("weight", "bias"):
            three = [tensors.pop(f"{layer}.self_attn.{one}_proj.{kind}") for one in "qkv"]
            found[f"{new}.attn.in_proj_{kind}"] = torch.cat(three)
    return found | renamed(tensors, names)


def state(module: nn.Module) -> Tensors:
    return dict(module.state_dict())


def renamed(tensors: Mapping[str, Tensor], modules: Mapping[str, str]) -> Tensors:
    """Renames each tensor by the longest path above it; a tensor without such a path is an error."""
    return {new_name(key, modules): tensor for key, tensor in tensors.items()}


def new_name(key: str, modules: Mapping[str, str]) -> str:
    above = next(path for path in paths_above(key) if path in modules)
    return modules[above] + key.removeprefix(above)


def paths_above(key: str) -> Iterable[str]:
    words = key.split(".")
    return (".".join(words[:count]) for count in range(len(words) - 1, 0, -1))
