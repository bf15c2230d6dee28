"""Makes the subjects of bench/paper_small.py, with hypernetworks or DreamBooth.

Hypernetworks and fine-tuned subjects are kept in the work folder, named for their settings, and reused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import scoring
import small_drawing
import small_world
import torch
from small_drawing import Studio
from small_world import World

from hyperrt import files
from hyperrt.lora.subject import Subject
from hyperrt.lora.subject_file import load_subject
from hyperrt.training import train
from hyperrt.training.finetune import DreamBoothConfig, finetune
from hyperrt.training.model import base_model as bases
from hyperrt.training.model import weight_hash
from hyperrt.training.model.encode import encode_images
from hyperrt.training.model.hypernet import Decoder
from hyperrt.training.run import checkpoint
from hyperrt.training.run.config import to_json

# How a hypernetwork goes on from another: at a rate that stays, and its EMA forgets the other soon.
GOING_ON = {"lr": 3e-4, "final_lr": 1.0, "ema": 0.98}
WHERE = ("base", "data", "output", "device", "threads")  # settings that change no result, or hardly


@dataclass(frozen=True)
class Made:
    """Subjects of all cases, and the median seconds for one."""

    subjects: Sequence[Subject]
    seconds: float


@dataclass(frozen=True)
class Lab:
    """Everything that the tables are made with.

    Attributes:
        training: settings of the hypernetworks that table 3 trains, one for each of `lambdas`.
        start: the run that these continue, or None.
        fine_tuning: settings of DreamBooth.
        work: the folder that keeps both.
    """

    world: World
    base: bases.Base
    studio: Studio
    training: dict[str, Any]
    lambdas: Sequence[float]
    fine_tuning: DreamBoothConfig
    work: Path
    start: Path | None = None

    def predicted(self, photos: int = 4) -> Made:
        """Subjects by the bundle's hypernetwork, from the first photos of each case."""
        runtime, subjects, times = self.studio.runtime, [], []
        for case in self.studio.cases:
            began = perf_counter()
            subjects.append(runtime.personalize(case.photos[:photos], case.noun))
            times.append(perf_counter() - began)
        return Made([small_drawing.anywhere(subject) for subject in subjects], median(times))

    def predicted_by(self, decoder: Decoder, photos: int) -> list[Subject]:
        """Subjects by another hypernetwork of the same base model."""
        return [self._subject(decoder, case, photos) for case in self.studio.cases]

    @torch.no_grad()
    def _subject(self, decoder: Decoder, case: scoring.Case, photos: int) -> Subject:
        pictures = np.stack(case.photos[:photos])
        packed = decoder(encode_images(self.base, pictures))
        return Subject({name: rows.mean(0).numpy() for name, rows in packed.items()}, case.noun, photos, {})

    def hypernetwork(self, lambda_: float) -> Decoder:
        """The hypernetwork of table 3 with that λ."""
        return checkpoint.load_hypernet(trained(self.world, self.training, lambda_, self.work, self.start))[0]

    def fine_tuned(self) -> Made:
        """Subjects by DreamBooth, from all photos of each case with the caption "a [V] robot"."""
        tuned = [self._fine_tuned(case) for case in self.studio.cases]
        return Made([small_drawing.anywhere(s) for s, _ in tuned], median(seconds for _, seconds in tuned))

    def _fine_tuned(self, case: scoring.Case) -> tuple[Subject, float]:
        layout, origin = self.studio.runtime.bundle.layout, weight_hash.hash_of(self.base.unet)
        name = f"{case.noun}-{case.index}-{_digest(vars(self.fine_tuning), origin, layout.hash)}"
        folder = self.work / "dreambooth"
        path, note = folder / f"{name}.safetensors", folder / f"{name}.json"
        if note.is_file():  # written last
            return load_subject(path, layout, origin), json.loads(note.read_text())["seconds"]
        done = finetune(self.base, case.photos, case.noun, layout, self.fine_tuning)[-1]
        folder.mkdir(parents=True, exist_ok=True)
        done.subject.save(path, force=True)
        content = json.dumps({"seconds": done.seconds, "steps": done.steps}).encode()
        files.publish(note, lambda file: file.write(content), force=True)
        return done.subject, done.seconds


def trained(
    world: World, training: dict[str, Any], lambda_: float, work: Path, start: Path | None = None
) -> Path:
    """The run of a hypernetwork with those settings and that λ, trained if it is missing.

    start: a run to continue for as many steps more.
    """
    training, origin = going_on(training, start)
    config = world.training("", lambda_=lambda_, **training)
    settings = {name: value for name, value in to_json(config).items() if name not in WHERE}
    base = weight_hash.hash_of(bases.opened(world.base).unet)
    out = work / f"lambda-{lambda_:g}-{_digest(settings, base, origin)}"
    if start is not None and not out.exists():
        part = work / f"{out.name}.part"
        shutil.copytree(start, part, dirs_exist_ok=True)
        part.rename(out)
    if not _finished(out, config.steps):
        where = small_world.captioned_by_noun(world, work / "captioned_by_noun")
        config = where.training(out, lambda_=lambda_, **training)
        train.run(config, resume=True, allow_changes=start is not None)
    return out


def going_on(training: dict[str, Any], start: Path | None) -> tuple[dict[str, Any], str]:
    """The settings of a run that continues `start`, and the hash of its weights; "" without `start`."""
    if start is None:
        return training, ""
    done = checkpoint.load_hypernet(start)[1]["step"]
    weights = (start / f"{checkpoint.HYPERNET}.safetensors").read_bytes()
    changed = GOING_ON | {"steps": training["steps"] + done}
    return training | changed, hashlib.sha256(weights).hexdigest()


def _finished(out: Path, steps: int) -> bool:
    """Whether the folder holds a run of that many steps."""
    try:
        return checkpoint.load_hypernet(out)[1]["step"] == steps
    except (FileNotFoundError, ValueError):
        return False


def _digest(*settings: object) -> str:
    """Eight hex digits of the hash of some settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
