"""The cache of scenes that both trainings read: thousands of identities, a few views of each.

Drawn once by worker processes and kept as memory-mapped arrays, so that the training loop
spends its time in the network. Identities vary along the first axis, views along the second:

    cache.json   how the cache was made; written last, so a cache without it is not finished
    images       (N, V, S, S, 3) uint8
    latents      (N, V, C, h, w) float16, scaled as the UNet takes them (written by the pretraining)
    nouns        (N,)   index into `SceneCache.names`: those of scenes.NOUNS, then those of cut-outs
    backgrounds  (N, V) index into scenes.BACKGROUNDS
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hyperrt import files
from training import scenes
from training.cutouts import Cutouts

log = logging.getLogger("training")

RECIPE, LATENTS = "cache.json", "latents.npy"
CUTOUT_SHARE = 0.25


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
        if self.cutouts is not None:
            rng = np.random.default_rng([scenes.SPLIT_SEEDS[self.split], 100, index])
            if rng.random() < self.share:
                return self.cutouts.noun(index), self.cutouts.subject(index, size)
        noun = scenes.NOUNS[index % len(scenes.NOUNS)]
        return noun, scenes.draw_subject(scenes.identity(noun, self.split, index), size)


@dataclass(frozen=True)
class SceneCache:
    """Views of subjects; see the module for shapes."""

    path: Path
    names: tuple[str, ...]
    images: np.ndarray
    nouns: np.ndarray
    backgrounds: np.ndarray

    @classmethod
    def open(cls, path: Path | str) -> SceneCache:
        """Opens a cache that `build` made; raises FileNotFoundError when there is none."""
        path = Path(path)
        if not (path / RECIPE).is_file():
            raise FileNotFoundError(
                f"{path} is not a finished scene cache; python -m training.pretrain makes one"
            )
        return cls(
            path=path,
            names=tuple(_recipe(path).get("names", scenes.NOUNS)),
            images=np.load(path / "images.npy", mmap_mode="r"),
            nouns=np.load(path / "nouns.npy"),
            backgrounds=np.load(path / "backgrounds.npy"),
        )

    @property
    def latents(self) -> np.ndarray:
        """Raises FileNotFoundError before the pretraining has written them."""
        if not (self.path / LATENTS).is_file():
            raise FileNotFoundError(
                f"{self.path} has no latents yet; python -m training.pretrain writes them"
            )
        return np.load(self.path / LATENTS, mmap_mode="r")

    def captions(self, identities: np.ndarray, views: np.ndarray, token: str | None = None) -> list[str]:
        """The captions of some (identity, view) pairs, with the subject's token or without."""
        names = [self.names[k] for k in self.nouns[identities]]
        places = [scenes.BACKGROUNDS[k] for k in self.backgrounds[identities, views]]
        return [scenes.caption(noun, place, token) for noun, place in zip(names, places, strict=True)]


def build(
    path: Path,
    identities: int,
    views: int,
    size: int,
    split: str = "train",
    workers: int = 2,
    cutouts: Cutouts | None = None,
    share: float = CUTOUT_SHARE,
) -> SceneCache:
    """Draws `identities` subjects in `views` scenes each. A finished cache of the same make-up is kept.

    Args:
        cutouts: subjects that are mixed with the drawn ones.
        share: of the identities, those that are cut-outs.
    """
    recipe: dict[str, Any] = {
        "identities": identities,
        "views": views,
        "size": size,
        "split": split,
        "version": 1,
    }
    subjects = Subjects(split, cutouts, share)
    if cutouts is not None:
        recipe.update(names=list(subjects.names), cutouts=cutouts.fingerprint, share=share)
    if _recipe(path) != recipe:
        path.mkdir(parents=True, exist_ok=True)
        for stale in (RECIPE, LATENTS):
            (path / stale).unlink(missing_ok=True)
        _draw_all(path, identities, views, size, subjects, workers)
        files.publish(path / RECIPE, lambda file: file.write(json.dumps(recipe).encode()))
    return SceneCache.open(path)


def _recipe(path: Path) -> dict[str, Any]:
    """What a finished cache says of itself; empty where there is none."""
    try:
        return dict(json.loads((path / RECIPE).read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def _draw_all(path: Path, identities: int, views: int, size: int, subjects: Subjects, workers: int) -> None:
    shape = (identities, views, size, size, 3)
    images = np.lib.format.open_memmap(path / "images.npy", "w+", np.uint8, shape)
    nouns = np.empty(identities, np.int16)
    backgrounds = np.empty((identities, views), np.int16)
    draw = partial(draw_views, views=views, size=size, subjects=subjects)
    for index, (noun, pictures, places) in enumerate(_in_processes(draw, range(identities), workers)):
        images[index], nouns[index], backgrounds[index] = pictures, noun, places
        if (index + 1) * 10 // identities > index * 10 // identities:
            log.info("cache: drew %d of %d subjects", index + 1, identities)
    images.flush()
    np.save(path / "nouns.npy", nouns)
    np.save(path / "backgrounds.npy", backgrounds)


def _in_processes(function: Any, items: Iterable[int], workers: int) -> Iterator[Any]:
    """`map` in worker processes; one worker is this process."""
    if workers == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(function, items, chunksize=32)


def draw_views(index: int, views: int, size: int, subjects: Subjects) -> tuple[int, np.ndarray, np.ndarray]:
    """One identity in different scenes.

    Returns its noun's number, the pictures (V, S, S, 3) uint8, the scenes' numbers (V,).
    """
    rng = np.random.default_rng([scenes.SPLIT_SEEDS[subjects.split], 1, index])
    noun, subject = subjects.at(index, size)
    places = rng.permutation(len(scenes.BACKGROUNDS))[:views]
    pictures = [scenes.compose(subject, scenes.BACKGROUNDS[k], rng, size) for k in places]
    return subjects.names.index(noun), np.stack(pictures), places.astype(np.int16)
