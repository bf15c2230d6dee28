"""What a bundle is made from, and what its manifest says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import CLIPTokenizer

from hyperrt.bundle import Betas, ImagePrompt, Preprocess
from hyperrt.errors import UsageError
from hyperrt.export.errors import ExportError
from hyperrt.export.parts import Part
from hyperrt.lora import LoraLayout
from hyperrt.solvers import BETA_SCHEDULES, PREDICTION_TYPES
from hyperrt.training import features, image_prompt, lora_layers


@dataclass(frozen=True)
class Inputs:
    """What a bundle is made from, as the user says it.

    Attributes:
        base: diffusers folder, single .safetensors file, or hub id with its commit (OWNER/NAME@COMMIT); None
            for the base that the hypernetwork was trained on.
        hypernet: checkpoint of the weight decoder, or its folder.
        random_weights: a seed: random weights of the family's sizes in place of all others.
        image_encoder: folder of the ViT that the hypernetwork reads, where the base model's has none.
        image_prompt: IP-Adapter-Plus file, for the open category.
        like: for a single file, see `loading.find`.
        offline: no network.
        size: of the pictures, in pixels; None: what the UNet was trained for.
    """

    base: str | Path | None = None
    hypernet: Path | None = None
    random_weights: int | None = None
    image_encoder: Path | None = None
    image_prompt: Path | None = None
    like: str | None = None
    offline: bool = False
    size: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """What a bundle is made from.

    Attributes:
        parts: unet, vae, text_encoder, image_encoder and weight_decoder; SDXL: text_encoder_2; open category:
            image_prompt.
        scheduler: configuration of the noise schedule.
        token: stands for the subject in prompts.
        image_size: of the pictures, in pixels.
        pad_2: id that fills the second text encoder's prompts.
        zero_empty: whether an empty prompt is all zeros and not encoded.
        license: what the bundle's LICENSES says.
        image_scale: of the image prompt, that the hypernetwork was trained with.
    """

    parts: Mapping[str, Part]
    tokenizer: CLIPTokenizer
    scheduler: Mapping[str, Any]
    layout: LoraLayout
    token: str
    image_size: int
    license: str
    pad_2: int | None = None
    zero_empty: bool = False
    image_scale: float = image_prompt.SCALE

    def config(self, part: str) -> Any:
        """The configuration of a part."""
        return self.parts[part].skeleton.config

    @property
    def is_sdxl(self) -> bool:
        """Whether there are two text encoders, pooled text and sizes."""
        return "text_encoder_2" in self.parts

    @property
    def max_tokens(self) -> int:
        """Length of an encoded prompt."""
        return int(self.tokenizer.model_max_length)

    @property
    def text_width(self) -> int:
        """Of the hidden states that the UNet reads."""
        names = [name for name in ("text_encoder", "text_encoder_2") if name in self.parts]
        return sum(self.config(name).hidden_size for name in names)

    @property
    def latent_size(self) -> int:
        """Of the latents, in their own pixels."""
        return self.image_size // vae_factor(self.parts["vae"])


def betas(source: Source) -> Betas:
    """The noise schedule for the manifest.

    Raises:
        ExportError: the runtime does not know it.
    """
    config = source.scheduler
    found = config.get("beta_schedule", "linear")  # diffusers' default
    what = "the base model has an unknown noise schedule"
    if found not in BETA_SCHEDULES or config.get("trained_betas") is not None:
        raise ExportError(what, f"its beta_schedule is {found!r}", "train it with scaled_linear")
    if config.get("rescale_betas_zero_snr"):
        why = "rescale_betas_zero_snr leaves no signal at the last timestep, where solvers divide by it"
        raise ExportError(what, why, "use a model without it")
    start, end = config.get("beta_start"), config.get("beta_end")
    try:
        return Betas(found, start, end, config.get("num_train_timesteps", 1000))
    except (TypeError, ValueError) as error:
        why = f"its betas go from {start!r} to {end!r}; it must be 0 < start < end < 1"
        raise ExportError(what, why, "use a model whose scheduler_config.json has them") from error


def prediction_type(source: Source) -> Any:
    """What the UNet predicts, for the manifest; diffusers' default where the configuration does not say.

    Raises:
        ExportError: the runtime does not know it.
    """
    found = source.scheduler.get("prediction_type", "epsilon")
    if found not in PREDICTION_TYPES:
        why = f"its prediction_type is {found!r}; known are {', '.join(sorted(PREDICTION_TYPES))}"
        raise ExportError("the base model predicts something unknown", why, "use another model")
    return found


def timestep_spacing(source: Source) -> Literal["leading", "trailing"]:
    """diffusers' word for the manifest; "linspace" of old configurations is close to "leading"."""
    return "trailing" if source.scheduler.get("timestep_spacing") == "trailing" else "leading"


def preprocess(source: Source) -> Preprocess:
    """Photo preprocessing for the manifest: that of training/features.py."""
    return features.preprocess_of(source.config("image_encoder"))


def image_prompt_section(source: Source) -> ImagePrompt | None:
    """What the manifest says of the image prompt."""
    if "image_prompt" not in source.parts:
        return None
    prompt: Any = source.parts["image_prompt"].skeleton
    return ImagePrompt(tokens=prompt.count, width=prompt.width, scale=source.image_scale)


def sized(source: Source, size: int | None) -> Source:
    """`source` for pictures of another size; what its UNet cannot halve as often as it must is refused.

    Raises:
        UsageError: such a size.
        ExportError: the graphs cannot express the UNet, or the runtime the noise schedule.
    """
    unet = source.parts["unet"].skeleton.config
    step = vae_factor(source.parts["vae"]) * 2 ** (len(unet.block_out_channels) - 1)
    wanted = source.image_size if size is None else size
    if wanted % step or not step <= wanted <= 4 * source.image_size:
        why = f"it takes multiples of {step} from {step} to {4 * source.image_size}"
        do = f"leave --size out for {source.image_size}, which the model was trained for"
        raise UsageError(f"the model cannot draw pictures of {wanted} pixels", why, do)
    _check_unet(source)
    betas(source)  # what the manifest cannot say is known before the work, not after
    prediction_type(source)
    return dataclasses.replace(source, image_size=wanted)


def _check_unet(source: Source) -> None:
    """Refuse conditions that the graphs do not compute."""
    unet = source.parts["unet"].skeleton
    config = unet.config
    latent = source.parts["vae"].skeleton.config.latent_channels
    odd = {
        "addition_embed_type": config.addition_embed_type not in (None, "text_time"),
        "class_embed_type": config.class_embed_type is not None or config.num_class_embeds is not None,
        "encoder_hid_dim_type": config.encoder_hid_dim_type is not None,
        "time_cond_proj_dim": config.time_cond_proj_dim is not None,
        "in_channels": config.in_channels != latent,
        "cross_attention_dim": config.cross_attention_dim != source.text_width,
    }
    found = [f"{name} is {config.get(name)!r}" for name, is_odd in odd.items() if is_odd]
    try:
        lora_layers.install(unet)
    except ValueError as error:
        found.append(str(error))
    if found:
        do = "give a text-to-image Stable Diffusion 1 or XL model"
        raise ExportError("the UNet is of a kind that is not known", "; ".join(found), do)


def vae_factor(vae: Part) -> int:
    """Pixels per latent."""
    return int(2 ** (len(vae.skeleton.config.block_out_channels) - 1))
