"""Base models from where users have them: a diffusers folder, a single file, a hub id.

A folder in diffusers' format says what a model is; its weights are in there, or in a single file. Each part
is read when it is needed. Weights are safetensors; pickles can run code and are refused, and so is code that
a model brings along. What is missing or damaged is said before the long work starts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hyperrt.errors import BadInput, IntegrityError, NotFound, UsageError
from hyperrt.export import single_file
from hyperrt.export.parts import Part
from hyperrt.training import base
from hyperrt.training.loop import first_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")
CONFIGURATION = ("*.json", "*.txt", "*.model", "LICENSE*")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
AGAIN = "copy or download it again"
CONVERT = "convert it: diffusers' DiffusionPipeline.save_pretrained(FOLDER, safe_serialization=True)"


@dataclass(frozen=True)
class Found:
    """Where a base model is.

    Attributes:
        folder: in diffusers' format.
        file: has the weights, where the folder has only what they mean.
    """

    folder: Path
    file: Path | None = None


def find(model: str, like: str | None, offline: bool) -> Found:
    """A base model by what the user calls it.

    Args:
        model: a folder in diffusers' format, a single .safetensors file, or a hub id with its revision.
        like: for a single file: folder or hub id that its configuration and tokenizer are taken from.
        offline: use of a hub only what was downloaded before.

    Raises:
        NotFound: there is no such thing, or a hub cannot be reached.
        BadInput: it is a pickle, or another kind of file.
        UsageError: a hub id has no revision; `like` is missing, or is given for nothing.
    """
    path = Path(model)
    if not path.is_dir() and path.suffix.lower() in PICKLES:
        why = f"{path.suffix} files are pickles, which can run code; they are not read"
        raise BadInput(f"{model} cannot be used", why, CONVERT)
    if not path.is_dir() and path.suffix == ".safetensors":
        return Found(_like(path, like, offline), path)
    if path.is_file():
        why = "of files, only .safetensors are read"
        raise BadInput(f"{model} is no base model", why, "give a folder in diffusers' format, or such a file")
    if like is not None:
        why = f"it is for a single .safetensors file, and {model} is none"
        raise UsageError(f"--like {like} would not be read", why, "leave --like out")
    return Found(path if path.is_dir() else _from_hub(model, offline, (*CONFIGURATION, "*.safetensors")))


def parts_of(
    folder: Path, image_encoder: Path | None = None, file: Path | None = None
) -> dict[str, Part]:
    """The networks of a base model; nothing but their configurations and names of weights is read now.

    Args:
        folder, file: as in `Found`.
        image_encoder: folder of the hypernetwork's ViT where the base model's has none (`image_encoder/`).

    Raises:
        NotFound: a part, or a file of its weights, is missing.
        BadInput: weights are there as pickles alone, or config.json is none, or the file has no such part.
        IntegrityError: a file of weights is damaged.
        ExportError: the file is of another architecture.
    """
    folders = {name: folder / name for name in ("unet", "vae", "text_encoder")}
    if (folder / "text_encoder_2").is_dir():
        folders["text_encoder_2"] = folder / "text_encoder_2"
    folders["image_encoder"] = image_encoder or folder / "image_encoder"
    _check_configured(folder, folders)
    parts = {}
    for name, where in folders.items():
        in_file = file is not None and name in single_file.PREFIXES
        parts[name] = _part(name, where, file if in_file else None)
        if file is not None and in_file:
            single_file.check(file, parts[name], folder)
        else:
            _check_weights(where)
    return parts


def scheduler_of(folder: Path, file: Path | None = None) -> dict[str, Any]:
    """The noise schedule's configuration; errors as `parts_of`."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    if file is not None:
        single_file.check_schedule(file, config)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        NotFound: there is no such file.
        IntegrityError: it is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise NotFound(f"there is no {path}", "it is part of a model in diffusers' format", AGAIN) from error
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged", first_line(error), AGAIN) from error
    if not isinstance(found, dict):
        raise IntegrityError(f"{path} is damaged", "it holds no JSON object", AGAIN)
    return found


