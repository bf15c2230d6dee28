"""Scores pictures of drawn subjects with the classifiers of the evaluation: one value per subject.

    subject           cosine of a picture and the subject, in the features of an encoder of subjects
    colours           the same in the colours of pixels that are not white, for the picture on white
    prompt            margin of the scene that the prompt names, -1 to 1: how much nearer the picture's border
                      is to real pictures of it than to those of the next best scene
    identity          rate: the nearest of 20 unseen subjects of the noun is the right one, on white
    identity_colours  the same by colours
    background        rate: the scene is the right one

The first three still vary when the rates are 0 or 1.  Every subject is drawn on white and in others; its
score is the mean.  Cases, photos and classifiers are those of training/evaluation/drawn.py.  The encoder is
that of training/evaluation/identity_encoder.py; it is trained at its first use (two minutes), on other data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hyperrt.bundle.bundle import Bundle
from hyperrt.training.data import scenes
from hyperrt.training.evaluation import classifiers, drawn, identity_encoder

Case = drawn.Case
Picture = np.ndarray  # [H, W, 3] uint8
Scores = Mapping[str, np.ndarray]  # name -> [cases]

SUBJECT, COLOURS, PROMPT = "subject", "colours", "prompt"
IDENTITY, IDENTITY_COLOURS, BACKGROUND = "identity", "identity_colours", "background"
NAMES = (SUBJECT, COLOURS, PROMPT, IDENTITY, IDENTITY_COLOURS, BACKGROUND)
REAL_VIEW = 500  # first view for the scores of real pictures; classifiers and photos have other views


def cases(seed: int, count: int) -> list[Case]:
    """Unseen drawn subjects, of the nouns in turn; different ones for every seed.

    Raises:
        ValueError: `count` is out of range.
    """
    nouns = len(scenes.NOUNS)
    if not 1 <= count <= drawn.CANDIDATES * nouns:
        raise ValueError(f"there are 1 to {drawn.CANDIDATES * nouns} subjects, not {count}")
    first = drawn.FIRST_INDEX + drawn.SEED_STRIDE * seed
    drawings = [drawn.candidates_of(noun, first) for noun in scenes.NOUNS[:count]]
    cases = []
    for k in range(count):
        place, noun = divmod(k, nouns)
        candidates = drawings[noun]
        cases.append(Case(scenes.NOUNS[noun], first + k, candidates[place], place, candidates))
    return cases


def scenes_of(case: int, others: int) -> list[str]:
    """The scenes of a case: white and `others` more, each equally often over the cases."""
    places = [drawn.OTHERS[(5 * case + 3 * j) % len(drawn.OTHERS)] for j in range(others)]
    return [drawn.WHITE, *places]


def encoder(bundle: Bundle, quick: bool) -> classifiers.Features:
    """The encoder of subjects; in a quick run the bundle's encoder, which need not be trained."""
    return classifiers.BundleEncoder(bundle) if quick else identity_encoder.trained()[0].features


class Scorer:
    """Scores the pictures of some cases.

    Args:
        features: of the encoder of subjects.
        others: number of scenes of each case besides white.
    """

    def __init__(self, features: classifiers.Features, cases: Sequence[Case], others: int = 1) -> None:
        self.cases = cases
        self.places = [scenes_of(k, others) for k in range(len(cases))]
        self.encoder = features
        self.scenes = drawn.scene_classifier(cases)
        self.lineups = {SUBJECT: drawn.Lineup(self.encoder), COLOURS: drawn.Lineup(classifiers.histogram)}

    def __call__(self, pictures: Sequence[Sequence[Picture]]) -> Scores:
        """Scores of the pictures of every case, in the order of its `places`: name -> [cases]."""
        rows = [
            self._of_case(case, places, of_case)
            for case, places, of_case in zip(self.cases, self.places, pictures, strict=True)
        ]
        return {name: np.array([row[name] for row in rows]) for name in NAMES}

    def real(self) -> Scores:
        """Scores of real pictures of the subjects in these scenes: the upper limit."""
        return self(
            [
                [case.view(scene, REAL_VIEW + j) for j, scene in enumerate(places)]
                for case, places in zip(self.cases, self.places, strict=True)
            ]
        )

    def _of_case(self, case: Case, places: Sequence[str], pictures: Sequence[Picture]) -> dict[str, float]:
        references = {name: lineup.references(case) for name, lineup in self.lineups.items()}
        likeness = [references[SUBJECT] @ self.encoder(picture) for picture in pictures]
        colours = references[COLOURS] @ classifiers.histogram(pictures[0])
        margins = [
            margin(self.scenes, picture, scene) for picture, scene in zip(pictures, places, strict=True)
        ]
        return {
            SUBJECT: float(np.mean([cosines[case.place] for cosines in likeness])),
            COLOURS: float(colours[case.place]),
            PROMPT: float(np.mean(margins)),
            IDENTITY: float(likeness[0].argmax() == case.place),
            IDENTITY_COLOURS: float(colours.argmax() == case.place),
            BACKGROUND: float(
                np.mean([self.scenes(p) == scene for p, scene in zip(pictures, places, strict=True)])
            ),
        }


def margin(judge: classifiers.SceneClassifier, picture: Picture, scene: str) -> float:
    """(other - right) / (other + right), of the distances to the nearest real pictures of a scene."""
    distances = np.square(judge.borders - classifiers.border(picture)).sum(axis=1)

    def distance(name: str) -> float:
        return float(np.sort(distances[judge.names == name])[: classifiers.SCENE_NEIGHBOURS].mean())

    right = distance(scene)
    other = min(distance(name) for name in dict.fromkeys(judge.names) if name != scene)
    return (other - right) / max(other + right, 1e-12)
