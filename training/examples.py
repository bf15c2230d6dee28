"""Draws the example subjects: `python -m training.examples -o examples/subjects`.

Each noun gets a folder with four photos of a subject that neither training nor tests draw.
"""

from __future__ import annotations

import functools
from pathlib import Path

import click
import numpy as np
from PIL import Image

from hyperrt import files
from hyperrt.cli.options import RenamedOption
from hyperrt.training.data import scenes
from hyperrt.training.messages import reported

PHOTO_SIZE = 256
PLACES = ("on a plain white background", "in a forest", "in a city", "in the snow")


@click.command()
@click.option(
    "--output",
    "-o",
    cls=RenamedOption,
    former=["--out"],
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for one folder per noun.",
)
@click.option("--index", default=0, show_default=True, help="Number of the subject of each noun.")
@click.option("--force", is_flag=True, help="Replace existing photos.")
def main(output: Path, index: int, force: bool) -> None:
    """Draw one example subject per noun, four photos each."""
    with reported():
        for noun in scenes.NOUNS:
            subject = scenes.drawn_subject(noun, "example", index)
            rng = np.random.default_rng([scenes.SPLIT_SEEDS["example"], 1, index])
            (output / noun).mkdir(parents=True, exist_ok=True)
            for number, place in enumerate(PLACES, start=1):
                photo = Image.fromarray(scenes.scene(subject, place, rng, PHOTO_SIZE))
                write = functools.partial(photo.save, format="PNG", optimize=True)
                files.publish(output / noun / f"{number}.png", write, force=force)


if __name__ == "__main__":
    main()
