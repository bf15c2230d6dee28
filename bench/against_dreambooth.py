"""Compares subjects of the hypernetwork with subjects fine-tuned with DreamBooth: quality and time.

    identity_hypernet, identity_dreambooth
                           share of subjects that are recognised among 20 unseen ones of the noun
    likeness_hypernet, likeness_dreambooth
                           cosine with the subject, in the features of an encoder of subjects
    colours_...            the same in the colours of pixels that are not white
    background_hypernet, background_dreambooth
                           share of pictures whose scene is the one in the prompt
    prompt_hypernet, prompt_dreambooth
                           margin of that scene (bench/scoring.py)
    seconds_per_subject_hypernet, seconds_per_subject_dreambooth
                           from photos in memory to LoRA, median
    times_faster           seconds of DreamBooth / seconds of the hypernetwork
    dreambooth_steps       steps of fine-tuning, chosen by the sweep
    sweep_likeness_N, sweep_prompt_N    scores of other subjects after N steps

Both methods see the same four photos of unseen drawn subjects and have a LoRA of the same rank on the same
sites.  The same runtime draws both with the same noise, at the bundle's guidance and κ 1.  DreamBooth also
gets the scene of each photo as a caption.  Its learning rate is constant, so the sweep is one run per
subject; it chooses the steps with the largest sum of likeness and prompt margin (the paper stops early, too:
figure 3).  The subjects of the sweep are not those of the comparison.  --dreambooth-steps N skips the sweep.
Everything is computed with the threads of --threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import report
import scoring
import small_drawing
import small_world
from small_drawing import Guidance, Studio

from hyperrt import Runtime
from hyperrt.lora.subject import Subject
from hyperrt.training.data import scenes
from hyperrt.training.evaluation.intervals import mean_interval
from hyperrt.training.finetune import DreamBoothConfig, Finetuned, finetune
from hyperrt.training.model import base_model as bases
from hyperrt.training.model import weight_hash
from hyperrt.training.run import device

STOPS = (50, 100, 200, 400, 800)
METHODS = ("hypernet", "dreambooth")
SHOWN = {  # score -> its name in the figures
    scoring.IDENTITY: "identity", scoring.SUBJECT: "likeness", scoring.COLOURS: "colours",
    scoring.BACKGROUND: "background", scoring.PROMPT: "prompt",
}  # fmt: skip
BARS = {"times_faster": ">= 1000", "background_hypernet": ">= background_dreambooth"}
REPEATS = 5  # of a personalisation, which takes milliseconds


@dataclass(frozen=True)
class Tuner:
    """Fine-tunes cases with DreamBooth, all with the same settings."""

    base: bases.Base
    runtime: Runtime
    config: DreamBoothConfig

    def __call__(self, case: scoring.Case, stops: Sequence[int] = ()) -> list[Finetuned]:
        """The subject of a case after each of the stops, and last after all steps."""
        prompts = [scenes.caption(case.noun, place, "[V]") for place in case.photo_scenes]
        layout = self.runtime.bundle.layout
        return finetune(self.base, case.photos, case.noun, layout, self.config, prompts, stops)


def main() -> None:
    parser = small_world.options(__doc__)
    parser.add_argument("--hypernet", type=Path, metavar="RUN", help="run of `hyperrt train`; else --bundle")
    parser.add_argument("--work", type=Path, help="keeps the exported bundle (default: beside the base)")
    parser.add_argument("--subjects", type=int, default=24, help="subjects of the comparison")
    parser.add_argument("--sweep-subjects", type=int, default=8)
    parser.add_argument("--dreambooth-steps", type=int, help="skip the sweep")
    parser.add_argument("--lr", type=float, default=DreamBoothConfig.lr, help="learning rate of DreamBooth")
    parser.add_argument("--steps", type=int, default=15, help="steps of the solver")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.quick:
        args.subjects, args.sweep_subjects, args.steps = 1, 1, 2
    with small_world.refusals(), small_world.opened(args, random=args.quick) as world:
        device.prepare(args.threads)
        base = bases.opened(world.base)
        work = args.work or world.base.parent / "bench"
        bundle = small_drawing.bundle_of(args, world, lambda: weight_hash.hash_of(base.unet), work)
        with Runtime.open(bundle.path, "onnxruntime", threads=args.threads) as runtime:
            figures = compare(args, base, runtime)
    report.finish(__file__, figures, BARS)


def compare(args: argparse.Namespace, base: bases.Base, runtime: Runtime) -> dict[str, float]:
    """Makes and scores all subjects; prints the intervals, returns the figures."""
    figures: dict[str, float] = {}
    steps = args.dreambooth_steps
    if not steps:
        stops = (1, 2) if args.quick else STOPS
        tuner = Tuner(base, runtime, settings(args, runtime, max(stops)))
        figures, steps = sweep(studio_of(args, runtime, args.seed + 1, args.sweep_subjects), tuner, stops)
    tuner = Tuner(base, runtime, settings(args, runtime, steps))
    studio = studio_of(args, runtime, args.seed, args.subjects)
    tuned = [tuner(case)[-1] for case in studio.cases]
    subjects = {"hypernet": personalised(runtime, studio.cases)}
    subjects["dreambooth"] = [(result.subject, result.seconds) for result in tuned]
    rows = []
    for method in METHODS:
        scores = studio.scores([small_drawing.anywhere(s) for s, _ in subjects[method]], guidance_of(runtime))
        rows.append((method, *(str(mean_interval(scores[name])) for name in SHOWN)))
        figures |= {f"{word}_{method}": float(scores[name].mean()) for name, word in SHOWN.items()}
        figures[f"seconds_per_subject_{method}"] = median(seconds for _, seconds in subjects[method])
    report.table(rows, ("method", *SHOWN.values()))
    times = [figures[f"seconds_per_subject_{method}"] for method in METHODS]
    return figures | {"times_faster": times[1] / times[0], "dreambooth_steps": steps}


def studio_of(args: argparse.Namespace, runtime: Runtime, seed: int, count: int) -> Studio:
    """A studio with the cases of a seed."""
    cases = scoring.cases(seed, count)
    return Studio(
        runtime, scoring.Scorer(scoring.encoder(runtime.bundle, args.quick), cases), args.steps, 1000 * seed
    )


def settings(args: argparse.Namespace, runtime: Runtime, steps: int) -> DreamBoothConfig:
    return DreamBoothConfig(steps=steps, lr=args.lr, token=runtime.bundle.prompts.token)


def guidance_of(runtime: Runtime) -> Guidance:
    return Guidance(runtime.bundle.defaults.guidance_scale, 1.0)


def personalised(runtime: Runtime, cases: Sequence[scoring.Case]) -> list[tuple[Subject, float]]:
    """(subject, seconds) of each case: one call of `Runtime.personalize`, median."""
    results = []
    for case in cases:
        made: list[Subject] = []
        times = [
            report.milliseconds(lambda case=case, made=made: made.append(
                runtime.personalize(case.photos, case.noun)))
            for _ in range(REPEATS)
        ]  # fmt: skip
        results.append((made[-1], median(times) / 1000))
    return results


def sweep(studio: Studio, tuner: Tuner, stops: Sequence[int]) -> tuple[dict[str, float], int]:
    """Figures of DreamBooth after so many steps, and the number of steps that does best."""
    tuned = [tuner(case, stops) for case in studio.cases]
    figures, totals, rows = {}, [], []
    for k, stop in enumerate(stops):
        subjects = [small_drawing.anywhere(of_case[k].subject) for of_case in tuned]
        scores = studio.scores(subjects, guidance_of(studio.runtime))
        likeness, prompt = (float(scores[name].mean()) for name in (scoring.SUBJECT, scoring.PROMPT))
        figures |= {f"sweep_likeness_{stop}": likeness, f"sweep_prompt_{stop}": prompt}
        totals.append(likeness + prompt)
        rows.append((stop, *(float(scores[name].mean()) for name in SHOWN), tuned[0][k].loss))
    report.table(rows, ("steps", *SHOWN.values(), "loss"))
    return figures, stops[int(np.argmax(totals))]


if __name__ == "__main__":
    main()
