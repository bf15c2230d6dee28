"""What an evaluation found, as report.json and index.html, with the paper's figures beside it."""

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
from typing import TYPE_CHECKING, Any

from hyperrt import Runtime, files
from hyperrt.sampling.options import SamplingConfig
from hyperrt.sampling.request import settings_of
from hyperrt.training.evaluation import protocols, report_page, report_plots, scores
from hyperrt.training.evaluation.prompt_packs import PACKS
from hyperrt.training.evaluation.protocols import DREAMBENCH_SETTINGS, PROTOCOLS, SubjectList
from hyperrt.training.evaluation.scorers import Scorer

if TYPE_CHECKING:
    from hyperrt.training.evaluate import EvaluateConfig, Row

log = logging.getLogger("hyperrt.training")

REPORT, PAGE, PLOT = "report.json", "index.html", "figures.png"
PICTURES, PHOTOS = "pictures", "photos"  # folders beside it
SCHEMA = 1
PAPER = Path(__file__).with_name("paper.json")
CALIBRATED = 0.01  # how near to the papers' figures of real photos a scorer must come
PACKAGES = (
    "hyperrt", "numpy", "pillow", "torch", "transformers", "accelerate", "onnxruntime", "onnxruntime-gpu",
    "openvino", "tensorrt", "tensorrt-rtx", "facenet-pytorch",
)  # fmt: skip


def write(
    config: EvaluateConfig,
    runtime: Runtime | None,
    listing: SubjectList,
    rows: Sequence[Row],
    scorers: Mapping[str, Scorer],
    absent: Mapping[str, str],
) -> None:
    """Writes the report and the page; the plot where matplotlib is installed."""
    report = assemble(config, runtime, listing, rows, scorers, absent)
    for doubt in report["not_comparable_because"]:
        log.warning("not comparable with published figures: %s", doubt)
    content = json.dumps(report, indent=1, allow_nan=False).encode()
    files.publish(config.output / REPORT, lambda file: file.write(content), force=True)
    plot = PLOT if report_plots.write(config.output / PLOT, report) else None
    pictures = os.path.relpath(config.pictures or config.output / PICTURES, config.output)
    page = report_page.page(report, pictures, PHOTOS, plot).encode("utf-8", "backslashreplace")
    files.publish(config.output / PAGE, lambda file: file.write(page), force=True)


def assemble(
    config: EvaluateConfig,
    runtime: Runtime | None,
    listing: SubjectList,
    rows: Sequence[Row],
    scorers: Mapping[str, Scorer],
    absent: Mapping[str, str],
) -> dict[str, Any]:
    """The report as JSON values."""
    protocol = PROTOCOLS[config.protocol]
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    real = scores.figures([row["real"] for row in rows])
    calibration = _calibration(config, listing, rows, real, paper["real"])
    settings = _settings(config, runtime)
    tables = [table | {"doubt": _doubt_of(table, settings)} for table in paper["tables"][config.protocol]]
    doubts = [
        *_doubts(config, listing, rows),
        *_doubts_of_tables(tables),
        *_doubts_of_scorers(scorers, calibration),
    ]
    counted = [row for row in rows if row["pictures"]]
    return {
        "schema": SCHEMA,
        "protocol": config.protocol,
        "comparable": not doubts,
        "not_comparable_because": doubts,
        "settings": settings,
        "bundle": _bundle(runtime),
        "commit": commit(),
        "versions": versions(),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "scorers": {name: scorer.about for name, scorer in scorers.items()},
        "absent": dict(absent),
        "figures": scores.figures([row["scores"] for row in counted]),
        "real": real,
        "calibration": calibration,
        "pictures": sum(len(row["pictures"]) for row in rows),
        "missing_pictures": sum(row["missing"] for row in rows),
        "missing_subjects": protocols.missing(protocol, listing.entries),
        "left_out": [list(one) for one in listing.left_out],
        "subjects": list(rows),
        "prompts": _by_prompt(rows),
        "paper": {"source": paper["source"], "units": paper["units"], "tables": tables},
    }


def _settings(config: EvaluateConfig, runtime: Runtime | None) -> dict[str, Any]:
    """How the pictures were asked for; where a bundle drew them, its defaults are filled in."""
    chosen = asdict(config.drawing)
    if runtime is not None:
        asked = SamplingConfig(**config.drawing.options(range(config.drawing.images)))
        known = settings_of(runtime.bundle, True, asked)
        chosen |= {name: known[name] for name in ("steps", "kappa", "solver")}
        chosen |= {"guidance": known["guidance_scale"], "backend": runtime.backend}
    named = {"only": list(config.only), "limit": config.limit, "drawn_here": runtime is not None}
    if config.protocol == "dreambench":
        other = "custom: as many pictures of each subject and prompt as `images` says"
        named["setting"] = DREAMBENCH_SETTINGS.get(config.drawing.images, other)
        named["settings_known"] = list(DREAMBENCH_SETTINGS.values())
    return chosen | named


def _bundle(runtime: Runtime | None) -> dict[str, Any] | None:
    if runtime is None:
        return None
    bundle = runtime.bundle
    return {
        "name": bundle.name, "family": bundle.family, "precision": bundle.precision,
        "image_size": bundle.image_size, **asdict(bundle.hashes),
    }  # fmt: skip


