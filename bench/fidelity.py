"""Do pictures show the subject of the photos, in the scene that the prompt names?

40 drawn subjects that no training has seen (five of each noun), with four photos of each in four scenes. The
runtime draws every picture with the bundle's defaults in three ways: with the subject's LoRA, without a LoRA
(`_none`: the base model knows the noun), and with the LoRA of another subject of the noun (`_wrong`).

    identity_hist      "a [V] NOUN on a plain white background" at kappa 1.2: share of pictures that are
                       nearest to the right one of 20 unseen subjects of the noun, in the colours of pixels
                       that are not white (chance: 0.05)
    identity_encoder   the same in the features of the bundle's image encoder, the hypernetwork's input
    background         "a [V] NOUN SCENE" at kappa 1, every subject in two of the twelve scenes: share of
                       pictures whose border is nearest to real pictures of the right scene
    ..._real           the same for real pictures that the classifiers have not seen: the upper limit
    identity_hist_cutouts   with --cutouts: the same for other people's drawings (split test); no target

A candidate is represented by four views on white, which differ from the photos and from the pictures of
`_real`. --seed chooses the subjects; the classifiers (training/evaluation/classifiers.py) do not change.
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
WAYS = ("", "_none", "_wrong")  # the subject's LoRA, no LoRA, another subject's
BARS = {"identity_hist": ">= 0.7", "identity_encoder": ">= 0.5", "background": ">= 0.9"}
BARS |= {"identity_hist_cutouts": ">= 0.4"}
BARS |= {"identity_hist_none": "about 0.05", "identity_hist_wrong": "about 0.05"}


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="chooses the subjects and the noise")
    parser.add_argument(
        "--sheet", type=Path, help="PNG to write with the photos and pictures of all subjects"
    )
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
            cutout = cutout_cases(args.cutouts, args.seed)
            subjects = [runtime.personalize(case.photos, case.noun) for case in cutout]
            pictures = [*identity_pictures(runtime, cutout, subjects, args.seed, steps)]
            by_colour = identity_figures(cutout, {"": pictures}, {"identity_hist": classifiers.histogram})
            figures |= {key.replace("hist", "hist_cutouts"): value for key, value in by_colour.items()}
    if args.sheet:
        write_sheet(args.sheet, cases, white, in_scenes)
    print(f"{len(cases)} subjects, seed {args.seed}\n")
    report.finish(__file__, figures, BARS)


def cutout_cases(folder: Path, seed: int) -> list[Case]:
    """Cut-outs of the split test, each with CANDIDATES, first of the same noun and then of others."""
    cut = cutouts.load(folder, "test")
    rng = np.random.default_rng([FIRST_INDEX, seed])
    cases = []
    for k in rng.permutation(len(cut.files))[:CUTOUTS]:
        same = [
            other
            for other in rng.permutation(len(cut.files))
            if other != k and cut.noun(other) == cut.noun(k)
        ]
        rest = [other for other in rng.permutation(len(cut.files)) if other != k and other not in same]
        candidates = [cut.subject(int(index), PHOTO_SIZE) for index in [k, *same, *rest][:CANDIDATES]]
        cases.append(Case(cut.noun(int(k)), FIRST_INDEX + len(cases), candidates[0], 0, candidates))
    return cases


def wrong_subjects(runtime: Runtime, cases: Sequence[Case], subjects: Sequence[Subject]) -> list[Subject]:
    """For every case the subject of the next candidate, which has the same noun."""
    wrong = []
    for case in cases:
        other = case.candidates[(case.place + 1) % len(case.candidates)]
        matches = [s for c, s in zip(cases, subjects, strict=True) if c.drawing is other]
        if not matches:
            photos = Case(case.noun, case.index + SEED_STRIDE // 2, other, 0, ()).photos
            matches = [runtime.personalize(photos, case.noun)]
        wrong.append(matches[0])
    return wrong


def draw(runtime: Runtime, noun: str, scene: str, subject: Subject | None, **options: object) -> np.ndarray:
    """Draws one picture; without a subject, by the base model from the prompt without [V]."""
    prompt = f"a [V] {noun} {scene}" if subject else f"a {noun} {scene}"
    if subject is None:
        options.pop("kappa")  # kappa needs a subject
    return runtime.generate(prompt, subject, **options).images[0]


def identity_pictures(
    runtime: Runtime, cases: Sequence[Case], by: Sequence[Subject | None], seed: int, steps: int | None
) -> Iterator[np.ndarray]:
    """Draws one picture of every case on white."""
    for k, (case, subject) in enumerate(zip(cases, by, strict=True)):
        noise = SEED_STRIDE * seed + k
        yield draw(runtime, case.noun, WHITE, subject, seed=noise, kappa=IDENTITY_KAPPA, steps=steps)


def background_pictures(
    runtime: Runtime, cases: Sequence[Case], by: Sequence[Subject | None], seed: int, steps: int | None
) -> Iterator[np.ndarray]:
    """Draws every case in its scenes (`scenes_of`)."""
    for k, (case, subject) in enumerate(zip(cases, by, strict=True)):
        for j, scene in enumerate(scenes_of(k)):
            noise = SEED_STRIDE * seed + 100 + SCENES_EACH * k + j
            yield draw(runtime, case.noun, scene, subject, seed=noise, kappa=BACKGROUND_KAPPA, steps=steps)


def scenes_of(case: int) -> list[str]:
    """The scenes of a case: each equally often in twelve cases, and different ones within a noun."""
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
    """Writes a row per case: photos | on white with its LoRA, none, another's | in scenes with the same."""
    rows = []
    for k, case in enumerate(cases):
        photos = [np.asarray(Image.fromarray(photo).resize((VIEW_SIZE, VIEW_SIZE))) for photo in case.photos]
        row = [*photos, *(white[way][k] for way in WAYS)]
        row += [picture for way in WAYS for picture in in_scenes[way][SCENES_EACH * k :][:SCENES_EACH]]
        rows.append(np.concatenate(row, axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    main()
