"""Reads the photos of one subject, in whatever form they come: folder, file, bytes, array, PIL image."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.errors import BadImage, BadInput
from hyperrt.photos.load import is_blank, load_folder, load_image
from hyperrt.text import printable

log = logging.getLogger("hyperrt")

MAX_WARNINGS = 10  # photos that get a line each; a folder may hold thousands

Photo = Any  # path, bytes, open binary file, [H, W, 3] uint8, or PIL image
Photos = str | os.PathLike[str] | Iterable[Photo]


def read_photos(photos: Photos, strict: bool = False) -> list[NDArray[np.uint8]]:
    """Every usable photo as [H, W, 3] uint8; one that is not is logged as a warning and left out.

    A photo that is nearly one colour is used, with a warning.

    Args:
        photos: a folder, a photo (a file's name, its contents, an open binary file, an array [H, W, 3] of
            uint8, a PIL image), an array [n, H, W, 3], or several of all these: a list, set or generator.
        strict: raise on the first photo that cannot be used.

    Raises:
        BadInput: no photo is left, or one is bad and `strict` is on, or these are no photos.
        NotFound: the folder or a file does not exist.
    """
    usable: list[NDArray[np.uint8]] = []
    names: list[str] = []
    bad: list[BadImage] = []
    for number, photo in enumerate(_each(photos), start=1):
        if isinstance(photo, (str, os.PathLike)) and os.path.isdir(photo):
            folder = load_folder(Path(photo), strict=strict)
            bad += [BadImage(name, reason) for name, reason in folder.rejected]
            usable += folder.images
            names += folder.names
            continue
        name = _name(photo, number)
        try:
            usable.append(load_image(photo, name=name))
            names.append(name)
        except BadImage as error:
            if strict:
                raise
            bad.append(error)
    if not usable:
        raise bad[0] if len(bad) == 1 else _none_left(bad)
    blank = [name for name, image in zip(names, usable, strict=True) if is_blank(image)]
    _warn([f"left out {error.name}: {error.reason}" for error in bad], "left out %s more photos")
    _warn([f"{name} shows no subject: it is nearly one colour" for name in blank], "and so do %s more photos")
    return usable


def _each(photos: Photos) -> Iterable[Photo]:
    """The photos one by one, of whatever holds them."""
    if isinstance(photos, np.ndarray):
        return photos if photos.ndim == 4 else [photos]
    single = isinstance(photos, (str, bytes, bytearray, memoryview, os.PathLike)) or hasattr(photos, "read")
    if single or not isinstance(photos, Iterable):
        return [photos]
    # The order of a set of names differs from run to run, and with it the last digits of a sum.
    return sorted(photos, key=str) if isinstance(photos, Set) else photos


def _name(photo: Photo, number: int) -> str:
    """What a warning calls a photo: the file's name, else its place among the photos."""
    name = photo if isinstance(photo, (str, os.PathLike)) else getattr(photo, "name", None)
    return printable(os.fsdecode(name)) if isinstance(name, (str, os.PathLike)) else f"photo {number}"


def _warn(messages: Sequence[str], more: str) -> None:
    for message in messages[:MAX_WARNINGS]:
        log.warning("%s", message)
    if len(messages) > MAX_WARNINGS:
        log.warning(more, f"{len(messages) - MAX_WARNINGS:,}")


def _none_left(bad: Sequence[BadImage]) -> BadInput:
    if not bad:
        do = "three to five photos are a good number"
        return BadInput("no photos were given", "a subject needs at least one", do)
    first = "; ".join(f"{error.name}: {error.reason}" for error in bad[:3])
    return BadInput(
        f"none of the {len(bad)} photos could be used", first, "convert them to PNG, JPEG or WebP"
    )
