"""Limits in the documents are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hyperrt.bundle import bundle, manifest
from hyperrt.lora import layout, metadata, reader, safetensors_file
from hyperrt.photos import formats, load

ROOT = Path(__file__).resolve().parents[1]
FORMAT, SECURITY = ROOT / "docs" / "bundle-format.md", ROOT / "SECURITY.md"
POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
# Document, words around the number (`#`), the constant, and the unit of the number.
LIMITS = [
    (FORMAT, "the manifest; UTF-8, at most # MiB", bundle.MAX_MANIFEST, 2**20),
    (FORMAT, "Counts and sizes MUST be at most #,", manifest.MAX_SIZE, 1),
    (FORMAT, "in the `shape` of a tensor is from 1 to #,", layout.MAX_WEIGHTS, 1),
    (FORMAT, "`row_bytes` are at most #,", manifest.MAX_BYTES, 1),
    (FORMAT, "a LoRA has at most # weights", layout.MAX_WEIGHTS, 1),
    (FORMAT, "`scale`, 0 to #, where", metadata.MAX_IMAGE_SCALE, 1),
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
    found = re.search(pattern, document.read_text(encoding="utf-8").replace("\u00a0", " "))
    assert found, f"{document.name} does not say {words!r}"
    assert number_in(found[1]) * unit == limit
