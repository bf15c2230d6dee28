"""Refuses base models with settings that the graphs do not compute, before the work.

Most settings need no check: networks are exported as diffusers and transformers build them from their
configurations. Checked are those that a pipeline of diffusers reads, and those for which the graphs replace
diffusers' code. docs/base-model-settings.md has the whole table.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderTiny

from hyperrt.export.errors import ExportError
from hyperrt.export.source import Source, betas
from hyperrt.training.model import lora_layers
from hyperrt.training.model.latents import LatentScale

TIME_IDS = 6  # SDXL: height and width, top and left of the crop, height and width of the target
TEXT_TO_IMAGE = "give a text-to-image Stable Diffusion 1, 2 or XL model"


def check(source: Source) -> None:
    """Checks that the graphs compute what diffusers' pipeline does with this model.

    Raises:
        ExportError: they do not.
    """
    for name, faults in (
        ("UNet", _unet(source)), ("VAE", _vae(source)), ("text encoder", _text_encoder(source)),
    ):  # fmt: skip
        if faults:
            what = f"the {name} is of a kind that is not known"
            raise ExportError(what, "; ".join(faults), TEXT_TO_IMAGE)
    betas(source)


def _unet(source: Source) -> list[str]:
    unet: Any = source.parts["unet"].skeleton
    config = unet.config
    odd = {
        "addition_embed_type": config.addition_embed_type != ("text_time" if source.is_sdxl else None),
        "class_embed_type": config.class_embed_type is not None,
        "class_embeddings_concat": bool(config.class_embeddings_concat),
        "num_class_embeds": config.num_class_embeds is not None,
        "encoder_hid_dim_type": config.encoder_hid_dim_type is not None,
        "time_cond_proj_dim": config.time_cond_proj_dim is not None,
        "in_channels": config.in_channels != source.config("vae").latent_channels,
        "out_channels": config.out_channels != config.in_channels,
        "cross_attention_dim": config.cross_attention_dim != source.text_width,
        # With these attn1 reads the text too, or two texts; the graph `context` projects it for attn2 only.
        "only_cross_attention": _any(config.only_cross_attention),
        "dual_cross_attention": bool(config.dual_cross_attention),
        "attention_type": config.attention_type != "default",  # such as GLIGEN's boxes
    }
    if source.is_sdxl and config.addition_embed_type == "text_time":
        width = source.config("text_encoder_2").projection_dim + TIME_IDS * config.addition_time_embed_dim
        # SDXL's refiner has 5 time ids, one of them an aesthetics score.
        odd["projection_class_embeddings_input_dim"] = config.projection_class_embeddings_input_dim != width
    faults = [f"{name} is {config.get(name)!r}" for name, is_odd in odd.items() if is_odd]
    try:
        lora_layers.install(unet)
    except ValueError as error:
        faults.append(str(error))
    return faults


def _any(value: Any) -> bool:
    return any(value) if isinstance(value, (list, tuple)) else bool(value)


def _vae(source: Source) -> list[str]:
    config, faults = source.config("vae"), []
    if config.out_channels != 3:
        faults.append(f"out_channels is {config.out_channels!r}; a picture has 3")
    tiny = isinstance(source.parts["vae"].skeleton, AutoencoderTiny)
    if tiny and config.upsampling_scaling_factor != 2:
        faults.append(f"upsampling_scaling_factor is {config.upsampling_scaling_factor!r}; it must be 2")
    try:
        LatentScale.of(config, source.is_sdxl)
    except ValueError as error:
        faults.append(str(error))
    return faults


def _text_encoder(source: Source) -> list[str]:
    config = source.config("text_encoder")
    # SDXL's pipeline does not read this setting.
    if getattr(config, "use_attention_mask", False) and not source.is_sdxl:
        return ["use_attention_mask is True; the graphs attend to the whole length of a prompt"]
    return []
