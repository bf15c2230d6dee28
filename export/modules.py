"""The graphs of a bundle as PyTorch modules that wrap those of the base model and the hypernetwork.

Names, shapes and meaning of all tensors: docs/bundle-format.md. rows = branches x images, branch-major.
Inputs and outputs are fp32 at every precision of the arithmetic (export/precision.py).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hyperrt.export import operators, row_unet
from hyperrt.lora.layout import LoraLayout
from hyperrt.training.model import encode, lora_layers
from hyperrt.training.model.latents import LatentScale
from hyperrt.training.model.lora_layers import Rows


class GraphModule(nn.Module):
    """Base of the modules below; `precision.apply` sets `dtype`, the type of the arithmetic."""

    dtype = torch.float32


class ImageEncoder(GraphModule):
    """pixels [photos, 3, S, S] to features [photos, T, F]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return encode.encode_pixels(self.encoder, pixels.to(self.dtype)).float()


class PackedDecoder(GraphModule):
    """features [photos, T, F] to lora_q [photos, Nq] and lora_kv [photos, Nkv]."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        packed = self.decoder(features.to(self.dtype))
        return packed["lora_q"].float(), packed["lora_kv"].float()


class ImageTokens(GraphModule):
    """features [photos, T, F] to image_tokens [photos, N, D] and zero_tokens [1, N, D] (of zero pixels)."""

    def __init__(self, image_prompt: Any, encoder: nn.Module) -> None:
        super().__init__()
        self.resampler = image_prompt.image_proj
        # Computed in fp32, then rounded to fp16 as all stored weights are.
        _make_fp32(image_prompt.image_proj)
        _make_fp32(encoder)
        self.register_buffer("of_zero_pixels", image_prompt.zero_tokens(encoder).half().float())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.resampler(features.to(self.dtype)).float(), self.of_zero_pixels.float().clone()


def _make_fp32(module: nn.Module) -> None:
    """Converts a module in place, but not a skeleton: PyTorch refuses to convert fake weights."""
    if not isinstance(next(module.parameters()), FakeTensor):
        module.float()


class OneTextEncoder(GraphModule):
    """input_ids [prompts, L] to hidden_states [prompts, L, D]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids).last_hidden_state.float()


