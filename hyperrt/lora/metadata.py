"""Metadata in the header of a LoRA file, for HyperRT and for other programs.

Ours is stored as `hyperrt.<name>` and records the origin of a subject.  Other programs read `modelspec.*`
(ModelSpec 1.0.1, github.com/Stability-AI/ModelSpec) and kohya's `ss_*`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hyperrt.text import shortened

REQUIRED = ("base_model", "hypernet", "class_noun", "photos", "trigger")
# For other programs: family of the base model, pixels, "epsilon", and in the open category the weight of the
# image tokens beside the LoRA.
OPTIONAL = ("family", "image_size", "prediction_type", "image_scale")
MAX_IMAGE_SCALE = 10
MAX_NOUN = 64  # characters, also of a trigger
MAX_TRIGGERS = 20

SGM = "https://github.com/Stability-AI/generative-models"  # ModelSpec's implementation for its block names
ARCHITECTURES = {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
VERSIONS = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}  # as kohya writes them
WIDTH_OF_SD2 = 1024
FAMILIES = {768: "sd15", WIDTH_OF_SD2: "sd15", 2048: "sdxl"}  # by width of the text's hidden states


def fault(origin: Mapping[str, str]) -> str:
    """Why metadata of ours cannot be used, or ""."""
    if missing := [name for name in REQUIRED if name not in origin]:
        return f"the metadata lacks {', '.join(missing)}"
    noun, photos = origin["class_noun"], origin["photos"]
    if not (0 < len(noun) <= MAX_NOUN and noun.isprintable()):
        return f"the class noun is {shortened(noun)!r}; it must be 1 to {MAX_NOUN} printable characters"
    if not (photos.isascii() and photos.isdigit() and len(photos) < 7):
        return f"the number of photos is {shortened(photos)!r}"
    return ""


def trigger_of(metadata: Mapping[str, str]) -> str:
    """The trigger words of another program's file, separated by commas, or ""."""
    triggers = triggers_in(metadata.get("modelspec.trigger_phrase", ""))[:MAX_TRIGGERS]
    return ", ".join(trigger for trigger in triggers if len(trigger) <= MAX_NOUN and trigger.isprintable())


def triggers_in(text: str) -> list[str]:
    """The triggers in a list separated by commas."""
    return [" ".join(part.split()) for part in text.split(",") if part.strip()]


def base_of(metadata: Mapping[str, str]) -> str:
    """The base model that another program's file names, or ""."""
    names = ("ss_sd_model_name", "modelspec.architecture", "ss_base_model_version")
    return next((shortened(metadata[name]) for name in names if metadata.get(name)), "")


def family_of(metadata: Mapping[str, str], text_width: int) -> str:
    """Family of the base model, from the metadata or the width of the text; "" if unknown."""
    if family := metadata.get("hyperrt.family", ""):
        return family
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if re.match(r"stable-diffusion-xl|sdxl", metadata.get(key, "")):
            return "sdxl"
        if re.match(r"stable-diffusion-v[12]|sd_v[12]", metadata.get(key, "")):
            return "sd15"
    return FAMILIES.get(text_width, "")


def for_others(
    format: str, origin: Mapping[str, str], config: Mapping[str, Any], text_width: int, layers: int | None
) -> dict[str, str]:
    """Metadata of a subject file of ours for other programs.

    Args:
        origin: ours, without prefix.
        config: PEFT's, for rank and alpha.
        layers: None unless kohya's names are those of the first publication.
    """
    family = origin.get("family", "")
    of_kohya = {} if format != "kohya" else kohya(config, family, text_width)
    if not family:
        return of_kohya
    noun, trigger, scale = origin["class_noun"], origin["trigger"], origin.get("image_scale")
    size, prediction = origin.get("image_size"), origin.get("prediction_type")
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{_architecture(family, text_width, prediction)}/lora",
        "implementation": SGM if layers else "diffusers",
        "title": f"{noun}, a subject of HyperRT",
        "resolution": f"{size}x{size}" if size else None,
        "trigger_phrase": f"{trigger} {noun}",
        "prediction_type": {"v_prediction": "v"}.get(prediction or "", prediction),
        "usage_hint": scale and f"made to be drawn beside the image tokens of an IP-Adapter at scale {scale}",
    }
    return of_kohya | {f"modelspec.{key}": text for key, text in spec.items() if text is not None}


def kohya(config: Mapping[str, Any], family: str, text_width: int) -> dict[str, str]:
    """The metadata that kohya's trainer would write."""
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(config["r"])}
    metadata["ss_network_alpha"] = str(config["lora_alpha"])
    if family in VERSIONS:
        is_2 = text_width == WIDTH_OF_SD2
        metadata |= {"ss_base_model_version": "sd_v2" if is_2 else VERSIONS[family], "ss_v2": str(is_2)}
    return metadata


def _architecture(family: str, text_width: int, prediction: str | None) -> str:
    if family == "sd15" and text_width == WIDTH_OF_SD2:
        return "stable-diffusion-v2-768-v" if prediction == "v_prediction" else "stable-diffusion-v2-512"
    return ARCHITECTURES.get(family, f"hyperrt-{family}")
