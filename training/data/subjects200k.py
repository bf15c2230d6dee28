"""Layout of Subjects200K (Yuanshi/Subjects200K): two views of a subject side by side in one picture.

    DIR/**/*.parquet   as published; needs the extra `parquet`
    DIR/**/*.tar       the same rows in tar shards: NAME.png or .jpg, and NAME.json with the other columns

Each view has a border of 8 pixels: left (8, 8, S + 8, S + 8), right (S + 16, 8, 2 S + 16, S + 8). A row
counts if all three scores are at least 5 and its descriptions are not marked as invalid. Captions are the
descriptions, with [V] before the first mention of the item (`subjects.captions_of_text`).
Source: OminiControl (arXiv 2411.15098); the columns are those of its public code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hyperrt.errors import BadImage, BadInput, BadPrompt, IntegrityError, NotFound, UsageError
from hyperrt.photos.formats import MIN_SIDE
from hyperrt.photos.srgb import Picture
from hyperrt.text import printable
from hyperrt.training.data import shards
from hyperrt.training.data.subjects import (
    Dataset,
    DatasetOptions,
    DatasetSubject,
    LeftOut,
    View,
    captions_of_text,
)

PADDING = 8  # pixels
SCORES = ("compositeStructure", "objectConsistency", "imageQuality")
MIN_SCORE = 5
COLUMNS = ["image", "quality_assessment", "description"]
ROWS_AT_ONCE = 16  # each is about a megabyte

Row = tuple[str, bytes, Mapping[str, Any]]  # name, picture, other columns


def subjects200k(source: Path, options: DatasetOptions) -> Dataset:
    """Both views of every row of sufficient quality; the training's sampler swaps their roles.

    Raises:
        NotFound: there is neither kind of file.
        UsageError: parquet files need pyarrow, which is not installed.
        BadInput, IntegrityError: a file lacks a column, or is damaged; raised when the subjects are read.
    """
    parquet = sorted(source.rglob("*.parquet")) if source.is_dir() else []
    if parquet:
        _pyarrow()  # raises before the work
        rows: Iterator[Row | LeftOut] = (row for path in parquet for row in _parquet_rows(path))
    else:
        if source.is_dir() and not any(source.rglob("*.tar")):
            why = "there is neither a *.parquet nor a *.tar in it"
            raise NotFound(f"{source} is not Subjects200K", why, "name the folder of its files")
        rows = (row for shard in shards.shards_of(source) for row in _tar_rows(shard))
    return Dataset((row if isinstance(row, LeftOut) else subject_of(row) for row in rows), 2)


def subject_of(row: Row) -> DatasetSubject | LeftOut:
    """The subject of a row, with two views."""
    name, picture, columns = row
    quality, about = columns.get("quality_assessment"), columns.get("description")
    if not isinstance(quality, Mapping) or not all(_score(quality, key) >= MIN_SCORE for key in SCORES):
        return LeftOut(name, f"a score is below {MIN_SCORE}", bad=False)
    if not isinstance(about, Mapping) or not about.get("item"):
        return LeftOut(name, "it has no description")
    if about.get("description_valid") is False:
        return LeftOut(name, "its descriptions are marked as invalid", bad=False)
    item = " ".join(str(about["item"]).split())
    views = []
    for number, side in enumerate(("left", "right")):
        try:
            captions = captions_of_text(str(about.get(f"description_{number}") or ""), item)
        except BadPrompt as error:
            return LeftOut(name, f"description_{number}: {error.what}")
        views.append(View(f"{name} ({side})", picture, captions, partial(half, number=number)))
    return DatasetSubject(item.lower(), tuple(views))


def half(picture: np.ndarray, number: int) -> Picture:
    """[S + 16, 2 S + 24, 3] => view 0 (left) or 1 (right), [S, S, 3].

    Raises:
        BadImage: the picture has another shape.
    """
    height, width = picture.shape[:2]
    side = height - 2 * PADDING
    if side < MIN_SIDE or width != 2 * side + 3 * PADDING:
        raise BadImage("image", f"it has {width} x {height} pixels, which is not two squares in a border")
    left = PADDING + number * (side + PADDING)
    return picture[PADDING : PADDING + side, left : left + side]


def _score(quality: Mapping[str, Any], key: str) -> float:
    score = quality.get(key)
    return score if isinstance(score, int | float) else 0


def _tar_rows(shard: Path) -> Iterator[Row | LeftOut]:
    for sample in shards.samples(shard):
        picture = next((sample.files[kind] for kind in shards.IMAGES if kind in sample.files), None)
        try:
            if sample.problem or picture is None:
                raise ValueError(sample.problem or "it has no image")
            yield sample.name, picture, shards.json_of(sample)
        except ValueError as error:
            yield LeftOut(sample.name, str(error))


def _parquet_rows(path: Path) -> Iterator[Row | LeftOut]:
    pyarrow, parquet = _pyarrow()
    again = "download it again"
    try:
        with parquet.ParquetFile(path) as file:
            if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
                why = f"it has no column {', '.join(missing)}"
                raise BadInput(f"{path} is not a file of Subjects200K", why, again)
            number = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=COLUMNS):
                for columns in batch.to_pylist():
                    name = f"{path.name} row {number}"
                    picture = (columns["image"] or {}).get("bytes")
                    yield (name, picture, columns) if picture else LeftOut(name, "it has no image")
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise IntegrityError(f"{path} is damaged", printable(str(error)), again) from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        why = "Subjects200K is published as parquet, which needs pyarrow, and pyarrow is not installed"
        raise UsageError("parquet files cannot be read", why, "pip install 'hyperrt[parquet]'") from error
    return pyarrow, parquet
