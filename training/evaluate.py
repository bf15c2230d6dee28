"""Draws and scores pictures of many subjects, and writes a report.

    hyperrt evaluate BUNDLE --protocol dreambench --subjects DIR --output OUT --clip DIR --dino DIR
    hyperrt evaluate --pictures DIR ...     scores what is there, and draws nothing
    hyperrt evaluate --calibrate ...        scores the real photos alone

OUT gets pictures/SUBJECT/*.png, photos/SUBJECT/*.png (small, for the page), report.json and index.html. The
pictures come from the runtime, the scores from training/evaluation/scorers.py; the protocols are those of
training/evaluation/protocols.py. Started by `accelerate launch -m hyperrt.training.evaluate ...`, each
process takes its part of the subjects; the figures are the same. A run that was killed goes on with --resume.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from hyperrt import Runtime, files
from hyperrt.engines import BACKENDS, resolve
from hyperrt.errors import BadInput, UsageError
from hyperrt.photos import load
from hyperrt.sampling.options import SamplingConfig
from hyperrt.training.evaluation import drawing as pictures
from hyperrt.training.evaluation import drawn_scorers, protocols, report, scores
from hyperrt.training.evaluation.drawing import Drawing, Found, Made
from hyperrt.training.evaluation.protocols import PROTOCOLS, Entry
from hyperrt.training.evaluation.report import PHOTOS, PICTURES, REPORT
from hyperrt.training.evaluation.scorers import Absent, Clip, Dino, Face, Scorer
from hyperrt.training.messages import reported
from hyperrt.training.run.signals import stopping

log = logging.getLogger("hyperrt.training")

SCORERS = ("clip", "dino", "face", "identity", "colours", "background")
THUMBNAIL = 256  # pixels
PATIENCE = timedelta(days=14)  # how long a process waits for the others, which may have more to draw
Row = dict[str, Any]  # what is known of a subject, as JSON values; see `evaluate_one`


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation.

    Raises:
        UsageError: a value is not one of those known, or two exclude each other.
    """

    protocol: str
    output: Path
    bundle: str | None = None  # name or folder
    subjects: Path | None = None
    pictures: Path | None = None  # score these, draw nothing
    calibrate: bool = False  # score real photos alone
    drawing: Drawing = field(default_factory=Drawing)
    scorers: tuple[str, ...] = ()  # none: the protocol's
    clip: str | None = None  # folder, or OWNER/NAME@REVISION on the hub
    dino: str | None = None
    face: bool = False
    judges: Path | None = None  # folder of trained judges; None: HyperRT's own
    only: tuple[str, ...] = ()  # subjects by name
    limit: int | None = None  # subjects; None: the protocol's
    backend: str = "auto"
    threads: int | None = None
    cpu: bool = False  # scorers compute on the processor, although there is a GPU
    offline: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        for kind, known, names in (
            ("protocol", PROTOCOLS, (self.protocol,)),
            ("scorer", SCORERS, self.scorers),
        ):
            for name in names:
                if name not in known:
                    why = f"there are {', '.join(known)}"
                    raise UsageError(f"there is no {kind} {name!r}", why, "name one of them")
        sources = {"a bundle": self.bundle, "--pictures": self.pictures, "--calibrate": self.calibrate}
        given = [name for name, value in sources.items() if value]
        if len(given) != 1:
            why = "pictures are drawn with a bundle, or are there already, or are not looked at"
            what = f"{' and '.join(given)} were given" if given else "no source of pictures was given"
            raise UsageError(what, why, f"give one of {', '.join(sources)}")


