"""The base model as a folder in diffusers' format, and the sizes of the `tiny` one.

    BASE/{unet,vae,text_encoder,tokenizer,scheduler,image_encoder}/ and model_index.json

`image_encoder` is not part of Stable Diffusion: it is the frozen ViT of the hypernetwork. SDXL also has
text_encoder_2/ and tokenizer_2/.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTModel,
)
from transformers.utils.logging import disable_progress_bar

from hyperrt.errors import HyperRTError, IntegrityError, NotFound
from hyperrt.training.model import model_config
from hyperrt.training.model.latents import LatentScale

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

IMAGE_SIZE = 64
MAX_TOKENS = 24
TEXT_WIDTH = 128
LATENT_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen parts that encode pictures and prompts; fp32 and in eval mode.

    Attributes:
        text_encoder_2, tokenizer_2: SDXL's, else None.
        zero_empty: whether the empty prompt is all zeros instead of being encoded.
    """

    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    image_encoder: ViTModel | CLIPVisionModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    zero_empty: bool = False

    @property
    def is_sdxl(self) -> bool:
        """Whether the model has SDXL's second text encoder."""
        return self.text_encoder_2 is not None

    @property
    def latent_scale(self) -> LatentScale:
        """The scale between the VAE's latents and the UNet's; errors as `LatentScale.of`."""
        return LatentScale.of(self.vae.config, self.is_sdxl)


@dataclass(frozen=True, kw_only=True)
class Base(Encoders):
    """All the frozen parts."""

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler


def tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids [prompts, L]."""
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def tiny_unet() -> UNet2DConditionModel:
    """9.4 M weights on latents [C, 8, 8]; attention at both levels, seven cross-attentions in all."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 192), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
    )  # fmt: skip


def tiny_vae() -> AutoencoderTiny:
    """No normalisation and nothing at full resolution but two convolutions: an AutoencoderKL of the same cost
    normalises each picture's colours away at first, and was 4 dB behind after ten times the training."""
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(48,) * 4, num_encoder_blocks=(0, 1, 2, 3),
        decoder_block_out_channels=(48,) * 4, num_decoder_blocks=(4, 3, 1, 0),
    )  # fmt: skip


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers: prompts of this world are a noun and a scene."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def tiny_image_encoder() -> ViTModel:
    """Features [65, 128]: one for the picture and one for each patch of 8 x 8 pixels."""
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        image_size=IMAGE_SIZE, patch_size=8,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def tiny_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction: at high noise, where the colours of a subject
    are settled, the error of v is the error of the picture; that of epsilon is the same divided by the
    noise."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


PARTS: dict[str, tuple[type[Any], ...]] = {  # classes that each part may have
    "unet": (UNet2DConditionModel,),
    "vae": (AutoencoderTiny, AutoencoderKL),
    "text_encoder": (CLIPTextModel,),
    "text_encoder_2": (CLIPTextModelWithProjection,),
    "tokenizer": (CLIPTokenizer,),
    "tokenizer_2": (CLIPTokenizer,),
    "image_encoder": (ViTModel, CLIPVisionModelWithProjection),
    "scheduler": (DDIMScheduler,),
}
CLIP_TEXT = ("clip_text_model", "clip")  # model_type of a text encoder, and of a whole CLIP's configuration
OF_SDXL = ("text_encoder_2", "tokenizer_2")
OF_TINY = tuple(name for name in PARTS if name not in OF_SDXL)
# transformers names weights of another shape only if it may ignore them; `read_part` does not.
NAMED = {"ignore_mismatched_sizes": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "CLIPTextModel": NAMED,
    "CLIPTextModelWithProjection": NAMED,
    "CLIPVisionModelWithProjection": NAMED,
    # The pooler is not part of the features, and a checkpoint without one would leave it empty.
    "ViTModel": NAMED | {"add_pooling_layer": False},
}


def load(folder: Path | str) -> Base:
    """Reads a base folder; no pickles.

    Raises:
        FileNotFoundError: the folder, or a part of it, is missing.
        ValueError: a part cannot be read, is of another class, lacks weights, or does not fit the others.
    """
    folder = Path(folder)
    model_config.check_index(folder, PARTS)
    return _checked(folder, Base(**_read_parts(folder, parts_of(folder))))


def load_encoders(folder: Path | str) -> Encoders:
    """The same without the UNet, which is the largest part; errors as `load`."""
    folder = Path(folder)
    names = [name for name in parts_of(folder) if name not in ("unet", "scheduler")]
    model_config.check_index(folder, PARTS)
    return _checked(folder, Encoders(**_read_parts(folder, names)))


def parts_of(folder: Path) -> tuple[str, ...]:
    """The names of its parts.

    Raises:
        FileNotFoundError: the folder, or a part of it, is missing.
    """
    names = (*OF_TINY, *OF_SDXL) if model_config.is_sdxl(folder) else OF_TINY
    if missing := [name for name in names if not (folder / name).is_dir()]:
        what = f"{folder} is not a base model: it has no {', '.join(missing)}"
        if missing == ["image_encoder"]:  # a model of diffusers
            what += "; add the folder of the ViT that the hypernetwork is to read"
        raise FileNotFoundError(what)
    return names


