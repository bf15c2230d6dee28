"""An evaluation as one HTML page: figures beside the paper's, pictures beside real photos.

Only the standard library; all text is escaped, all links are relative, nothing runs. The page and the
folders beside it can be moved together.
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
    """The page of a report (training/evaluation/report.py).

    Args:
        pictures, photos: their folders, relative to the page.
        plot: file of the plot, likewise; None: there is none.
    """
    title = f"Evaluation: {report['protocol']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _about(report),
        *(_paper_table(table, report["figures"]) for table in report["paper"]["tables"]),
        _figures_table(report),
        _absent(report),
        f'<p><img src="{_link(plot)}" alt="plot"></p>' if plot else "",
        _prompt_table(report),
        *(_subject(row, pictures, photos) for row in report["subjects"]),
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
        "Commit": report["commit"],
        "Pictures": f"{report['pictures']:,}, {report['missing_pictures']:,} missing",
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_plain(value))}</td></tr>" for name, value in facts.items()
    )
    verdict = "<p>Comparable with the paper's figures, as far as the settings go.</p>"
    if doubts := report["not_comparable_because"]:
        items = "".join(f"<li>{escape(doubt)}</li>" for doubt in doubts)
        verdict = f"<p>Not comparable with published figures:</p><ul>{items}</ul>"
    return f"{verdict}<table>{rows}</table>"


def _paper_table(table: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """A table of the paper, with our row where it has the same columns and we drew in the same way."""
    columns = table["columns"]
    ours = {key: figure["mean"] for key, figure in figures.items()} | {columns[0]: "This run"}
    rows = [*map(_cells, table["rows"])]
    said = [table["note"]] if "note" in table else []
    if any(name in figures for name in columns):
        if table["doubt"]:
            said.append(f"This run has no row here: {table['doubt']}.")
        else:
            rows.append(_cells([ours.get(name) for name in columns], "ours"))
    notes = "".join(f"<p>{escape(one)}</p>" for one in said)
    return f"<h2>{escape(table['title'])}</h2>{_table(columns, rows)}{notes}"


def _figures_table(report: Mapping[str, Any]) -> str:
    rows = []
    for key, figure in report["figures"].items():
        real = report["real"].get(key, {}).get("mean")
        interval = f"{figure['low']:.3f} to {figure['high']:.3f}"
        rows.append(_cells([NAMES.get(key, key), figure["mean"], interval, figure["subjects"], real]))
    head = ["Score", "Mean over subjects", "95 % interval", "Subjects", "Real photos"]
    text = _table(head, rows) if rows else "<p>Nothing was scored.</p>"
    for key, found in report["calibration"].items():
        verdict = {True: "it agrees", False: "it does not agree", None: found["note"]}[found["agrees"]]
        text += (
            f"<p>{NAMES[key]} of real photos: {found['leave_self_out']:.3f} without the photo itself, "
            f"{found['with_self']:.3f} with it; published: {found['published']:.3f}; {escape(verdict)}.</p>"
        )
    return f"<h2>Figures</h2>{text}"


def _absent(report: Mapping[str, Any]) -> str:
    said = [f"{name}: {why}" for name, why in report["absent"].items()]
    said += [f"{name} is left out: {why}" for name, why in report["left_out"]]
    if report["missing_subjects"]:
        said.append(f"subjects that are not there: {', '.join(report['missing_subjects'])}")
    items = "".join(f"<li>{escape(one)}</li>" for one in said)
    return f"<h2>Absent</h2><ul>{items}</ul>" if said else ""


def _prompt_table(report: Mapping[str, Any]) -> str:
    keys = list(dict.fromkeys(key for one in report["prompts"] for key in one["scores"]))
    rows = [
        _cells([one["template"], one["pictures"], *(one["scores"].get(key) for key in keys)])
        for one in report["prompts"]
    ]
    return f"<h2>By prompt</h2>{_table(['Prompt', 'Pictures', *keys], rows)}"


def _subject(row: Mapping[str, Any], pictures: str, photos: str) -> str:
    name = row["name"]
    shown = [_figure(f"{photos}/{name}/{file}", "photo") for file in row["photos"]]
    pack = PACKS[row["pack"]]
    plain = pack.plain(row["noun"])
    made = [
        _figure(f"{pictures}/{name}/{one['file']}", f"{plain[one['number']]}; {_scores(one['scores'])}")
        for one in row["pictures"]
    ]
    said = [row["reason"]] if row["reason"] else []
    said += [f"left out: {file}: {why}" for file, why in row["left_out"]]
    notes = "".join(f"<p>{escape(one)}</p>" for one in said)
    head = f"{name} ({row['noun']})"
    summary = f"<p>{escape(_scores(row['scores']))}</p>" if row["scores"] else ""
    return f"<h2>{escape(head)}</h2>{summary}{notes}<div>{''.join(shown)}</div><div>{''.join(made)}</div>"


def _figure(path: str, caption: str) -> str:
    link = _link(path)
    image = f'<a href="{link}"><img src="{link}" loading="lazy" alt=""></a>'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _scores(found: Mapping[str, float | None]) -> str:
    known = {key: value for key, value in found.items() if value is not None}
    return ", ".join(f"{NAMES.get(key, key)} {value:.3f}" for key, value in known.items())


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
    """A relative path as a link: never one to a scheme or another host."""
    return quote(Path(path).as_posix(), safe="/")
