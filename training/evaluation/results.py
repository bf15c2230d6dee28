"""The results of one evaluation, as report.json holds them."""

from __future__ import annotations

from dataclasses import dataclass, field

from hyperrt.training.evaluation.scores import Score


@dataclass(frozen=True)
class ScoredPicture:
    """A picture and its scores."""

    file: str  # name in the subject's folder
    number: int  # of the prompt, from 0
    image: int  # of this prompt, from 0
    seed: int | None
    scores: dict[str, Score]


@dataclass
class SubjectResult:
    """The result of one subject."""

    name: str
    noun: str
    pack: str  # name of the prompt pack
    photos: list[str] = field(default_factory=list)  # files of the small copies
    left_out: list[tuple[str, str]] = field(default_factory=list)  # photos and pictures: name, reason
    reason: str = ""  # why the subject does not count; empty if it does
    drawn: int = 0  # pictures drawn in this run
    kept: int = 0  # pictures kept from an earlier run
    missing: int = 0  # pictures
    real: dict[str, Score] = field(default_factory=dict)  # scores of the real photos
    scores: dict[str, Score] = field(default_factory=dict)  # means over the pictures
    pictures: list[ScoredPicture] = field(default_factory=list)

    def __str__(self) -> str:
        if self.reason:
            return self.reason
        scores = ", ".join(f"{key} {value:.3f}" for key, value in self.scores.items() if value is not None)
        return f"{self.drawn} pictures drawn, {self.kept} kept" + (f"; {scores}" if scores else "")
