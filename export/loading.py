"""Base models from where users have them: a diffusers folder, a single file, a hub id.

Everything ends as a folder in diffusers' format, of which each part is read when it is needed. Weights are
safetensors; pickles can run code and are refused, and so is code that a model brings along. What is missing
or damaged is said before the long work starts.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from export.errors import ExportError
from export.parts import Part
from hyperrt.errors import BadInput, IntegrityError, NotFound, UsageError
from training import base

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "LICENSE*")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
CONVERT = "convert it: diffusers' DiffusionPipeline.save_pretrained(FOLDER, safe_serialization=True)"


@contextmanager
def as_folder(model: str, like: str | None, offline: bool) -> Iterator[Path]:
    """The folder of a base model, for as long as it is needed.

    Args:
        model: a folder in diffusers' format, a single .safetensors file, or a hub id with its revision.
        like: for a single file: folder or hub id that its configuration and tokenizer are taken from.
        offline: use of a hub only what was downloaded before.

    Raises:
        NotFound: there is no such thing, or a hub cannot be reached.
        BadInput: it is a pickle, or no model.
        UsageError: a hub id has no revision.
    """
    path = Path(model)
    if path.is_dir():
        yield path
    elif path.suffix in PICKLES:
        why = f"{path.suffix} files are pickles, which can run code; they are not read"
        raise BadInput(f"{model} cannot be used", why, CONVERT)
    elif path.suffix == ".safetensors":
        with tempfile.TemporaryDirectory() as folder:
            yield _from_single_file(path, like, offline, Path(folder))
    else:
        yield _from_hub(model, offline)


def parts_of(folder: Path, image_encoder: Path | None = None) -> dict[str, Part]:
    """The networks of a base model's folder; nothing but their configurations is read now.

    image_encoder: folder of the hypernetwork's ViT where the base model's own has none (`image_encoder/`).

    Raises:
        NotFound: a part, or a file of its weights, is missing.
        BadInput: weights are there as pickles alone, or config.json is none.
        IntegrityError: a file of weights is damaged.
    """
    folders = {name: folder / name for name in ("unet", "vae", "text_encoder")}
    if (folder / "text_encoder_2").is_dir():
        folders["text_encoder_2"] = folder / "text_encoder_2"
    folders["image_encoder"] = image_encoder or folder / "image_encoder"
    missing = [name for name, where in folders.items() if not (where / "config.json").is_file()]
    if missing == ["image_encoder"]:
        why = "a base model of diffusers has none; it is the ViT that the hypernetwork was trained with"
        raise NotFound(f"there is no image encoder in {folder}", why, "say where it is: --image-encoder DIR")
    if missing:
        why = f"it has no {', '.join(missing)}" if folder.is_dir() else "there is no such folder"
        do = "give a folder in diffusers' format, with model_index.json"
        raise NotFound(f"no base model can be read from {folder}", why, do)
    for where in folders.values():
        _check_weights(where)
    return {name: _part(name, where) for name, where in folders.items()}


def scheduler_of(folder: Path) -> dict[str, Any]:
    """The noise schedule's configuration; errors as `parts_of`."""
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        why = "it holds the noise schedule that the model was trained with"
        raise NotFound(f"there is no {path}", why, "copy the model again") from error
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged", str(error), "copy the model again") from error
    return config


def _part(name: str, folder: Path) -> Part:
    def read() -> Any:
        # As it is stored: fp16 in half the memory. What is read is rounded to fp16 in any case.
        dtype = torch.float16 if _stored_as_half(folder) else torch.float32
        try:
            return base.read_part(folder, name, dtype)
        except ValueError as error:
            do = "copy it again, or train it again"
            raise IntegrityError(
                f"the base model {folder.parent} is damaged", _first_line(error), do
            ) from error

    def build() -> Any:
        try:
            return base.empty_part(folder, name)
        except ValueError as error:
            do = "give a Stable Diffusion model; other kinds are not known"
            raise BadInput(f"{folder} cannot be used as {name}", _first_line(error), do) from error

    return Part(name, build, read)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors that diffusers and transformers would read, shards of an index included."""
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    if indexes:
        names = set(json.loads(indexes[0].read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return sorted(folder.glob("*.safetensors"))


def _check_weights(folder: Path) -> None:
    """Every file is there and whole; reads headers alone."""
    found = _weight_files(folder)
    if not found:
        pickled = [path.name for path in folder.glob("*") if path.suffix in PICKLES]
        if pickled:
            why = f"{pickled[0]} is a pickle, which can run code, and is not read"
            raise BadInput(f"{folder} has no safetensors", why, CONVERT)
        raise NotFound(f"{folder} has no weights", "there is no .safetensors file in it", "copy it again")
    for path in found:
        if not path.is_file():
            why = f"{path.name} is missing, and the index of the weights names it"
            raise NotFound(f"{folder} is not complete", why, "copy or download it again")
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            why = f"{folder.name}/{path.name}: {_first_line(error)}"
            raise IntegrityError(
                f"the base model {folder.parent} is damaged", why, "copy it again"
            ) from error


def _stored_as_half(folder: Path) -> bool:
    with safe_open(_weight_files(folder)[0], "pt") as file:
        return all(file.get_slice(key).get_dtype() in ("F16", "I64") for key in file.keys())  # noqa: SIM118


def _from_hub(model: str, offline: bool) -> Path:
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
                name, revision=revision, allow_patterns=list(HUB_FILES), local_files_only=offline
            )
        )
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        why = "--offline is given, and it was not downloaded before" if offline else _first_line(error)
        do = "give a folder, or download it on a machine with a network"
        raise NotFound(f"{model} cannot be had from the hub", why, do) from error


def _from_single_file(path: Path, like: str | None, offline: bool, folder: Path) -> Path:
    """The file as a folder in diffusers' format: read whole once, in fp16."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if not path.is_file():
        raise NotFound(f"there is no base model {path}", "there is no such file", "check the path")
    if like is None:
        why = "the file has weights alone; what they mean is in the folder of the model that it was made from"
        raise UsageError(f"{path} has no configuration", why, "say which: --like DIR or OWNER/NAME@COMMIT")
    with as_folder(like, None, offline) as configured:
        xl = (configured / "text_encoder_2").is_dir()
        pipeline_class = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
        try:
            pipeline = pipeline_class.from_single_file(
                str(path), config=str(configured), torch_dtype=torch.float16, local_files_only=True,
                **({} if xl else {"safety_checker": None}),
            )  # fmt: skip
        except MemoryError:
            raise
        except Exception as error:  # diffusers, transformers and safetensors have no common one
            do = "check that --like is of the same architecture, and the file whole"
            raise ExportError(f"{path} cannot be read as a model", _first_line(error), do) from error
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or repr(error)).splitlines()[0]
