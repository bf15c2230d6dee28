"""Subjects of a data set: found by a layout, then read, often by a worker process.

A layout (training/data/folders.py, shards.py, subjects200k.py, and cut-outs in cache.py) knows how a data set
lies on the disk. It yields subjects whose photos are not read yet, and names those that it leaves out. `read`
reads the photos of one subject; an unusable photo is left out with a reason, and the others are kept.

Captions come in pairs: the subject's has the placeholder [V], which training replaces by its token; the
generic one describes the same picture without it (c_S and c_G of arXiv 2511.03156).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hyperrt.errors import BadImage, BadPrompt, NotFound
from hyperrt.photos import load
from hyperrt.photos.formats import MAX_SIDE
from hyperrt.photos.srgb import Picture
from hyperrt.sampling import prompts

PLACEHOLDER = "[V]"

Captions = tuple[str, str]  # of the subject, generic
Content = Path | bytes | Callable[[], np.ndarray]


@dataclass(frozen=True)
class View:
    """One photo of a subject, not read yet.

    Attributes:
        name: of the file, for messages; untrusted.
        content: the file, its contents, or a function that draws the picture. Consecutive views may share
            one; then it is read once.
        captions: the subject's and the generic one.
        part: cuts the view out of the picture; None: the whole picture.
    """

    name: str
    content: Content
    captions: Captions
    part: Callable[[np.ndarray], Picture] | None = None


@dataclass(frozen=True)
class DatasetSubject:
    """A subject of a data set: its class noun and its photos."""

    noun: str
    views: tuple[View, ...]


@dataclass(frozen=True)
class LeftOut:
    """A photo or a sample that is not used; `bad` if it is unreadable, not only below a quality filter."""

    name: str
    why: str
    bad: bool = True


@dataclass(frozen=True)
class DatasetOptions:
    """Options of a layout.

    Attributes:
        split: "train" or "eval".
        noun: of subjects for which the data set gives none.
        views: maximum number of photos per subject; None: the layout's default.
        limit: maximum number of subjects; None: all.
        size: of the pictures, in pixels; for layouts that draw them.
    """

    split: str = "train"
    noun: str | None = None
    views: int | None = None
    limit: int | None = None
    size: int = 512


@dataclass(frozen=True)
class Dataset:
    """The subjects of a data set, one at a time, and the largest number of views of a subject."""

    subjects: Iterator[DatasetSubject | LeftOut]
    views: int


@dataclass(frozen=True)
class SubjectPictures:
    """The photos of a subject: images [n, S, S, 3] uint8 with n captions; n may be 0."""

    noun: str
    images: np.ndarray
    captions: list[Captions]
    left_out: list[LeftOut]


def read(subject: DatasetSubject, size: int) -> SubjectPictures:
    """Reads every photo of a subject as a square picture of `size` pixels, cut from the middle.

    A repeated picture is used once: a target that equals the photo would teach the network to copy.
    """
    pictures: list[Picture] = []
    captions, left_out = [], []
    seen: dict[bytes, str] = {}
    picture, content = None, None
    for view in subject.views:
        try:
            if picture is None or view.content is not content:
                picture, content = _load(view, size), view.content
            image = load.square(picture if view.part is None else view.part(picture), size)
            first = seen.setdefault(hashlib.sha256(image.tobytes()).digest(), view.name)
            if first != view.name:
                raise BadImage(view.name, f"it is the same picture as {first}")
        except (BadImage, NotFound) as error:
            left_out.append(LeftOut(view.name, error.why))
            continue
        pictures.append(image)
        captions.append(view.captions)
    stacked = np.stack(pictures) if pictures else np.empty((0, size, size, 3), np.uint8)
    return SubjectPictures(subject.noun, stacked, captions, left_out)


def _load(view: View, size: int) -> np.ndarray:
    if not isinstance(view.content, bytes | Path):
        return view.content()
    try:
        return load.load_image(view.content, keep_side=MAX_SIDE, follow=False)
    except BadImage:
        if view.part is not None:  # it is measured in pixels of the whole picture
            raise
        # Like `hyperrt generate`, decode a JPEG of over 64 megapixels at a smaller scale.
        return load.load_image(view.content, keep_side=max(load.KEEP_SIDE, 2 * size), follow=False)


def captions_of_noun(noun: str) -> Captions:
    """("a [V] face", "a face"): the paper's captions of a closed category."""
    return f"a {PLACEHOLDER} {noun}", f"a {noun}"


def captions_of_text(text: str, noun: str) -> Captions:
    """The captions from a text that describes the picture.

    A text with [V] is the subject's caption. Otherwise [V] is inserted before the first mention of the noun;
    if there is none, the text is preceded by "a [V] noun, ".

    Raises:
        BadPrompt: it is not a text, or is empty, or has no [V] and the noun is unknown.
    """
    plain = prompts.check_text(text, "caption")
    if PLACEHOLDER.lower() in plain.lower():
        both = prompts.split_prompt(plain, noun, token=PLACEHOLDER)
        return both.subject, both.generic
    if not plain or not noun:
        raise BadPrompt(f"the caption has no {PLACEHOLDER}", "and the class noun of the subject is unknown")
    mention = re.search(rf"(?<!\w){re.escape(noun)}(?!\w)", plain, re.IGNORECASE)
    if mention is None:
        return f"a {PLACEHOLDER} {noun}, {plain}", plain
    return f"{plain[: mention.start()]}{PLACEHOLDER} {plain[mention.start() :]}", plain
