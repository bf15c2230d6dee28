from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperrt.errors import BadInput, NotFound
from hyperrt.training.data import folders, scenes
from hyperrt.training.data.subjects import DatasetOptions
from hyperrt.training.evaluation import drawn, protocols
from hyperrt.training.evaluation.protocols import PROTOCOLS, subjects


def photo(path: Path, colour: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (colour, 10, 10)).save(path)
    return path


def names(selection: protocols.SubjectList) -> list[str]:
    return [subject.name for subject in selection.subjects]


def test_dreambench_names_its_subjects_by_their_folders(tmp_path):
    for name in ("dog2", "dog", "can"):
        photo(tmp_path / name / "00.png")
    photo(tmp_path / "loose.png")
    found = subjects(PROTOCOLS["dreambench"], tmp_path)
    assert names(found) == ["can", "dog", "dog2"]
    assert [subject.noun for subject in found.subjects] == ["can", "dog", "dog"]
    assert [subject.pack.name for subject in found.subjects] == ["dreambench-objects"] + [
        "dreambench-live"
    ] * 2
    missing = protocols.missing(PROTOCOLS["dreambench"], found.subjects)
    assert len(missing) == 27 and "backpack" in missing


def test_another_subject_needs_a_class_noun(tmp_path):
    for name in ("can", "rex", "thing"):
        photo(tmp_path / name / "1.png")
    (tmp_path / "metadata.csv").write_text(
        "file,subject,class_noun,live\nrex/1.png,rex,dragon,1\ncan/1.png,can,jar,0\n"
    )
    found = subjects(PROTOCOLS["dreambench"], tmp_path)
    assert [(e.name, e.noun, e.pack.name) for e in found.subjects] == [
        ("can", "can", "dreambench-objects"),  # DreamBench's own noun stands
        ("rex", "dragon", "dreambench-live"),
    ]
    ((name, why),) = found.left_out
    assert name == "thing" and "class noun" in why


def test_a_table_of_nouns_may_begin_with_a_byte_order_mark(tmp_path):
    photo(tmp_path / "rex" / "1.png")
    (tmp_path / "metadata.csv").write_text("subject,class_noun\nrex,dragon\n", encoding="utf-8-sig")
    assert [subject.noun for subject in subjects(PROTOCOLS["dreambench"], tmp_path).subjects] == ["dragon"]


def test_every_file_and_folder_is_a_face(tmp_path):
    photo(tmp_path / "2.jpg")
    photo(tmp_path / "10.jpg")
    for k in (1, 2):
        photo(tmp_path / "anna" / f"{k}.png", k)
    (tmp_path / "list.txt").write_text("no photo")
    found = subjects(PROTOCOLS["faces"], tmp_path)
    assert names(found) == ["2.jpg", "10.jpg", "anna"]
    assert [len(subject.photos().images) for subject in found.subjects] == [1, 1, 2]
    assert {subject.pack.name for subject in found.subjects} == {"hyperrt-faces-v1"}


def test_celeba_hq_gives_only_the_faces_that_no_training_sees(tmp_path):
    for number in ("0", "99", "29799", "29850", "29900", "029950", "29999", "30000"):
        photo(tmp_path / f"{number}.jpg")
    (tmp_path / "29901").mkdir()
    found = subjects(PROTOCOLS["faces"], tmp_path)
    assert names(found) == ["29900.jpg", "029950.jpg", "29999.jpg"]
    trained = [subject.views[0].name for subject in folders.celeba(tmp_path, DatasetOptions()).subjects]
    assert trained == ["0.jpg", "99.jpg", "29799.jpg"]


@pytest.mark.parametrize("split", ["test", "val"])
def test_afhq_gives_only_the_animals_of_its_test_split(tmp_path, split):
    for part, number in (("train", 1), (split, 2)):
        for kind in ("cat", "dog", "wild"):
            photo(tmp_path / part / kind / f"{number}.png")
    found = subjects(PROTOCOLS["afhq"], tmp_path)
    assert names(found) == ["cat-2.png", "dog-2.png", "wild-2.png"]
    assert names(found) == names(subjects(PROTOCOLS["afhq"], tmp_path / split))


