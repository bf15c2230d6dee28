"""Shows an evaluation as one HTML page: scores beside the paper's, pictures beside real photos.

All text is escaped, all links are relative, and the page holds no script. It can be moved together with the
folders beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hyperrt.training.evaluation.prompt_packs import PACKS

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #bbb; padding: .2em .6em; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.ours { background: #eef6e8; font-weight: 600; }
figure { display: inline-block; margin: .3em; width: 128px; vertical-align: top; font-size: 12px; }
figure img { width: 128px; height: 128px; object-fit: contain; background: #ddd; }
figcaption { overflow-wrap: anywhere; line-height: 1.25; }
"""
NAMES = {
    "clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO", "avg": "Avg.", "face_rec": "Face rec.",
    "ft_s": "Fine-tuning, s", "kappa": "κ",
}  # fmt: skip


def page(report: Mapping[str, Any], pictures: str, photos: str, plot: str | None = None) -> str:
    """The HTML of a report (training/evaluation/report.py).

    Args:
        pictures, photos: folders, relative to the page.
        plot: file of the plot, relative to the page; None: without a plot.
    """
    title = f"Evaluation: {report['protocol']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _about(report),
        *(_paper_table(table, report["figures"]) for table in report["paper"]["tables"]),
        _figures_table(report),
        _missing(report),
        f'<p><img src="{_link(plot)}" alt="plot"></p>' if plot else "",
        _prompt_table(report),
        *(_subject(subject, pictures, photos) for subject in report["subjects"]),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _about(report: Mapping[str, Any]) -> str:
    bundle = report["bundle"]
    drawn_by = f"{bundle['name']}, {bundle['family']}, {bundle['precision']}" if bundle else "not drawn here"
    settings = {name: value for name, value in report["settings"].items() if value not in (None, [], "")}
    facts = {
        "Bundle": drawn_by,
        **{name.capitalize().replace("_", " "): value for name, value in settings.items()},
        **({"Commit": report["commit"]} if "commit" in report else {}),
        "Pictures": f"{report['pictures']:,}, {report['missing_pictures']:,} missing",
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_plain(value))}</td></tr>" for name, value in facts.items()
    )
    verdict = "<p>Comparable with the paper's figures, as far as the settings go.</p>"
    if reasons := report["not_comparable_because"]:
        items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
        verdict = f"<p>Not comparable with published figures:</p><ul>{items}</ul>"
    return f"{verdict}<table>{rows}</table>"


def _paper_table(table: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """A table of the paper, with a row for this run if it has the columns and was drawn in the same way."""
    columns = table["columns"]
    ours = {key: figure["mean"] for key, figure in figures.items()} | {columns[0]: "This run"}
    rows = [*map(_cells, table["rows"])]
    notes = [table["note"]] if "note" in table else []
    if any(name in figures for name in columns):
        if table["doubt"]:
            notes.append(f"This run has no row here: {table['doubt']}.")
        else:
            rows.append(_cells([ours.get(name) for name in columns], "ours"))
    return f"<h2>{escape(table['title'])}</h2>{_table(columns, rows)}{_paragraphs(notes)}"


def _figures_table(report: Mapping[str, Any]) -> str:
    rows = []
    for key, figure in report["figures"].items():
        real = report["real"].get(key, {}).get("mean")
        interval = f"{figure['low']:.3f} to {figure['high']:.3f}"
        rows.append(_cells([NAMES.get(key, key), figure["mean"], interval, figure["subjects"], real]))
    head = ["Score", "Mean over subjects", "95 % interval", "Subjects", "Real photos"]
    text = _table(head, rows) if rows else "<p>Nothing was scored.</p>"
    for key, score in report["calibration"].items():
        verdict = {True: "it agrees", False: "it does not agree", None: score["note"]}[score["agrees"]]
        text += (
            f"<p>{NAMES[key]} of real photos: {score['leave_self_out']:.3f} without the photo itself, "
            f"{score['with_self']:.3f} with it; published: {score['published']:.3f}; {escape(verdict)}.</p>"
        )
    return f"<h2>Figures</h2>{text}"


def _missing(report: Mapping[str, Any]) -> str:
    lines = [f"{name}: {why}" for name, why in report["absent"].items()]
    lines += [f"{name} is left out: {why}" for name, why in report["left_out"]]
    if report["missing_subjects"]:
        lines.append(f"missing subjects: {', '.join(report['missing_subjects'])}")
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>Missing</h2><ul>{items}</ul>" if lines else ""


def _prompt_table(report: Mapping[str, Any]) -> str:
    prompts = report["prompts"]
    keys = list(dict.fromkeys(key for prompt in prompts for key in prompt["scores"]))
    rows = [
        _cells([prompt["template"], prompt["pictures"], *(prompt["scores"].get(key) for key in keys)])
        for prompt in prompts
    ]
    return f"<h2>By prompt</h2>{_table(['Prompt', 'Pictures', *keys], rows)}"


def _subject(subject: Mapping[str, Any], pictures: str, photos: str) -> str:
    name = subject["name"]
    prompts = PACKS[subject["pack"]].plain(subject["noun"])
    photo_figures = "".join(_figure(f"{photos}/{name}/{file}", "photo") for file in subject["photos"])
    picture_figures = "".join(
        _figure(
            f"{pictures}/{name}/{picture['file']}",
            f"{prompts[picture['number']]}; {_scores(picture['scores'])}",
        )
        for picture in subject["pictures"]
    )
    notes = [_scores(subject["scores"])] if subject["scores"] else []
    notes += [subject["reason"]] if subject["reason"] else []
    notes += [f"left out: {file}: {why}" for file, why in subject["left_out"]]
    head = f"<h2>{escape(name)} ({escape(subject['noun'])})</h2>"
    return f"{head}{_paragraphs(notes)}<div>{photo_figures}</div><div>{picture_figures}</div>"


def _figure(path: str, caption: str) -> str:
    link = _link(path)
    image = f'<a href="{link}"><img src="{link}" loading="lazy" alt=""></a>'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _scores(scores: Mapping[str, float | None]) -> str:
    return ", ".join(
        f"{NAMES.get(key, key)} {value:.3f}" for key, value in scores.items() if value is not None
    )


def _paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _table(head: Iterable[str], rows: Sequence[str]) -> str:
    names = "".join(f"<th>{escape(NAMES.get(name, name))}</th>" for name in head)
    return f"<table><tr>{names}</tr>{''.join(rows)}</table>"


def _cells(values: Iterable[Any], kind: str = "") -> str:
    cells = "".join(
        f'<td class="number">{escape(_plain(value))}</td>'
        if isinstance(value, int | float)
        else f"<td>{escape(_plain(value))}</td>"
        for value in values
    )
    return f'<tr class="{kind}">{cells}</tr>'


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _link(path: str) -> str:
    """A relative path as a link; a colon is escaped, so it never names a scheme or a host."""
    return quote(Path(path).as_posix(), safe="/")
