"""Draws the pictures of README.md with the bundle in the wheel: `python docs/pictures.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hyperrt import Runtime
from hyperrt.lora.subject import Subject
from hyperrt.training.data.scenes import NOUNS

Picture = NDArray[np.uint8]

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "images"
SUBJECTS = ROOT / "examples" / "subjects"
SCENES = ("on a beach", "in the snow", "in a forest", "under a night sky", "in a desert", "underwater")
KAPPAS = (0.0, 0.4, 0.8, 1.0, 1.2, 1.6, 2.0)
GAP, ZOOM = 4, 2


def photos(noun: str) -> list[Picture]:
    """The photos of an example subject, [64, 64, 3] uint8 each."""
    paths = sorted((SUBJECTS / noun).glob("*.png"))
    images = [Image.open(path).convert("RGB") for path in paths]
    return [np.asarray(image.resize((64, 64), Image.Resampling.BOX)) for image in images]


def sheet(rows: Sequence[Sequence[Picture | None]]) -> Image.Image:
    """Pictures of one size in rows on white; None leaves a gap."""
    side = 64 * ZOOM
    columns = max(map(len, rows))
    canvas = Image.new("RGB", (columns * (side + GAP) - GAP, len(rows) * (side + GAP) - GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            if picture is not None:
                large = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(large, (x * (side + GAP), y * (side + GAP)))
    return canvas


def draw(
    runtime: Runtime, noun: str, subject: Subject, scenes: Sequence[str], **options: float
) -> Iterator[Picture]:
    """A picture of the subject for each scene."""
    for scene in scenes:
        yield runtime.generate(f"a [V] {noun} {scene}", subject, seed=0, **options).images[0]


def main() -> None:
    """Write docs/images/{first,subjects,kappa}.png."""
    OUT.mkdir(exist_ok=True)
    with Runtime.open("tiny", "onnxruntime") as runtime:
        subjects = {noun: runtime.personalize(SUBJECTS / noun, noun) for noun in NOUNS}
        first = [*photos("mug"), None, *draw(runtime, "mug", subjects["mug"], SCENES[:4])]
        sheet([first]).save(OUT / "first.png", optimize=True)
        rows = [[photos(noun)[0], None, *draw(runtime, noun, subjects[noun], SCENES)] for noun in NOUNS]
        sheet(rows).save(OUT / "subjects.png", optimize=True)
        rows = [
            [photos(noun)[0], None]
            + [next(draw(runtime, noun, subjects[noun], ["on a beach"], kappa=kappa)) for kappa in KAPPAS]
            for noun in ("robot", "flower", "mug")
        ]
        sheet(rows).save(OUT / "kappa.png", optimize=True)


if __name__ == "__main__":
    main()