def test_afhq_without_its_test_split_is_refused(tmp_path):
    photo(tmp_path / "train" / "cat" / "1.png")
    with pytest.raises(BadInput, match="no animals to evaluate") as caught:
        subjects(PROTOCOLS["afhq"], tmp_path)
    assert len(str(caught.value).splitlines()) == 3


def test_an_animal_may_have_the_name_of_a_split(tmp_path):
    photo(tmp_path / "val" / "1.png")
    photo(tmp_path / "rex.png")
    assert names(subjects(PROTOCOLS["afhq"], tmp_path)) == ["rex.png", "val"]


def test_a_limit_is_spread_evenly_over_the_classes_of_afhq(tmp_path):
    for kind in ("cat", "dog", "wild"):
        for k in range(3):
            photo(tmp_path / kind / f"{k}.png")
    found = subjects(PROTOCOLS["afhq"], tmp_path)
    assert len(found.subjects) == 9
    assert names(found.select(limit=5)) == ["cat-0.png", "cat-1.png", "dog-0.png", "dog-1.png", "wild-0.png"]
    assert {subject.noun for subject in found.subjects} == {"cat", "dog", "wild animal"}


def test_drawn_subjects_need_no_folder_and_are_five_of_each_noun(monkeypatch):
    monkeypatch.setattr(drawn, "PHOTO_SIZE", 64)  # drawn sixteen times as fast
    found = subjects(PROTOCOLS["drawn"], None)
    assert len(set(names(found))) == 40
    some = found.select(limit=8)
    assert [subject.noun for subject in some.subjects] == list(scenes.NOUNS)
    assert all(len(subject.photos().images) == 4 for subject in some.subjects[:2])


def test_subjects_are_selected_by_name_and_an_unknown_name_is_refused(tmp_path):
    for name in ("dog", "can", "vase"):
        photo(tmp_path / name / "1.png")
    found = subjects(PROTOCOLS["dreambench"], tmp_path)
    assert names(found.select(only=("vase", "can"))) == ["can", "vase"]
    with pytest.raises(NotFound, match="no subject 'cat'"):
        found.select(only=("cat",))


def test_a_folder_that_is_missing_or_empty_is_an_error(tmp_path):
    with pytest.raises(NotFound, match="there is no folder"):
        subjects(PROTOCOLS["faces"], tmp_path / "nowhere")
    with pytest.raises(NotFound, match="--subjects"):
        subjects(PROTOCOLS["afhq"], None)
    (tmp_path / "thing").mkdir()
    with pytest.raises(BadInput, match="class noun"):
        subjects(PROTOCOLS["dreambench"], tmp_path)
    with pytest.raises(BadInput, match="it is empty"):
        subjects(PROTOCOLS["faces"], (tmp_path / "thing"))


def test_unreadable_photos_are_named_and_the_others_used(tmp_path):
    photo(tmp_path / "dog" / "1.png")
    (tmp_path / "dog" / "2.png").write_bytes(b"broken")
    (tmp_path / "can").mkdir()
    dog, can = subjects(PROTOCOLS["dreambench"], tmp_path).select(only=("dog", "can")).subjects[::-1]
    found = dog.photos()
    assert len(found.images) == 1 and np.array_equal(found.images[0][0, 0], [90, 10, 10])
    assert [name for name, _ in found.rejected] == ["2.png"]
    with pytest.raises(BadInput):
        can.photos()


@pytest.mark.skipif(os.name != "posix", reason="other systems refuse such names")
def test_hostile_names_become_harmless_names_of_folders(tmp_path):
    photo(tmp_path / "a%2fb.png")
    photo(tmp_path / '"><script>.png')
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes((tmp_path / "a%2fb.png").read_bytes())
    folder_names = names(subjects(PROTOCOLS["faces"], tmp_path))
    assert len(set(folder_names)) == 3
    assert all(name.isascii() and not set(name) & set('/"<>&') for name in folder_names)
