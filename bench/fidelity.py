"""Is it the subject of the photos, and is it where the prompt says?

40 drawn subjects that no training has seen (five of each noun), four photos of each in four scenes. Every
picture is made by the runtime with the bundle's defaults, in three ways: with the subject's LoRA, with none
(`_none`: the base model, which knows the noun), and with the LoRA of another subject of the noun (`_wrong`).

    identity_hist      "a [V] NOUN on a plain white background" at kappa 1.2: how often the nearest of 20
                       unseen subjects of the noun is the right one, by the colours of what is not white
                       (chance: 0.05)
    identity_encoder   the same by the bundle's frozen image encoder, which the hypernetwork also reads
    background         "a [V] NOUN SCENE" at kappa 1, every subject in two of the twelve scenes: how often the
                       scene is the right one, by the picture's border among real pictures
    ..._real           the judge's answer on real pictures that it has not seen: the ceiling
    identity_hist_cutouts   with --cutouts: the same on other people's drawings (split test), reported only

A candidate is known by four views of its own on white, other than the photos and other than the views behind
`_real`. --seed draws other subjects; the judges (training/evaluation/classifiers.py) stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import report
from PIL import Image

from hyperrt import Runtime
from hyperrt.lora.subject import Subject
from hyperrt.training.data import cutouts, scenes
from hyperrt.training.evaluation import classifiers, drawn
from hyperrt.training.evaluation.drawn import (
    CANDIDATES,
    FIRST_INDEX,
    PHOTO_SIZE,
    SEED_STRIDE,
    VIEW_SIZE,
    WHITE,
    Case,
)

SCENES_EACH = 2
IDENTITY_KAPPA, BACKGROUND_KAPPA = 1.2, 1.0
CUTOUTS = 40
WAYS = ("", "_none", "_wrong")  # its own LoRA, none, another's
BARS = {"identity_hist": ">= 0.7", "identity_encoder": ">= 0.5", "background": ">= 0.9"}
BARS |= {"identity_hist_cutouts": ">= 0.4"}
BARS |= {"identity_hist_none": "about 0.05", "identity_hist_wrong": "about 0.05"}


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="other subjects and other noise")
    parser.add_argument("--sheet", type=Path, help="write photos and pictures of all subjects here, as PNG")
    parser.add_argument("--cutouts", type=Path, help="folder of RGBA cut-outs with metadata.csv")
    args = parser.parse_args()
    cases = drawn.cases_of(args.seed, per_noun=1 if args.quick else drawn.PER_NOUN)
    with Runtime.open(args.bundle, "onnxruntime") as runtime:
        steps = 2 if args.quick else None
        encoder = classifiers.BundleEncoder(runtime.bundle)
        subjects = [runtime.personalize(case.photos, case.noun) for case in cases]
        ways = {
            "": subjects,
            "_none": [None] * len(cases),
            "_wrong": wrong_subjects(runtime, cases, subjects),
        }
        white = {way: [*identity_pictures(runtime, cases, by, args.seed, steps)] for way, by in ways.items()}
        figures = identity_figures(
            cases, white, {"identity_hist": classifiers.histogram, "identity_encoder": encoder}
        )
        in_scenes = {
            way: [*background_pictures(runtime, cases, by, args.seed, steps)] for way, by in ways.items()
        }
        figures |= background_figures(cases, in_scenes)
        if args.cutouts:
            others = cutout_cases(args.cutouts, args.seed)
            own = [runtime.personalize(case.photos, case.noun) for case in others]
            pictures = [*identity_pictures(runtime, others, own, args.seed, steps)]
            found = identity_figures(others, {"": pictures}, {"identity_hist": classifiers.histogram})
            figures |= {key.replace("hist", "hist_cutouts"): value for key, value in found.items()}
    if args.sheet:
        write_sheet(args.sheet, cases, white, in_scenes)
    print(f"{len(cases)} subjects, seed {args.seed}\n")
    report.finish(__file__, figures, BARS)


def cutout_cases(folder: Path, seed: int) -> list[Case]:
    """Cut-outs of the split test, each among CANDIDATES of them, of its own noun where there are as many."""
    found = cutouts.load(folder, "test")
    rng = np.random.default_rng([FIRST_INDEX, seed])
    cases = []
    for k in rng.permutation(len(found.files))[:CUTOUTS]:
        same = [
            other
            for other in rng.permutation(len(found.files))
            if other != k and found.noun(other) == found.noun(k)
        ]
        rest = [other for other in rng.permutation(len(found.files)) if other != k and other not in same]
        candidates = [found.subject(int(index), PHOTO_SIZE) for index in [k, *same, *rest][:CANDIDATES]]
        cases.append(Case(found.noun(int(k)), FIRST_INDEX + len(cases), candidates[0], 0, candidates))
    return cases


def wrong_subjects(runtime: Runtime, cases: Sequence[Case], subjects: Sequence[Subject]) -> list[Subject]:
    """For every case the LoRA of another unseen subject of its noun: the next candidate's."""
    wrong = []
    for case in cases:
        other = case.candidates[(case.place + 1) % len(case.candidates)]
        known = [s for c, s in zip(cases, subjects, strict=True) if c.drawing is other]
        if not known:
            photos = Case(case.noun, case.index + SEED_STRIDE // 2, other, 0, ()).photos
            known = [runtime.personalize(photos, case.noun)]
        wrong.append(known[0])
    return wrong


def draw(runtime: Runtime, noun: str, scene: str, subject: Subject | None, **options: object) -> np.ndarray:
    """One picture; without a subject the base model's, of the prompt without [V]."""
    prompt = f"a [V] {noun} {scene}" if subject else f"a {noun} {scene}"
    if subject is None:
        options.pop("kappa")  # there is nothing to share the guidance with
    return runtime.generate(prompt, subject, **options).images[0]


def identity_pictures(
    runtime: Runtime, cases: Sequence[Case], by: Sequence[Subject | None], seed: int, steps: int | None
) -> Iterator[np.ndarray]:
    """One picture of every case on white."""
    for k, (case, subject) in enumerate(zip(cases, by, strict=True)):
        noise = SEED_STRIDE * seed + k
        yield draw(runtime, case.noun, WHITE, subject, seed=noise, kappa=IDENTITY_KAPPA, steps=steps)


def background_pictures(
    runtime: Runtime, cases: Sequence[Case], by: Sequence[Subject | None], seed: int, steps: int | None
) -> Iterator[np.ndarray]:
    """SCENES_EACH pictures of every case, as `scenes_of` says."""
    for k, (case, subject) in enumerate(zip(cases, by, strict=True)):
        for j, scene in enumerate(scenes_of(k)):
            noise = SEED_STRIDE * seed + 100 + SCENES_EACH * k + j
            yield draw(runtime, case.noun, scene, subject, seed=noise, kappa=BACKGROUND_KAPPA, steps=steps)


def scenes_of(case: int) -> list[str]:
    """The scenes of a case: over twelve cases all scenes equally often, and not the same ones for a noun."""
    return [scenes.BACKGROUNDS[(5 * case + 6 * j) % len(scenes.BACKGROUNDS)] for j in range(SCENES_EACH)]


def identity_figures(
    cases: Sequence[Case], pictures: dict[str, list[np.ndarray]], by: dict[str, classifiers.Features]
) -> dict[str, float]:
    """How often the right candidate is the nearest, by each judge, in each way, and of real pictures."""
    figures = {}
    real = [case.view(WHITE, 0) for case in cases]
    for name, features in by.items():
        lineup = drawn.Lineup(features)
        for way, made in {**pictures, "_real": real}.items():
            right = [lineup.is_right(case, picture) for case, picture in zip(cases, made, strict=True)]
            figures[name + way] = float(np.mean(right))
    return figures


def background_figures(cases: Sequence[Case], pictures: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """How often the scene is the right one, in each way, and of real pictures."""
    judge = drawn.scene_classifier(cases)
    names, real = drawn.real_scenes(cases, 10_000)
    wanted = [scene for k in range(len(cases)) for scene in scenes_of(k)]
    figures = {"background_real": share(judge, real, names)}
    return figures | {f"background{way}": share(judge, made, wanted) for way, made in pictures.items()}


def share(judge: classifiers.SceneClassifier, pictures: Sequence[np.ndarray], wanted: Sequence[str]) -> float:
    return float(np.mean([judge(picture) == name for picture, name in zip(pictures, wanted, strict=True)]))


def write_sheet(
    path: Path,
    cases: Sequence[Case],
    white: dict[str, list[np.ndarray]],
    in_scenes: dict[str, list[np.ndarray]],
) -> None:
    """A row per case: four photos | on white with its own LoRA, none, another's | its scenes, likewise."""
    rows = []
    for k, case in enumerate(cases):
        photos = [np.asarray(Image.fromarray(photo).resize((VIEW_SIZE, VIEW_SIZE))) for photo in case.photos]
        row = [*photos, *(white[way][k] for way in WAYS)]
        row += [picture for way in WAYS for picture in in_scenes[way][SCENES_EACH * k :][:SCENES_EACH]]
        rows.append(np.concatenate(row, axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    main()
