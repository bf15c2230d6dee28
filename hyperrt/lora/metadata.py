"""What the header of a LoRA file says beside its tensors: for HyperRT, and for other programs.

Ours is stored as `hyperrt.<name>` and says where a subject comes from.  Others read `modelspec.*` (ModelSpec
1.0.1, github.com/Stability-AI/ModelSpec) and, of kohya's trainer, `ss_*`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hyperrt.text import shortened

REQUIRED = ("base_model", "hypernet", "class_noun", "photos", "trigger")
# What other programs want to know: family of the base model, pixels, "epsilon", and of the open category how
# strongly the image tokens act beside the LoRA.
OPTIONAL = ("family", "image_size", "prediction_type", "image_scale")
MAX_IMAGE_SCALE = 10
MAX_NOUN = 64  # characters, also of a trigger
MAX_TRIGGERS = 20

SGM = "https://github.com/Stability-AI/generative-models"  # ModelSpec: names of the first publication
ARCHITECTURES = {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
VERSIONS = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}  # kohya's words
WIDTH_OF_SD2 = 1024
FAMILIES = {768: "sd15", WIDTH_OF_SD2: "sd15", 2048: "sdxl"}  # by the width of the text


def fault(origin: Mapping[str, str]) -> str:
    """Why our metadata cannot be used, or ""."""
    if missing := [name for name in REQUIRED if name not in origin]:
        return f"the metadata lacks {', '.join(missing)}"
    noun, photos = origin["class_noun"], origin["photos"]
    if not (0 < len(noun) <= MAX_NOUN and noun.isprintable()):
        return f"the class noun is {shortened(noun)!r}; it must be 1 to {MAX_NOUN} printable characters"
    if not (photos.isascii() and photos.isdigit() and len(photos) < 7):
        return f"the number of photos is {shortened(photos)!r}"
    return ""


def trigger_of(metadata: Mapping[str, str]) -> str:
    """What another program's file says to write in a prompt, triggers with commas between them, or ""."""
    found = triggers_in(metadata.get("modelspec.trigger_phrase", ""))[:MAX_TRIGGERS]
    return ", ".join(trigger for trigger in found if len(trigger) <= MAX_NOUN and trigger.isprintable())


def triggers_in(text: str) -> list[str]:
    """The triggers that commas separate."""
    return [" ".join(part.split()) for part in text.split(",") if part.strip()]


def base_of(metadata: Mapping[str, str]) -> str:
    """What another program's file says of its base model, or ""."""
    names = ("ss_sd_model_name", "modelspec.architecture", "ss_base_model_version")
    return next((shortened(metadata[name]) for name in names if metadata.get(name)), "")


def family_of(metadata: Mapping[str, str], text_width: int) -> str:
    """Family of the base model, as the file says or as the width of its text tells; "" if not known."""
    said = metadata.get("hyperrt.family", "")
    if said:
        return said
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if re.match(r"stable-diffusion-xl|sdxl", metadata.get(key, "")):
            return "sdxl"
        if re.match(r"stable-diffusion-v[12]|sd_v[12]", metadata.get(key, "")):
            return "sd15"
    return FAMILIES.get(text_width, "")


def for_others(
    format: str, origin: Mapping[str, str], config: Mapping[str, Any], text_width: int, layers: int | None
) -> dict[str, str]:
    """What a file of ours says for other programs.

    Args:
        origin: ours, without prefix.
        config: PEFT's, of which rank and alpha are taken.
        layers: not None: kohya's names are those of the first publication.
    """
    family = origin.get("family", "")
    found = {} if format != "kohya" else kohya(config, family, text_width)
    if not family:
        return found
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
    return found | {f"modelspec.{key}": text for key, text in spec.items() if text is not None}


def kohya(config: Mapping[str, Any], family: str, text_width: int) -> dict[str, str]:
    """What kohya's trainer would say of the network."""
    found = {"ss_network_module": "networks.lora", "ss_network_dim": str(config["r"])}
    found["ss_network_alpha"] = str(config["lora_alpha"])
    if family in VERSIONS:
        is_2 = text_width == WIDTH_OF_SD2
        found |= {"ss_base_model_version": "sd_v2" if is_2 else VERSIONS[family], "ss_v2": str(is_2)}
    return found


def _architecture(family: str, text_width: int, prediction: str | None) -> str:
    if family == "sd15" and text_width == WIDTH_OF_SD2:
        return "stable-diffusion-v2-768-v" if prediction == "v_prediction" else "stable-diffusion-v2-512"
    return ARCHITECTURES.get(family, f"hyperrt-{family}")