def _check_configured(folder: Path, folders: Mapping[str, Path]) -> None:
    missing = [name for name, where in folders.items() if not (where / "config.json").is_file()]
    if not missing:
        return
    encoder = folders["image_encoder"]
    if missing == ["image_encoder"] and encoder != folder / "image_encoder":
        why = "it has no config.json" if encoder.is_dir() else "there is no such folder"
        do = "give the folder of a ViT in transformers' format: --image-encoder DIR"
        raise NotFound(f"no image encoder can be read from {encoder}", why, do)
    if missing == ["image_encoder"]:
        why = "a base model of diffusers has none; it is the ViT that the hypernetwork was trained with"
        raise NotFound(f"there is no image encoder in {folder}", why, "say where it is: --image-encoder DIR")
    why = f"it has no {', '.join(missing)}" if folder.is_dir() else "there is no such folder"
    do = "give a folder in diffusers' format, with model_index.json"
    raise NotFound(f"no base model can be read from {folder}", why, do)


def _part(name: str, folder: Path, file: Path | None) -> Part:
    def read() -> Any:
        # As it is stored: fp16 in half the memory. What is read is rounded to fp16 in any case.
        dtype = torch.float16 if _stored_as_half(folder) else torch.float32
        try:
            return base.read_part(folder, name, dtype)
        except ValueError as error:
            do = "copy it again, or train it again"
            raise IntegrityError(f"{folder} is damaged", first_line(error), do) from error

    def build() -> Any:
        try:
            return base.empty_part(folder, name)
        except ValueError as error:
            do = "give a Stable Diffusion model; other kinds are not known"
            raise BadInput(f"{folder} cannot be used as {name}", first_line(error), do) from error

    return Part(name, build, read) if file is None else single_file.part_of(file, name, build)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors that diffusers and transformers would read, shards of an index included."""
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    if indexes:
        weight_map = read_json(indexes[0]).get("weight_map")
        if not weight_map or not isinstance(weight_map, dict):
            raise IntegrityError(f"{indexes[0]} is damaged", "it has no weight_map", AGAIN)
        return [folder / str(name) for name in sorted(set(weight_map.values()))]
    return sorted(folder.glob("*.safetensors"))


def _check_weights(folder: Path) -> None:
    """Every file is there and whole; reads headers alone."""
    found = _weight_files(folder)
    if not found:
        pickled = [path.name for path in folder.glob("*") if path.suffix in PICKLES]
        if pickled:
            why = f"{pickled[0]} is a pickle, which can run code, and is not read"
            raise BadInput(f"{folder} has no safetensors", why, CONVERT)
        raise NotFound(f"{folder} has no weights", "there is no .safetensors file in it", AGAIN)
    for path in found:
        if not path.is_file():
            why = f"{path.name} is missing, and the index of the weights names it"
            raise NotFound(f"{folder} is not complete", why, AGAIN)
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            why = f"{path.name}: {first_line(error)}"
            raise IntegrityError(f"{folder} is damaged", why, AGAIN) from error


def _stored_as_half(folder: Path) -> bool:
    with safe_open(_weight_files(folder)[0], "pt") as file:
        return all(file.get_slice(key).get_dtype() in ("F16", "I64") for key in file.keys())  # noqa: SIM118


def _from_hub(model: str, offline: bool, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not HUB_ID.fullmatch(model):
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", model) and not os.path.lexists(model):
            why = "a name without the commit's 40 digits can mean another model tomorrow"
            raise UsageError(f"{model} has no pinned revision", why, "write OWNER/NAME@COMMIT")
        do = "check the path, or write OWNER/NAME@COMMIT for one of the hub"
        raise NotFound(f"there is no base model {model}", "it is no folder, no file and no hub id", do)
    name, _, revision = model.partition("@")
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), local_files_only=offline
            )
        )
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        why = "--offline is given, and it was not downloaded before" if offline else first_line(error)
        do = "give a folder, or download it on a machine with a network"
        raise NotFound(f"{model} cannot be had from the hub", why, do) from error


def _like(path: Path, like: str | None, offline: bool) -> Path:
    """The folder of the configuration of a single file."""
    if not path.is_file():
        raise NotFound(f"there is no base model {path}", "there is no such file", "check the path")
    if like is None:
        why = "the file has weights alone; what they mean is in the folder of the model that it was made from"
        raise UsageError(f"{path} has no configuration", why, "say which: --like DIR or OWNER/NAME@COMMIT")
    if Path(like).is_dir():
        return Path(like)
    if Path(like).suffix.lower() in (*PICKLES, ".safetensors"):
        why = "it is a file of weights, or none"
        raise UsageError(f"--like {like} has no configuration", why, "name a folder, or OWNER/NAME@COMMIT")
    return _from_hub(like, offline, CONFIGURATION)
