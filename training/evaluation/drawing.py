"""Draws the pictures of an evaluation, or finds those that exist.

    FOLDER/SUBJECT/NN-K.png     picture K, from 0, of prompt NN of the pack, from 00

Each picture carries its recipe. A picture is kept if its recipe is the one that would be drawn, so a killed
run resumes. Pictures of one call are kept or drawn together, so resuming changes no bit.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperrt.errors import BadImage, HyperRTError, NumericError
from hyperrt.lora.subject import Subject
from hyperrt.photos import load
from hyperrt.runtime import Runtime, finish
from hyperrt.sampling import recipe
from hyperrt.sampling.options import SamplingOptions
from hyperrt.text import printable, short_repr

log = logging.getLogger("hyperrt.training")

NAME = re.compile(r"(\d{1,6})-(\d{1,6})\.(?:png|jpe?g|webp)", re.IGNORECASE)


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn; None stands for the bundle's default.

    Attributes:
        pictures: of each subject and prompt; picture k has the seed `seed` + k for every prompt.
        cfg: plain CFG of the personalised model, instead of HM-CFG.
        batch_size: pictures per call of the runtime.
    """

    pictures: int = 4
    seed: int = 42
    steps: int | None = 30
    kappa: float | None = None
    cfg: bool = False
    guidance_scale: float | None = None
    solver: str | None = None
    batch_size: int = 4

    def options(self, pictures: range) -> dict[str, Any]:
        """The options of `Runtime.generate` for these pictures of each prompt."""
        return {
            "kappa": self.kappa, "cfg": self.cfg, "guidance_scale": self.guidance_scale, "steps": self.steps,
            "solver": self.solver, "seed": self.seed + pictures.start, "n": len(pictures),
            "batch_size": min(len(pictures), self.batch_size),
        }  # fmt: skip


@dataclass
class DrawResult:
    """Counts of a subject's pictures; `failed` holds (file, reason)."""

    drawn: int = 0
    kept: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def draw(
    runtime: Runtime,
    subject: Subject,
    prompts: Sequence[str],
    folder: Path,
    settings: DrawSettings,
    result: DrawResult,
) -> Iterator[None]:
    """Draws the missing pictures, counts them in `result`, and yields after each call of the runtime.

    A picture that comes out flat or not finite is logged and left out, and its old file is removed.

    Raises:
        HyperRTError, engines.EngineError: as `Runtime.generate`, except NumericError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts_per_call = max(1, settings.batch_size // settings.pictures)
    for start in range(0, len(prompts), prompts_per_call):
        numbers = range(start, min(start + prompts_per_call, len(prompts)))
        call = Call({number: prompts[number] for number in numbers}, range(settings.pictures))
        _draw_call(runtime, subject, call, folder, settings, result)
        yield


@dataclass(frozen=True)
class Call:
    """One call of the runtime: prompts by number, and the pictures of each."""

    prompts: Mapping[int, str]
    pictures: range

    def split(self) -> list[Call]:
        """Smaller calls for the same pictures: one per prompt, or one per picture of a single prompt."""
        if len(self.prompts) > 1:
            return [Call({number: prompt}, self.pictures) for number, prompt in self.prompts.items()]
        return [Call(self.prompts, range(k, k + 1)) for k in self.pictures]


def _draw_call(
    runtime: Runtime, subject: Subject, call: Call, folder: Path, settings: DrawSettings, result: DrawResult
) -> None:
    options = settings.options(call.pictures)
    pairs = list(call.prompts.values()), [subject] * len(call.prompts)
    request = runtime.resolve(*pairs, SamplingOptions(**options))
    recipes = {
        folder / f"{number:02}-{k}.png": {**of_prompt, "seed": settings.seed + k}
        for number, of_prompt in zip(call.prompts, request.recipes, strict=True)
        for k in call.pictures
    }
    if all(_has_recipe(path, expected) for path, expected in recipes.items()):
        result.kept += len(recipes)
        return
    try:
        outputs = finish(runtime.sample(request))
    except NumericError as error:
        if len(recipes) > 1:  # the others may be good
            for smaller in call.split():
                _draw_call(runtime, subject, smaller, folder, settings, result)
            return
        (path,) = recipes
        log.warning("%s/%s: %s", folder.name, path.name, error.what)
        path.unlink(missing_ok=True)
        result.failed.append((path.name, error.what))
        return
    pictures = [picture for output in outputs for picture in output.images]
    for path, picture in zip(recipes, pictures, strict=True):
        recipe.save_png(path, picture, recipes[path], force=True)
    result.drawn += len(recipes)


def _has_recipe(path: Path, expected: Mapping[str, Any]) -> bool:
    """Whether the picture exists, can be decoded, and has this recipe."""
    try:
        actual = recipe.read(path)
        load.load_image(path)  # the recipe stands before the pixels, which may be damaged
    except HyperRTError:
        return False
    plain = json.loads(json.dumps(expected))
    return plain == {key: actual.get(key) for key in plain}


@dataclass(frozen=True)
class PictureFile:
    """A picture of a subject on the disk."""

    file: Path
    number: int  # of the prompt
    image: int  # of this prompt
    seed: int | None  # from its recipe


def find(
    folder: Path, prompts: Sequence[str], pictures: int
) -> tuple[list[PictureFile], list[tuple[str, str]]]:
    """The usable pictures of a subject, in order, and (file, reason) of the others.

    Args:
        prompts: of the subject's pack; a picture whose recipe has another prompt is left out.
        pictures: of each prompt; files with a higher number are ignored.
    """
    usable: list[PictureFile] = []
    left_out: list[tuple[str, str]] = []
    for path in sorted(folder.iterdir() if folder.is_dir() else (), key=lambda path: path.name):
        match = NAME.fullmatch(path.name)
        if not match:
            continue
        number, image = int(match[1]), int(match[2])
        if image >= pictures:
            continue
        try:
            parameters = _recipe_of(path, prompts, number)
        except BadImage as error:
            left_out.append((printable(path.name), error.why))
            continue
        usable.append(PictureFile(path, number, image, parameters.get("seed")))
    return sorted(usable, key=lambda picture: (picture.number, picture.image)), left_out


def _recipe_of(path: Path, prompts: Sequence[str], number: int) -> dict[str, Any]:
    """The recipe of a picture; empty if it has none.

    Raises:
        BadImage: it cannot be read, or its recipe has another prompt.
    """
    load.load_image(path)
    if number >= len(prompts):
        raise BadImage(path.name, f"there are prompts 0 to {len(prompts) - 1}")
    try:
        parameters = recipe.read(path)
    except BadImage:
        return {}
    if parameters.get("prompt") != prompts[number]:
        actual = short_repr(str(parameters.get("prompt")))
        raise BadImage(path.name, f"its recipe has the prompt {actual}, not {prompts[number]!r}")
    return parameters
