"""Subjects from a folder of cut-outs: pictures with a transparent background.

    DIR/metadata.csv    table with the columns file and class_noun and optionally family (only rows of the
                        family `core` are used) and split (train or test)
    DIR/**/*.png, webp  without a table, each file is a "thing"

A training needs more subjects than there are files, so every further round through the files turns the hues
by an angle that depends on the subject. Train and test never share a file.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hyperrt.errors import BadImage, BadInput, NotFound
from hyperrt.text import printable
from hyperrt.training.data import scenes

log = logging.getLogger("hyperrt.training")

TABLE, FAMILY, THING = "metadata.csv", "core", "thing"
SUFFIXES = (".png", ".webp")
MAX_PIXELS = 4_000_000
SEEDS = {"train": 0, "test": 1}
OPAQUE = 8  # lowest alpha of a pixel of the subject
DESCRIBED_SIZE = 16  # pixels, enough to name the colours
SHOWN = 5  # bad files in a warning


@dataclass(frozen=True)
class Cutouts:
    """The usable files of one split, and the reasons why others are skipped, by name.

    Subjects are numbered without end: subject k comes from file k mod n.
    """

    split: str
    files: tuple[Path, ...]
    nouns: tuple[str, ...]  # of each file
    skipped: dict[str, str]

    def noun(self, index: int) -> str:
        """The coarse noun of a subject."""
        return self.nouns[index % len(self.files)]

    def subject(self, index: int, size: int) -> Image.Image:
        """A subject as RGBA (size, size) on transparent ground; the first round keeps the file's hues."""
        picture = read(self.files[index % len(self.files)])
        if index >= len(self.files):
            turn = np.random.default_rng([SEEDS[self.split], index]).uniform(0.1, 0.9)
            picture = turn_hue(picture, turn)
        return _squared(picture).resize((size, size), Image.Resampling.LANCZOS)

    def describe(self, index: int) -> str:
        """The noun of a subject with its two commonest colours: `red and dark green frog`."""
        pixels = np.asarray(self.subject(index, DESCRIBED_SIZE)).reshape(-1, 4)
        names = Counter(scenes.colour_name(tuple(pixel)) for pixel in pixels[pixels[:, 3] > 127, :3].tolist())
        colours = " and ".join(name for name, _ in names.most_common(2))
        return f"{colours} {self.noun(index)}".lstrip()  # a nearly transparent subject has no colours

    @property
    def fingerprint(self) -> str:
        """A hash of the files' names and nouns, for cache.json."""
        listed = "\n".join(f"{file.name} {noun}" for file, noun in zip(self.files, self.nouns, strict=True))
        return hashlib.sha256(listed.encode()).hexdigest()[:12]


def load(folder: Path | str, split: str = "train") -> Cutouts:
    """Reads every file of a split once; unusable files are skipped with a warning.

    Raises:
        NotFound: the folder does not exist.
        BadInput: no cut-out of the split can be used, or the table has no column `file`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}", "cut-outs are read from it", "check --cutouts")
    files, nouns, skipped = [], [], {}
    for name, noun in _listed(folder, split):
        try:
            _check_inside(folder, name)
            read(folder / name)
        except BadImage as error:
            skipped[printable(name)] = error.why
            continue
        files.append(folder / name)
        nouns.append(noun)
    if not files:
        why = f"{len(skipped)} files of the split {split!r} are bad" + (
            f": {_named(skipped)}" if skipped else ""
        )
        raise BadInput(
            f"{folder} has no cut-outs to use", why, "give a folder of PNG or WebP files with alpha"
        )
    if skipped:
        log.warning(
            "%d of %d cut-outs are left out: %s", len(skipped), len(skipped) + len(files), _named(skipped)
        )
    return Cutouts(split, tuple(files), tuple(nouns), skipped)


def read(path: Path) -> Image.Image:
    """Reads a file as RGBA.

    Raises:
        BadImage: it cannot be read, or no pixel is transparent, or all are.
    """
    name = printable(path.name)
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            raise ValueError("it is not a file")
        with Image.open(path, formats=("PNG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            picture = image.convert("RGBA")
    except Exception as error:  # decoders may raise anything
        raise BadImage(name, printable(str(error)) or type(error).__name__) from error
    least, most = picture.getchannel("A").getextrema()
    if most < OPAQUE or least > 255 - OPAQUE:
        raise BadImage(name, "nothing in it is " + ("opaque" if most < OPAQUE else "transparent"))
    return picture


def turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    """Turns all hues by a fraction of the circle; keeps alpha, saturation and brightness."""
    hue, saturation, value = picture.convert("RGB").convert("HSV").split()
    hue = hue.point([(level + round(256 * turn)) % 256 for level in range(256)])
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    turned.putalpha(picture.getchannel("A"))
    return turned


def _listed(folder: Path, split: str) -> Iterator[tuple[str, str]]:
    """(file, noun) of each row of the table in a split; without a table, of each file."""
    if not (folder / TABLE).is_file():
        names = (
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES
        )
        yield from ((name, THING) for name in sorted(names) if _split_of(name) == split)
        return
    with (folder / TABLE).open(newline="", encoding="utf-8-sig", errors="replace") as file:
        table = csv.DictReader(file)
        if "file" not in (table.fieldnames or ()):
            raise BadInput(f"{folder / TABLE} has no column 'file'", f"it has {table.fieldnames}", "add one")
        for row in table:
            if (row.get("family") or FAMILY) == FAMILY and (
                row.get("split") or _split_of(row["file"])
            ) == split:
                yield row["file"], _noun(row.get("class_noun") or THING)


def _split_of(name: str) -> str:
    """The split of a file, by a hash of its name: a fifth is `test`."""
    return "test" if hashlib.sha256(name.encode()).digest()[0] % 5 == 0 else "train"


def _noun(text: str) -> str:
    """The noun of a table if it is one to three plain words, otherwise "thing"."""
    noun = text.strip().lower()
    return noun if re.fullmatch(r"[a-z]{1,20}( [a-z]{1,20}){0,2}", noun) else THING


def _check_inside(folder: Path, name: str) -> None:
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise BadImage(printable(name), "it lies outside the folder")


def _squared(picture: Image.Image) -> Image.Image:
    """Crops to the opaque part and centres it in a transparent square."""
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha >= OPAQUE)).getbbox()
    cut = picture.crop(box)
    side = max(cut.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square


def _named(skipped: dict[str, str]) -> str:
    more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    return "; ".join(f"{name} ({why})" for name, why in list(skipped.items())[:SHOWN]) + more
