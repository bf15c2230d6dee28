"""The pictures of an evaluation on the disk: drawn by the runtime, or found there.

    FOLDER/SUBJECT/NN-K.png     prompt number NN of the pack, from 00; picture number K of it, from 0

Each carries its recipe. A picture whose recipe is the one that would be drawn is kept, so a run that was
killed goes on; all pictures of one call are kept or drawn together, so that going on changes no bit.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperrt import Runtime
from hyperrt.errors import BadImage, HyperRTError, NumericError
from hyperrt.lora.subject import Subject
from hyperrt.photos import load as images
from hyperrt.sampling import recipe
from hyperrt.sampling.options import SamplingConfig
from hyperrt.sampling.prompts import shortened
from hyperrt.sampling.request import plan

log = logging.getLogger("hyperrt.training")

NAME = re.compile(r"(\d{1,6})-(\d{1,6})\.(?:png|jpe?g|webp)", re.IGNORECASE)


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; None is the bundle's default.

    Attributes:
        cfg: plain CFG of the personalised model, instead of HM-CFG.
        images: of each subject and prompt; picture k has the seed `seed` + k, whatever the prompt.
        batch: pictures of one call.
    """

    images: int = 4
    seed: int = 42
    steps: int | None = 30
    kappa: float | None = None
    cfg: bool = False
    guidance: float | None = None
    solver: str | None = None
    batch: int = 4

    def options(self, pictures: range) -> dict[str, Any]:
        """The options of `Runtime.generate` for some pictures of each prompt."""
        return {
            "kappa": self.kappa, "cfg": self.cfg, "guidance_scale": self.guidance, "steps": self.steps,
            "solver": self.solver, "seed": self.seed + pictures.start, "n": len(pictures),
            "batch_size": min(len(pictures), self.batch),
        }  # fmt: skip


@dataclass
class DrawResult:
    """What became of a subject's pictures.

    Attributes:
        drawn, kept: how many.
        failed: (file, reason).
    """

    drawn: int = 0
    kept: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def draw(
    runtime: Runtime,
    subject: Subject,
    prompts: Sequence[str],
    folder: Path,
    drawing: Drawing,
    made: DrawResult,
) -> Iterator[None]:
    """Draw what is not there yet, count it in `made`, and yield after each call of the runtime.

    A picture that comes out flat or not finite is left out, and said; one that was there is replaced.

    Raises:
        HyperRTError, engines.EngineError: as `Runtime.generate`, but for NumericError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    together = max(1, drawing.batch // drawing.images)  # prompts of one call
    for start in range(0, len(prompts), together):
        numbers = range(start, min(start + together, len(prompts)))
        call = Call({k: prompts[k] for k in numbers}, range(drawing.images))
        _draw_together(runtime, subject, call, folder, drawing, made)
        yield


@dataclass(frozen=True)
class Call:
    """What one call of the runtime draws: these prompts, by number, each with these pictures of it."""

    prompts: Mapping[int, str]
    pictures: range

    def alone(self) -> list[Call]:
        """The same in several calls: each prompt alone, or else each picture; one picture: itself."""
        if len(self.prompts) > 1:
            return [Call({number: prompt}, self.pictures) for number, prompt in self.prompts.items()]
        return [Call(self.prompts, range(k, k + 1)) for k in self.pictures]


def _draw_together(
    runtime: Runtime, subject: Subject, call: Call, folder: Path, drawing: Drawing, made: DrawResult
) -> None:
    options = drawing.options(call.pictures)
    pairs = list(call.prompts.values()), [subject] * len(call.prompts)
    wanted = plan(runtime.bundle, runtime.backend, *pairs, SamplingConfig(**options)).recipes
    files = {
        folder / f"{number:02}-{k}.png": {**one, "seed": drawing.seed + k}
        for number, one in zip(call.prompts, wanted, strict=True)
        for k in call.pictures
    }
    if all(_is_of(path, one) for path, one in files.items()):
        made.kept += len(files)
        return
    try:
        results = runtime.generate(*pairs, **options)
    except NumericError as error:
        if len(files) > 1:  # only one of them may be bad
            for one in call.alone():
                _draw_together(runtime, subject, one, folder, drawing, made)
            return
        (path,) = files
        log.warning("%s/%s: %s", folder.name, path.name, error.what)
        path.unlink(missing_ok=True)
        made.failed.append((path.name, error.what))
        return
    pictures = [picture for result in results for picture in result.images]
    for (path, one), picture in zip(files.items(), pictures, strict=True):
        recipe.save_png(path, picture, one, force=True)
    made.drawn += len(files)


def _is_of(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a picture is there, whole, and of that recipe."""
    try:
        found = recipe.read(path)
        images.load_image(path)  # the recipe stands before the pixels, which may be damaged
    except HyperRTError:
        return False
    plain = json.loads(json.dumps(wanted))
    return plain == {key: found.get(key) for key in plain}


@dataclass(frozen=True)
class PictureFile:
    """A picture of a subject on the disk."""

    file: Path
    number: int  # of its prompt
    image: int
    seed: int | None  # as its recipe says


def find(folder: Path, prompts: Sequence[str], most: int) -> tuple[list[PictureFile], list[tuple[str, str]]]:
    """The pictures of a subject that can be scored, in order; and (file, reason) of those that cannot.

    Args:
        prompts: those of its pack; a picture whose recipe has another prompt is left out.
        most: pictures of each prompt; others are not looked at.
    """
    found: list[PictureFile] = []
    left_out: list[tuple[str, str]] = []
    for path in sorted(folder.iterdir() if folder.is_dir() else (), key=lambda path: path.name):
        match = NAME.fullmatch(path.name)
        if not match:
            continue
        number, image = int(match[1]), int(match[2])
        if image >= most:
            continue
        try:
            said = _said(path, prompts, number)
        except BadImage as error:
            left_out.append((images.printable(path.name), error.why))
            continue
        found.append(PictureFile(path, number, image, said.get("seed")))
    return sorted(found, key=lambda one: (one.number, one.image)), left_out


def _said(path: Path, prompts: Sequence[str], number: int) -> dict[str, Any]:
    """A picture's recipe; empty where it has none.

    Raises:
        BadImage: it cannot be read, or is of another prompt.
    """
    images.load_image(path)
    if number >= len(prompts):
        raise BadImage(path.name, f"there are prompts 0 to {len(prompts) - 1}")
    try:
        said = recipe.read(path)
    except BadImage:
        return {}
    if said.get("prompt") != prompts[number]:
        other = shortened(str(said.get("prompt")))
        raise BadImage(path.name, f"its recipe has the prompt {other}, not {prompts[number]!r}")
    return said
