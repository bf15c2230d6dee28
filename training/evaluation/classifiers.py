"""Judges of drawn subjects: whose picture is it, and which scene does it show?

None of them is trained with the models that they judge, but `BundleEncoder` is the bundle's own frozen
image encoder. What each says of real pictures is the ceiling of its figure.
Used by bench/fidelity.py and, with the encoder of training/evaluation/identity_encoder.py, by
training/evaluate.py and bench/scoring.py.

Pictures are [H, W, 3] uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hyperrt import engines
from hyperrt.bundle.bundle import Bundle
from hyperrt.photos.load import preprocess

Features = Callable[[np.ndarray], np.ndarray]  # a picture to a vector of unit length

LEVELS = 6  # of each channel in the colour histogram: bins are 51 apart
NOT_WHITE = 40  # how far below 255 the least channel of a pixel must be for it to count
SCENE_NEIGHBOURS = 5


def histogram(picture: np.ndarray) -> np.ndarray:
    """Square root of the colour histogram of the pixels that are not white: [LEVELS^3], of unit length.

    Joint RGB bins; a pixel is shared between the eight bins around it (trilinear), so that a small change of
    colour is a small change of the histogram. With the square root, the dot product of two histograms is
    their Bhattacharyya coefficient.
    """
    pixels = picture.reshape(-1, 3).astype(np.float64)
    pixels = pixels[pixels.min(axis=1) < 255 - NOT_WHITE]
    place = pixels / 255 * (LEVELS - 1)
    low = np.minimum(place.astype(int), LEVELS - 2)
    share = place - low
    bins = np.zeros((LEVELS,) * 3)
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, share, 1 - share).prod(axis=1)
        np.add.at(bins, tuple((low + corner).T), weight)
    total = bins.sum()
    return np.sqrt(bins.ravel() / total) if total else bins.ravel()  # of an empty picture: like nobody's


class BundleEncoder:
    """CLS feature of the bundle's image encoder, of unit length: [F]."""

    def __init__(self, bundle: Bundle) -> None:
        self.engine = engines.open(bundle.graph("image_encoder"))
        self.preprocess = bundle.preprocess

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        pixels = preprocess([picture], self.preprocess)
        feature: np.ndarray = self.engine.run({"pixels": pixels})["features"][0, 0]
        return feature / np.linalg.norm(feature)


def nearest(picture: np.ndarray, references: np.ndarray, features: Features) -> int:
    """Which of the candidates [n, F] a picture is most like (cosine)."""
    return int(np.argmax(references @ features(picture)))


def reference(views: Sequence[np.ndarray], features: Features) -> np.ndarray:
    """What a candidate looks like: the mean feature of some views of it, of unit length."""
    mean = np.mean([features(view) for view in views], axis=0)
    return mean / np.linalg.norm(mean)


class SceneClassifier:
    """Which scene a picture shows, by its border: a vote of the nearest of some real pictures."""

    def __init__(self, pictures: Sequence[np.ndarray], names: Sequence[str]) -> None:
        self.known = np.stack([border(picture) for picture in pictures])
        self.names = np.array(names)

    def __call__(self, picture: np.ndarray) -> str:
        distances = np.square(self.known - border(picture)).sum(axis=1)
        names, votes = np.unique(self.names[np.argsort(distances)[:SCENE_NEIGHBOURS]], return_counts=True)
        return str(names[votes.argmax()])


def border(picture: np.ndarray) -> np.ndarray:
    """Mean colours of the blocks of 8 x 8 along the edge of a 64 px picture: 28 blocks, [84] in [0, 1].

    Subjects hardly reach there.
    """
    blocks = picture.reshape(8, picture.shape[0] // 8, 8, picture.shape[1] // 8, 3).mean(axis=(1, 3)) / 255
    edge = np.ones((8, 8), bool)
    edge[1:-1, 1:-1] = False
    feature: np.ndarray = blocks[edge].ravel()
    return feature
