"""Compares the graphs' UNet with diffusers' forward, and upsampling with a convolution."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D

from hyperrt.export import modules, row_unet
from hyperrt.training.model import lora_layers
from hyperrt.training.model.lora_layers import Rows

COMMON = {
    "sample_size": 8, "norm_num_groups": 8, "cross_attention_dim": 32, "attention_head_dim": 2,
    "block_out_channels": (16, 32), "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}  # fmt: skip
KINDS = {
    "sd15": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "two transformer layers, linear projections": {
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
    },
    "no middle block": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "mid_block_type": None,
    },
    "a middle block without attention": {"mid_block_type": "UNetMidBlock2D"},
    "a centred input": {"center_input_sample": True},
    "an activation after the time embedding": {"time_embedding_act_fn": "silu"},
    "a wider time embedding": {"time_embedding_dim": 80},
    "a Fourier time embedding": {"time_embedding_type": "fourier"},
    "other functions": {
        "act_fn": "gelu",
        "timestep_post_act": "silu",
        "resnet_time_scale_shift": "scale_shift",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,
        "mid_block_scale_factor": 2.0,
        "conv_in_kernel": 1,
        "conv_out_kernel": 5,
        "downsample_padding": 0,
        "upcast_attention": True,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_share_their_beginning_give_what_diffusers_gives(kind):
    torch.manual_seed(0)
    plain = UNet2DConditionModel(**COMMON | KINDS[kind]).eval().requires_grad_(False)
    for vector in plain.parameters():  # a norm as it is made may be applied twice, and nobody sees it
        if vector.ndim == 1:
            vector += 0.1 * torch.randn_like(vector)
    images, branches = 2, 3
    rows = images * branches
    x, text = torch.randn(images, 4, 8, 8), torch.randn(rows, 5, 32)
    condition = {"text_embeds": torch.randn(rows, 16), "time_ids": torch.rand(rows, 6) * 100}
    tiled = x.repeat(branches, 1, 1, 1)
    sdxl = kind == "sdxl"
    expected = plain(tiled, 321, text, added_cond_kwargs=condition if sdxl else None).sample

    ours = copy.deepcopy(plain)
    lora_layers.install(ours)
    modules.feed_added(ours)
    row_unet.install(ours)
    layout = lora_layers.layout_of(ours, 2)
    gate, lora_kv = torch.zeros(rows), torch.zeros(1, layout.size("lora_kv"))
    packed = lora_layers.context(ours, text, gate, lora_kv, layout)
    state = Rows({}, gate.reshape(-1, 1, 1), lora_layers.split_context(ours, packed))
    added = None
    if sdxl:
        ids = ours.add_time_proj(condition["time_ids"].flatten()).reshape(rows, -1)
        added = ours.add_embedding(torch.cat([condition["text_embeds"], ids], dim=-1))
    found = row_unet.predict(
        ours, x, torch.tensor(321.0), state, lambda y: y.repeat(branches, *[1] * (y.ndim - 1)), added
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (4, 7)])
def test_four_phases_are_upsampling_and_convolution(size):
    torch.manual_seed(0)
    module = Upsample2D(6, use_conv=True, out_channels=5).requires_grad_(False)
    x = torch.randn(2, 6, *size)
    expected = module(x)
    torch.testing.assert_close(expected, module.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
    row_unet.install(module)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
