"""Reads what a bundle is made from: a base model and a hypernetwork that fit each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CLIPTokenizer

from hyperrt.errors import NotFound, UsageError
from hyperrt.export import families, hypernetwork, loading, supported
from hyperrt.export.families import Family
from hyperrt.export.hypernetwork import Hypernetwork
from hyperrt.export.loading import ModelFiles
from hyperrt.export.parts import ModelPart
from hyperrt.export.source import Source, sized, vae_factor
from hyperrt.training.model import image_prompt

if TYPE_CHECKING:
    from hyperrt.cli.configs import ExportConfig

LICENSE_OF_VAE = """\
It is under the terms of the model that it is of; there was no LICENSE file beside it to copy.
"""
READ = ("base", "vae", "hypernet", "image_encoder", "image_prompt", "like")  # options that name what is read


def read(config: ExportConfig) -> Source:
    """Reads all but the weights, which are read when they are needed, and checks that the parts fit.

    Raises:
        UsageError: options contradict each other, or one is missing.
        NotFound, BadInput, IntegrityError: a file is missing, of another kind, or damaged.
        ExportError: the parts do not fit each other, or the graphs do not compute what they do.
    """
    family = families.get(config.model)
    if config.random_weights is not None:
        return _random(config, family)
    if config.hypernet is None:
        why = "a bundle is made from a base model and the hypernetwork that was trained on it"
        raise UsageError("--hypernet is not given", why, "name the folder of its run with --hypernet")
    hypernet = hypernetwork.read(Path(config.hypernet))
    source = sized(_source(family, config, hypernet), config.size)
    supported.check(source)
    hypernetwork.check_base(hypernet, source, family.half_hash)
    hypernetwork.check_image_prompt(hypernet, source.parts.get("image_prompt"))
    return source


def _random(config: ExportConfig, family: Family) -> Source:
    for name in READ:
        if getattr(config, name) is not None:
            option = f"--{name.replace('_', '-')}"
            why = "random weights replace all that could be read"
            raise UsageError(f"{option} and --random-weights exclude each other", why, "leave one out")
    source = sized(family.random(config.random_weights), config.size)
    supported.check(source)
    return source


def _source(family: Family, config: ExportConfig, hypernet: Hypernetwork) -> Source:
    base = _base_model(config, hypernet)
    folder = base.folder
    vae = None if config.vae is None else loading.find_vae(config.vae, folder, config.offline)
    image_encoder = None if config.image_encoder is None else Path(config.image_encoder)
    parts = loading.parts_of(folder, image_encoder, base.file, vae)
    unet = parts["unet"].skeleton
    tokenizer = loading.tokenizer_of(folder / "tokenizer", parts["text_encoder"])
    parts["weight_decoder"] = hypernet.part
    if config.image_prompt is not None:
        parts["image_prompt"] = _image_prompt(Path(config.image_prompt), unet)
    return Source(
        parts=parts,
        tokenizer=tokenizer,
        scheduler=loading.scheduler_of(folder, base.file),
        layout=hypernet.layout,
        token=hypernet.token,
        image_scale=hypernet.image_scale,
        image_size=unet.config.sample_size * vae_factor(parts["vae"]),
        license=_license(base, family) + _license_of_vae(vae),
        **(_sdxl_rules(folder, parts["text_encoder_2"], tokenizer) if "text_encoder_2" in parts else {}),
    )


def _base_model(config: ExportConfig, hypernet: Hypernetwork) -> ModelFiles:
    """The base model of the command, or else the one that the hypernetwork was trained on."""
    if not config.base and not hypernet.base.is_dir():
        why = f"{hypernet.path} was trained on {hypernet.base}, which is not there"
        raise NotFound("there is no base model", why, "say where it is: --base BASE")
    replaced = [name for name in ("vae", "image_encoder") if getattr(config, name) is not None]
    return loading.find(config.base or str(hypernet.base), config.like, config.offline, replaced)


def _image_prompt(path: Path, unet: Any) -> ModelPart:
    def load() -> Any:
        return image_prompt.load(path, unet, torch.float16)

    empty = load().to("meta")  # which checks the file now; its tensors say how large the skeleton is
    return ModelPart("image_prompt", lambda: empty, load)


def _sdxl_rules(folder: Path, text_encoder_2: ModelPart, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    index = loading.read_json(folder / "model_index.json")
    return {
        "tokenizer_2": loading.second_tokenizer_of(folder, text_encoder_2, tokenizer),
        "zero_empty": bool(index.get("force_zeros_for_empty_prompt", True)),  # diffusers' default
    }


def _license(base: ModelFiles, family: Family) -> str:
    """The LICENSE of the folder, which does not hold for a single file: it only borrows the configuration."""
    paths = [] if base.file else sorted(base.folder.glob("LICENSE*"))
    return _text(paths[0]) if paths else family.license


def _license_of_vae(vae: ModelFiles | None) -> str:
    """The licence of a VAE that replaces the base model's."""
    if vae is None:
        return ""
    model = vae.folder.parent  # of the VAE, if it has an index
    folders = [vae.folder, model] if (model / "model_index.json").is_file() else [vae.folder]
    paths = [] if vae.file else [path for folder in folders for path in sorted(folder.glob("LICENSE*"))]
    text = _text(paths[0]) if paths else LICENSE_OF_VAE
    return f"\n---- the VAE, which is not the base model's ----\n\n{text}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
