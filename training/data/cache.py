"""The cache that both trainings read: pictures of thousands of identities, a few views of each.

Kept as memory-mapped arrays, so that the training loop spends its time in the network. Identities vary along
the first axis, views along the second. What training/pretrain.py draws and what training/prepare.py reads
from a data set is one format:

    cache.json     how the cache was made; written last, so a cache without it is not finished
    images         (N, V, S, S, 3) uint8
    nouns          (N,)   index into `PictureCache.names`
    captions.json  of each identity and view, of the subject and generic; or, of drawn scenes:
    backgrounds    (N, V) index into scenes.BACKGROUNDS, which makes the captions
    descriptions.json  of drawn scenes: of each identity the noun with its colours and pattern
    latents*       (N, V, C, h, w) float16, scaled as the UNet takes them
    features-*, text-*, pooled-*   what the frozen encoders make of pictures and captions: features.py

An identity with fewer than V different views has them again: view v of n is view v mod n in every array.
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
from hyperrt.training.data import cutouts as cutouts_of
from hyperrt.training.data import scenes
from hyperrt.training.data.cutouts import Cutouts
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
AHEAD = 4  # items that each worker is ahead of what is used
CUTOUT_SHARE = 0.25
CUTOUT_VIEWS = 4
CUTOUT_SPLITS = {"train": "train", "eval": "test"}


@dataclass(frozen=True)
class Subjects:
    """Who is at which index: a drawn subject or, for a share of the indices, a cut-out."""

    split: str
    cutouts: Cutouts | None = None
    share: float = CUTOUT_SHARE

    @property
    def names(self) -> tuple[str, ...]:
        """The coarse nouns of all of them; the drawn ones come first."""
        others = set() if self.cutouts is None else set(self.cutouts.nouns)
        return (*scenes.NOUNS, *sorted(others - set(scenes.NOUNS)))

    def at(self, index: int, size: int) -> tuple[str, Image.Image]:
        """The noun, and the subject as RGBA (size, size)."""
        if self.cutouts is not None and self._is_cutout(index):
            return self.cutouts.noun(index), self.cutouts.subject(index, size)
        who = self._drawn(index)
        return who.noun, scenes.draw_subject(who, size)

    def describe(self, index: int) -> str:
        """The noun with colours and pattern, as captions can have it."""
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
    """Views of subjects, and captions of them; see the module for shapes.

    Attributes:
        names: the nouns of the classes.
        texts: for each identity the captions of its different views, [V] for the token.
        metadata: what cache.json says.
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
            FileNotFoundError: there is none.
            IntegrityError: its files do not fit together.
        """
        path = Path(path)
        if not (path / METADATA).is_file():
            raise FileNotFoundError(
                f"{path} is not a finished scene cache; hyperrt pretrain and hyperrt prepare make one"
            )
        return cls.read(path, read_json(path / METADATA))

    @classmethod
    def read(cls, path: Path, metadata: Mapping[str, Any]) -> PictureCache:
        """Opens what is there, finished or not; errors as `open`."""
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
            why = f"there are {len(images)} identities, {len(nouns)} nouns and {len(texts)} captions"
            raise IntegrityError(f"the cache {path} is damaged", why, "remove it, and make it anew")
        return cls(path, names, images, nouns, texts, metadata)

    @property
    def recipe(self) -> Mapping[str, Any]:  # for features.py, until it is split
        return self.metadata

    @property
    def shape(self) -> tuple[int, int]:
        """(N, V)."""
        identities, views = self.images.shape[:2]
        return identities, views

    @cached_property
    def counts(self) -> np.ndarray:
        """(N,) how many different views an identity has, 1 to V."""
        return np.array([len(views) for views in self.texts])

    @property
    def latents(self) -> np.ndarray:
        """Raises FileNotFoundError before they have been written."""
        path = self.path / self.metadata.get("latents", LATENTS)
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} has no latents yet; hyperrt pretrain writes them")
        return np.load(path, mmap_mode="r")

    @property
    def mirrored(self) -> np.ndarray | None:
        """The latents of the mirrored pictures, in caches that were prepared with --flip."""
        name = self.metadata.get("mirrored")
        return None if name is None else np.load(self.path / name, mmap_mode="r")

    def captions(self, identities: np.ndarray, views: np.ndarray, token: str | None = None) -> list[str]:
        """The captions of some (identity, view) pairs, with the subject's token or without."""
        pairs = [
            self.texts[who][view % len(self.texts[who])] for who, view in zip(identities, views, strict=True)
        ]
        return [generic if token is None else text.replace(PLACEHOLDER, token) for text, generic in pairs]

    def described(self, identities: np.ndarray, views: np.ndarray) -> list[str]:
        """The captions of some (identity, view) pairs of drawn scenes, with descriptions for the nouns."""
        places, found = np.load(self.path / BACKGROUNDS), json.loads((self.path / DESCRIPTIONS).read_text())
        pairs = zip(identities, views, strict=True)
        return [scenes.caption(found[who], scenes.BACKGROUNDS[places[who, view]]) for who, view in pairs]


