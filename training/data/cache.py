"""The cache that both trainings read: pictures of thousands of subjects, a few views of each.

The arrays are memory-mapped. Subjects vary along the first axis, views along the second.
training/pretrain.py draws a cache and training/prepare.py makes one from a data set, in this format:

    cache.json     settings, counts and names of files; written last, so without it a cache is unfinished
    images         (N, V, S, S, 3) uint8
    nouns          (N,)   index into `PictureCache.names`
    captions.json  captions of each subject and view, with [V] and generic; or, for drawn scenes:
    backgrounds    (N, V) index into scenes.BACKGROUNDS, from which the captions follow
    descriptions.json  for drawn scenes: each subject's noun with its colours and pattern
    latents*       (N, V, C, h, w) float16, scaled as the UNet takes them
    features-*, text-*, pooled-*   outputs of the frozen encoders for pictures and captions: features.py

A subject with n < V different views repeats them: view v is view v mod n in every array.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hyperrt import files
from hyperrt.errors import IntegrityError, ResourceError, UsageError
from hyperrt.training.data import scenes
from hyperrt.training.data.cutouts import Cutouts
from hyperrt.training.data.cutouts import load as load_cutouts
from hyperrt.training.data.subjects import (
    PLACEHOLDER,
    Captions,
    Dataset,
    DatasetOptions,
    DatasetSubject,
    View,
)

log = logging.getLogger("hyperrt.training")

METADATA, LATENTS, CAPTIONS = "cache.json", "latents.npy", "captions.json"
IMAGES, NOUNS = "images.npy", "nouns.npy"
BACKGROUNDS, DESCRIPTIONS = "backgrounds.npy", "descriptions.json"
AHEAD = 4  # items that each worker may compute in advance
CUTOUT_SHARE = 0.25
CUTOUT_VIEWS = 4
CUTOUT_SPLITS = {"train": "train", "eval": "test"}


@dataclass(frozen=True)
class MixedSubjects:
    """Numbered subjects: drawn ones and, for a share of the indices, cut-outs."""

    split: str
    cutouts: Cutouts | None = None
    share: float = CUTOUT_SHARE

    @property
    def names(self) -> tuple[str, ...]:
        """The coarse nouns; those of drawn subjects come first."""
        others = set() if self.cutouts is None else set(self.cutouts.nouns)
        return (*scenes.NOUNS, *sorted(others - set(scenes.NOUNS)))

    def at(self, index: int, size: int) -> tuple[str, Image.Image]:
        """The noun and the drawing of a subject, RGBA (size, size)."""
        if self.cutouts is not None and self._is_cutout(index):
            return self.cutouts.noun(index), self.cutouts.subject(index, size)
        subject = self._drawn(index)
        return subject.noun, scenes.draw_subject(subject, size)

    def describe(self, index: int) -> str:
        """The noun with colours and pattern, for a caption."""
        if self.cutouts is not None and self._is_cutout(index):
            return self.cutouts.describe(index)
        return scenes.describe(self._drawn(index))

    def _is_cutout(self, index: int) -> bool:
        rng = np.random.default_rng([scenes.SPLIT_SEEDS[self.split], 100, index])
        return bool(rng.random() < self.share)

    def _drawn(self, index: int) -> scenes.DrawnSubject:
        return scenes.drawn_subject(scenes.NOUNS[index % len(scenes.NOUNS)], self.split, index)


@dataclass(frozen=True)
class PictureCache:
    """Views of subjects and their captions; the module gives the shapes.

    Attributes:
        names: the nouns of the classes.
        texts: the captions of each subject's different views, with [V] in place of the token.
        metadata: the contents of cache.json.
    """

    path: Path
    names: tuple[str, ...]
    images: np.ndarray
    nouns: np.ndarray
    texts: Sequence[Sequence[Captions]]
    metadata: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> PictureCache:
        """Opens a finished cache.

        Raises:
            FileNotFoundError: the folder holds no finished cache.
            IntegrityError: its files do not match.
        """
        path = Path(path)
        if not (path / METADATA).is_file():
            raise FileNotFoundError(
                f"{path} is not a finished picture cache; hyperrt pretrain and hyperrt prepare make one"
            )
        return cls.read(path, read_json(path / METADATA))

    @classmethod
    def read(cls, path: Path, metadata: Mapping[str, Any]) -> PictureCache:
        """Opens a cache that may be unfinished, with this metadata; errors as `open`."""
        names = tuple(metadata.get("names", scenes.NOUNS))
        images = np.load(path / IMAGES, mmap_mode="r")
        nouns = np.load(path / NOUNS)
        if (path / CAPTIONS).is_file():
            texts = [[tuple(pair) for pair in views] for views in read_json(path / CAPTIONS).get("texts", ())]
        else:
            texts = [
                [_captions_of_scene(names[noun], scenes.BACKGROUNDS[k]) for k in places]
                for noun, places in zip(nouns, np.load(path / BACKGROUNDS), strict=True)
            ]
        if not len(images) == len(nouns) == len(texts) or not all(texts):
            why = (
                f"there are pictures of {len(images)} subjects, {len(nouns)} nouns, captions of {len(texts)}"
            )
            raise IntegrityError(f"the cache {path} is damaged", why, "remove it, and make it again")
        return cls(path, names, images, nouns, texts, metadata)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, V)."""
        subjects, views = self.images.shape[:2]
        return subjects, views

    @cached_property
    def counts(self) -> np.ndarray:
        """(N,) the number of different views of each subject, 1 to V."""
        return np.array([len(views) for views in self.texts])

    @property
    def latents(self) -> np.ndarray:
        """(N, V, C, h, w) float16.

        Raises:
            FileNotFoundError: they are not written yet.
        """
        path = self.path / self.metadata.get("latents", LATENTS)
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} has no latents yet; hyperrt pretrain writes them")
        return np.load(path, mmap_mode="r")

    @property
    def mirrored(self) -> np.ndarray | None:
        """The latents of the mirrored pictures; None without --flip in `hyperrt prepare`."""
        name = self.metadata.get("mirrored")
        return None if name is None else np.load(self.path / name, mmap_mode="r")

    def captions(self, subjects: np.ndarray, views: np.ndarray, token: str | None = None) -> list[str]:
        """The captions of (subject, view) pairs: with the token, or generic if it is None."""
        pairs = [
            self.texts[subject][view % len(self.texts[subject])]
            for subject, view in zip(subjects, views, strict=True)
        ]
        return [generic if token is None else text.replace(PLACEHOLDER, token) for text, generic in pairs]

    def described(self, subjects: np.ndarray, views: np.ndarray) -> list[str]:
        """The captions of (subject, view) pairs of drawn scenes, with descriptions instead of nouns."""
        places = np.load(self.path / BACKGROUNDS)
        descriptions = json.loads((self.path / DESCRIPTIONS).read_text())
        return [
            scenes.caption(descriptions[subject], scenes.BACKGROUNDS[places[subject, view]])
            for subject, view in zip(subjects, views, strict=True)
        ]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a cache; empty if the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _captions_of_scene(noun: str, place: str) -> Captions:
    return scenes.caption(noun, place, PLACEHOLDER), scenes.caption(noun, place)