def run(config: EvaluateConfig) -> Path:
    """The whole evaluation; returns the path of report.json.

    Raises:
        UsageError: OUT holds an evaluation and `resume` is off.
        NotFound, BadInput: there are no subjects, or nothing of them that can be used.
        HyperRTError, engines.EngineError: as the runtime and the scorers.
        SystemExit: 128 + the number of a signal that arrived.
    """
    state = PartialState(cpu=config.cpu, timeout=PATIENCE)
    protocol = PROTOCOLS[config.protocol]
    everybody = protocols.subjects(protocol, config.subjects)
    listing = everybody.chosen(config.only, config.limit or protocol.limit)
    if state.is_main_process:
        _prepare(config)
    state.wait_for_everyone()
    with stopping() as stopped:
        with state.main_process_first():  # so that one process trains or fetches, and the others find it
            scorers, absent = _scorers(config, everybody.entries, state)
        with (
            _runtime(config, state) as runtime,
            state.split_between_processes(list(listing.entries)) as share,
        ):
            rows: list[Row] = []
            for entry in share:
                if not stopped:
                    rows.append(evaluate_one(config, entry, runtime, scorers, stopped))
                    log.info("%s: %s (%d of %d)", entry.name, _in_words(rows[-1]), len(rows), len(share))
        if stopped:
            return config.output  # `stopping` ends the process
        by_name = {row["name"]: row for row in gather_object(rows)}  # the last one may come twice
    report_path = config.output / REPORT
    if state.is_main_process:
        ordered = [by_name[entry.name] for entry in listing.entries]
        _refuse_nothing(config, ordered)
        report.write(config, runtime, listing, ordered, scorers, absent)
    state.wait_for_everyone()
    return report_path


def evaluate_one(
    config: EvaluateConfig,
    entry: Entry,
    runtime: Runtime | None,
    scorers: Mapping[str, Scorer],
    stopped: Sequence[int] = (),
) -> Row:
    """Draws what is to be drawn of a subject, and scores what is there.

    Returns a row with `name`, `noun`, `pack`, `photos` (files of small copies), `left_out` ([name, reason] of
    photos and pictures), `reason` (why nothing of it counts, or ""), `drawn`, `kept`, `missing`, `real` and
    `scores` (means), and `pictures`, each with `file`, `number`, `image`, `seed`, `scores`.
    """
    row: Row = {
        "name": entry.name, "noun": entry.noun, "pack": entry.pack.name, "photos": [], "left_out": [],
        "reason": "", "drawn": 0, "kept": 0, "missing": 0, "real": {}, "scores": {}, "pictures": [],
    }  # fmt: skip
    try:
        photos = entry.photos()
    except BadInput as error:
        log.warning("%s is left out: %s", entry.name, error.why or error.what)
        return {**row, "reason": f"{error.what}: {error.why}"}
    row["photos"] = _small_copies(photos, config.output / PHOTOS / entry.name)
    row["left_out"] = [list(one) for one in photos.rejected]
    folder = (config.pictures or config.output / PICTURES) / entry.name
    if runtime is not None:
        made = _draw(config, entry, photos, runtime, folder, stopped)
        row |= {"drawn": made.drawn, "kept": made.kept}
        row["left_out"] += [list(one) for one in made.failed]
    if stopped:
        return row
    for scorer in scorers.values():
        row["real"] |= scorer.real(entry, photos.images)
    if not config.calibrate:
        _score(entry, photos, folder, config, scorers, row)
    for name, reason in row["left_out"]:
        log.warning("%s: left out %s: %s", entry.name, name, reason)
    return row


def _score(
    entry: Entry,
    photos: load.Photos,
    folder: Path,
    config: EvaluateConfig,
    scorers: Mapping[str, Scorer],
    row: Row,
) -> None:
    """Fills in what a row says of pictures."""
    prompts = entry.pack.prompts(entry.noun)
    found, bad = pictures.find(folder, prompts, config.drawing.images)
    row["left_out"] += [list(one) for one in bad]
    row["missing"] = len(prompts) * config.drawing.images - len(found)
    if not found:
        row["reason"] = "there are no pictures of it"
        return
    row["pictures"] = _scored(entry, photos.images, found, scorers)
    of_pictures = scores.means([one["scores"] for one in row["pictures"]])
    row["scores"] = of_pictures | scores.average(of_pictures, PROTOCOLS[config.protocol].average)


def _draw(
    config: EvaluateConfig,
    entry: Entry,
    photos: load.Photos,
    runtime: Runtime,
    folder: Path,
    stopped: Sequence[int],
) -> Made:
    subject = runtime.personalize(photos.images, entry.noun)
    made = Made()
    prompts = entry.pack.prompts(entry.noun)
    for _ in pictures.draw(runtime, subject, prompts, folder, config.drawing, made):
        if stopped:
            break
    return made


