"""Documents agree with the code: limits, figures, and links."""

from __future__ import annotations

import re

import pytest

from hyperrt.bundle import bundle, manifest
from hyperrt.lora import layout, metadata, reader, safetensors_file
from hyperrt.photos import formats, load
from tests.documents import DOCUMENTS, ROOT, table_rows, text_of

FORMAT, SECURITY = ROOT / "docs" / "bundle-format.md", ROOT / "SECURITY.md"
POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
# Document, words around the number (`#`), the constant, and the unit of the number.
LIMITS = [
    (FORMAT, "the manifest; UTF-8, at most # MiB", bundle.MAX_MANIFEST, 2**20),
    (FORMAT, "Counts and sizes MUST be at most #,", manifest.MAX_SIZE, 1),
    (FORMAT, "in the `shape` of a tensor is from 1 to #,", layout.MAX_WEIGHTS, 1),
    (FORMAT, "`row_bytes` are at most #,", manifest.MAX_BYTES, 1),
    (FORMAT, "a LoRA has at most # weights", layout.MAX_WEIGHTS, 1),
    (FORMAT, "`scale`, 0 to #, is the default", metadata.MAX_IMAGE_SCALE, 1),
    (FORMAT, "a header of more than # MiB", safetensors_file.MAX_HEADER, 2**20),
    (FORMAT, "a weight beyond ±#", reader.MAX_WEIGHT, 1),
    (FORMAT, "alpha not above 0, or above #;", reader.MAX_ALPHA, 1),
    (FORMAT, "| 1 to # printable characters |", metadata.MAX_NOUN, 1),
    (SECURITY, "at most # of each folder", load.MAX_PHOTOS, 1),
    (SECURITY, "of at most # MiB", load.MAX_FILE_BYTES, 2**20),
    (SECURITY, ", # million pixels", formats.MAX_PIXELS, 10**6),
    (SECURITY, "smaller scale may have # of them", formats.MAX_JPEG_PIXELS, 1),
    (SECURITY, "at most # scans", formats.MAX_SCANS, 1),
    (SECURITY, "# pixels a side", formats.MAX_SIDE, 1),
]


def number_in(text: str) -> int:
    """ "65,536", "16 384", "2²⁸" or "10⁶" as a number."""
    base, power = re.fullmatch(r"([\d, ]*\d)([⁰¹²³⁴⁵⁶⁷⁸⁹]*)", text).groups()
    return int(re.sub(r"\D", "", base)) ** int(power.translate(POWERS) or 1)


@pytest.mark.parametrize(("document", "words", "limit", "unit"), LIMITS, ids=[row[1] for row in LIMITS])
def test_a_limit_in_a_document_is_that_of_the_code(document, words, limit, unit):
    before, after = map(re.escape, words.split("#"))
    pattern = before + r"(?<!\d)(\d[\d, ]*[⁰¹²³⁴⁵⁶⁷⁸⁹]*)(?<![, ])" + after
    match = re.search(pattern, document.read_text(encoding="utf-8").replace("\u00a0", " "))
    assert match, f"{document.name} does not say {words!r}"
    assert number_in(match[1]) * unit == limit


def figures(document: str) -> list[list[str]]:
    """Rows of a document's tables of figures: what, measured, target, command."""
    return [row for row in table_rows(document) if len(row) == 4 and "bench/" in row[3]]


def test_every_figure_is_given_and_names_the_script_that_measures_it():
    rows = figures("docs/measurements.md")
    assert rows
    for what, measured, _, command in rows:
        script = ROOT / command.strip("`").split()[1]
        assert script.is_file(), command
        key = re.search(r"`(\w+)`$", what).group(1)
        assert key in script.read_text(encoding="utf-8"), f"{script.name} has no figure {key}"
        assert measured, f"{key} is not filled in"


def test_the_figures_of_the_readme_are_those_of_the_measurements():
    rows = figures("README.md")
    assert len(rows) == 6
    assert not [row for row in rows if row not in figures("docs/measurements.md")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)", text_of(document)):
        name, _, heading = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), target
        assert not heading or heading in headings(path.read_text(encoding="utf-8")), target


def headings(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them: "## What runs where" => what-runs-where."""
    lines = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
