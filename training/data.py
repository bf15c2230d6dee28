"""The cache of scenes that both trainings read: thousands of identities, a few views of each.

Drawn once by worker processes and kept as memory-mapped arrays, so that the training loop
spends its time in the network. Identities vary along the first axis, views along the second:

    images       (N, V, S, S, 3) uint8
    latents      (N, V, C, h, w) float16, scaled as the UNet takes them (written by the pretraining)
    nouns        (N,)   index into scenes.NOUNS
    backgrounds  (N, V) index into scenes.BACKGROUNDS
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from training import scenes


@dataclass(frozen=True)
class SceneCache:
    """Views of drawn subjects; see the module for shapes."""

    path: Path
    images: np.ndarray
    nouns: np.ndarray
    backgrounds: np.ndarray

    @classmethod
    def open(cls, path: Path | str) -> SceneCache:
        """Opens a cache that `build` made; raises FileNotFoundError when there is none."""
        path = Path(path)
        return cls(
            path=path,
            images=np.load(path / "images.npy", mmap_mode="r"),
            nouns=np.load(path / "nouns.npy"),
            backgrounds=np.load(path / "backgrounds.npy"),
        )

    @property
    def latents(self) -> np.ndarray:
        return np.load(self.path / "latents.npy", mmap_mode="r")

    def captions(self, identities: np.ndarray, views: np.ndarray, token: str | None = None) -> list[str]:
        """The captions of some (identity, view) pairs, with the subject's token or without."""
        names = [scenes.NOUNS[k] for k in self.nouns[identities]]
        places = [scenes.BACKGROUNDS[k] for k in self.backgrounds[identities, views]]
        return [scenes.caption(noun, place, token) for noun, place in zip(names, places, strict=True)]


def build(path: Path, identities: int, views: int, size: int, split: str = "train", workers: int = 2) -> SceneCache:
    """Draws `identities` subjects in `views` scenes each. A finished cache of the same make-up is kept."""
    recipe = {"identities": identities, "views": views, "size": size, "split": split, "version": 1}
    done = path / "cache.json"
    if not done.exists() or json.loads(done.read_text()) != recipe:
        path.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        _draw_all(path, identities, views, size, split, workers)
        done.write_text(json.dumps(recipe))
    return SceneCache.open(path)


def _draw_all(path: Path, identities: int, views: int, size: int, split: str, workers: int) -> None:
    shape = (identities, views, size, size, 3)
    images = np.lib.format.open_memmap(path / "images.npy", "w+", np.uint8, shape)
    backgrounds = np.empty((identities, views), np.int16)
    with ProcessPoolExecutor(workers) as pool:
        drawn = pool.map(partial(draw_views, views=views, size=size, split=split), range(identities), chunksize=32)
        for index, (pictures, places) in enumerate(drawn):
            images[index], backgrounds[index] = pictures, places
    images.flush()
    np.save(path / "nouns.npy", np.arange(identities, dtype=np.int16) % len(scenes.NOUNS))
    np.save(path / "backgrounds.npy", backgrounds)


def draw_views(index: int, views: int, size: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Views of one identity in different scenes: (V, S, S, 3) uint8 and the scenes' numbers (V,)."""
    rng = np.random.default_rng([scenes.SPLIT_SEEDS[split], 1, index])
    who = scenes.identity(scenes.NOUNS[index % len(scenes.NOUNS)], split, index)
    subject = scenes.draw_subject(who, size)
    places = rng.permutation(len(scenes.BACKGROUNDS))[:views]
    pictures = [scenes.compose(subject, scenes.BACKGROUNDS[k], rng, size) for k in places]
    return np.stack(pictures), places.astype(np.int16)
