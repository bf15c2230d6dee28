"""Nearest-neighbour classifiers of drawn pictures: which subject is it, and which scene?

They share no training with the models that they evaluate, but `BundleEncoder` is the bundle's frozen image
encoder. Their accuracy on real pictures is the ceiling of a score.
Used by bench/fidelity.py and, with the features of training/evaluation/identity_encoder.py, by
training/evaluate.py and bench/scoring.py.

Pictures are [H, W, 3] uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hyperrt import engines
from hyperrt.bundle.bundle import Bundle
from hyperrt.photos.load import preprocess

Features = Callable[[np.ndarray], np.ndarray]  # picture -> vector of unit length

LEVELS = 6  # of each channel in the colour histogram: bins are 51 apart
NOT_WHITE = 40  # a pixel counts if its lowest channel is at least this far below 255
SCENE_NEIGHBOURS = 5


def histogram(picture: np.ndarray) -> np.ndarray:
    """Square root of the colour histogram of the pixels that are not white: [LEVELS^3], of unit length.

    Joint RGB bins. Each pixel is shared between the eight bins around it (trilinear), so a small change of
    colour changes the histogram little. With the square root, the dot product of two histograms is their
    Bhattacharyya coefficient.
    """
    pixels = picture.reshape(-1, 3).astype(np.float64)
    pixels = pixels[pixels.min(axis=1) < 255 - NOT_WHITE]
    position = pixels / 255 * (LEVELS - 1)
    low = np.minimum(position.astype(int), LEVELS - 2)
    share = position - low
    bins = np.zeros((LEVELS,) * 3)
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, share, 1 - share).prod(axis=1)
        np.add.at(bins, tuple((low + corner).T), weight)
    total = bins.sum()
    return np.sqrt(bins.ravel() / total) if total else bins.ravel()  # zeros if all is white


class BundleEncoder:
    """Computes the CLS feature [F] of the bundle's image encoder, of unit length."""

    def __init__(self, bundle: Bundle) -> None:
        self.engine = engines.open(bundle.graph("image_encoder"))
        self.preprocess = bundle.preprocess

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        pixels = preprocess([picture], self.preprocess)
        feature: np.ndarray = self.engine.run({"pixels": pixels})["features"][0, 0]
        return feature / np.linalg.norm(feature)


def nearest(picture: np.ndarray, references: np.ndarray, features: Features) -> int:
    """The index of the reference [n, F] that is nearest to a picture (cosine)."""
    return int(np.argmax(references @ features(picture)))


def reference(views: Sequence[np.ndarray], features: Features) -> np.ndarray:
    """The mean feature of views of a candidate, of unit length."""
    mean = np.mean([features(view) for view in views], axis=0)
    return mean / np.linalg.norm(mean)


class SceneClassifier:
    """Names the scene of a picture by its border: a vote of the nearest reference pictures."""

    def __init__(self, pictures: Sequence[np.ndarray], names: Sequence[str]) -> None:
        self.borders = np.stack([border(picture) for picture in pictures])
        self.names = np.array(names)

    def __call__(self, picture: np.ndarray) -> str:
        distances = np.square(self.borders - border(picture)).sum(axis=1)
        names, votes = np.unique(self.names[np.argsort(distances)[:SCENE_NEIGHBOURS]], return_counts=True)
        return str(names[votes.argmax()])


def border(picture: np.ndarray) -> np.ndarray:
    """Mean colours of the 28 blocks along the picture's edge, of 8 x 8 blocks in all: [84] in [0, 1].

    Subjects hardly reach the edge.
    """
    blocks = picture.reshape(8, picture.shape[0] // 8, 8, picture.shape[1] // 8, 3).mean(axis=(1, 3)) / 255
    edge = np.ones((8, 8), bool)
    edge[1:-1, 1:-1] = False
    feature: np.ndarray = blocks[edge].ravel()
    return feature