def _doubts(config: EvaluateConfig, listing: SubjectList, rows: Sequence[Row]) -> list[str]:
    """Why the figures are no measure beside the paper's; empty: they are."""
    protocol = PROTOCOLS[config.protocol]
    packs = dict.fromkeys(row["pack"] for row in rows)
    doubts = [f"prompts={name}: {note}" for name in packs if (note := PACKS[name].note)]
    wanted = protocol.subjects or protocol.limit
    counted = sum(bool(row["pictures"]) for row in rows)
    if counted != wanted or protocols.missing(protocol, listing.entries):
        doubts.append(f"{counted} subjects of the {wanted} that a whole run has")
    if missing := sum(row["missing"] for row in rows):
        doubts.append(f"{missing} pictures are missing")
    if config.protocol == "dreambench" and config.drawing.images not in DREAMBENCH_SETTINGS:
        doubts.append(f"{config.drawing.images} pictures of each subject and prompt, not 4 or 1")
    if config.pictures is None and config.drawing.steps != 30:
        doubts.append(f"{config.drawing.steps or 'the default number of'} steps, not 30")
    return doubts


def _doubt_of(table: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Why this run has no row in a table of the paper; empty: it was drawn as the table's rows were."""
    if not settings["drawn_here"]:
        return "it was not drawn here, so its guidance is not known"
    kappas = [] if settings["cfg"] else [settings["kappa"]]
    ours = {"cfg": settings["cfg"], "guidance": settings["guidance"], "kappa": kappas}
    for known in table["drawn"]:
        same = all(known[name] == ours[name] for name in ("cfg", "guidance"))
        if same and set(kappas) <= set(known["kappa"]):
            return ""
    theirs = " or ".join(map(_guidance, table["drawn"]))
    return f"it was drawn with {_guidance(ours)}, and the table with {theirs}"


def _guidance(drawn: Mapping[str, Any]) -> str:
    """What the tables of training/paper.json say under `drawn`, in words."""
    if drawn["cfg"]:
        return f"CFG at w + 1 = {drawn['guidance']:g}"
    kappas = ", ".join(f"{kappa:g}" for kappa in drawn["kappa"])
    return f"HM-CFG at w + 1 = {drawn['guidance']:g}, κ = {kappas}"


def _doubts_of_tables(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of all tables, if this run has a row in none."""
    if not all(table["doubt"] for table in tables):
        return []
    return [f"{table['title']}: {table['doubt']}" for table in tables]


def _doubts_of_scorers(scorers: Mapping[str, Scorer], calibration: Mapping[str, Any]) -> list[str]:
    doubts = [
        f"{name} is no network of the size that the papers have"
        for name, scorer in scorers.items()
        if not scorer.about.get("as_published", True)
    ]
    doubts += [
        f"{key} of real photos is {found['leave_self_out']:.3f}, and published is {found['published']:.3f}"
        for key, found in calibration.items()
        if found["agrees"] is False
    ]
    return doubts


def _calibration(
    config: EvaluateConfig,
    listing: SubjectList,
    rows: Sequence[Row],
    real: Mapping[str, Mapping[str, Any]],
    paper: Mapping[str, float],
) -> dict[str, Any]:
    """The scorers on DreamBench's real photos, beside what the papers have for them.

    Args:
        real: `scores.figures` of the real photos.
    """
    if config.protocol != "dreambench":
        return {}
    missing = protocols.missing(PROTOCOLS["dreambench"], listing.entries)
    unusable = [row["name"] for row in rows if not row["photos"]]
    whole = not missing and not unusable and len(rows) == PROTOCOLS["dreambench"].subjects
    found: dict[str, Any] = {}
    for key, published in paper.items():
        if key not in real:
            continue
        difference = real[key]["mean"] - published
        found[key] = {
            "leave_self_out": real[key]["mean"],
            "with_self": real[f"{key}_with_self"]["mean"],
            "published": published,
            "difference": difference,
            "agrees": abs(difference) <= CALIBRATED if whole else None,
            "note": "" if whole else "not all 30 subjects are there, so nothing follows",
        }
    return found


def _by_prompt(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over all pictures of each template, in the packs' order."""
    found: dict[str, list[Mapping[str, scores.Score]]] = {}
    for row in rows:
        for one in row["pictures"]:
            found.setdefault(PACKS[row["pack"]].templates[one["number"]], []).append(one["scores"])
    return [
        {"template": template, "pictures": len(of_one), "scores": scores.means(of_one)}
        for template, of_one in found.items()
    ]


def commit() -> str:
    """Short hash of the checkout, "-dirty" where files differ from it; "unknown" outside git."""
    known = _git("rev-parse", "--short", "HEAD")
    # Not `describe --dirty`, which writes the index anew.
    changed = known and _git("status", "--porcelain", "--untracked-files=no")
    return f"{known}-dirty" if changed else known or "unknown"


def _git(*arguments: str) -> str:
    """What git says of the folder of this file; "" where there is no git, or no checkout."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Those packages that the figures may depend on, as installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
