"""Scores pictures of drawn subjects, with classifiers that share no training with the evaluated models.

identity              how often the nearest of 20 unseen candidates is the right one, by the features of
                      training/evaluation/identity_encoder.py (chance: 0.05)
identity_similarity   cosine with the subject's views on white, by the same features
identity_hist         as `identity`, by the colours that are not white; only for pictures on white
background            how often the picture's border shows the scene of the prompt
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperrt.errors import UsageError
from hyperrt.photos.srgb import Picture
from hyperrt.training.data import scenes
from hyperrt.training.evaluation import classifiers, drawn, identity_encoder, scores
from hyperrt.training.evaluation.drawn import WHITE, Case, Lineup
from hyperrt.training.evaluation.protocols import EvaluationSubject
from hyperrt.training.evaluation.scorers import Columns
from hyperrt.training.evaluation.scores import Score

REAL_NUMBER = 500  # first number of the views that give the ceilings; photos and references have others


class IdentityScorer:
    """Identifies the subject by the contrastive encoder."""

    def __init__(self, folder: Path | None = None) -> None:
        encoder, self.about = identity_encoder.trained(folder)
        self.lineup = Lineup(encoder.features)

    def score(
        self,
        subject: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        case = _case(subject)
        reference = self.lineup.references(case)[case.place]
        return {
            "identity": [float(self.lineup.is_right(case, picture)) for picture in pictures],
            "identity_similarity": [float(reference @ self.lineup.features(picture)) for picture in pictures],
        }

    def real(self, subject: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        views = _real_views(_case(subject))
        columns = self.score(subject, photos, list(views.values()), [])
        return {key: scores.mean(column) for key, column in columns.items()}


class ColourScorer:
    """Identifies the subject by its colours."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {"model": "histogram of the colours that are not white, square roots"}
        self.lineup = Lineup(classifiers.histogram)

    def score(
        self,
        subject: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        case = _case(subject)
        right = [
            float(self.lineup.is_right(case, picture)) if _scene(number) == WHITE else None
            for picture, number in zip(pictures, numbers, strict=True)
        ]
        return {"identity_hist": right}

    def real(self, subject: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        case = _case(subject)
        return {"identity_hist": float(self.lineup.is_right(case, _real_views(case)[WHITE]))}


class BackgroundScorer:
    """Checks that the picture shows the scene of its prompt."""

    def __init__(self, subjects: Sequence[EvaluationSubject]) -> None:
        self.about: dict[str, Any] = {"model": "mean colours of the border, vote of five real pictures"}
        self.classify = drawn.scene_classifier([_case(subject) for subject in subjects])

    def score(
        self,
        subject: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        right = [
            float(self.classify(picture) == _scene(number))
            for picture, number in zip(pictures, numbers, strict=True)
        ]
        return {"background": right}

    def real(self, subject: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        views = _real_views(_case(subject))
        return {"background": scores.mean(float(self.classify(view) == name) for name, view in views.items())}


def _case(subject: EvaluationSubject) -> Case:
    if subject.case is None:
        why = f"{subject.name} comes from photos, and has no candidates"
        raise UsageError("these scorers need the protocol drawn", why, "choose others with --scorers")
    return subject.case


def _scene(number: int) -> str:
    """The scene of prompt `number` of the pack drawn-v1."""
    return scenes.BACKGROUNDS[number]


def _real_views(case: Case) -> dict[str, Picture]:
    """A real picture of the subject in each scene; the classifiers have not seen them."""
    return {name: case.view(name, REAL_NUMBER + k) for k, name in enumerate(scenes.BACKGROUNDS)}
