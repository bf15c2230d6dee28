"""The first stage of training/prepare.py: reads the photos of a data set into images, nouns and captions.

images.npy, nouns.npy   see training/data/cache.py
skipped.jsonl           {"name", "why"} of each bad photo
captions.json           written last: the captions, counts of photos, and the settings of this stage
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hyperrt import files
from hyperrt.errors import BadInput, IntegrityError
from hyperrt.text import printable
from hyperrt.training.data.cache import CAPTIONS, IMAGES, NOUNS, in_processes
from hyperrt.training.data.subjects import Captions, Dataset, DatasetSubject, LeftOut, SubjectPictures, read

log = logging.getLogger("hyperrt.training")

SKIPPED = "skipped.jsonl"
SETTINGS = "recipe"  # key of captions.json, which caches on disk already have
SHOWN = 5  # bad photos in a message
LOG_EVERY = 1000  # subjects


def write(
    folder: Path, dataset: Dataset, size: int, limit: int | None, workers: int, settings: Mapping[str, Any]
) -> None:
    """Reads every subject of a data set and writes the four files.

    Args:
        size: of the pictures, in pixels.
        limit: maximum number of subjects.
        workers: processes that read.
        settings: stored in captions.json.

    Raises:
        BadInput: no photo can be used; skipped.jsonl gives the reasons.
        IntegrityError: a file of the data set is damaged.
        ResourceError: the disk is full, or a worker died.
    """
    tally = Tally()
    try:
        files.publish(
            folder / IMAGES,
            lambda file: _write_images(file, dataset, size, limit, workers, tally),
            force=True,
        )
    finally:
        files.publish(folder / SKIPPED, lambda file: file.write(tally.report().encode()), force=True)
    names = sorted(set(tally.nouns))
    number = {name: index for index, name in enumerate(names)}
    nouns = np.array([number[noun] for noun in tally.nouns], np.int32)
    files.publish(folder / NOUNS, lambda file: np.save(file, nouns), force=True)
    content = {SETTINGS: dict(settings), "names": names, **tally.counts(), "texts": tally.texts}
    files.publish(folder / CAPTIONS, lambda file: file.write(json.dumps(content).encode()), force=True)


def check_share(folder: Path, counts: Mapping[str, Any], max_share: float) -> None:
    """Logs the photos that were left out; refuses too many bad ones.

    Args:
        counts: `photos`, `bad` and `filtered` of captions.json.
        max_share: of bad photos.

    Raises:
        BadInput: the share of bad photos is larger.
    """
    photos, bad = counts["photos"], counts["bad"]
    if counts["filtered"]:
        log.info("%d samples are below the layout's quality filter", counts["filtered"])
    if not bad:
        return
    with (folder / SKIPPED).open(encoding="utf-8") as file:
        first = [LeftOut(**json.loads(line)) for line in itertools.islice(file, SHOWN)]
    what = f"{bad:,} of {photos:,} photos are left out ({bad / photos:.1%})"
    why = _with_names(f"{folder / SKIPPED} lists them", first)
    if bad > max_share * photos:
        needed = math.ceil(100 * bad / photos) / 100
        raise BadInput(what, why, f"repair them, or allow more than {max_share:.1%}: --max-bad {needed}")
    log.warning("%s: %s", what, why)


@dataclass
class Tally:
    """Counts of the photos, and the nouns and captions of the subjects."""

    nouns: list[str] = field(default_factory=list)  # of each subject
    texts: list[list[Captions]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)  # bad photos
    photos: int = 0  # including bad ones
    filtered: int = 0

    def usable(self, items: Iterator[DatasetSubject | LeftOut]) -> Iterator[DatasetSubject]:
        """Yields the subjects and counts what is left out."""
        for item in items:
            if isinstance(item, DatasetSubject):
                yield item
            elif item.bad:
                self.left_out.append(item)
                self.photos += 1
            else:
                self.filtered += 1

    def add(self, pictures: SubjectPictures, views: int) -> np.ndarray:
        """Counts a subject; returns its row (V, S, S, 3), or (0, S, S, 3) if all its photos are bad."""
        self.left_out += pictures.left_out
        self.photos += len(pictures.images) + len(pictures.left_out)
        different = pictures.images[:views]
        if not len(different):
            return different
        self.nouns.append(pictures.noun)
        self.texts.append(pictures.captions[:views])
        return different[np.arange(views) % len(different)]

    def counts(self) -> dict[str, int]:
        return {"photos": self.photos, "bad": len(self.left_out), "filtered": self.filtered}

    def report(self) -> str:
        """The bad photos as JSON lines."""
        return "".join(json.dumps({"name": item.name, "why": item.why}) + "\n" for item in self.left_out)


def _write_images(
    file: BinaryIO, dataset: Dataset, size: int, limit: int | None, workers: int, tally: Tally
) -> None:
    """Writes the pictures subject by subject; the header gets their number at the end."""
    shape = (dataset.views, size, size, 3)
    _write_header(file, (0, *shape))
    start = file.tell()
    subjects = in_processes(partial(read, size=size), tally.usable(dataset.subjects), workers)
    for pictures in subjects:
        file.write(tally.add(pictures, dataset.views).tobytes())
        done = len(tally.nouns)
        if done and done % LOG_EVERY == 0:
            log.info("read %d subjects, %d photos are bad", done, len(tally.left_out))
        if done == limit:
            break
    subjects.close()
    if not tally.nouns:
        why = f"{len(tally.left_out):,} of {tally.photos:,} photos are bad"
        if tally.filtered:
            why += f", and {tally.filtered:,} samples are below the layout's quality filter"
        why = _with_names(why, tally.left_out)
        raise BadInput("no photo of the data set can be used", why, "check --source and --layout")
    file.seek(0)
    _write_header(file, (len(tally.nouns), *shape))
    if file.tell() != start:  # NumPy reserves space for the first number
        raise IntegrityError(f"{IMAGES} cannot be written", "NumPy made its header longer")


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _with_names(text: str, left_out: list[LeftOut]) -> str:
    names = "; ".join(f"{printable(item.name)} ({item.why})" for item in left_out[:SHOWN])
    return f"{text}: {names}" if names else text
