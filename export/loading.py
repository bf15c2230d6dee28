"""Loads base models from a diffusers folder, a single file or a hub id.

A folder in diffusers' format has the configurations of a model; the weights are there too, or in a single
file. Each part is read when it is needed. Weights are safetensors; pickles can run code and are refused, and
so is code that comes with a model. Missing and damaged files are reported before the long work starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CLIPTokenizer

from hyperrt.errors import BadInput, IntegrityError, NotFound, UsageError
from hyperrt.export import hub, single_file
from hyperrt.export.errors import ExportError
from hyperrt.export.hub import CONVERT
from hyperrt.export.parts import ModelPart
from hyperrt.export.source import unknown_noise
from hyperrt.training.messages import first_line
from hyperrt.training.model import base_model as base
from hyperrt.training.model import model_config, noise_schedule
from hyperrt.training.model.latents import LatentScale

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
AGAIN = "copy or download it again"


@dataclass(frozen=True)
class ModelFiles:
    """The files of a base model or a VAE.

    Attributes:
        folder: in diffusers' format; for a VAE in a single file, the folder with its configuration.
        file: the single file with the weights, if they are not in the folder.
    """

    folder: Path
    file: Path | None = None


def find(model: str, like: str | None, offline: bool, but: Sequence[str] = ()) -> ModelFiles:
    """Finds a base model.

    Args:
        model: a folder in diffusers' format, a single .safetensors file, or a hub id with its revision.
        like: for a single file: folder or hub id with its configuration and tokenizer.
        offline: do not access the network; use only files already in the Hugging Face cache.
        but: parts whose weights are not downloaded.

    Raises:
        NotFound: it does not exist, or the hub cannot be reached.
        BadInput: it is a pickle, or another kind of file.
        UsageError: a hub id has no revision; `like` is missing, or has no use.
    """
    path = Path(model)
    if _is_weights(path, "base model"):
        return ModelFiles(_like(path, like, offline), path)
    if like is not None:
        why = f"it is for a single .safetensors file, and {model} is not one"
        raise UsageError(f"--like {like} would not be read", why, "leave --like out")
    if path.is_dir():
        return ModelFiles(path)
    return ModelFiles(hub.fetch(model, offline, lambda files: hub.base_model(files, but)))


def find_vae(vae: str, base_model: Path, offline: bool) -> ModelFiles:
    """Finds a VAE; errors as `find`.

    Args:
        vae: a folder in diffusers' format (a VAE's or a base model's), a .safetensors file, or a hub id.
        base_model: folder with the configuration for a single file.
    """
    path = Path(vae)
    if _is_weights(path, "VAE"):
        if not path.is_file():
            raise NotFound(f"there is no VAE {path}", "there is no such file", "check the path")
        return ModelFiles(base_model / "vae", path)
    folder = path if path.is_dir() else hub.fetch(vae, offline, hub.vae, "VAE")
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (folder / "config.json").is_file():
        why = "it has no config.json" if path.is_dir() else "its repository has no config.json"
        raise NotFound(f"no VAE can be read from {vae}", why, "give a folder in diffusers' format, or a file")
    return ModelFiles(folder)


def _is_weights(path: Path, kind: str) -> bool:
    """Whether the path names a .safetensors file, which may not exist.

    Raises:
        BadInput: it is a pickle, or another kind of file.
    """
    if path.is_dir():
        return False
    if path.suffix.lower() in PICKLES:
        why = f"{path.suffix} files are pickles, which can run code; they are not read"
        raise BadInput(f"{path} cannot be used", why, CONVERT)
    if path.is_file() and path.suffix != ".safetensors":
        why = "the only files that are read are .safetensors"
        do = "give a folder in diffusers' format, or a .safetensors file"
        raise BadInput(f"{path} is not a {kind}", why, do)
    return path.suffix == ".safetensors"


def parts_of(
    folder: Path, image_encoder: Path | None = None, file: Path | None = None, vae: ModelFiles | None = None
) -> dict[str, ModelPart]:
    """The networks of a base model; reads their configurations and the headers of their weights.

    Args:
        folder, file: as in `ModelFiles`.
        image_encoder: folder of the hypernetwork's ViT, if the base model has no `image_encoder/`.
        vae: replaces the base model's.

    Raises:
        NotFound: a part or a file of its weights is missing.
        BadInput: the only weights are pickles, a config.json is of another kind, or the file lacks a part.
        IntegrityError: a file of weights is damaged.
        ExportError: a file has another architecture, or the VAE's latents have another scale than the base's.
    """
    folders = {name: folder / name for name in ("unet", "vae", "text_encoder")}
    if model_config.is_sdxl(folder):
        folders["text_encoder_2"] = folder / "text_encoder_2"
    folders["image_encoder"] = image_encoder or folder / "image_encoder"
    files = {name: file if name in single_file.PREFIXES else None for name in folders}
    if vae is not None:
        folders["vae"], files["vae"] = vae.folder, vae.file
    _check_configured(folder, folders, vae)
    _check_index(folder, [name for name in folders if folders[name] != folder / name])
    parts = {}
    for name, part_folder in folders.items():
        parts[name] = _part(name, part_folder, files[name])
        if (weights := files[name]) is not None:
            single_file.check(weights, parts[name], folder, "VAE" if weights != file else "base model")
        else:
            _check_weights(part_folder, name)
    if vae is not None:
        _check_latents(folder, parts["vae"], vae)
    return parts


def _check_index(folder: Path, but: list[str]) -> None:
    try:
        model_config.check_index(folder, base.PARTS, but)
    except (ValueError, OSError) as error:
        do = "give a Stable Diffusion model; other kinds are not known"
        raise BadInput(f"{folder} cannot be used", first_line(error), do) from error


def _check_latents(folder: Path, vae: ModelPart, given: ModelFiles) -> None:
    """Checks that a VAE scales its latents as the base model's VAE does, if the base model has one.

    An AutoencoderTiny has another scale: it decodes the UNet's latents as they are.
    """
    vae_of_base = folder / "vae"
    if not (vae_of_base / "config.json").is_file() or given.folder == vae_of_base:
        return
    vaes = [_part("vae", vae_of_base, None).skeleton, vae.skeleton]
    if type(vaes[0]) is not type(vaes[1]):
        return
    try:
        expected, scale = (LatentScale.of(module.config, model_config.is_sdxl(folder)) for module in vaes)
    except ValueError:
        return  # `supported.check` reports it, for the VAE that is used
    if scale != expected:
        why = f"its latents have {_text_of(scale)}, the base model's {_text_of(expected)}"
        do = "give a VAE that was made for this kind of base model"
        raise ExportError(f"the VAE {given.file or given.folder} does not fit the base model", why, do)


def _text_of(scale: LatentScale) -> str:
    statistics = f", mean {list(scale.mean)}, std {list(scale.std)}" if scale.mean else ""
    return f"scaling_factor {scale.factor:g}{statistics}"


def scheduler_of(folder: Path, file: Path | None = None) -> dict[str, Any]:
    """The noise schedule's configuration, with the defaults of its class; errors as `parts_of`.

    Raises:
        ExportError: the solvers do not support it.
    """
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    named = model_config.class_in_index(model_config.index_of(folder), "scheduler")
    if why := noise_schedule.fault(config, named, is_sdxl=model_config.is_sdxl(folder)):
        raise unknown_noise(why)
    if file is not None:
        single_file.check_schedule(file, config)
    return noise_schedule.with_defaults(config, named)


def tokenizer_of(folder: Path, text_encoder: ModelPart) -> CLIPTokenizer:
    """A tokenizer that fits a text encoder.

    Raises:
        IntegrityError: it cannot be read, or does not fit.
        ExportError: diffusers reads one of its words as several.
    """
    what, do = f"{folder} cannot be used", "copy the model again"
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers has no common class of errors
        raise IntegrityError(what, first_line(error), do) from error
    if why := model_config.misfit(tokenizer, text_encoder.skeleton.config):
        raise IntegrityError(what, why, do)
    added = tokenizer.added_tokens_encoder
    if several := sorted(word for word in added if f"{word}_1" in added):
        word = several[0]
        why = f"diffusers reads {word} as {word} {word}_1 ..., which the runtime does not"
        raise ExportError(what, why, "use the model without that textual inversion")
    return tokenizer


def second_tokenizer_of(folder: Path, text_encoder_2: ModelPart, tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """SDXL's second tokenizer, which must read text as the first does; errors as `tokenizer_of`.

    Raises:
        ExportError: they differ in more than the pad token.
    """
    second = tokenizer_of(folder / "tokenizer_2", text_encoder_2)
    if _rules(second, second.pad_token) != _rules(tokenizer, second.pad_token):
        why = "vocabulary, length or special tokens differ, and a bundle has one tokenizer"
        do = "use a model whose tokenizers differ in the pad alone, as SDXL's do"
        raise ExportError(f"the two tokenizers of {folder} read text in two ways", why, do)
    return second


def _rules(tokenizer: CLIPTokenizer, pad: str) -> tuple[Any, ...]:
    """How a tokenizer reads text, without its pad token."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {(token["content"], token["id"]) for token in rules["added_tokens"] if token["content"] != pad}
    return rules["model"], rules["normalizer"], rules["pre_tokenizer"], special, tokenizer.model_max_length


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        NotFound: the file does not exist.
        IntegrityError: it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise NotFound(f"there is no {path}", "it is part of a model in diffusers' format", AGAIN) from error
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged", first_line(error), AGAIN) from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} is damaged", "it holds no JSON object", AGAIN)
    return value


