"""A subject of a data set: found by a layout, then read, often by a worker process.

A layout (training/data/folders.py, shards.py, subjects200k.py, and the cut-outs of data.py) knows how a data
set lies on the disk. It yields subjects whose photos are not read yet, and names what it leaves out. `read`
makes pictures of one subject; a photo that cannot be used is left out, and named, and the others are kept.

Captions come in pairs: that of the subject has the placeholder [V], for which the training puts its token;
the generic one is of the same picture without it (c_S and c_G of arXiv 2511.03156).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hyperrt.errors import BadImage, BadPrompt, NotFound
from hyperrt.photos import load as images
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
        name: of the file, for people; it may be hostile.
        content: the file, its contents, or what draws the picture. Views may share one: it is read once.
        captions: of the subject and generic.
        part: cuts the view out of the picture; None: all of it.
    """

    name: str
    content: Content
    captions: Captions
    part: Callable[[np.ndarray], Picture] | None = None


@dataclass(frozen=True)
class DatasetSubject:
    """A person, animal or thing: the noun of its class, and its photos."""

    noun: str
    views: tuple[View, ...]


@dataclass(frozen=True)
class LeftOut:
    """A photo or a sample that is not used; `bad`: not for its quality, but because it cannot be read."""

    name: str
    why: str
    bad: bool = True


@dataclass(frozen=True)
class DatasetOptions:
    """What a layout is told.

    Attributes:
        split: "train" or "eval".
        noun: of subjects that do not say what they are.
        views: most photos of one subject; None: the layout's own number.
        limit: most subjects; None: all.
        size: of the pictures, in pixels; of use to what draws.
    """

    split: str = "train"
    noun: str | None = None
    views: int | None = None
    limit: int | None = None
    size: int = 512


@dataclass(frozen=True)
class Dataset:
    """What a layout finds: the subjects, as they come, and the most views that one of them has."""

    subjects: Iterator[DatasetSubject | LeftOut]
    views: int


@dataclass(frozen=True)
class SubjectPictures:
    """A subject that was read: images [n, S, S, 3] uint8 with n captions; n may be 0."""

    noun: str
    images: np.ndarray
    captions: list[Captions]
    left_out: list[LeftOut]


def read(subject: DatasetSubject, size: int) -> SubjectPictures:
    """Every photo of a subject as a square picture of `size` pixels, the middle of what is longer than high.

    The same picture twice is used once: a target that is the photo teaches to copy.
    """
    found: list[Picture] = []
    captions, left_out = [], []
    seen: dict[bytes, str] = {}
    picture, content = None, None
    for view in subject.views:
        try:
            if picture is None or view.content is not content:
                picture, content = _load(view.content), view.content
            image = images.square(picture if view.part is None else view.part(picture), size)
            first = seen.setdefault(hashlib.sha256(image.tobytes()).digest(), view.name)
            if first != view.name:
                raise BadImage(view.name, f"it is the same picture as {first}")
        except (BadImage, NotFound) as error:
            left_out.append(LeftOut(view.name, error.why))
            continue
        found.append(image)
        captions.append(view.captions)
    stacked = np.stack(found) if found else np.empty((0, size, size, 3), np.uint8)
    return SubjectPictures(subject.noun, stacked, captions, left_out)


def _load(content: Content) -> np.ndarray:
    if isinstance(content, bytes | Path):
        # Whole: what is cut out of it is measured in its own pixels.
        return images.load_image(content, keep_side=MAX_SIDE, follow=False)
    return content()


def captions_of_noun(noun: str) -> Captions:
    """("a [V] face", "a face"): the paper's captions of a closed category."""
    return f"a {PLACEHOLDER} {noun}", f"a {noun}"


def captions_of_text(text: str, noun: str) -> Captions:
    """Both captions of a text that describes the picture.

    A text with [V] is the subject's caption. Into another one [V] is put before the first mention of the
    noun; where there is none, "a [V] noun" goes before all.

    Raises:
        BadPrompt: it is no text, or is empty, or has neither [V] nor a noun to put it before.
    """
    plain = prompts.check_text(text, "caption")
    if PLACEHOLDER.lower() in plain.lower():
        both = prompts.split_prompt(plain, noun, token=PLACEHOLDER)
        return both.subject, both.generic
    if not plain or not noun:
        raise BadPrompt(f"the caption has no {PLACEHOLDER}", "nor is it known what the subject is")
    mention = re.search(rf"(?<!\w){re.escape(noun)}(?!\w)", plain, re.IGNORECASE)
    if mention is None:
        return f"a {PLACEHOLDER} {noun}, {plain}", plain
    return f"{plain[: mention.start()]}{PLACEHOLDER} {plain[mention.start() :]}", plain
