"""The settings of one evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hyperrt.errors import UsageError
from hyperrt.training.evaluation.drawing import DrawSettings
from hyperrt.training.evaluation.protocols import PROTOCOLS

SCORERS = ("clip", "dino", "face", "identity", "colours", "background")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The options of one `hyperrt evaluate`.

    Raises:
        UsageError: the protocol or a scorer is unknown, or not exactly one source of pictures is given.
    """

    protocol: str
    output: Path
    bundle: str | None = None  # name or folder
    subjects: Path | None = None  # folder of the subjects' photos
    score: Path | None = None  # score the pictures in this folder; draw nothing
    calibrate: bool = False  # score the real photos only
    drawing: DrawSettings = field(default_factory=DrawSettings)
    scorers: tuple[str, ...] = ()  # empty: the protocol's scorers
    clip: str | None = None  # folder, or OWNER/NAME@REVISION on the hub
    dino: str | None = None
    face: bool = False
    encoders: Path | None = None  # folder of trained identity encoders; None: in HyperRT's own folder
    only: tuple[str, ...] = ()  # names of subjects
    limit: int | None = None  # maximum number of subjects; None: the protocol's
    backend: str = "auto"
    threads: int | None = None
    cpu: bool = False  # run the scorers on the CPU even if there is a GPU
    offline: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        for kind, available, names in (
            ("protocol", PROTOCOLS, (self.protocol,)),
            ("scorer", SCORERS, self.scorers),
        ):
            for name in names:
                if name not in available:
                    why = f"there are {', '.join(available)}"
                    raise UsageError(f"there is no {kind} {name!r}", why, "name one of them")
        sources = {"a bundle": self.bundle, "--score": self.score, "--calibrate": self.calibrate}
        given = [name for name, value in sources.items() if value]
        if len(given) != 1:
            what = f"{' and '.join(given)} were given" if given else "no source of pictures was given"
            why = "a bundle draws pictures, --score reads them from a folder, --calibrate needs none"
            raise UsageError(what, why, f"give one of {', '.join(sources)}")
