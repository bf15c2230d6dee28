"""Writes the results of an evaluation as report.json and index.html, beside the paper's figures."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hyperrt import Runtime, files
from hyperrt.engines.backends import BACKENDS
from hyperrt.sampling.options import SamplingOptions
from hyperrt.sampling.settings import settle
from hyperrt.training.evaluation import protocols, report_page, report_plots, scores
from hyperrt.training.evaluation.drawing import DrawSettings
from hyperrt.training.evaluation.prompt_packs import PACKS
from hyperrt.training.evaluation.protocols import DREAMBENCH_SETTINGS, PROTOCOLS, SubjectList
from hyperrt.training.evaluation.results import SubjectResult
from hyperrt.training.evaluation.scorers import Scorer
from hyperrt.training.evaluation.settings import EvaluateConfig

log = logging.getLogger("hyperrt.training")

REPORT, PAGE, PLOT = "report.json", "index.html", "figures.png"
PICTURES, PHOTOS = "pictures", "photos"  # folders beside the report
SCHEMA = 1
PAPER = Path(__file__).with_name("paper.json")
CALIBRATED = 0.01  # largest difference to the papers' scores of real photos
PACKAGES = (
    "hyperrt", "numpy", "pillow", "torch", "transformers", "accelerate", "facenet-pytorch",
    *dict.fromkeys(package for backend in BACKENDS.values() for package in backend.packages),
)  # fmt: skip


def write(
    config: EvaluateConfig,
    runtime: Runtime | None,
    selection: SubjectList,
    results: Sequence[SubjectResult],
    scorers: Mapping[str, Scorer],
    unavailable: Mapping[str, str],
) -> None:
    """Writes the report, the page and, if matplotlib is installed, the plot."""
    report = assemble(config, runtime, selection, results, scorers, unavailable)
    for reason in report["not_comparable_because"]:
        log.warning("not comparable with published figures: %s", reason)
    content = json.dumps(report, indent=1, allow_nan=False).encode()
    files.publish(config.output / REPORT, lambda file: file.write(content), force=True)
    plot = PLOT if report_plots.write(config.output / PLOT, report) else None
    pictures = os.path.relpath(config.score or config.output / PICTURES, config.output)
    page = report_page.page(report, pictures, PHOTOS, plot).encode("utf-8", "backslashreplace")
    files.publish(config.output / PAGE, lambda file: file.write(page), force=True)


def assemble(
    config: EvaluateConfig,
    runtime: Runtime | None,
    selection: SubjectList,
    results: Sequence[SubjectResult],
    scorers: Mapping[str, Scorer],
    unavailable: Mapping[str, str],
) -> dict[str, Any]:
    """The report as JSON values."""
    protocol = PROTOCOLS[config.protocol]
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    real = scores.figures([result.real for result in results])
    calibration = _calibration(config, selection, results, real, paper["real"])
    settings = _settings(config, runtime)
    tables = [table | {"doubt": _mismatch(table, settings)} for table in paper["tables"][config.protocol]]
    reasons = [
        *_incomplete(config, selection, results),
        *_mismatches(tables),
        *_scorer_problems(scorers, calibration),
    ]
    checkout = commit()
    return {
        "schema": SCHEMA,
        "protocol": config.protocol,
        "comparable": not reasons,
        "not_comparable_because": reasons,
        "settings": settings,
        "bundle": _bundle(runtime),
        **({"commit": checkout} if checkout else {}),
        "versions": versions(),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "scorers": {name: scorer.about for name, scorer in scorers.items()},
        "absent": dict(unavailable),
        "figures": scores.figures([result.scores for result in results if result.pictures]),
        "real": real,
        "calibration": calibration,
        "pictures": sum(len(result.pictures) for result in results),
        "missing_pictures": sum(result.missing for result in results),
        "missing_subjects": protocols.missing(protocol, selection.subjects),
        "left_out": [list(pair) for pair in selection.left_out],
        "subjects": [asdict(result) for result in results],
        "prompts": _by_prompt(results),
        "paper": {"source": paper["source"], "units": paper["units"], "tables": tables},
    }


def _settings(config: EvaluateConfig, runtime: Runtime | None) -> dict[str, Any]:
    """The settings of the pictures, with the bundle's defaults filled in if it drew them."""
    drawing = config.drawing
    settings = _drawing(drawing)
    if runtime is not None:
        options = SamplingOptions(**drawing.options(range(drawing.pictures)))
        resolved = settle(runtime.bundle, True, options)
        settings |= {name: getattr(resolved, name) for name in ("steps", "kappa", "solver")}
        settings |= {"guidance": resolved.guidance_scale, "backend": runtime.backend}
    settings |= {"only": list(config.only), "limit": config.limit, "drawn_here": runtime is not None}
    if config.protocol == "dreambench":
        custom = "custom: as many pictures of each subject and prompt as `images` says"
        settings["setting"] = DREAMBENCH_SETTINGS.get(drawing.pictures, custom)
        settings["settings_known"] = list(DREAMBENCH_SETTINGS.values())
    return settings


def _drawing(settings: DrawSettings) -> dict[str, Any]:
    """The settings under the names of report.json, schema 1."""
    names = {"pictures": "images", "guidance_scale": "guidance", "batch_size": "batch"}
    return {names.get(name, name): value for name, value in asdict(settings).items()}


