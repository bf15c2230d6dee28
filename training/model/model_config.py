"""The configurations of a base model's folder, read as diffusers' pipelines read them."""

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
    """Why a tokenizer does not fit a text encoder of that configuration; "" where it does.

    An empty folder makes a tokenizer, too, and one without tokenizer_config.json knows no length.
    """
    tokens, known = len(tokenizer), config.vocab_size
    if not 3 <= tokens <= known:
        return f"it knows {tokens} tokens, the text encoder {known}"
    length, most = tokenizer.model_max_length, config.max_position_embeddings
    if not 3 <= length <= most:
        return f"its model_max_length is {length:.4g}, and the text encoder has {most} positions"
    return ""


def index_of(folder: Path) -> dict[str, Any]:
    """model_index.json; {} where there is none, or it holds no object.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    path = folder / "model_index.json"
    found = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def class_in_index(index: dict[str, Any], name: str) -> str | None:
    """The class that an index names for a part; diffusers prefers it to that of the part's configuration."""
    entry = index.get(name)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None else None


def check_index(folder: Path, classes: Mapping[str, Sequence[type[Any]]], but: Sequence[str] = ()) -> None:
    """Whether model_index.json names the classes that the parts are read as.

    Args:
        classes: that each part may have.
        but: parts that are not read from the folder.

    Raises:
        ValueError: it names another, or cannot be read.
    """
    index = index_of(folder)
    for name in classes.keys() - {*but, "scheduler"}:
        found, known = class_in_index(index, name), [cls.__name__ for cls in classes[name]]
        if found is not None and found.removesuffix("Fast") not in known:
            why = f"{name} is of the class {found!r}; known are {', '.join(known)}"
            raise ValueError(f"{folder / 'model_index.json'}: {why}")


def is_sdxl(folder: Path) -> bool:
    """Whether a base model's folder has the second text encoder of an SDXL."""
    return (folder / "text_encoder_2").is_dir()


def sample_size(config: Any, folder: Path) -> int:
    """Side of the latents that a UNet was trained for, in the base model's folder.

    diffusers' pipeline of Stable Diffusion reads less than 64, in configurations of before 0.9, as 64.

    Raises:
        ValueError: the configuration says no size, or that of an oblong.
        KeyError: it lacks it.
    """
    size, written_by = config["sample_size"], str(config.get("_diffusers_version", "1"))
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"the UNet's sample_size is {size!r}; it must be one number, the side of a square")
    old = re.match(r"0\.[0-8](?:\D|$)", written_by) is not None
    return 64 if old and size < 64 and not is_sdxl(folder) else size


def picture_size(folder: Path) -> tuple[int, int]:
    """Pixels that the UNet was trained for, and what the sides of a picture must be a multiple of.

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
    """Which files of a part's folder are read: an index and its shards, or a safetensors file.

    In full precision where they are there, else in the variant fp16. An index goes first, as in diffusers.
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
