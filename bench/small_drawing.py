"""Draws subjects with the runtime, under HM-CFG and under plain CFG, and scores the pictures.

Plain CFG is what the paper compares with: the personalised model on both rows, with the empty prompt and with
the subject's.  Of HM-CFG the empty prompt goes to the base model.
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

TRAIN = "hyperrt train --model BASE --data CACHE --output RUN; then say --hypernet RUN"
NOISE_STRIDE = 10  # between the seeds of two cases


@dataclass(frozen=True)
class Guidance:
    """HM-CFG of scale s = w + 1 at κ; κ None: plain CFG of the personalised model at that scale."""

    scale: float
    kappa: float | None


@dataclass(frozen=True)
class Studio:
    """A runtime, the cases, and who scores their pictures.

    steps: of the solver; seed: of the first noise. A case has the same noise wherever it is drawn.
    """

    runtime: Runtime
    scorer: scoring.Scorer
    steps: int
    seed: int = 0

    @property
    def cases(self) -> Sequence[scoring.Case]:
        return self.scorer.cases

    def scores(self, subjects: Sequence[Subject], guidance: Guidance) -> scoring.Scores:
        """Scores of the cases, each drawn as a subject in its places: name -> [cases]."""
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
    """One picture."""
    how = {"guidance_scale": guidance.scale, "kappa": guidance.kappa, "cfg": guidance.kappa is None}
    return runtime.generate(prompt, subject, **how, **options).images[0]


def anywhere(subject: Subject) -> Subject:
    """The subject without its origin: these scripts check the base model once, for all subjects."""
    return dataclasses.replace(subject, metadata={})


def bundle_of(args: argparse.Namespace, world: World, base_hash: Callable[[], str], work: Path) -> Bundle:
    """The bundle that draws: exported from --hypernet, or --bundle, which must be of the same base model.

    With --quick any bundle will do.

    Raises:
        Incompatible: the bundle is of another base model.
    """
    if args.hypernet:
        return Bundle.open(exported(world, args.hypernet, work))
    bundle = Bundle.open(args.bundle)
    if not args.quick and bundle.hashes.base_model != (wanted := base_hash()):
        why = f"its base model is {bundle.hashes.base_model[:12]}, that of --model is {wanted[:12]}"
        raise Incompatible(f"the bundle {bundle.name} cannot draw this", why, f"train one for it: {TRAIN}")
    return bundle


def exported(world: World, hypernet: Path, work: Path) -> Path:
    """A bundle of the base model and a hypernetwork; made once for the same weights."""
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
