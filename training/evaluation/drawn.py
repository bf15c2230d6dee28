"""Drawn subjects that no training has seen, each with the candidates to tell it from.

Each candidate has `VIEWS` reference views on white. They differ from the photos and from the pictures that
give the ceiling.
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
REAL_SCENES = 25  # reference pictures of each scene
OTHERS = tuple(scene for scene in scenes.BACKGROUNDS if scene != WHITE)
FIRST_INDEX, SEED_STRIDE = 1_000_000, 1_000  # far from the indices that training uses


@dataclass(frozen=True, eq=False)
class Case:
    """A drawn subject to evaluate, and the candidates to tell it from."""

    noun: str
    index: int  # of the case; seeds its views
    drawing: Image.Image  # RGBA
    place: int  # index among the candidates
    candidates: Sequence[Image.Image]  # RGBA

    def view(self, scene: str, number: int, size: int = VIEW_SIZE) -> np.ndarray:
        """A real picture of the subject [size, size, 3]; the same number always gives the same picture."""
        return view(self.drawing, scene, [self.index, number], size)

    @cached_property
    def photo_scenes(self) -> list[str]:
        """The scenes of the photos: never white, so that a picture on white cannot be a copy."""
        order = np.random.default_rng([self.index, 1]).permutation(len(OTHERS))
        return [OTHERS[k] for k in order[:PHOTOS]]

    @cached_property
    def photos(self) -> list[np.ndarray]:
        """The photos for the hypernetwork: [S, S, 3] uint8 each."""
        return [self.view(scene, 100 + OTHERS.index(scene), PHOTO_SIZE) for scene in self.photo_scenes]


def view(drawing: Image.Image, scene: str, seed: Sequence[int], size: int = VIEW_SIZE) -> np.ndarray:
    """A drawing (RGBA) in a scene: [size, size, 3] uint8."""
    return scenes.compose(drawing, scene, np.random.default_rng(list(seed)), size)


def cases_of(seed: int, per_noun: int = PER_NOUN) -> list[Case]:
    """The first `per_noun` candidates of each noun as cases; each seed gives different subjects."""
    cases = []
    first = FIRST_INDEX + SEED_STRIDE * seed
    for noun in scenes.NOUNS:
        drawings = candidates_of(noun, first)
        cases += [Case(noun, first + len(cases) + k, drawings[k], k, drawings) for k in range(per_noun)]
    return cases


def candidates_of(noun: str, first: int) -> list[Image.Image]:
    """Drawings (RGBA) of `CANDIDATES` unseen subjects of a noun, from index `first` on."""
    subjects = [scenes.drawn_subject(noun, "test", first + k) for k in range(CANDIDATES)]
    return [scenes.draw_subject(subject, PHOTO_SIZE) for subject in subjects]


class Lineup:
    """Finds the candidate that a picture shows: the nearest by some features."""

    def __init__(self, features: classifiers.Features) -> None:
        self.features = features
        self._references: dict[int, tuple[Sequence[Image.Image], np.ndarray]] = {}  # shared by a noun's cases

    def references(self, case: Case) -> np.ndarray:
        """The mean feature of each candidate's reference views: [candidates, F] of unit length."""
        key = id(case.candidates)
        if key not in self._references:
            views = [
                [view(candidate, WHITE, [k, 2, v]) for v in range(VIEWS)]
                for k, candidate in enumerate(case.candidates)
            ]
            references = np.stack(
                [classifiers.reference(of_candidate, self.features) for of_candidate in views]
            )
            self._references[key] = (case.candidates, references)  # the list stays alive, so its id is unique
        return self._references[key][1]

    def is_right(self, case: Case, picture: np.ndarray) -> bool:
        """Whether the nearest candidate is the subject of the case."""
        return classifiers.nearest(picture, self.references(case), self.features) == case.place


def scene_classifier(cases: Sequence[Case]) -> classifiers.SceneClassifier:
    """A classifier of scenes with real pictures of these cases as its references."""
    names, pictures = real_scenes(cases, 1_000)
    return classifiers.SceneClassifier(pictures, names)


def real_scenes(cases: Sequence[Case], offset: int) -> tuple[list[str], list[np.ndarray]]:
    """Names and real pictures of scenes, `REAL_SCENES` of each; each offset gives different pictures."""
    names = [name for name in scenes.BACKGROUNDS for _ in range(REAL_SCENES)]
    return names, [cases[k % len(cases)].view(name, offset + k) for k, name in enumerate(names)]
