"""Drawn subjects that no training has seen, each with the candidates among which it must be found.

A candidate is known by `VIEWS` views of its own on white, other than the photos and other than the pictures
whose figures are the ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from hyperrt.training.data import scenes
from hyperrt.training.evaluation import classifiers

WHITE = "on a plain white background"
PER_NOUN, CANDIDATES = 5, 20
PHOTO_SIZE, VIEW_SIZE = 256, 64  # pixels
PHOTOS, VIEWS = 4, 4
REAL_SCENES = 25  # pictures of each scene that the judge of scenes knows
OTHERS = tuple(scene for scene in scenes.BACKGROUNDS if scene != WHITE)
FIRST_INDEX, SEED_STRIDE = 1_000_000, 1_000  # far from the indices that training looks at


@dataclass(frozen=True, eq=False)
class Case:
    """A subject that is judged, as RGBA at both sizes, and the candidates among which it must be found."""

    noun: str
    index: int  # of the case
    drawing: Image.Image  # RGBA
    place: int  # among the candidates
    candidates: Sequence[Image.Image]  # RGBA

    def view(self, scene: str, number: int, size: int = VIEW_SIZE) -> np.ndarray:
        """A real picture of the subject; the same number gives the same one for ever."""
        return view(self.drawing, scene, [self.index, number], size)

    @cached_property
    def photo_scenes(self) -> list[str]:
        """Where the photos are taken: never on white, so that a white picture is no copy."""
        order = np.random.default_rng([self.index, 1]).permutation(len(OTHERS))
        return [OTHERS[k] for k in order[:PHOTOS]]

    @cached_property
    def photos(self) -> list[np.ndarray]:
        """What the hypernetwork sees: [S, S, 3] uint8 each."""
        return [self.view(scene, 100 + OTHERS.index(scene), PHOTO_SIZE) for scene in self.photo_scenes]


def view(drawing: Image.Image, scene: str, seed: Sequence[int], size: int = VIEW_SIZE) -> np.ndarray:
    """RGBA in a scene: [size, size, 3] uint8."""
    return scenes.compose(drawing, scene, np.random.default_rng(list(seed)), size)


def cases_of(seed: int, per_noun: int = PER_NOUN) -> list[Case]:
    """Unseen drawn subjects, the first of the candidates of each noun; another seed draws others."""
    cases = []
    first = FIRST_INDEX + SEED_STRIDE * seed
    for noun in scenes.NOUNS:
        drawings = candidates_of(noun, first)
        cases += [Case(noun, first + len(cases) + k, drawings[k], k, drawings) for k in range(per_noun)]
    return cases


def candidates_of(noun: str, first: int) -> list[Image.Image]:
    """Those among which a subject of the noun must be found, from an index on, as RGBA."""
    who = [scenes.drawn_subject(noun, "test", first + k) for k in range(CANDIDATES)]
    return [scenes.draw_subject(one, PHOTO_SIZE) for one in who]


class Lineup:
    """Which candidate of a case is a picture of? The nearest, by some features."""

    def __init__(self, features: classifiers.Features) -> None:
        self.features = features
        self._known: dict[int, tuple[Sequence[Image.Image], np.ndarray]] = {}  # the cases of a noun share it

    def references(self, case: Case) -> np.ndarray:
        """What each candidate looks like: [candidates, F] of unit length."""
        key = id(case.candidates)
        if key not in self._known:
            views = [
                [view(one, WHITE, [k, 2, v]) for v in range(VIEWS)] for k, one in enumerate(case.candidates)
            ]
            found = np.stack([classifiers.reference(of_one, self.features) for of_one in views])
            self._known[key] = (case.candidates, found)  # kept, so that no other list gets its id
        return self._known[key][1]

    def is_right(self, case: Case, picture: np.ndarray) -> bool:
        """The nearest candidate is the case's own subject."""
        return classifiers.nearest(picture, self.references(case), self.features) == case.place


def scene_classifier(cases: Sequence[Case]) -> classifiers.SceneClassifier:
    """The judge of scenes, which knows real pictures of these cases."""
    names, pictures = real_scenes(cases, 1_000)
    return classifiers.SceneClassifier(pictures, names)


def real_scenes(cases: Sequence[Case], offset: int) -> tuple[list[str], list[np.ndarray]]:
    """REAL_SCENES pictures of each scene, and the scenes' names; another offset gives other pictures."""
    names = [name for name in scenes.BACKGROUNDS for _ in range(REAL_SCENES)]
    return names, [cases[k % len(cases)].view(name, offset + k) for k, name in enumerate(names)]
