"""The text in which AUTOMATIC1111's web UI keeps the settings of a picture, and which many programs read.

    a red house in the snow
    Negative prompt: blurry
    Steps: 30, Sampler: DPM++ 2M, CFG scale: 7.0, Seed: 42, Size: 512x512, Model: v1-5

`write` turns a recipe into this text, and `read` the text into a recipe, as far as it has a meaning here.
"CFG scale" is that of plain classifier-free guidance: HM-CFG of half the scale pulls as strongly
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

from hyperrt import __version__
from hyperrt.sampling.guidance import CFG_PULL

log = logging.getLogger("hyperrt")

SAMPLERS = {"ddim": "DDIM", "euler": "Euler", "euler_ancestral": "Euler a", "dpmpp_2m": "DPM++ 2M"}
OURS = "hyperrt "  # what the value of "Version" begins with in a text of this program
READ = ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "Version")
MAX_LINE = 10_000  # characters of the settings that are read
FEWEST = 3  # settings in a line of settings; a line with less is part of the prompt
# Bounded and possessive, so that a hostile line takes no more time than an honest one.
SETTING = re.compile(r'(\w[\w /-]{0,60}): {0,9}("(?:\\.|[^\\"])*+"|[^,]*+)')


def write(recipe: Mapping[str, Any]) -> str:
    """The recipe as text; see `hyperrt.sampling.recipe` for its keys, of which none must be there."""
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
        "Version": f"{OURS}{recipe.get('version', __version__)}",
    }
    lines = [_one_line(recipe.get("prompt"))]
    if recipe.get("negative_prompt"):
        lines.append(f"Negative prompt: {_one_line(recipe['negative_prompt'])}")
    pairs = [f"{key}: {_quoted(value)}" for key, value in settings.items() if value is not None]
    lines.append(", ".join(pairs))
    return "\n".join(lines)


def read(text: str) -> dict[str, Any] | None:
    """The recipe that the text holds, its values as untrusted as the text; None if it holds no settings.

    One warning says what of another program's settings has no meaning here.
    """
    lines = text.strip().split("\n")
    last = max((k for k, line in enumerate(lines) if line.startswith("Steps:")), default=None)
    settings = {} if last is None else _settings(lines[last])
    if len(settings) < FEWEST:
        return None
    prompt, *negative = re.split(r"^Negative prompt:", "\n".join(lines[:last]), maxsplit=1, flags=re.M)
    solver, renamed = _solver(settings.get("Sampler", ""))
    ours = settings.get("Version", "").startswith(OURS)
    cfg = ours and "Subject" in settings and "Kappa" not in settings
    size = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", settings.get("Size", ""))
    found = {
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
        found |= {
            "cfg": cfg,
            "kappa": _number(settings.get("Kappa")),
            "class_noun": settings.get("Subject"),
            "strength": _number(settings.get("Subject strength")),
        }
    else:
        _warn(renamed, [name for name in settings if name not in READ])
    return {name: value for name, value in found.items() if value is not None}


def _settings(line: str) -> dict[str, str]:
    pairs = SETTING.findall(line[:MAX_LINE])
    return {key.strip(): _unquoted(value.strip()) for key, value in pairs}


def _solver(sampler: str) -> tuple[str | None, str]:
    """The solver that a sampler's name begins with, and what to say where it is not just that one."""
    names = {**{name: name for name in SAMPLERS}, **{shown: name for name, shown in SAMPLERS.items()}}
    for known in sorted(names, key=len, reverse=True):
        if f"{sampler} ".lower().startswith(f"{known} ".lower()):
            exact = len(sampler) == len(known)
            return names[known], "" if exact else f"the sampler {sampler[:60]!r} is drawn as {names[known]}"
    return None, f"there is no sampler {sampler[:60]!r} here, so the default is used" if sampler else ""


def _warn(renamed: str, left_out: list[str]) -> None:
    unread = f"not read: {', '.join(left_out[:20])}" if left_out else ""
    said = ["the recipe is another program's, so its seed draws another picture here", renamed, unread]
    log.warning("%s", "; ".join(filter(None, said)))


def _scaled(value: Any, factor: float) -> Any:
    return value * factor if isinstance(value, Real) else value


def _number(text: str | None) -> Any:
    """The number that the text is; else the text, which whoever takes the recipe refuses."""
    if text and re.fullmatch(r"-?[0-9]{1,20}", text):
        return int(text)
    return float(text) if text and re.fullmatch(r"-?[0-9]{1,20}\.[0-9]{1,20}", text) else text


def _one_line(text: Any) -> str:
    # A line break would let a prompt pass for the lines below it; to the tokenizer it is a space anyway.
    return " ".join(str(text or "").split())


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def _unquoted(text: str) -> str:
    try:
        found = json.loads(text) if text.startswith('"') else text
    except ValueError:
        return text
    return found if isinstance(found, str) else text