class TwoTextEncoders(GraphModule):
    """SDXL: ids of both [prompts, L] to hidden_states [prompts, L, D1 + D2] and pooled [prompts, P]."""

    def __init__(self, encoder: nn.Module, encoder_2: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder_2 = encoder_2

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, pooled = encode.encode_ids(self.encoder, self.encoder_2, input_ids, input_ids_2)
        return hidden_states.float(), pooled.float()


class Context(GraphModule):
    """Prompts to K and V of every cross-attention, including the K/V LoRA: [rows, L, W].

    With an image prompt, K and V of its tokens follow those of the text; its V is multiplied by image_scale.
    """

    def __init__(self, unet: nn.Module, image_prompt: nn.Module | None = None, *, layout: LoraLayout) -> None:
        super().__init__()
        self.unet = unet
        self.layout = layout
        self.image_prompt = image_prompt

    def forward(
        self,
        hidden_states: Tensor,
        gate: Tensor,
        lora_kv: Tensor,
        image_tokens: Tensor | None = None,
        image_scale: Tensor | None = None,
    ) -> Tensor:
        image = None
        if self.image_prompt is not None:
            image = self.image_prompt.key_values(image_tokens.to(self.dtype), image_scale.to(self.dtype))
        text, gate, lora_kv = (x.to(self.dtype) for x in (hidden_states, gate, lora_kv))
        return lora_layers.context(self.unet, text, gate, lora_kv, self.layout, image).float()


class ContextWithAdded(Context):
    """SDXL: also `added` [rows, E], the embedding of pooled text and sizes for the time embedding."""

    def forward(  # in the order of the graph's inputs
        self,
        hidden_states: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        gate: Tensor,
        lora_kv: Tensor,
        image_tokens: Tensor | None = None,
        image_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        context = super().forward(hidden_states, gate, lora_kv, image_tokens, image_scale)
        return context, self._added(pooled, time_ids).float()

    def _added(self, pooled: Tensor, time_ids: Tensor) -> Tensor:
        sizes = self.unet.add_time_proj(time_ids.flatten()).reshape(time_ids.shape[0], -1)
        return self.unet.add_embedding(torch.cat([pooled, sizes], dim=-1).to(self.dtype))


class DenoisingStep(GraphModule):
    """One step of the loop: tiling to rows, UNet with Q LoRA; in fp32 the guidance sum and solver update.

    x            = tile(c0 latents)                                         export/row_unet.py
    g            = sum_b guidance_b UNet(x, timestep, context, lora)_b      paper eq. 20
    next_latents = c1 latents + c2 g + c3 previous + c4 noise               hyperrt/sampling/solvers.py
    denoised     = c5 latents + c6 g
    """

    def __init__(self, unet: nn.Module, *, layout: LoraLayout, image_tokens: int = 0) -> None:
        super().__init__()
        self.unet = unet
        self.layout = layout
        self.image_tokens = image_tokens  # how many tokens of the context are the image prompt's

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
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        factors = lora_layers.unpack(self.layout, {"lora_q": lora_q.to(self.dtype)})
        gates = gate.to(self.dtype).reshape(-1, 1, 1)
        text, image = lora_layers.split_text_and_image(self.unet, context.to(self.dtype), self.image_tokens)
        rows = Rows(factors, gates, text, image)
        return self.step(latents, previous, noise, timestep, coefficients, guidance, gate, rows, added)

    def step(
        self,
        latents: Tensor,
        previous: Tensor,
        noise: Tensor,
        timestep: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        gate: Tensor,
        rows: Rows,
        added: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The step, given all that the UNet reads beside the latents as `rows`."""
        c = coefficients
        x = (latents * c[0]).to(self.dtype)
        added = None if added is None else added.to(self.dtype)
        output = row_unet.predict(
            self.unet, x, timestep, rows, lambda x: torch.ops.hyperrt.rows_from_images(x, gate), added
        )
        g = torch.ops.hyperrt.combine(output.float(), guidance, latents)
        following = c[1] * latents + c[2] * g + c[3] * previous + c[4] * noise
        return following, c[5] * latents + c[6] * g


class VaeDecoder(GraphModule):
    """Latents of the UNet [images, C, h, w] to pixels [images, 3, H, W] in [-1, 1]."""

    def __init__(self, vae: Any, *, scale: LatentScale) -> None:
        super().__init__()
        self.vae = vae
        self.scale = scale

    def forward(self, latents: Tensor) -> Tensor:
        z = self.scale.for_vae(latents).to(self.dtype)
        return self.vae.decode(z, return_dict=False)[0].float()


def feed_added(unet: Any) -> None:
    """Makes SDXL's UNet take `added` [rows, E] as an argument, in place of pooled text and sizes."""
    if unet.config.addition_embed_type == "text_time":
        unet.get_aug_embed = _added


def _added(emb: Tensor, encoder_hidden_states: Tensor | None, added_cond_kwargs: dict[str, Tensor]) -> Tensor:
    return added_cond_kwargs["added"]


def attend_in_vae(vae: nn.Module) -> None:
    """Makes the decoder's attention one operator: written out it would store 16384² scores."""
    for module in vae.modules():
        if isinstance(module, Attention):
            module.set_processor(_VaeAttention())


class _VaeAttention:
    """Self-attention over the pixels of hidden_states [images, C, h, w], with group norm and residual."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        images, channels, height, width = hidden_states.shape
        x = attn.group_norm(hidden_states.reshape(images, channels, height * width)).transpose(1, 2)
        x = operators.attend(attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.heads)
        x = attn.to_out[0](x).transpose(1, 2).reshape(images, channels, height, width)
        return (x + hidden_states) / attn.rescale_output_factor
