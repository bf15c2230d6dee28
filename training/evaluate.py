"""Draws and scores pictures of many subjects and writes a report.

    hyperrt evaluate BUNDLE --protocol dreambench --subjects DIR --output OUT --clip DIR --dino DIR
    hyperrt evaluate --score DIR ...        scores the pictures in DIR and draws nothing
    hyperrt evaluate --calibrate ...        scores the real photos only

OUT gets pictures/SUBJECT/*.png, photos/SUBJECT/*.png (small copies for the page), report.json and index.html.
The runtime draws the pictures, training/evaluation/scorers.py scores them, and
training/evaluation/protocols.py defines the protocols. With `accelerate launch -m hyperrt.training.evaluate`
each process takes its share of the subjects; the scores are the same. --resume continues a killed run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from hyperrt import Runtime, files
from hyperrt.cli.options import RenamedOption
from hyperrt.engines import BACKENDS, resolve
from hyperrt.errors import BadInput, UsageError
from hyperrt.photos import load
from hyperrt.sampling.options import SamplingOptions
from hyperrt.training.evaluation import drawing, drawn_scorers, protocols, report, scores
from hyperrt.training.evaluation.drawing import DrawResult, DrawSettings, PictureFile
from hyperrt.training.evaluation.protocols import PROTOCOLS, EvaluationSubject
from hyperrt.training.evaluation.report import PHOTOS, PICTURES, REPORT
from hyperrt.training.evaluation.results import ScoredPicture, SubjectResult
from hyperrt.training.evaluation.scorers import (
    ClipScorer,
    DinoScorer,
    FaceScorer,
    Scorer,
    ScorerUnavailable,
)
from hyperrt.training.evaluation.settings import SCORERS, EvaluateConfig
from hyperrt.training.messages import reported
from hyperrt.training.run.signals import stopping

log = logging.getLogger("hyperrt.training")

THUMBNAIL = 256  # pixels
PATIENCE = timedelta(days=14)  # how long a process waits for the others, which may have more to draw


def run(config: EvaluateConfig) -> Path:
    """Runs the evaluation and returns the path of report.json.

    Raises:
        UsageError: OUT holds an evaluation and `resume` is off.
        NotFound, BadInput: there are no subjects, or none of them can be used.
        HyperRTError, engines.EngineError: as the runtime and the scorers.
        SystemExit: 128 + the number of a signal that arrived.
    """
    state = PartialState(cpu=config.cpu, timeout=PATIENCE)
    protocol = PROTOCOLS[config.protocol]
    everybody = protocols.subjects(protocol, config.subjects)
    selection = everybody.select(config.only, config.limit or protocol.limit)
    if state.is_main_process:
        _prepare_output(config)
    state.wait_for_everyone()
    with stopping() as stopped:
        with state.main_process_first():  # one process trains or downloads; the others find the files
            scorers, unavailable = _scorers(config, everybody.subjects, state)
        with (
            _runtime(config, state) as runtime,
            state.split_between_processes(list(selection.subjects)) as share,
        ):
            results: list[SubjectResult] = []
            for subject in share:
                if not stopped:
                    results.append(evaluate_subject(config, subject, runtime, scorers, stopped))
                    log.info("%s: %s (%d of %d)", subject.name, results[-1], len(results), len(share))
        if stopped:
            return config.output  # `stopping` ends the process
        by_name = {result.name: result for result in gather_object(results)}  # the last may come twice
    if state.is_main_process:
        ordered = [by_name[subject.name] for subject in selection.subjects]
        _check_any_scored(config, ordered)
        report.write(config, runtime, selection, ordered, scorers, unavailable)
    state.wait_for_everyone()
    return config.output / REPORT


def evaluate_subject(
    config: EvaluateConfig,
    subject: EvaluationSubject,
    runtime: Runtime | None,
    scorers: Mapping[str, Scorer],
    stopped: Sequence[int] = (),
) -> SubjectResult:
    """Draws the missing pictures of a subject and scores all of them.

    Args:
        runtime: draws; None: only existing pictures are scored.
        stopped: if a signal is added to it, drawing stops and nothing is scored.
    """
    result = SubjectResult(subject.name, subject.noun, subject.pack.name)
    try:
        photos = subject.photos()
    except BadInput as error:
        log.warning("%s is left out: %s", subject.name, error.why or error.what)
        result.reason = f"{error.what}: {error.why}"
        return result
    result.photos = _save_thumbnails(photos, config.output / PHOTOS / subject.name)
    result.left_out += photos.rejected
    folder = (config.score or config.output / PICTURES) / subject.name
    if runtime is not None:
        drawn = _draw(config, subject, photos, runtime, folder, stopped)
        result.drawn, result.kept = drawn.drawn, drawn.kept
        result.left_out += drawn.failed
    if stopped:
        return result
    for scorer in scorers.values():
        result.real |= scorer.real(subject, photos.images)
    if not config.calibrate:
        _score(config, subject, photos, folder, scorers, result)
    for name, reason in result.left_out:
        log.warning("%s: left out %s: %s", subject.name, name, reason)
    return result


def _score(
    config: EvaluateConfig,
    subject: EvaluationSubject,
    photos: load.Photos,
    folder: Path,
    scorers: Mapping[str, Scorer],
    result: SubjectResult,
) -> None:
    """Scores the pictures in a folder and adds them to the result."""
    prompts = subject.pack.prompts(subject.noun)
    pictures, bad = drawing.find(folder, prompts, config.drawing.pictures)
    result.left_out += bad
    result.missing = len(prompts) * config.drawing.pictures - len(pictures)
    if not pictures:
        result.reason = "there are no pictures of it"
        return
    result.pictures = _scored(subject, photos.images, pictures, scorers)
    means = scores.means([picture.scores for picture in result.pictures])
    result.scores = means | scores.average(means, PROTOCOLS[config.protocol].average)


def _draw(
    config: EvaluateConfig,
    subject: EvaluationSubject,
    photos: load.Photos,
    runtime: Runtime,
    folder: Path,
    stopped: Sequence[int],
) -> DrawResult:
    personalized = runtime.personalize(photos.images, subject.noun)
    result = DrawResult()
    prompts = subject.pack.prompts(subject.noun)
    for _ in drawing.draw(runtime, personalized, prompts, folder, config.drawing, result):
        if stopped:
            break
    return result


def _scored(
    subject: EvaluationSubject,
    photos: Sequence[np.ndarray],
    pictures: Sequence[PictureFile],
    scorers: Mapping[str, Scorer],
) -> list[ScoredPicture]:
    images = [load.load_image(picture.file) for picture in pictures]
    columns: dict[str, Sequence[scores.Score]] = {}
    for scorer in scorers.values():
        columns |= scorer.score(subject, photos, images, [picture.number for picture in pictures])
    return [
        ScoredPicture(
            picture.file.name,
            picture.number,
            picture.image,
            picture.seed,
            {key: column[k] for key, column in columns.items()},
        )
        for k, picture in enumerate(pictures)
    ]


def _save_thumbnails(photos: load.Photos, folder: Path) -> list[str]:
    """Writes small copies of the photos for the page; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for k, photo in enumerate(photos.images):
        small = Image.fromarray(photo)
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        names.append(f"{k:02}.png")
        files.publish(folder / names[-1], lambda file, small=small: small.save(file, "PNG"), force=True)
    return names