PictureCache = PictureCache  # for features.py, until it is split


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a cache; empty where there is no such file, or another one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _captions_of_scene(noun: str, place: str) -> Captions:
    return scenes.caption(noun, place, PLACEHOLDER), scenes.caption(noun, place)


def build(
    path: Path,
    identities: int,
    views: int,
    size: int,
    split: str = "train",
    workers: int = 2,
    cutouts: Cutouts | None = None,
    share: float = CUTOUT_SHARE,
    force: bool = False,
) -> PictureCache:
    """Draws `identities` subjects in `views` scenes each. A finished cache of the same make-up is kept.

    Args:
        cutouts: subjects that are mixed with the drawn ones.
        share: of the identities, those that are cut-outs.
        force: replace a finished cache of another make-up.

    Raises:
        UsageError: there is one, and `force` is off.
    """
    metadata: dict[str, Any] = {
        "identities": identities,
        "views": views,
        "size": size,
        "split": split,
        "version": 3,
    }
    subjects = Subjects(split, cutouts, share)
    if cutouts is not None:
        metadata.update(names=list(subjects.names), cutouts=cutouts.fingerprint, share=share)
    finished = read_json(path / METADATA)
    if finished != metadata:
        if finished and not force:
            names = sorted(finished.keys() | metadata.keys())
            differing = [name for name in names if finished.get(name) != metadata.get(name)]
            why = f"it is a finished cache, of which {', '.join(differing)} would change"
            raise UsageError(f"{path} exists", why, "add --force, or choose another --cache")
        path.mkdir(parents=True, exist_ok=True)
        for stale in (METADATA, LATENTS):
            (path / stale).unlink(missing_ok=True)
        _draw_all(path, identities, views, size, subjects, workers)
        files.publish(path / METADATA, lambda file: file.write(json.dumps(metadata).encode()))
    return PictureCache.open(path)


def _draw_all(path: Path, identities: int, views: int, size: int, subjects: Subjects, workers: int) -> None:
    shape = (identities, views, size, size, 3)
    images = np.lib.format.open_memmap(path / IMAGES, "w+", np.uint8, shape)
    nouns = np.empty(identities, np.int16)
    backgrounds = np.empty((identities, views), np.int16)
    draw = partial(draw_views, views=views, size=size, subjects=subjects)
    for index, (noun, pictures, places) in enumerate(in_processes(draw, range(identities), workers)):
        images[index], nouns[index], backgrounds[index] = pictures, noun, places
        if (index + 1) * 10 // identities > index * 10 // identities:
            log.info("cache: drew %d of %d subjects", index + 1, identities)
    images.flush()
    np.save(path / NOUNS, nouns)
    np.save(path / BACKGROUNDS, backgrounds)
    found = json.dumps([subjects.describe(index) for index in range(identities)])
    files.publish(path / DESCRIPTIONS, lambda file: file.write(found.encode()), force=True)


def in_processes(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`map` in worker processes, reading `items` only a little ahead; one worker is this process.

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
            why = "the system may have killed it for want of memory"
            raise ResourceError("a worker process died", why, "take fewer: --workers") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def draw_views(index: int, views: int, size: int, subjects: Subjects) -> tuple[int, np.ndarray, np.ndarray]:
    """One identity in different scenes.

    Returns its noun's number, the pictures (V, S, S, 3) uint8, the scenes' numbers (V,).
    """
    rng, places = _scenes_of(index, views, subjects.split)
    noun, subject = subjects.at(index, size)
    pictures = [scenes.compose(subject, scenes.BACKGROUNDS[k], rng, size) for k in places]
    return subjects.names.index(noun), np.stack(pictures), places


def _scenes_of(index: int, views: int, split: str) -> tuple[np.random.Generator, np.ndarray]:
    """The generator that composes an identity, and the numbers of its scenes (V,)."""
    rng = np.random.default_rng([scenes.SPLIT_SEEDS[split], 1, index])
    return rng, rng.permutation(len(scenes.BACKGROUNDS))[:views].astype(np.int16)


def cutout_subjects(source: Path, options: DatasetOptions) -> Dataset:
    """Layout `cutouts`: cut-outs (data/cutouts.py) in drawn scenes; `limit` says how many identities.

    Raises:
        NotFound, BadInput: as `cutouts.load`.
    """
    found = cutouts_of.load(source, CUTOUT_SPLITS[options.split])
    subjects = Subjects(found.split, found, share=1.0)
    views = min(options.views or CUTOUT_VIEWS, len(scenes.BACKGROUNDS))

    def one(index: int) -> DatasetSubject:
        noun, drawn = found.noun(index), partial(_pictures, index, views, options.size, subjects)
        places = [scenes.BACKGROUNDS[k] for k in _scenes_of(index, views, found.split)[1]]
        texts = [_captions_of_scene(noun, place) for place in places]
        name = f"identity {index}"
        return DatasetSubject(
            noun, tuple(View(name, drawn, text, partial(_picture, k)) for k, text in enumerate(texts))
        )

    return Dataset(map(one, range(options.limit or len(found.files))), views)


def _pictures(index: int, views: int, size: int, subjects: Subjects) -> np.ndarray:
    return draw_views(index, views, size, subjects)[1]


def _picture(view: int, pictures: np.ndarray) -> np.ndarray:
    return pictures[view]
