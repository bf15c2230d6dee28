"""Specifies the graphs of a bundle: the module, parts, inputs and outputs of each.

Names, shapes and meaning of all tensors: docs/bundle-format.md. Dims: photos, prompts, images and branches
are free; rows = branches x images, branch-major; subjects is 1 (one LoRA for all rows) or rows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from hyperrt.engines.tensors import TensorSpec
from hyperrt.export import modules, operators, row_unet
from hyperrt.export.parts import FAKE
from hyperrt.export.source import Source
from hyperrt.lora.layout import LoraLayout
from hyperrt.plans import compare
from hyperrt.training.model import lora_layers, resampler

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True, eq=False)
class GraphSpec:
    """One graph: a module whose `forward` takes `inputs` by name and returns `outputs` in order.

    parts: names of the parts that it is made from.
    make:  the module to trace, from modules of these parts, whose attention it replaces.
    hold:  the same for their weights alone, which leaves the modules as diffusers has them.
    refit: layout of the LoRA, if its factors become constants of the file in place of the input lora_q.
    """

    name: str
    parts: tuple[str, ...]
    make: Callable[[Modules], modules.GraphModule]
    hold: Callable[[Modules], modules.GraphModule]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    integers: int = 0  # upper bound of integer inputs, exclusive
    refit: LoraLayout | None = None

    @property
    def file_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of the file."""
        return tuple(spec for spec in self.inputs if self.refit is None or spec.name != "lora_q")

    @property
    def weights(self) -> tuple[TensorSpec, ...]:
        """The constants of the file that a refit replaces."""
        return () if self.refit is None else self.refit.constants("lora_q")

    def feeds(self, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        """Random inputs; `sizes` of the symbolic dims."""
        arrays = compare.random_feeds(self.inputs, sizes, seed, self.integers)
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


@dataclass(frozen=True)
class ImagePromptShape:
    """Number of image tokens and their width; both 0 without an image prompt."""

    tokens: int = 0
    width: int = 0


def build(source: Source, adapt: str = "inputs") -> tuple[GraphSpec, ...]:
    """The graphs in the order in which a picture needs them.

    adapt: how the LoRA enters the denoiser, "inputs" or "refit".

    Raises:
        ExportError: the graphs do not compute the UNet's kind of attention or condition.
    """
    image = ImagePromptShape()
    if "image_prompt" in source.parts:
        prompt = source.parts["image_prompt"].skeleton
        image = ImagePromptShape(prompt.count, prompt.width)
    denoiser = _denoiser_graph(source, image)
    if adapt == "refit":
        denoiser = dataclasses.replace(denoiser, refit=source.layout)
    return (
        *_photo_graphs(source, image),
        _text_graph(source),
        _context_graph(source, image),
        denoiser,
        _vae_graph(source),
    )


# Names of the weights that a graph holds, for graphs that do not hold all weights of their parts.
HELD = {
    "context": re.compile(r"attn2\.to_[kv]\.|add_embedding\.|\.ip_adapter\."),
    "denoiser": re.compile(r"^(?!.*(attn2\.to_[kv]\.|add_embedding\.))"),
    "vae_decoder": re.compile(r"^vae\.(decoder|post_quant_conv)\."),
}


def numbers_of(graph: GraphSpec, skeletons: Modules) -> int:
    """About how many weights the graph holds: K and V projections are in `context` and not in `denoiser`."""
    with FAKE:
        names = graph.make(skeletons).named_parameters()
    held = HELD.get(graph.name, re.compile(""))
    return sum(parameter.numel() for name, parameter in names if held.search(name))


def _photo_graphs(source: Source, image: ImagePromptShape) -> tuple[GraphSpec, ...]:
    vision = source.config("image_encoder")
    patches = (vision.image_size // vision.patch_size) ** 2
    features = _f32("features", "photos", patches + 1, vision.hidden_size)
    pixels = _f32("pixels", "photos", 3, vision.image_size, vision.image_size)
    vectors = tuple(_f32(name, "photos", source.layout.size(name)) for name in ("lora_q", "lora_kv"))
    graphs = (
        _graph("image_encoder", modules.ImageEncoder, ("image_encoder",), (pixels,), (features,)),
        _graph("weight_decoder", modules.PackedDecoder, ("weight_decoder",), (features,), vectors),
    )
    if not image.tokens:
        return graphs
    shape = (image.tokens, image.width)
    tokens = (_f32("image_tokens", "photos", *shape), _f32("zero_tokens", 1, *shape))
    parts = ("image_prompt", "image_encoder")
    return (*graphs, _graph("image_prompt", modules.ImageTokens, parts, (features,), tokens))


def _text_graph(source: Source) -> GraphSpec:
    ids = ("prompts", source.max_tokens)
    names = [name for name in ("text_encoder", "text_encoder_2") if name in source.parts]
    inputs = tuple(TensorSpec(f"input_ids{name[12:]}", ids, "int64") for name in names)
    outputs = [_f32("hidden_states", *ids, source.text_width)]
    module: type[modules.GraphModule] = modules.OneTextEncoder
    if source.is_sdxl:
        module = modules.TwoTextEncoders
        outputs.append(_f32("pooled", "prompts", source.config("text_encoder_2").projection_dim))
    vocabulary = source.config("text_encoder").vocab_size
    return _graph("text_encoder", module, tuple(names), inputs, tuple(outputs), integers=vocabulary)


def _context_graph(source: Source, image: ImagePromptShape) -> GraphSpec:
    inputs = [_f32("hidden_states", "rows", source.max_tokens, source.text_width)]
    outputs = [_context_spec(source, image)]
    if source.is_sdxl:
        inputs.append(_f32("pooled", "rows", source.config("text_encoder_2").projection_dim))
        inputs.append(_f32("time_ids", "rows", 6))
        outputs.append(_added_spec(source))
    inputs += [_f32("gate", "rows"), _f32("lora_kv", "subjects", source.layout.size("lora_kv"))]
    parts = ["unet"]
    if image.tokens:
        inputs += [_f32("image_tokens", "rows", image.tokens, image.width), _f32("image_scale", "rows")]
        parts.append("image_prompt")
    cls = modules.ContextWithAdded if source.is_sdxl else modules.Context
    return _graph("context", cls, tuple(parts), tuple(inputs), tuple(outputs), layout=source.layout)


def _denoiser_graph(source: Source, image: ImagePromptShape) -> GraphSpec:
    latent = ("images", source.config("unet").in_channels, source.latent_size, source.latent_size)
    inputs = [
        *(_f32(name, *latent) for name in ("latents", "previous", "noise")),
        *(_f32("timestep"), _f32("coefficients", 7), _f32("guidance", "branches")),
        *(_context_spec(source, image), _f32("gate", "rows")),
        _f32("lora_q", "subjects", source.layout.size("lora_q")),
    ]
    if source.is_sdxl:
        inputs.append(_added_spec(source))
    outputs = (_f32("next_latents", *latent), _f32("denoised", *latent))
    return _graph(
        "denoiser", modules.DenoisingStep, ("unet",), tuple(inputs), outputs,
        layout=source.layout, image_tokens=image.tokens,
    )  # fmt: skip


def _vae_graph(source: Source) -> GraphSpec:
    channels = source.config("unet").in_channels
    if isinstance(source.parts["vae"].skeleton, AutoencoderTiny):  # small: never decoded in tiles
        latent, pixels = (source.latent_size,) * 2, (source.image_size,) * 2
    else:
        latent, pixels = ("h", "w"), ("H", "W")
    inputs, outputs = (_f32("latents", "images", channels, *latent),), (_f32("pixels", "images", 3, *pixels),)
    return _graph("vae_decoder", modules.VaeDecoder, ("vae",), inputs, outputs, scale=source.latent_scale)


def _context_spec(source: Source, image: ImagePromptShape) -> TensorSpec:
    width = sum(site.d_out for site in source.layout.sites_of("lora_kv"))
    return _f32("context", "rows", source.max_tokens + image.tokens, width)


def _added_spec(source: Source) -> TensorSpec:
    unet: Any = source.parts["unet"].skeleton
    return _f32("added", "rows", unet.add_embedding.linear_2.out_features)


def _graph(
    name: str,
    cls: type[modules.GraphModule],
    parts: tuple[str, ...],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    integers: int = 0,
    **options: object,
) -> GraphSpec:
    """A graph whose module is made by `cls` from the modules of `parts`, in their order."""

    def hold(loaded: Modules) -> modules.GraphModule:
        return cls(*(loaded[part] for part in parts), **options)

    def make(loaded: Modules) -> modules.GraphModule:
        for part in parts:
            _use_operators(part, loaded[part])
        return hold(loaded)

    return GraphSpec(name, parts, make, hold, inputs, outputs, integers)


def _use_operators(part: str, module: nn.Module) -> None:
    """Gives a part the attention that becomes one node, and the cheaper upsampling."""
    if part == "unet":
        lora_layers.install(module, operators.attend, operators.attend_again)
        modules.feed_added(module)
        row_unet.install(module)
    elif part == "vae":
        modules.attend_in_vae(module)
        row_unet.install(module)
    elif part in ("image_prompt", "weight_decoder"):
        resampler.use_attention(module, operators.attend)


def _f32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, shape, "float32")