def _prepare_output(config: EvaluateConfig) -> None:
    output, why = config.output, "existing files are kept"
    names = {path.name for path in output.iterdir() if path.name[0] != "."} if output.is_dir() else set()
    if names and not names & {PHOTOS, PICTURES, REPORT}:
        raise UsageError(f"{output} is not empty, and holds no evaluation", why, "choose another --output")
    if names and not config.resume:
        raise UsageError(f"{output} holds an evaluation", why, "add --resume, or choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the folder {output} cannot be created"
        raise UsageError(what, error.strerror or str(error), "choose another --output") from error


def _runtime(
    config: EvaluateConfig, state: PartialState
) -> contextlib.AbstractContextManager[Runtime | None]:
    """The runtime that draws; on GPUs each process of a machine takes its own."""
    if config.bundle is None:
        return contextlib.nullcontext()
    device = state.local_process_index if BACKENDS[resolve(config.backend)].nvidia else 0
    return Runtime.open(config.bundle, config.backend, config.threads, device=device)


def _scorers(
    config: EvaluateConfig, everybody: Sequence[EvaluationSubject], state: PartialState
) -> tuple[dict[str, Scorer], dict[str, str]]:
    """The available scorers, and the reasons why others are unavailable, by name."""
    scorers: dict[str, Scorer] = {}
    unavailable: dict[str, str] = {}
    for name in config.scorers or PROTOCOLS[config.protocol].scorers:
        try:
            scorers[name] = _scorer(name, config, everybody, state)
        except ScorerUnavailable as error:
            unavailable[name] = str(error)
            log.warning("scorer %s is unavailable: %s", name, error)
    return scorers, unavailable


def _scorer(
    name: str, config: EvaluateConfig, everybody: Sequence[EvaluationSubject], state: PartialState
) -> Scorer:
    if name in ("clip", "dino"):
        source = getattr(config, name)
        if not source:
            why = f"no weights were given; --{name} takes a folder, or OWNER/NAME on the hub"
            raise ScorerUnavailable(why)
        return (ClipScorer if name == "clip" else DinoScorer)(source, state.device, config.offline)
    if name == "face":
        if not config.face:
            raise ScorerUnavailable("it was not requested; --face uses facenet-pytorch and its weights")
        return FaceScorer(state.device, config.offline)
    if config.protocol != "drawn":
        why = "it scores drawn subjects only"
        raise UsageError(f"{name} cannot score {config.protocol}", why, "choose others with --scorers")
    return {
        "identity": lambda: drawn_scorers.IdentityScorer(config.encoders),
        "colours": drawn_scorers.ColourScorer,
        "background": lambda: drawn_scorers.BackgroundScorer(everybody),
    }[name]()


def _check_any_scored(config: EvaluateConfig, results: Sequence[SubjectResult]) -> None:
    """Raises BadInput if no subject has scores."""
    if not any(result.real if config.calibrate else result.pictures for result in results):
        why = "; ".join(f"{result.name}: {result.reason}" for result in results[:3])
        where = config.score or config.subjects or config.output
        what = f"nothing in {where} can be scored"
        raise BadInput(what, why, "see training/evaluation/drawing.py for the names")


class CountOrFolder(click.IntRange):
    """The value of --pictures: a count or, as in earlier versions, the folder that --score names now."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        is_folder = isinstance(value, str) and Path(value).is_dir() and not value.isdigit()
        return Path(value) if is_folder else super().convert(value, param, ctx)


PATH = click.Path(path_type=Path)


@click.command(
    context_settings={"show_default": True}, epilog="The protocols: training/evaluation/protocols.py"
)
@click.argument("bundle", required=False)
@click.option("--protocol", required=True, help=f"One of {', '.join(PROTOCOLS)}.")
@click.option("--output", "-o", type=PATH, required=True, help="Folder of the report and the pictures.")
@click.option("--subjects", type=PATH, help="Folder of the subjects' real photos.")
@click.option("--score", type=PATH, help="Score the pictures in this folder; draw nothing.")
@click.option("--calibrate", is_flag=True, help="Score the real photos only.")
@click.option(
    "--pictures",
    "-n",
    cls=RenamedOption,
    former=["--images-per-prompt"],
    type=CountOrFolder(1, 1000),
    help="Pictures of each subject and prompt.  [default: 4]",
)
@click.option("--fast", is_flag=True, help="One picture of each subject and prompt.")
@click.option("--seed", type=click.IntRange(0), default=42, help="Picture k of a prompt uses seed + k.")
@click.option("--steps", type=click.IntRange(1, 1000), default=30, help="Denoising steps.")
@click.option(
    "--kappa", type=float, help="Share of the subject in the guidance, 0 to 2.  [default: the bundle's]"
)
@click.option("--cfg", is_flag=True, help="Plain CFG of the personalised model, as in the paper's tables.")
@click.option(
    "--guidance-scale",
    "-g",
    cls=RenamedOption,
    former=["--guidance"],
    type=float,
    help="How hard to follow the prompt (s = w + 1).  [default: the bundle's; twice that with --cfg]",
)
@click.option("--solver", help="[default: the bundle's]")
@click.option(
    "--batch-size",
    cls=RenamedOption,
    former=["--batch"],
    type=click.IntRange(1, 1000),
    default=4,
    help="Pictures per engine call.",
)
@click.option("--scorers", help=f"Some of {','.join(SCORERS)}.  [default: the protocol's]")
@click.option("--clip", help="CLIP ViT-B/32: a folder, or OWNER/NAME[@REVISION] on the hub.")
@click.option("--dino", help="DINO ViT-S/16: likewise.")
@click.option("--face", is_flag=True, help="Face recognition by facenet-pytorch.")
@click.option(
    "--encoders",
    cls=RenamedOption,
    former=["--judges"],
    type=PATH,
    help="Folder of trained identity encoders.  [default: in HyperRT's own folder]",
)
@click.option("--only", multiple=True, help="Name of a subject; may be repeated.")
@click.option(
    "--limit", type=click.IntRange(1), help="Maximum number of subjects.  [default: the protocol's]"
)
@click.option("--backend", default="auto", help="What runs the model.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the physical cores]")
@click.option("--cpu", is_flag=True, help="Run the scorers on the CPU even if there is a GPU.")
@click.option("--offline", is_flag=True, help="Do not access the network.")
@click.option("--resume", is_flag=True, help="Continue the evaluation in --output.")
def main(
    pictures: int | Path | None, fast: bool, seed: int, steps: int, kappa: float | None, cfg: bool,
    guidance_scale: float | None, solver: str | None, batch_size: int, scorers: str | None, **others: Any,
) -> None:  # fmt: skip
    """Draw and score pictures of many subjects with BUNDLE (a name or a folder), and write a report.

    \b
    Examples:
      hyperrt evaluate tiny --protocol drawn --output report --limit 8
      hyperrt evaluate sdxl --protocol dreambench --subjects dreambench --output report
      hyperrt evaluate --protocol drawn --score report/pictures --output scores
    """
    with reported():
        if isinstance(pictures, Path):
            others["score"], pictures = pictures, None
        if fast and pictures not in (None, 1):
            why = f"--fast draws one picture of each prompt, and --pictures is {pictures}"
            raise UsageError("--fast and --pictures do not go together", why, "leave one of them out")
        count = 1 if fast else pictures or 4
        settings = DrawSettings(count, seed, steps, kappa, cfg, guidance_scale, solver, batch_size)
        SamplingOptions(**settings.options(range(count)))  # checks the values
        names = tuple(name.strip() for name in (scorers or "").split(",") if name.strip())
        click.echo(run(EvaluateConfig(drawing=settings, scorers=names, **others)))


if __name__ == "__main__":
    main()
