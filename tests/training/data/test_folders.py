from __future__ import annotations

import pytest

from hyperrt.errors import BadInput, NotFound
from hyperrt.training.data import folders
from hyperrt.training.data.subjects import DatasetOptions, DatasetSubject, LeftOut
from tests.training import data_sets


def read(layout, source, **options):
    return list(layout(source, DatasetOptions(**options)).subjects)


def names(subjects):
    return [
        view.name for subject in subjects if isinstance(subject, DatasetSubject) for view in subject.views
    ]


def test_each_folder_is_a_subject_with_a_class_noun(tmp_path):
    subjects = read(folders.folders, data_sets.folders(tmp_path / "set"))
    assert [subject.noun for subject in subjects] == ["robot", "stuffed animal", "cat", "dog"]
    assert names(subjects)[:3] == ["a/1.png", "a/2.png", "a/10.png"]
    assert subjects[1].views[0].captions == ("a [V] stuffed animal", "a stuffed animal")


def test_files_with_the_class_noun_may_begin_with_a_byte_order_mark(tmp_path):
    source = data_sets.folders(tmp_path / "set")
    for name in ("a/class.txt", "b/metadata.json", "prompts_and_classes.txt"):
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())
    subjects = read(folders.folders, source)
    assert [subject.noun for subject in subjects] == ["robot", "stuffed animal", "cat", "dog"]


def test_the_option_is_for_subjects_without_a_class_noun(tmp_path):
    source = data_sets.write(data_sets.folders(tmp_path / "set"), ["e/1.png"])
    assert [subject.noun for subject in read(folders.folders, source, noun="toy")][0::4] == ["robot", "toy"]
    with pytest.raises(BadInput, match="class noun of the subject 'e' is unknown") as raised:
        read(folders.folders, source)
    assert len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize("content", ["[1]", "{", '{"noun": "cat"}', "[" * 50_000])
def test_a_broken_metadata_file_is_named(content, tmp_path):
    source = data_sets.write(tmp_path / "set", ["a/1.png"])
    (source / "a" / "metadata.json").write_text(content)
    with pytest.raises(BadInput, match=r"a/metadata\.json cannot be used"):
        read(folders.folders, source)


def test_an_empty_folder_among_others_is_left_out(tmp_path):
    source = data_sets.write(tmp_path / "set", ["a/1.png"])
    (source / "b").mkdir()
    (source / "b" / "notes.md").write_text("no photo")
    assert read(folders.folders, source, noun="cat")[1] == LeftOut("b", "it holds no photos")


def test_the_option_limits_the_views(tmp_path):
    source = data_sets.folders(tmp_path / "set")
    assert folders.folders(source, DatasetOptions(views=2)).views == 2
    assert folders.folders(source, DatasetOptions()).views == 3
    assert names(read(folders.folders, source, views=1)) == ["a/1.png", "b/1.png", "c/1.png", "d/1.png"]


def test_faces_are_split_by_their_numbers(tmp_path):
    source = data_sets.write(data_sets.celeba(tmp_path / "faces"), ["cover.png"])
    trained = read(folders.celeba, source)
    assert names(trained) == ["0.png", "7.png", "00012.png", "29799.png"]
    assert [item.name for item in trained if isinstance(item, LeftOut)] == ["cover.png"]
    assert names(read(folders.celeba, source, split="eval")) == ["29950.png"]
    (source / "29950.png").unlink()
    with pytest.raises(BadInput, match=r"numbered from 29,900 to 29,999"):
        read(folders.celeba, source, split="eval")


def test_animals_are_mixed_in_an_order_that_does_not_change(tmp_path):
    kinds = [f"train/{kind}/{n}.png" for kind in ("cat", "dog", "wild") for n in range(8)]
    source = data_sets.write(tmp_path / "afhq", kinds)
    subjects = read(folders.afhq, source)
    assert names(subjects) == names(read(folders.afhq, source))
    assert len({subject.noun for subject in subjects[-8:]}) == 3
    assert sorted(names(subjects)) == sorted(kind.removeprefix("train/") for kind in kinds)
    with pytest.raises(NotFound, match="no folder test or val"):
        read(folders.afhq, source, split="eval")