def build(
    path: Path,
    count: int,
    views: int,
    size: int,
    split: str = "train",
    workers: int = 2,
    cutouts: Cutouts | None = None,
    share: float = CUTOUT_SHARE,
    force: bool = False,
) -> PictureCache:
    """Draws `count` subjects in `views` scenes each. A finished cache with the same settings is kept.

    Args:
        cutouts: subjects to mix with the drawn ones.
        share: of cut-outs among the subjects.
        force: replace a finished cache with other settings.

    Raises:
        UsageError: the folder holds a finished cache with other settings, and `force` is off.
    """
    metadata: dict[str, Any] = {
        "identities": count,
        "views": views,
        "size": size,
        "split": split,
        "version": 3,
    }
    subjects = MixedSubjects(split, cutouts, share)
    if cutouts is not None:
        metadata.update(names=list(subjects.names), cutouts=cutouts.fingerprint, share=share)
    finished = read_json(path / METADATA)
    if finished != metadata:
        if finished and not force:
            names = sorted(finished.keys() | metadata.keys())
            differing = [name for name in names if finished.get(name) != metadata.get(name)]
            why = f"it is a finished cache with other settings: {', '.join(differing)}"
            raise UsageError(f"{path} exists", why, "add --force, or choose another --cache")
        path.mkdir(parents=True, exist_ok=True)
        for stale in (METADATA, LATENTS):
            (path / stale).unlink(missing_ok=True)
        _draw_all(path, count, views, size, subjects, workers)
        files.publish(path / METADATA, lambda file: file.write(json.dumps(metadata).encode()))
    return PictureCache.open(path)