def _check_configured(folder: Path, folders: Mapping[str, Path], vae: ModelFiles | None) -> None:
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
    if missing == ["vae"] and vae is not None:
        why = f"{vae.file} has weights alone, and {folder} has no configuration of a VAE"
        raise NotFound("the VAE has no configuration", why, "give --vae a folder in diffusers' format")
    if missing == ["vae"]:
        raise NotFound(
            f"the base model {folder} has no VAE", "there is no vae/config.json", single_file.NAME_VAE
        )
    why = f"it has no {', '.join(missing)}" if folder.is_dir() else "there is no such folder"
    do = "give a folder in diffusers' format, with model_index.json"
    raise NotFound(f"no base model can be read from {folder}", why, do)


def _part(name: str, folder: Path, file: Path | None) -> ModelPart:
    def read() -> Any:
        # fp16 weights stay fp16, in half the memory; others are rounded to fp16 later.
        dtype = torch.float16 if _stored_as_half(folder, name) else torch.float32
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

    return ModelPart(name, build, read) if file is None else single_file.part_of(file, name, build)


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors that diffusers and transformers would read, including the shards of an index."""
    names = model_config.weights((path.name for path in folder.iterdir()), model_config.STEMS[name])
    if not names or not names[0].endswith(".json"):
        return [folder / name for name in names]
    weight_map = read_json(folder / names[0]).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise IntegrityError(f"{folder / names[0]} is damaged", "it has no weight_map", AGAIN)
    return [folder / str(name) for name in sorted(set(weight_map.values()))]


def _check_weights(folder: Path, name: str) -> None:
    """Checks that all weight files exist and are whole; reads only their headers."""
    paths = _weight_files(folder, name)
    if not paths:
        pickled = [path.name for path in folder.glob("*") if path.suffix in PICKLES]
        if pickled:
            why = f"{pickled[0]} is a pickle, which can run code, and is not read"
            raise BadInput(f"{folder} has no safetensors", why, CONVERT)
        why = f"there is no {model_config.STEMS[name]}.safetensors in it"
        raise NotFound(f"{folder} has no weights", why, AGAIN)
    for path in paths:
        if not path.is_file():
            why = f"{path.name} is missing, and the index of the weights names it"
            raise NotFound(f"{folder} is not complete", why, AGAIN)
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            why = f"{path.name}: {first_line(error)}"
            raise IntegrityError(f"{folder} is damaged", why, AGAIN) from error


def _stored_as_half(folder: Path, name: str) -> bool:
    with safe_open(_weight_files(folder, name)[0], "pt") as file:
        return all(file.get_slice(key).get_dtype() in ("F16", "I64") for key in file.keys())  # noqa: SIM118


def _like(path: Path, like: str | None, offline: bool) -> Path:
    """The folder with the configuration of a single file."""
    if not path.is_file():
        raise NotFound(f"there is no base model {path}", "there is no such file", "check the path")
    if like is None:
        why = (
            "the file has only weights; the configuration is in the folder of the model that it was made from"
        )
        raise UsageError(f"{path} has no configuration", why, "say which: --like DIR or OWNER/NAME@COMMIT")
    if Path(like).is_dir():
        return Path(like)
    if Path(like).suffix.lower() in (*PICKLES, ".safetensors"):
        why = "it is a file of weights"
        raise UsageError(f"--like {like} has no configuration", why, "name a folder, or OWNER/NAME@COMMIT")
    return hub.fetch(like, offline, hub.configuration)