def _scored(
    entry: Entry, photos: Sequence[np.ndarray], found: Sequence[Found], scorers: Mapping[str, Scorer]
) -> list[dict[str, Any]]:
    loaded = [load.load_image(one.file) for one in found]
    columns: dict[str, Sequence[scores.Score]] = {}
    for scorer in scorers.values():
        columns |= scorer.score(entry, photos, loaded, [one.number for one in found])
    return [
        {
            "file": one.file.name, "number": one.number, "image": one.image, "seed": one.seed,
            "scores": {key: column[k] for key, column in columns.items()},
        }
        for k, one in enumerate(found)
    ]  # fmt: skip


def _small_copies(photos: load.Photos, folder: Path) -> list[str]:
    """The photos, reduced, for the page; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for k, photo in enumerate(photos.images):
        small = Image.fromarray(photo)
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        names.append(f"{k:02}.png")
        files.publish(folder / names[-1], lambda file, small=small: small.save(file, "PNG"), force=True)
    return names


def _prepare(config: EvaluateConfig) -> None:
    out, why = config.output, "nothing is overwritten unasked"
    names = {path.name for path in out.iterdir() if path.name[0] != "."} if out.is_dir() else set()
    if names and not names & {PHOTOS, PICTURES, REPORT}:
        raise UsageError(f"{out} is not empty, and holds no evaluation", why, "choose another --output")
    if names and not config.resume:
        raise UsageError(f"{out} holds an evaluation", why, "add --resume, or another --output")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be made", error.strerror or str(error), "name another") from error


def _runtime(
    config: EvaluateConfig, state: PartialState
) -> contextlib.AbstractContextManager[Runtime | None]:
    """Where GPUs draw, each process of a machine has one."""
    if config.bundle is None:
        return contextlib.nullcontext()
    device = state.local_process_index if BACKENDS[resolve(config.backend)].nvidia else 0
    return Runtime.open(config.bundle, config.backend, config.threads, device=device)


def _scorers(
    config: EvaluateConfig, everybody: Sequence[Entry], state: PartialState
) -> tuple[dict[str, Scorer], dict[str, str]]:
    """Those that can be had, and why the others cannot."""
    found: dict[str, Scorer] = {}
    absent: dict[str, str] = {}
    for name in config.scorers or PROTOCOLS[config.protocol].scorers:
        try:
            found[name] = _scorer(name, config, everybody, state)
        except Absent as error:
            absent[name] = str(error)
            log.warning("%s is absent: %s", name, error)
    return found, absent


def _scorer(name: str, config: EvaluateConfig, everybody: Sequence[Entry], state: PartialState) -> Scorer:
    if name in ("clip", "dino"):
        source = getattr(config, name)
        if not source:
            raise Absent(f"no weights were named; --{name} takes a folder, or OWNER/NAME on the hub")
        return (Clip if name == "clip" else Dino)(source, state.device, config.offline)
    if name == "face":
        if not config.face:
            raise Absent("it was not asked for; --face takes facenet-pytorch and its weights")
        return Face(state.device, config.offline)
    if config.protocol != "drawn":
        why = "it knows drawn subjects alone"
        raise UsageError(f"{name} cannot score {config.protocol}", why, "choose others with --scorers")
    return {
        "identity": lambda: drawn_scorers.Identity(config.judges),
        "colours": drawn_scorers.Colours,
        "background": lambda: drawn_scorers.Background(everybody),
    }[name]()


def _refuse_nothing(config: EvaluateConfig, rows: Sequence[Row]) -> None:
    wanted = "real" if config.calibrate else "pictures"
    if not any(row[wanted] for row in rows):
        why = "; ".join(f"{row['name']}: {row['reason']}" for row in rows[:3])
        where = config.pictures or config.subjects or config.output
        what = f"nothing in {where} can be scored"
        raise BadInput(what, why, "see training/evaluation/drawing.py for the names")


def _in_words(row: Row) -> str:
    if row["reason"]:
        return row["reason"]
    figures = ", ".join(f"{key} {value:.3f}" for key, value in row["scores"].items() if value is not None)
    return f"{row['drawn']} pictures drawn, {row['kept']} kept" + (f"; {figures}" if figures else "")


PATH = click.Path(path_type=Path)


@click.command(
    context_settings={"show_default": True}, epilog="The protocols: training/evaluation/protocols.py"
)
@click.argument("bundle", required=False)
@click.option("--protocol", required=True, help=f"One of {', '.join(PROTOCOLS)}.")
@click.option("--output", type=PATH, required=True, help="Folder of the report and the pictures.")
@click.option("--subjects", type=PATH, help="Folder of the subjects' real photos.")
@click.option("--pictures", "found", type=PATH, help="Score the pictures there, draw nothing.")
@click.option("--calibrate", is_flag=True, help="Score the real photos alone.")
@click.option("--images-per-prompt", type=click.IntRange(1, 1000), help="[default: 4]")
@click.option("--fast", is_flag=True, help="One image for each prompt.")
@click.option("--seed", type=click.IntRange(0), default=42, help="Image k of a prompt has seed + k.")
@click.option("--steps", type=click.IntRange(1, 1000), default=30)
@click.option("--kappa", type=float, help="[default: the bundle's]")
@click.option("--cfg", is_flag=True, help="Plain CFG of the personalised model, as in the paper's tables.")
@click.option("--guidance", type=float, help="s = w + 1 [default: the bundle's, of CFG twice that]")
@click.option("--solver", help="[default: the bundle's]")
@click.option("--batch", type=click.IntRange(1, 1000), default=4, help="Pictures of one call.")
@click.option("--scorers", help=f"Some of {','.join(SCORERS)} [default: the protocol's]")
@click.option("--clip", help="CLIP ViT-B/32: a folder, or OWNER/NAME[@REVISION] on the hub.")
@click.option("--dino", help="DINO ViT-S/16: likewise.")
@click.option("--face", is_flag=True, help="Face recognition by facenet-pytorch.")
@click.option("--judges", type=PATH, help="Folder of trained judges [default: HyperRT's own].")
@click.option("--only", multiple=True, help="A subject by name; may be repeated.")
@click.option("--limit", type=click.IntRange(1), help="Most subjects [default: the protocol's]")
@click.option("--backend", default="auto", help="That draws.")
@click.option("--threads", type=click.IntRange(1), help="Of one engine call.")
@click.option("--cpu", is_flag=True, help="Scorers compute on the processor, although there is a GPU.")
@click.option("--offline", is_flag=True, help="Fetch nothing.")
@click.option("--resume", is_flag=True, help="Go on with the evaluation in --output.")
def main(
    bundle: str | None, protocol: str, output: Path, found: Path | None, images_per_prompt: int | None,
    fast: bool, seed: int, steps: int, kappa: float | None, cfg: bool, guidance: float | None,
    solver: str | None, batch: int, scorers: str | None, **others: Any,
) -> None:  # fmt: skip
    """Draw and score pictures of many subjects with BUNDLE (a name or a folder), and write a report.

    \b
    Examples:
      hyperrt evaluate tiny --protocol drawn --output report --limit 8
      hyperrt evaluate sdxl --protocol dreambench --subjects dreambench --output report
      hyperrt evaluate --protocol drawn --pictures report/pictures --output scores
    """
    with reported():
        if fast and images_per_prompt not in (None, 1):
            why = f"--fast is one image of each prompt, and --images-per-prompt is {images_per_prompt}"
            raise UsageError("--fast and --images-per-prompt do not go together", why, "leave one out")
        number = 1 if fast else images_per_prompt or 4
        drawing = Drawing(number, seed, steps, kappa, cfg, guidance, solver, batch)
        SamplingConfig(**drawing.options(range(number)))
        names = tuple(name.strip() for name in (scorers or "").split(",") if name.strip())
        config = EvaluateConfig(
            bundle=bundle, protocol=protocol, output=output, pictures=found, drawing=drawing, scorers=names,
            **others,
        )  # fmt: skip
        click.echo(run(config))


if __name__ == "__main__":
    main()