def _draw_all(path: Path, count: int, views: int, size: int, subjects: MixedSubjects, workers: int) -> None:
    shape = (count, views, size, size, 3)
    images = np.lib.format.open_memmap(path / IMAGES, "w+", np.uint8, shape)
    nouns = np.empty(count, np.int16)
    backgrounds = np.empty((count, views), np.int16)
    draw = partial(draw_views, views=views, size=size, subjects=subjects)
    for index, (noun, pictures, places) in enumerate(in_processes(draw, range(count), workers)):
        images[index], nouns[index], backgrounds[index] = pictures, noun, places
        if (index + 1) * 10 // count > index * 10 // count:
            log.info("cache: drew %d of %d subjects", index + 1, count)
    images.flush()
    np.save(path / NOUNS, nouns)
    np.save(path / BACKGROUNDS, backgrounds)
    descriptions = json.dumps([subjects.describe(index) for index in range(count)])
    files.publish(path / DESCRIPTIONS, lambda file: file.write(descriptions.encode()), force=True)


def in_processes(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """Maps in worker processes, reading `items` only a little ahead; with one worker in this process.

    Raises:
        ResourceError: a worker died.
    """
    if workers == 1:
        yield from map(function, items)
        return
    items, waiting = iter(items), deque[Any]()
    with ProcessPoolExecutor(workers) as pool:
        try:
            waiting.extend(pool.submit(function, item) for item in islice(items, AHEAD * workers))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(items, 1))
        except BrokenProcessPool as error:
            why = "the system may have killed it because memory ran out"
            raise ResourceError("a worker process died", why, "reduce --workers") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def draw_views(
    index: int, views: int, size: int, subjects: MixedSubjects
) -> tuple[int, np.ndarray, np.ndarray]:
    """Draws one subject in different scenes.

    Returns:
        The number of its noun, the pictures (V, S, S, 3) uint8, and the numbers of the scenes (V,).
    """
    rng, places = _scenes_of(index, views, subjects.split)
    noun, drawing = subjects.at(index, size)
    pictures = [scenes.compose(drawing, scenes.BACKGROUNDS[k], rng, size) for k in places]
    return subjects.names.index(noun), np.stack(pictures), places


def _scenes_of(index: int, views: int, split: str) -> tuple[np.random.Generator, np.ndarray]:
    """The random generator of a subject's scenes, and their numbers (V,)."""
    rng = np.random.default_rng([scenes.SPLIT_SEEDS[split], 1, index])
    return rng, rng.permutation(len(scenes.BACKGROUNDS))[:views].astype(np.int16)


def cutout_subjects(source: Path, options: DatasetOptions) -> Dataset:
    """Layout `cutouts`: cut-outs (training/data/cutouts.py) in drawn scenes; `limit` is their number.

    Raises:
        NotFound, BadInput: as `cutouts.load`.
    """
    cutouts = load_cutouts(source, CUTOUT_SPLITS[options.split])
    subjects = MixedSubjects(cutouts.split, cutouts, share=1.0)
    views = min(options.views or CUTOUT_VIEWS, len(scenes.BACKGROUNDS))

    def subject(index: int) -> DatasetSubject:
        noun, draw = cutouts.noun(index), partial(_pictures, index, views, options.size, subjects)
        places = [scenes.BACKGROUNDS[k] for k in _scenes_of(index, views, cutouts.split)[1]]
        texts = [_captions_of_scene(noun, place) for place in places]
        name = f"subject {index}"
        return DatasetSubject(
            noun, tuple(View(name, draw, text, partial(_picture, k)) for k, text in enumerate(texts))
        )

    return Dataset(map(subject, range(options.limit or len(cutouts.files))), views)


def _pictures(index: int, views: int, size: int, subjects: MixedSubjects) -> np.ndarray:
    return draw_views(index, views, size, subjects)[1]


def _picture(view: int, pictures: np.ndarray) -> np.ndarray:
    return pictures[view]
