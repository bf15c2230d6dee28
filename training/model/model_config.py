"""Reads the configurations in a base model's folder as diffusers' pipelines do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperrt.training.model import noise_schedule

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# The name of a part's weights, as diffusers and transformers save them.
STEMS = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model") | dict.fromkeys(
    ("text_encoder", "text_encoder_2", "image_encoder"), "model"
)


def misfit(tokenizer: CLIPTokenizer, config: Any) -> str:
    """Why a tokenizer does not fit a text encoder with this configuration; "" if it fits.

    transformers also loads a tokenizer from an empty folder, or without a length from one that lacks
    tokenizer_config.json.
    """
    tokens, vocabulary = len(tokenizer), config.vocab_size
    if not 3 <= tokens <= vocabulary:
        return f"it knows {tokens} tokens, the text encoder {vocabulary}"
    length, most = tokenizer.model_max_length, config.max_position_embeddings
    if not 3 <= length <= most:
        return f"its model_max_length is {length:.4g}, and the text encoder has {most} positions"
    return ""


def index_of(folder: Path) -> dict[str, Any]:
    """The content of model_index.json; {} if the file is missing or not a JSON object.

    Raises:
        ValueError, OSError: the file cannot be read.
    """
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    return index if isinstance(index, dict) else {}


def class_in_index(index: dict[str, Any], name: str) -> str | None:
    """The class that an index names for a part; diffusers prefers it to that of the part's configuration."""
    entry = index.get(name)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None else None


def check_index(folder: Path, classes: Mapping[str, Sequence[type[Any]]], but: Sequence[str] = ()) -> None:
    """Checks that model_index.json names the classes that the parts are read as.

    Args:
        classes: those that each part may have.
        but: parts that are not read from the folder.

    Raises:
        ValueError: it names another class, or cannot be read.
    """
    index = index_of(folder)
    for name in classes.keys() - {*but, "scheduler"}:
        named, class_names = class_in_index(index, name), [cls.__name__ for cls in classes[name]]
        if named is not None and named.removesuffix("Fast") not in class_names:
            why = f"{name} is of the class {named!r}; known are {', '.join(class_names)}"
            raise ValueError(f"{folder / 'model_index.json'}: {why}")


def is_sdxl(folder: Path) -> bool:
    """Whether a base model's folder has the second text encoder of an SDXL."""
    return (folder / "text_encoder_2").is_dir()


def sample_size(config: Any, folder: Path) -> int:
    """Side of the latents that a UNet was trained for, in the base model's folder.

    In configurations from before diffusers 0.9, its pipeline for Stable Diffusion reads sizes below 64 as 64.

    Raises:
        ValueError: sample_size is not one positive integer.
        KeyError: the configuration lacks it.
    """
    size, written_by = config["sample_size"], str(config.get("_diffusers_version", "1"))
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"the UNet's sample_size is {size!r}; it must be one number, the side of a square")
    old = re.match(r"0\.[0-8](?:\D|$)", written_by) is not None
    return 64 if old and size < 64 and not is_sdxl(folder) else size


def picture_size(folder: Path) -> tuple[int, int]:
    """The side in pixels that the UNet was trained for, and the number that divides the sides of a picture.

    Raises:
        ValueError, OSError: a configuration cannot be read.
    """
    unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        return sample_size(unet, folder) * factor, factor * 2 ** (len(unet["block_out_channels"]) - 1)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the configuration of unet or vae in {folder} lacks {error}") from error


def scheduler(folder: Path) -> dict[str, Any]:
    """scheduler_config.json of a base model, with the defaults of its class.

    Raises:
        OSError, ValueError: it cannot be read, or the solvers do not describe the model's noise.
    """
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8-sig"))
    named = class_in_index(index_of(folder), "scheduler")
    if why := noise_schedule.fault(config, named, is_sdxl=is_sdxl(folder)):
        raise ValueError(why)
    return noise_schedule.with_defaults(config, named)


def weights(names: Iterable[str], stem: str) -> list[str]:
    """The weight files of a part's folder: an index and its shards, or one safetensors file.

    Full precision comes before the variant fp16, and an index before a single file, as in diffusers.
    """
    names = sorted(names)
    for variant in ("", ".fp16"):
        index, whole = f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors"
        if index in names:
            number = r"-\d+-of-\d+"  # which older files have before the variant
            ends = "|".join(re.escape(variant) + number if k else number + re.escape(variant) for k in (0, 1))
            shard = re.compile(rf"{re.escape(stem)}({ends})\.safetensors")
            return [index, *filter(shard.fullmatch, names)]
        if whole in names:
            return [whole]
    return []