def _bundle(runtime: Runtime | None) -> dict[str, Any] | None:
    if runtime is None:
        return None
    bundle = runtime.bundle
    return {
        "name": bundle.name, "family": bundle.family, "precision": bundle.precision,
        "image_size": bundle.image_size, **asdict(bundle.hashes),
    }  # fmt: skip


def _incomplete(
    config: EvaluateConfig, selection: SubjectList, results: Sequence[SubjectResult]
) -> list[str]:
    """How the run differs from the protocol; empty if it does not."""
    protocol = PROTOCOLS[config.protocol]
    packs = dict.fromkeys(result.pack for result in results)
    reasons = [f"prompts={name}: {note}" for name in packs if (note := PACKS[name].note)]
    expected = protocol.subjects or protocol.limit
    counted = sum(bool(result.pictures) for result in results)
    if counted != expected or protocols.missing(protocol, selection.subjects):
        reasons.append(f"{counted} subjects of the {expected} that a whole run has")
    if missing := sum(result.missing for result in results):
        reasons.append(f"{missing} pictures are missing")
    if config.protocol == "dreambench" and config.drawing.pictures not in DREAMBENCH_SETTINGS:
        reasons.append(f"{config.drawing.pictures} pictures of each subject and prompt, not 4 or 1")
    if config.score is None and config.drawing.steps != 30:
        reasons.append(f"{config.drawing.steps or 'the default number of'} steps, not 30")
    return reasons


def _mismatch(table: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Why a run with these settings has no row in a table of the paper; empty if it has one."""
    if not settings["drawn_here"]:
        return "it was not drawn here, so its guidance is not known"
    kappas = [] if settings["cfg"] else [settings["kappa"]]
    ours = {"cfg": settings["cfg"], "guidance": settings["guidance"], "kappa": kappas}
    for theirs in table["drawn"]:
        same = all(theirs[name] == ours[name] for name in ("cfg", "guidance"))
        if same and set(kappas) <= set(theirs["kappa"]):
            return ""
    expected = " or ".join(map(_guidance, table["drawn"]))
    return f"it was drawn with {_guidance(ours)}, and the table with {expected}"


def _guidance(drawn: Mapping[str, Any]) -> str:
    """Words for an item of `drawn` in paper.json."""
    if drawn["cfg"]:
        return f"CFG at w + 1 = {drawn['guidance']:g}"
    kappas = ", ".join(f"{kappa:g}" for kappa in drawn["kappa"])
    return f"HM-CFG at w + 1 = {drawn['guidance']:g}, κ = {kappas}"


def _mismatches(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The mismatch of each table if the run has a row in none of them; otherwise empty."""
    if not all(table["doubt"] for table in tables):
        return []
    return [f"{table['title']}: {table['doubt']}" for table in tables]


def _scorer_problems(scorers: Mapping[str, Scorer], calibration: Mapping[str, Any]) -> list[str]:
    """How the scorers differ from those of the papers."""
    reasons = [
        f"{name} is not a network of the size that the papers have"
        for name, scorer in scorers.items()
        if not scorer.about.get("as_published", True)
    ]
    reasons += [
        f"{key} of real photos is {score['leave_self_out']:.3f}, and published is {score['published']:.3f}"
        for key, score in calibration.items()
        if score["agrees"] is False
    ]
    return reasons


def _calibration(
    config: EvaluateConfig,
    selection: SubjectList,
    results: Sequence[SubjectResult],
    real: Mapping[str, Mapping[str, Any]],
    paper: Mapping[str, float],
) -> dict[str, Any]:
    """The scores of DreamBench's real photos beside the published ones.

    Args:
        real: `scores.figures` of the real photos.
        paper: the published scores.
    """
    if config.protocol != "dreambench":
        return {}
    missing = protocols.missing(PROTOCOLS["dreambench"], selection.subjects)
    unusable = [result.name for result in results if not result.photos]
    complete = not missing and not unusable and len(results) == PROTOCOLS["dreambench"].subjects
    calibration: dict[str, Any] = {}
    for key, published in paper.items():
        if key not in real:
            continue
        difference = real[key]["mean"] - published
        calibration[key] = {
            "leave_self_out": real[key]["mean"],
            "with_self": real[f"{key}_with_self"]["mean"],
            "published": published,
            "difference": difference,
            "agrees": abs(difference) <= CALIBRATED if complete else None,
            "note": "" if complete else "not all 30 subjects are there, so nothing follows",
        }
    return calibration


def _by_prompt(results: Sequence[SubjectResult]) -> list[dict[str, Any]]:
    """Means over all pictures of each template, in the packs' order."""
    by_template: dict[str, list[Mapping[str, scores.Score]]] = {}
    for result in results:
        templates = PACKS[result.pack].templates
        for picture in result.pictures:
            by_template.setdefault(templates[picture.number], []).append(picture.scores)
    return [
        {"template": template, "pictures": len(pictures), "scores": scores.means(pictures)}
        for template, pictures in by_template.items()
    ]


def commit(source: Path = Path(__file__)) -> str:
    """Short hash of the commit that holds a source file, with "-dirty" if the checkout has changes.

    Empty if git does not track the file: an installation may lie in the checkout of another project.
    """
    if not _git(source.parent, "ls-files", source.name):
        return ""
    head = _git(source.parent, "rev-parse", "--short", "HEAD")
    # Not `describe --dirty`, which rewrites the index.
    changed = head and _git(source.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    """The output of git in a folder; empty without git or a checkout."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def versions() -> dict[str, str]:
    """The versions of the installed packages that the scores may depend on."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
