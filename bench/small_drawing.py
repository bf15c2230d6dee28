"""Draws subjects with the runtime, under HM-CFG and under plain CFG, and scores the pictures.

The paper compares HM-CFG with plain CFG, in which the personalised model computes both rows, that of the
empty prompt and that of the subject's prompt.  In HM-CFG the base model computes the row of the empty prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import scoring
from small_world import World

from hyperrt import Runtime
from hyperrt.bundle.bundle import Bundle
from hyperrt.errors import Incompatible
from hyperrt.lora.subject import Subject

TRAIN = "hyperrt train --base BASE --data CACHE --output RUN, then give --hypernet RUN"
NOISE_STRIDE = 10  # between the seeds of two cases


@dataclass(frozen=True)
class Guidance:
    """HM-CFG of scale s = w + 1 at κ; κ None: plain CFG of the personalised model at that scale."""

    scale: float
    kappa: float | None


@dataclass(frozen=True)
class Studio:
    """Draws and scores the pictures of the cases.

    Attributes:
        steps: of the solver.
        seed: of the first noise; a case has the same noise in every table and with every method.
    """

    runtime: Runtime
    scorer: scoring.Scorer
    steps: int
    seed: int = 0

    @property
    def cases(self) -> Sequence[scoring.Case]:
        return self.scorer.cases

    def scores(self, subjects: Sequence[Subject], guidance: Guidance) -> scoring.Scores:
        """Draws case k in its places with `subjects[k]`; returns the scores, name -> [cases]."""
        return self.scorer([[*self.drawn(k, subject, guidance)] for k, subject in enumerate(subjects)])

    def drawn(self, case: int, subject: Subject, guidance: Guidance) -> Iterator[scoring.Picture]:
        """The pictures of a case, one in each of its places."""
        for j, scene in enumerate(self.scorer.places[case]):
            prompt = f"a [V] {self.cases[case].noun} {scene}"
            noise = self.seed + NOISE_STRIDE * case + j
            yield draw(self.runtime, prompt, subject, guidance, steps=self.steps, seed=noise)


def draw(
    runtime: Runtime, prompt: str, subject: Subject, guidance: Guidance, **options: int
) -> scoring.Picture:
    """Draws one picture."""
    settings = {"guidance_scale": guidance.scale, "kappa": guidance.kappa, "cfg": guidance.kappa is None}
    return runtime.generate(prompt, subject, **settings, **options).images[0]


def anywhere(subject: Subject) -> Subject:
    """The subject without metadata, for any bundle; the scripts check the base model once, in `bundle_of`."""
    return dataclasses.replace(subject, metadata={})


def bundle_of(args: argparse.Namespace, world: World, base_hash: Callable[[], str], work: Path) -> Bundle:
    """The bundle that draws: exported from --hypernet, or --bundle, which must have the same base model.

    With --quick its base model is not checked.

    Raises:
        Incompatible: the bundle has another base model.
    """
    if args.hypernet:
        return Bundle.open(exported(world, args.hypernet, work))
    bundle = Bundle.open(args.bundle)
    if not args.quick and bundle.hashes.base_model != (expected := base_hash()):
        why = f"its base model is {bundle.hashes.base_model[:12]}, --base is {expected[:12]}"
        raise Incompatible(f"the bundle {bundle.name} cannot draw this", why, f"train one for it: {TRAIN}")
    return bundle


def exported(world: World, hypernet: Path, work: Path) -> Path:
    """The folder of a bundle of the base model and a hypernetwork; exported once for the same weights."""
    from hyperrt.cli.configs import ExportConfig
    from hyperrt.export import export_bundle
    from hyperrt.training.run.checkpoint import HYPERNET

    weights = hypernet / f"{HYPERNET}.safetensors" if hypernet.is_dir() else hypernet
    if not weights.is_file():
        raise FileNotFoundError(f"{hypernet} holds no hypernetwork; make one: {TRAIN}")
    folder = work / f"bundle-{hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        paths = {"base": str(world.base), "hypernet": str(hypernet), "output": str(folder)}
        export_bundle(ExportConfig(model="tiny", verify="none", **paths))
    return folder
