"""The six graphs of a bundle as PyTorch modules around those of the base model and the weight decoder.

Names, shapes and meaning of all tensors: docs/bundle-format.md. Dims: photos, prompts, images and branches
are free; rows = branches x images, branch-major; subjects is 1 (one LoRA for all rows) or rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engines.base import TensorSpec
from export import operators
from hyperrt.lora import LoraLayout
from training import lora_layers
from training.base import Base
from training.hypernet import WeightDecoder
from training.lora_layers import Rows

# Ranges of random inputs that are not Gaussian: sums must not cancel, or relative errors mean nothing.
UNIFORM = {"timestep": (1.0, 999.0), "coefficients": (0.5, 1.0), "guidance": (0.5, 1.0), "gate": (0.0, 1.0)}


@dataclass(frozen=True, eq=False)
class Graph:
    """One graph: a module whose `forward` takes `inputs` by name and returns `outputs` in order."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    integers: int = 0  # integer inputs are below this

    def feeds(self, sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
        """Random inputs; `sizes` says how large each symbolic dim is."""
        generator = torch.Generator().manual_seed(seed)
        feeds = {}
        for spec in self.inputs:
            shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
            if spec.dtype == "int64":
                feeds[spec.name] = torch.randint(self.integers, shape, generator=generator)
            elif spec.name in UNIFORM:
                low, high = UNIFORM[spec.name]
                feeds[spec.name] = low + (high - low) * torch.rand(shape, generator=generator)
            else:
                # LoRA factors of unit size would saturate the softmax, and rounding would become large.
                scale = 0.2 if spec.name.startswith("lora_") else 1.0
                feeds[spec.name] = scale * torch.randn(shape, generator=generator)
        return feeds


class ImageEncoder(nn.Module):
    """pixels [photos, 3, S, S] to features [photos, T, F]."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.encoder = base.image_encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels).last_hidden_state


class PackedDecoder(nn.Module):
    """features [photos, T, F] to lora_q [photos, Nq] and lora_kv [photos, Nkv]."""

    def __init__(self, decoder: WeightDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        packed = self.decoder(features)
        return packed["lora_q"], packed["lora_kv"]


class TextEncoder(nn.Module):
    """input_ids [prompts, L] to hidden_states [prompts, L, D]."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.encoder = base.text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids).last_hidden_state


class Context(nn.Module):
    """Prompts to K and V of every cross-attention, K/V LoRA included: [rows, L, W]."""

    def __init__(self, base: Base, layout: LoraLayout) -> None:
        super().__init__()
        self.unet = base.unet
        self.layout = layout

    def forward(self, hidden_states: Tensor, gate: Tensor, lora_kv: Tensor) -> Tensor:
        return lora_layers.context(self.unet, hidden_states, gate, lora_kv, self.layout)


class Denoiser(nn.Module):
    """One step of the loop: tiling to rows, UNet with Q LoRA, guidance sum, solver update; all fp32.

    x            = tile(c0 latents)
    g            = sum_b guidance_b UNet(x, timestep, context, lora)_b      paper eq. 20
    next_latents = c1 latents + c2 g + c3 previous + c4 noise               hyperrt/solvers.py
    denoised     = c5 latents + c6 g
    """

    def __init__(self, base: Base, layout: LoraLayout) -> None:
        super().__init__()
        self.unet = base.unet
        self.layout = layout

    def forward(
        self,
        latents: Tensor,
        previous: Tensor,
        noise: Tensor,
        timestep: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        context: Tensor,
        gate: Tensor,
        lora_q: Tensor,
    ) -> tuple[Tensor, Tensor]:
        c = coefficients
        factors = lora_layers.unpack(self.layout, {"lora_q": lora_q})
        rows = Rows(factors, gate.reshape(-1, 1, 1), lora_layers.split_context(self.unet, context))
        x = torch.ops.hyperrt.rows_from_images(latents * c[0], gate)
        options = {"rows": rows}
        # The text is in `context`: no projection reads encoder_hidden_states.
        output = self.unet(x, timestep, None, cross_attention_kwargs=options, return_dict=False)[0]
        g = torch.ops.hyperrt.combine(output, guidance, latents)
        following = c[1] * latents + c[2] * g + c[3] * previous + c[4] * noise
        return following, c[5] * latents + c[6] * g


class VaeDecoder(nn.Module):
    """Latents as the UNet takes them [images, C, h, w] to pixels [images, 3, H, W] in [-1, 1]."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.vae = base.vae
        self.scale = float(base.vae.config.scaling_factor)
        self.shift = float(base.vae.config.get("shift_factor") or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.scale + self.shift, return_dict=False)[0]


def build(base: Base, decoder: WeightDecoder) -> tuple[Graph, ...]:
    """The graphs in the order in which a picture needs them.

    Makes every attention of `base.unet` a `RowAttention`.
    """
    lora_layers.install(base.unet, operators.attend)
    layout = decoder.layout
    unet, vision, length = base.unet.config, base.image_encoder.config, base.tokenizer.model_max_length
    size = vision.image_size
    features = _f32("features", "photos", (size // vision.patch_size) ** 2 + 1, vision.hidden_size)
    lora_q, lora_kv = (layout.size(name) for name in ("lora_q", "lora_kv"))
    hidden = (length, base.text_encoder.config.hidden_size)
    context = _f32("context", "rows", length, sum(site.d_out for site in layout.sites_of("lora_kv")))
    gate = _f32("gate", "rows")
    latent = ("images", unet.in_channels, unet.sample_size, unet.sample_size)
    pixels = unet.sample_size * 2 ** (len(base.vae.config.block_out_channels) - 1)
    step = (
        *(_f32(name, *latent) for name in ("latents", "previous", "noise")),
        *(_f32("timestep"), _f32("coefficients", 7), _f32("guidance", "branches")),
        *(context, gate, _f32("lora_q", "subjects", lora_q)),
    )
    return (
        Graph("image_encoder", ImageEncoder(base), (_f32("pixels", "photos", 3, size, size),), (features,)),
        Graph(
            "weight_decoder", PackedDecoder(decoder), (features,),
            (_f32("lora_q", "photos", lora_q), _f32("lora_kv", "photos", lora_kv)),
        ),
        Graph(
            "text_encoder", TextEncoder(base), (TensorSpec("input_ids", ("prompts", length), "int64"),),
            (_f32("hidden_states", "prompts", *hidden),), integers=base.text_encoder.config.vocab_size,
        ),
        Graph(
            "context", Context(base, layout),
            (_f32("hidden_states", "rows", *hidden), gate, _f32("lora_kv", "subjects", lora_kv)), (context,),
        ),
        Graph(
            "denoiser", Denoiser(base, layout), step,
            (_f32("next_latents", *latent), _f32("denoised", *latent)),
        ),
        Graph(
            "vae_decoder", VaeDecoder(base), (_f32("latents", *latent),),
            (_f32("pixels", "images", 3, pixels, pixels),),
        ),
    )  # fmt: skip


def weights_of(graph: Graph) -> int:
    """How many numbers the graph stores: K and V projections are in `context` and not in `denoiser`."""
    sizes = {name: parameter.numel() for name, parameter in graph.module.named_parameters()}
    hoisted = {name for name in sizes if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    if graph.name == "context":
        return sum(sizes[name] for name in hoisted)
    if graph.name == "vae_decoder":
        return sum(
            n for name, n in sizes.items() if name.startswith(("vae.decoder.", "vae.post_quant_conv."))
        )
    return sum(sizes[name] for name in sizes.keys() - hoisted)


def _f32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, shape, "float32")
