"""Reads and writes the text in which AUTOMATIC1111's web UI and other programs keep a picture's settings.

    a red house in the snow
    Negative prompt: blurry
    Steps: 30, Sampler: DPM++ 2M, CFG scale: 7.0, Seed: 42, Size: 512x512, Model: v1-5

`write` turns a recipe into this text, and `read` turns the text into a recipe, without the settings that have
no meaning here. "CFG scale" is that of plain classifier-free guidance; HM-CFG at half the scale is as strong
(`guidance.CFG_PULL`).
Source: `parse_generation_parameters` and `create_infotext` of AUTOMATIC1111/stable-diffusion-webui.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

from hyperrt.sampling.guidance import CFG_PULL
from hyperrt.version import VERSION

log = logging.getLogger("hyperrt")

SAMPLERS = {"ddim": "DDIM", "euler": "Euler", "euler_ancestral": "Euler a", "dpmpp_2m": "DPM++ 2M"}
OURS = "hyperrt "  # start of the value of "Version" in a text of this program
READ = ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "Version")
MAX_LINE = 10_000  # characters of the line of settings that are read
MIN_SETTINGS = 3  # a line with fewer is part of the prompt
# Bounded and possessive, so that a hostile line takes no longer than others.
SETTING = re.compile(r'(\w[\w /-]{0,60}): {0,9}("(?:\\.|[^\\"])*+"|[^,]*+)')


def write(recipe: Mapping[str, Any]) -> str:
    """The recipe as text; sampling/recipe.py lists its keys, which are all optional."""
    size = recipe.get("size")
    settings = {
        "Steps": recipe.get("steps"),
        "Sampler": SAMPLERS.get(str(recipe.get("solver")), recipe.get("solver")),
        "CFG scale": _scaled(recipe.get("guidance_scale"), 1 if recipe.get("cfg") else CFG_PULL),
        "Seed": recipe.get("seed"),
        "Size": "x".join(map(str, size)) if isinstance(size, (list, tuple)) else None,
        "Model hash": str(recipe.get("base_model") or "")[:10] or None,
        "Model": recipe.get("bundle"),
        "Kappa": recipe.get("kappa"),
        "Subject": recipe.get("class_noun"),
        "Subject strength": recipe.get("strength"),
        "Version": f"{OURS}{recipe.get('version', VERSION)}",
    }
    lines = [_one_line(recipe.get("prompt"))]
    if recipe.get("negative_prompt"):
        lines.append(f"Negative prompt: {_one_line(recipe['negative_prompt'])}")
    pairs = [f"{key}: {_quoted(value)}" for key, value in settings.items() if value is not None]
    lines.append(", ".join(pairs))
    return "\n".join(lines)


def read(text: str) -> dict[str, Any] | None:
    """The recipe in a text, its values as untrusted as the text; None if it holds no settings.

    One warning names the settings of another program that have no meaning here.
    """
    lines = text.strip().split("\n")
    last = max((k for k, line in enumerate(lines) if line.startswith("Steps:")), default=None)
    settings = {} if last is None else _settings(lines[last])
    if len(settings) < MIN_SETTINGS:
        return None
    prompt, *negative = re.split(r"^Negative prompt:", "\n".join(lines[:last]), maxsplit=1, flags=re.M)
    solver, renamed = _solver(settings.get("Sampler", ""))
    ours = settings.get("Version", "").startswith(OURS)
    cfg = ours and "Subject" in settings and "Kappa" not in settings
    size = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", settings.get("Size", ""))
    recipe = {
        "prompt": prompt.strip(),
        "negative_prompt": "".join(negative).strip(),
        "steps": _number(settings["Steps"]),
        "solver": solver,
        "guidance_scale": _scaled(_number(settings.get("CFG scale")), 1 if cfg else 1 / CFG_PULL),
        "seed": _number(settings.get("Seed")),
        "size": [int(size[1]), int(size[2])] if size else None,
        "base_model": settings.get("Model hash"),
        "bundle": settings.get("Model"),
    }
    if ours:
        recipe |= {
            "cfg": cfg,
            "kappa": _number(settings.get("Kappa")),
            "class_noun": settings.get("Subject"),
            "strength": _number(settings.get("Subject strength")),
        }
    else:
        _warn(renamed, [name for name in settings if name not in READ])
    return {name: value for name, value in recipe.items() if value is not None}


def _settings(line: str) -> dict[str, str]:
    pairs = SETTING.findall(line[:MAX_LINE])
    return {key.strip(): _unquoted(value.strip()) for key, value in pairs}


def _solver(sampler: str) -> tuple[str | None, str]:
    """The solver at the start of a sampler's name, and a warning if the name has more."""
    names = {**{name: name for name in SAMPLERS}, **{shown: name for name, shown in SAMPLERS.items()}}
    for name in sorted(names, key=len, reverse=True):
        if f"{sampler} ".lower().startswith(f"{name} ".lower()):
            exact = len(sampler) == len(name)
            return names[name], "" if exact else f"the sampler {sampler[:60]!r} is drawn as {names[name]}"
    return None, f"there is no sampler {sampler[:60]!r} here, so the default is used" if sampler else ""


def _warn(renamed: str, left_out: list[str]) -> None:
    unread = f"not read: {', '.join(left_out[:20])}" if left_out else ""
    parts = ["the recipe is another program's, so its seed draws another picture here", renamed, unread]
    log.warning("%s", "; ".join(filter(None, parts)))


def _scaled(value: Any, factor: float) -> Any:
    return value * factor if isinstance(value, Real) else value


def _number(text: str | None) -> Any:
    """The text as a number; else the text itself, which `generate` refuses."""
    if text and re.fullmatch(r"-?[0-9]{1,20}", text):
        return int(text)
    return float(text) if text and re.fullmatch(r"-?[0-9]{1,20}\.[0-9]{1,20}", text) else text


def _one_line(text: Any) -> str:
    # A line break would let a prompt pass for the lines below it; the tokenizer reads it as a space.
    return " ".join(str(text or "").split())


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def _unquoted(text: str) -> str:
    try:
        value = json.loads(text) if text.startswith('"') else text
    except ValueError:
        return text
    return value if isinstance(value, str) else text
