"""What scores pictures of drawn subjects; none of it was trained with what is judged.

identity        how often the nearest of 20 unseen candidates is the right one, by the encoder of
                training/evaluation/identity_encoder.py (chance: 0.05)
identity_similarity   cosine with what the subject looks like on white, by the same encoder
identity_hist   as `identity`, by the colours of what is not white; of pictures on white alone
background      how often the scene is the prompt's, by the picture's border
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperrt.errors import UsageError
from hyperrt.training.data import scenes
from hyperrt.training.evaluation import classifiers, drawn, identity_encoder, scores
from hyperrt.training.evaluation.drawn import WHITE, Case, Lineup
from hyperrt.training.evaluation.protocols import EvaluationSubject
from hyperrt.training.evaluation.scorers import Columns, Picture
from hyperrt.training.evaluation.scores import Score

REAL_NUMBER = 500  # of the views of which the ceilings are; photos and what judges know have others


class IdentityScorer:
    """Who is it, by the contrastive encoder."""

    def __init__(self, folder: Path | None = None) -> None:
        encoder, self.about = identity_encoder.trained(folder)
        self.lineup = Lineup(encoder.features)

    def score(
        self,
        entry: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        case = _case(entry)
        own = self.lineup.references(case)[case.place]
        return {
            "identity": [float(self.lineup.is_right(case, picture)) for picture in pictures],
            "identity_similarity": [float(own @ self.lineup.features(picture)) for picture in pictures],
        }

    def real(self, entry: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        real = _real_views(_case(entry))
        found = self.score(entry, photos, list(real.values()), [])
        return scores.means([{key: column[k] for key, column in found.items()} for k in range(len(real))])


class ColourScorer:
    """Who is it, by colours."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {"model": "histogram of the colours that are not white, square roots"}
        self.lineup = Lineup(classifiers.histogram)

    def score(
        self,
        entry: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        case = _case(entry)
        found = [
            float(self.lineup.is_right(case, picture)) if _scene(number) == WHITE else None
            for picture, number in zip(pictures, numbers, strict=True)
        ]
        return {"identity_hist": found}

    def real(self, entry: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        case = _case(entry)
        return {"identity_hist": float(self.lineup.is_right(case, _real_views(case)[WHITE]))}


class BackgroundScorer:
    """Which scene is it."""

    def __init__(self, entries: Sequence[EvaluationSubject]) -> None:
        self.about: dict[str, Any] = {"model": "mean colours of the border, vote of five real pictures"}
        self.judge = drawn.scene_classifier([_case(entry) for entry in entries])

    def score(
        self,
        entry: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        found = [
            float(self.judge(picture) == _scene(number))
            for picture, number in zip(pictures, numbers, strict=True)
        ]
        return {"background": found}

    def real(self, entry: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        real = _real_views(_case(entry))
        return {"background": scores.mean(float(self.judge(view) == name) for name, view in real.items())}


def _case(entry: EvaluationSubject) -> Case:
    if entry.case is None:
        why = f"{entry.name} comes from photos, and has no candidates"
        raise UsageError("these scorers are of the protocol drawn", why, "choose others with --scorers")
    return entry.case


def _scene(number: int) -> str:
    """What prompt `number` of the pack drawn-v1 asks for."""
    return scenes.BACKGROUNDS[number]


def _real_views(case: Case) -> dict[str, Picture]:
    """One picture of the subject in each scene, which no judge knows."""
    return {name: case.view(name, REAL_NUMBER + k) for k, name in enumerate(scenes.BACKGROUNDS)}
