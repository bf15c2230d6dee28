"""The source of a bundle, its networks and settings, and the manifest's sections about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import CLIPTokenizer

from hyperrt.bundle.bundle import Betas, ImagePrompt, Preprocess
from hyperrt.errors import UsageError
from hyperrt.export.errors import ExportError
from hyperrt.export.parts import ModelPart
from hyperrt.lora.layout import LoraLayout
from hyperrt.training.model import image_prompt, noise_schedule
from hyperrt.training.model.encode import preprocess_of
from hyperrt.training.model.latents import LatentScale


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """What a bundle is made from.

    Attributes:
        parts: unet, vae, text_encoder, image_encoder and weight_decoder; SDXL: text_encoder_2; open category:
            image_prompt.
        scheduler: configuration of the noise schedule.
        token: stands for the subject in prompts.
        image_size: side of the pictures, in pixels.
        tokenizer_2: of SDXL's second text encoder; only its pad token differs.
        zero_empty: whether an empty prompt becomes zeros instead of being encoded.
        license: text of the bundle's LICENSES.
        image_scale: weight of the image prompt in the hypernetwork's training.
    """

    parts: Mapping[str, ModelPart]
    tokenizer: CLIPTokenizer
    scheduler: Mapping[str, Any]
    layout: LoraLayout
    token: str
    image_size: int
    license: str
    tokenizer_2: CLIPTokenizer | None = None
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
    def pad(self) -> int | None:
        """Id that fills prompts after their end token; None: the end token itself."""
        pad = self.tokenizer.pad_token_id
        return None if pad == self.tokenizer.eos_token_id else int(pad)

    @property
    def pad_2(self) -> int | None:
        """The same for the second text encoder; None without one."""
        return None if self.tokenizer_2 is None else int(self.tokenizer_2.pad_token_id)

    @property
    def latent_scale(self) -> LatentScale:
        """The scale between the UNet's latents and the VAE's.

        Raises:
            ValueError: the VAE's configuration has a setting that diffusers' pipeline does not read.
        """
        return LatentScale.of(self.config("vae"), self.is_sdxl)

    @property
    def max_tokens(self) -> int:
        """Length of an encoded prompt, in tokens."""
        return int(self.tokenizer.model_max_length)

    @property
    def text_width(self) -> int:
        """Width of the hidden states that the UNet reads."""
        names = [name for name in ("text_encoder", "text_encoder_2") if name in self.parts]
        return sum(self.config(name).hidden_size for name in names)

    @property
    def latent_size(self) -> int:
        """Side of the latents."""
        return self.image_size // vae_factor(self.parts["vae"])


def betas(source: Source) -> Betas:
    """The noise schedule for the manifest.

    Raises:
        ExportError: the runtime does not support it.
    """
    config = source.scheduler
    if why := noise_schedule.fault(config, is_sdxl=source.is_sdxl):
        raise unknown_noise(why)
    start, end = config.get("beta_start"), config.get("beta_end")
    try:
        return Betas(
            config.get("beta_schedule", "linear"), start, end, config.get("num_train_timesteps", 1000)
        )
    except (TypeError, ValueError) as error:
        why = f"its betas go from {start!r} to {end!r}; it must be 0 < start < end < 1"
        raise unknown_noise(why) from error


def unknown_noise(why: str) -> ExportError:
    """The error for a noise schedule that the solvers do not support."""
    do = "use a model whose scheduler_config.json has the betas that it was trained with"
    return ExportError("the base model has an unknown noise schedule", why, do)


def prediction_type(source: Source) -> Any:
    """What the UNet predicts, for the manifest; by default diffusers' "epsilon"."""
    return source.scheduler.get("prediction_type", "epsilon")


def timestep_spacing(source: Source) -> Literal["leading", "trailing"]:
    """diffusers' setting, for the manifest; "linspace" of old configurations is close to "leading"."""
    return "trailing" if source.scheduler.get("timestep_spacing") == "trailing" else "leading"


def preprocess(source: Source) -> Preprocess:
    """Photo preprocessing for the manifest, as in training."""
    return preprocess_of(source.config("image_encoder"))


def image_prompt_section(source: Source) -> ImagePrompt | None:
    """The manifest's section about the image prompt, or None."""
    if "image_prompt" not in source.parts:
        return None
    prompt: Any = source.parts["image_prompt"].skeleton
    return ImagePrompt(tokens=prompt.count, width=prompt.width, scale=source.image_scale)


def sized(source: Source, size: int | None) -> Source:
    """`source` for pictures of another size, in pixels; None keeps the size.

    Raises:
        UsageError: the UNet cannot halve the latents as often as it must, or the size is out of range.
    """
    unet = source.parts["unet"].skeleton.config
    step = vae_factor(source.parts["vae"]) * 2 ** (len(unet.block_out_channels) - 1)
    size = source.image_size if size is None else size
    if size % step or not step <= size <= 4 * source.image_size:
        why = f"it takes multiples of {step} from {step} to {4 * source.image_size}"
        do = f"leave --size out for {source.image_size}, which the model was trained for"
        raise UsageError(f"the model cannot draw pictures of {size} pixels", why, do)
    return dataclasses.replace(source, image_size=size)


def save_tokenizer(source: Source, path: Path) -> None:
    """Writes the first tokenizer as the runtime reads it."""
    tokenizer = source.tokenizer.backend_tokenizer
    # transformers keeps the padding of the last text that it encoded; the runtime pads and cuts by itself.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(path))


def vae_factor(vae: ModelPart) -> int:
    """Pixels per latent, along one side."""
    return int(2 ** (len(vae.skeleton.config.block_out_channels) - 1))