def _read_parts(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    disable_progress_bar()  # six bars for one model
    parts = {name: read_part(folder / name, name) for name in names}
    if "text_encoder_2" not in parts:
        return parts
    index = model_config.index_of(folder)
    return parts | {"zero_empty": bool(index.get("force_zeros_for_empty_prompt", True))}  # diffusers' default


def _checked(folder: Path, parts: Any) -> Any:
    """Returns the parts if each tokenizer fits its encoder and the VAE's latents can be scaled.

    Raises:
        ValueError: a tokenizer does not fit, or the latents cannot be scaled.
    """
    for name, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        tokenizer = getattr(parts, name)
        if tokenizer is not None and (why := model_config.misfit(tokenizer, getattr(parts, encoder).config)):
            raise ValueError(f"{folder / name}: {why}")
    try:
        LatentScale.of(parts.vae.config, parts.is_sdxl)
    except ValueError as error:
        raise ValueError(f"{folder / 'vae'}: {error}") from error
    return parts


def opened(folder: Path | str) -> Base:
    """`load` for a command; errors as `readable`."""
    with readable(folder, "make it again with hyperrt pretrain"):
        return load(folder)


@contextlib.contextmanager
def readable(folder: Path | str, remedy: str) -> Iterator[None]:
    """Turns errors of reading a folder into errors of a command.

    Raises:
        NotFound: the folder, or a part of it, is missing.
        IntegrityError: the folder cannot be read.
    """
    try:
        yield
    except HyperRTError:
        raise
    except FileNotFoundError as error:
        raise NotFound(f"{folder} is incomplete", str(error), remedy) from error
    except (ValueError, EOFError, OSError, IndexError) as error:
        why = str(error) or type(error).__name__
        raise IntegrityError(f"{folder} cannot be read", why, remedy) from error


def read_part(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """One part of a base folder (a key of `PARTS`), frozen and in eval mode; errors as `load`."""
    try:
        if name == "scheduler":
            return DDIMScheduler.from_config(model_config.scheduler(folder.parent))
        cls = class_of(folder, name)
        if not issubclass(cls, nn.Module):
            return cls.from_pretrained(folder)
        options = OPTIONS.get(cls.__name__, {})
        if cls.__module__.startswith("diffusers"):
            options = {"torch_dtype": dtype, "variant": _variant(folder, name)}
        else:
            options = options | {"dtype": dtype, "variant": _variant(folder, name)}
        part, info = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except MemoryError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors share no base class
        raise ValueError(f"{folder} cannot be read: {(str(error).strip() or repr(error))}") from error
    if lacking := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
        why = f"{len(lacking)} weights are missing or have another shape"
        raise ValueError(f"{folder}: {why}, the first is {lacking[0]}")
    return _as_pipelines_have_it(part, folder).to(dtype).eval().requires_grad_(False)


def empty_part(folder: Path, name: str) -> nn.Module:
    """The part that config.json describes, with fresh weights; errors as `load`."""
    try:
        cls = class_of(folder, name)
        if cls.__module__.startswith("diffusers"):
            return _as_pipelines_have_it(cls.from_config(cls.load_config(folder)), folder)
        options = {"add_pooling_layer": False} if cls is ViTModel else {}
        return cls(cls.config_class.from_pretrained(folder), **options)
    except Exception as error:  # as above
        raise ValueError(f"{folder} cannot be read: {(str(error).strip() or repr(error))}") from error


def _as_pipelines_have_it(part: Any, folder: Path) -> Any:
    """The part; a UNet with the sample_size that diffusers' pipeline would give it."""
    if isinstance(part, UNet2DConditionModel):
        part.register_to_config(sample_size=model_config.sample_size(part.config, folder.parent))
    return part


def class_of(folder: Path, name: str) -> type[Any]:
    """The class that config.json names; if it names none, the part's only possible class.

    Raises:
        OSError, ValueError: config.json cannot be read, or names another class.
    """
    classes = {cls.__name__: cls for cls in PARTS[name]}
    first = PARTS[name][0]
    if not issubclass(first, nn.Module):
        return first
    config = json.loads((folder / "config.json").read_text())
    if name.startswith("text_encoder"):  # its architectures may name a class with more around it
        class_name = config.get("model_type", CLIP_TEXT[0])
        if class_name in CLIP_TEXT:
            return first
    else:
        class_name = config.get("_class_name") or config.get("architectures", [config.get("model_type")])[0]
    if class_name is None and len(classes) == 1:
        return first
    if class_name not in classes:
        raise ValueError(f"it is of the class {class_name!r}; known are {', '.join(classes)}")
    return classes[class_name]


def _variant(folder: Path, name: str) -> str | None:
    """ "fp16" if the folder has a part's weights in that variant only."""
    files = model_config.weights((path.name for path in folder.iterdir()), model_config.STEMS[name])
    return "fp16" if files and ".fp16" in files[0] else None


def save(base: Base, folder: Path) -> None:
    """Writes every part, and model_index.json for diffusers."""
    library = dict.fromkeys(("unet", "vae", "scheduler"), "diffusers")
    index: dict[str, object] = {"_class_name": "StableDiffusionPipeline"}
    for name in OF_TINY:
        part = getattr(base, name)
        part.save_pretrained(folder / name)
        index[name] = [library.get(name, "transformers"), type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
