from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from hyperrt.errors import BadImage, BadInput, IntegrityError, NotFound, UsageError
from hyperrt.training.data.subjects import DatasetOptions, DatasetSubject, LeftOut, read
from hyperrt.training.data.subjects200k import half, subject_of, subjects200k
from tests.training import data_sets

PICTURES = list(data_sets.drawn(2))
PNG = data_sets.encoded(data_sets.composite(*PICTURES))


def subjects(source):
    return list(subjects200k(source, DatasetOptions()).subjects)


def test_the_two_views_are_cut_out_with_their_own_captions():
    subject = subject_of(("0", PNG, data_sets.row("Red Lamp")))
    assert subject.noun == "red lamp"
    assert [view.captions for view in subject.views] == [
        ("The [V] Red Lamp stands on a beach.", "The Red Lamp stands on a beach."),
        ("a [V] Red Lamp, Something in the snow.", "Something in the snow."),
    ]
    assert np.array_equal(read(subject, 64).images, PICTURES)


@pytest.mark.parametrize("shape", [(80, 152), (79, 152), (152, 80), (16, 24), (528, 1047)])
def test_a_picture_that_is_not_two_squares_in_a_border_is_refused(shape):
    picture = np.zeros((*shape, 3), np.uint8)
    if shape == (80, 152):
        assert half(picture, 1).shape == (64, 64, 3)
    else:
        with pytest.raises(BadImage, match="not two squares"):
            half(picture, 0)


@pytest.mark.parametrize("scores", [4, None, "5", float("nan")])
def test_a_row_below_the_quality_filter_is_left_out_but_not_bad(scores):
    left = subject_of(("0", PNG, data_sets.row("lamp", scores)))
    assert (left.bad, left.why) == (False, "a score is below 5")
    one_low = data_sets.row("lamp")
    one_low["quality_assessment"]["objectConsistency"] = 3
    assert not subject_of(("0", PNG, one_low)).bad
    assert not subject_of(("0", PNG, data_sets.row("lamp", description_valid=False))).bad


@pytest.mark.parametrize(
    "change", [{"item": None}, {"item": ""}, {"description_1": ""}, {"description_0": "\7"}]
)
def test_a_row_without_words_is_bad(change):
    left = subject_of(("0", PNG, data_sets.row("lamp", **change)))
    assert isinstance(left, LeftOut)
    assert left.bad
    assert subject_of(("0", PNG, data_sets.row("lamp") | {"description": "text"})).bad


def test_rows_in_tar_shards_are_read(tmp_path):
    good = json.dumps(data_sets.row("lamp")).encode()
    data_sets.tar(tmp_path / "0.tar", [("a.png", PNG), ("a.json", good), ("b.json", good), ("c.png", PNG)])
    kept, no_image, no_words = subjects(tmp_path)
    assert isinstance(kept, DatasetSubject)
    assert no_image.why == "it has no image"
    assert not no_words.bad  # nor has it scores


def test_a_folder_with_other_files_is_refused(tmp_path):
    with pytest.raises(NotFound, match=r"neither a \*\.parquet nor a \*\.tar"):
        subjects(tmp_path)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'hyperrt\[parquet\]'") as raised:
        subjects(tmp_path)
    assert len(str(raised.value).splitlines()) == 3


def test_published_parquet_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": PNG, "path": None}, **data_sets.row(f"lamp {n}", 5 - n)} for n in range(2)]
    rows.append({"image": None, **data_sets.row("lamp")})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    kept, filtered, bad = subjects(tmp_path)
    assert kept.views[1].name == "train-0.parquet row 0 (right)"
    assert np.array_equal(read(kept, 64).images, PICTURES)
    assert (filtered.bad, bad.bad) == (False, True)
    (tmp_path / "train-0.parquet").write_bytes((tmp_path / "train-0.parquet").read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="is damaged"):
        subjects(tmp_path)
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}]), tmp_path / "train-0.parquet")
    with pytest.raises(BadInput, match="no column image"):
        subjects(tmp_path)
