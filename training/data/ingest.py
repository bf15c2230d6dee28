"""The first stage of training/prepare.py: the photos of a data set => images, nouns and captions of a cache.

images.npy, nouns.npy   see training/data/cache.py
skipped.jsonl           {"name", "why"} of each photo that is left out for being bad
captions.json           written last: the captions, how many photos there were, what they were made from
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
SHOWN = 5  # photos that are left out and named in a message
LOG_EVERY = 1000  # subjects


def write(
    folder: Path, found: Dataset, size: int, limit: int | None, workers: int, recipe: Mapping[str, Any]
) -> None:
    """Reads every subject that a layout found and writes the four files.

    Args:
        size: of the pictures, in pixels.
        limit: most subjects.
        workers: processes that read.
        recipe: what captions.json is to say of their origin.

    Raises:
        BadInput: nothing can be used; skipped.jsonl says why.
        IntegrityError: a file of the data set is damaged.
        ResourceError: the disk is full, or a worker died.
    """
    tally = Tally()
    try:
        files.publish(
            folder / IMAGES, lambda file: _write_images(file, found, size, limit, workers, tally), force=True
        )
    finally:
        files.publish(folder / SKIPPED, lambda file: file.write(tally.report().encode()), force=True)
    names = sorted(set(tally.nouns))
    number = {name: index for index, name in enumerate(names)}
    nouns = np.array([number[noun] for noun in tally.nouns], np.int32)
    files.publish(folder / NOUNS, lambda file: np.save(file, nouns), force=True)
    content = {"recipe": dict(recipe), "names": names, **tally.counts(), "texts": tally.texts}
    files.publish(folder / CAPTIONS, lambda file: file.write(json.dumps(content).encode()), force=True)


def check_share(folder: Path, about: Mapping[str, Any], most: float) -> None:
    """Says what was left out; more than a share of it is an error.

    Args:
        about: of captions.json: photos, bad, filtered.
        most: the share of bad photos that is still good.

    Raises:
        BadInput: there are more.
    """
    photos, bad = about["photos"], about["bad"]
    if about["filtered"]:
        log.info("%d samples are not good enough for the layout's filter", about["filtered"])
    if not bad:
        return
    with (folder / SKIPPED).open(encoding="utf-8") as file:
        first = [LeftOut(**json.loads(line)) for line in itertools.islice(file, SHOWN)]
    what = f"{bad:,} of {photos:,} photos are left out ({bad / photos:.1%})"
    why = _with_names(f"all are named in {folder / SKIPPED}", first)
    if bad > most * photos:
        needed = math.ceil(100 * bad / photos) / 100
        raise BadInput(what, why, f"mend them, or allow more than {most:.1%}: --max-bad {needed}")
    log.warning("%s: %s", what, why)


@dataclass
class Tally:
    """What became of the photos."""

    nouns: list[str] = field(default_factory=list)  # of each identity
    texts: list[list[Captions]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)  # the bad ones
    photos: int = 0  # bad ones included
    filtered: int = 0

    def passing(self, found: Iterator[DatasetSubject | LeftOut]) -> Iterator[DatasetSubject]:
        """The subjects; what is left out is noted."""
        for item in found:
            if isinstance(item, DatasetSubject):
                yield item
            elif item.bad:
                self.left_out.append(item)
                self.photos += 1
            else:
                self.filtered += 1

    def add(self, pictures: SubjectPictures, views: int) -> np.ndarray:
        """Notes a subject; returns its row (V, S, S, 3), or (0, S, S, 3) where all its photos are bad."""
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
        """JSON lines of what was left out for being bad."""
        return "".join(json.dumps({"name": item.name, "why": item.why}) + "\n" for item in self.left_out)


def _write_images(
    file: BinaryIO, found: Dataset, size: int, limit: int | None, workers: int, tally: Tally
) -> None:
    """One identity behind the other; how many there are is known at the end."""
    shape = (found.views, size, size, 3)
    _write_header(file, (0, *shape))
    start = file.tell()
    pictures = in_processes(partial(read, size=size), tally.passing(found.subjects), workers)
    for one in pictures:
        file.write(tally.add(one, found.views).tobytes())
        done = len(tally.nouns)
        if done and done % LOG_EVERY == 0:
            log.info("read %d subjects, %d photos are bad", done, len(tally.left_out))
        if done == limit:
            break
    pictures.close()
    if not tally.nouns:
        why = f"of {tally.photos:,} photos {len(tally.left_out):,} are bad"
        if tally.filtered:
            why += f", and {tally.filtered:,} samples are not good enough for the layout's filter"
        why = _with_names(why, tally.left_out)
        raise BadInput("the data set has nothing that can be used", why, "check --source and --layout")
    file.seek(0)
    _write_header(file, (len(tally.nouns), *shape))
    if file.tell() != start:  # NumPy leaves room for the first number to grow
        raise IntegrityError(f"{IMAGES} cannot be written", "NumPy made its header longer")


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _with_names(text: str, left_out: list[LeftOut]) -> str:
    named = "; ".join(f"{printable(item.name)} ({item.why})" for item in left_out[:SHOWN])
    return f"{text}: {named}" if named else text
