from __future__ import annotations

import io
import json
import os
import pickle
import random
import tarfile

import pytest

from hyperrt.errors import BadInput, IntegrityError, NotFound
from hyperrt.training.data import shards
from hyperrt.training.data.subjects import DatasetOptions, DatasetSubject, LeftOut
from tests.training import data_sets

PNG = data_sets.encoded(next(data_sets.drawn(1)))


@pytest.fixture
def shard(tmp_path):
    """A function: members => a shard of them."""
    return lambda *members: data_sets.tar(tmp_path / "0.tar", members)


def subjects(shard, noun=None, **options):
    return list(shards.webdataset(shard, DatasetOptions(noun=noun, **options)).subjects)


def only(shard, noun=None):
    [found] = subjects(shard, noun)
    return found


class Gadget:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def test_files_with_one_name_are_one_sample_and_its_images_are_views(tmp_path):
    found = shards.webdataset(data_sets.webdataset(tmp_path / "set"), DatasetOptions())
    subjects = list(found.subjects)
    assert found.views == 2
    assert [subject.noun for subject in subjects] == ["cat", "dog", "robot", "fish"]
    captions = [[view.captions for view in subject.views] for subject in subjects]
    assert captions[0] == 2 * [("a [V] cat", "a cat")]
    assert captions[1] == 2 * [("a [V] dog in the snow", "a dog in the snow")]
    assert captions[2] == [
        ("A red [V] Robot on a hill", "A red Robot on a hill"),
        ("a [V] robot, on a beach", "on a beach"),
    ]


@pytest.mark.parametrize(("suffix", "text"), [("cls", "cat"), ("json", '{"noun": "cat"}')])
def test_texts_may_begin_with_a_byte_order_mark(shard, suffix, text):
    assert only(shard(("a.png", PNG), (f"a.{suffix}", text.encode("utf-8-sig")))).noun == "cat"


def test_a_single_shard_can_be_named(shard):
    assert only(shard(("a/b.jpg", PNG), ("a/b.cls", b"cat"))).noun == "cat"
    with pytest.raises(NotFound, match="has no shards"):
        subjects(shard().parent / "absent")


@pytest.mark.parametrize("suffix", ["pkl", "PKL", "0.pickle", "pyd", "pth", "pt", "ckpt"])
def test_a_pickle_is_refused_and_not_loaded(suffix, shard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = shard(("0.png", PNG), ("0.cls", b"cat"), (f"1.{suffix}", pickle.dumps(Gadget())), ("1.png", PNG))
    with pytest.raises(BadInput, match=rf"holds a pickle(?s:.*)1\.{suffix}") as raised:
        subjects(path)
    assert len(str(raised.value).splitlines()) == 3
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("a.png", PNG)], "neither a caption nor a class noun"),
        ([("a.png", PNG), ("a.txt", b"a scene")], "the caption has no [V]"),
        ([("a.txt", b"a [V] cat")], "it has no image"),
        ([("a.png", PNG), ("a.txt", b"\xff\xfe")], "its .txt is not UTF-8"),
        ([("a.png", PNG), ("a.txt", b"a [V] \0 cat")], "a character that is not text"),
        ([("a.png", PNG), ("a.cls", b"17")], "the number 17, not a noun"),
        ([("a.png", PNG), ("a.json", b"[" * 100_000)], "its .json is not a JSON object"),
        ([("a.png", PNG), ("a.json", b"[1]")], "its .json is not a JSON object"),
        ([("../../a.png", PNG), ("../../a.cls", b"cat")], "points outside the archive"),
        ([("/etc/a.png", PNG), ("/etc/a.cls", b"cat")], "points outside the archive"),
        ([("a.png", PNG), ("a.png", PNG), ("a.cls", b"cat")], "two .png files"),
        ([("a.png", PNG), ("a.txt", b"x" * (shards.MAX_TEXT + 1))], "the limit is"),
    ],
)
def test_an_unusable_sample_is_left_out_with_its_reason(members, why, shard):
    left, kept = subjects(shard(*members, ("good.png", PNG), ("good.cls", b"cat")))
    assert isinstance(left, LeftOut)
    assert left.bad
    assert why in left.why
    assert isinstance(kept, DatasetSubject)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_not_read(kind, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        about = tarfile.TarInfo("a.png")
        about.type, about.linkname = kind, "/etc/passwd"
        archive.addfile(about)
    assert "a link or a device" in only(tmp_path / "0.tar", "cat").why


def test_a_member_that_claims_to_be_huge_is_not_read(tmp_path):
    about = tarfile.TarInfo("a.png")
    about.size = 1 << 40
    (tmp_path / "0.tar").write_bytes(about.tobuf(tarfile.GNU_FORMAT) + PNG)
    with pytest.raises(IntegrityError, match="is damaged"):
        subjects(tmp_path / "0.tar", "cat")


def test_a_truncated_shard_is_refused_or_gives_only_right_photos(shard):
    files = [(f"{n}.png", f"{n}.cls") for n in range(3)]
    path = shard(*((name, PNG if name.endswith("png") else b"cat") for pair in files for name in pair))
    whole = path.read_bytes()
    expected = [subject.views[0].content for subject in subjects(path)]
    for cut in range(0, len(whole), 171):
        path.write_bytes(whole[:cut])
        try:
            found = [s.views[0].content for s in subjects(path, "cat") if isinstance(s, DatasetSubject)]
        except IntegrityError as error:
            assert len(str(error).splitlines()) == 3
        else:  # cut between two files: what is there is right
            assert found == expected[: len(found)]
    path.write_bytes(b"no shard at all" * 100)
    with pytest.raises(IntegrityError, match="is damaged"):
        subjects(path)


def test_a_shard_with_changed_bytes_is_read_or_refused(tmp_path):
    path = data_sets.webdataset(tmp_path / "set") / "0.tar"
    whole = path.read_bytes()
    seed = random.randrange(2**32)
    print(f"random.Random({seed})")
    chance = random.Random(seed)
    outcomes = set()
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            changed[chance.randrange(len(whole) // 512) * 512 + chance.randrange(160)] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            outcomes |= {type(found) for found in subjects(path, "cat")}
        except (IntegrityError, BadInput) as error:
            outcomes.add(type(error))
    assert {DatasetSubject, IntegrityError} <= outcomes


def test_the_number_of_views_is_that_of_the_photos(shard):
    three = [(f"{n}.{v}.png", PNG) for n in range(2) for v in range(3)]
    assert shards.webdataset(shard(*three), DatasetOptions(noun="cat")).views == 3
    assert shards.webdataset(shard(*three), DatasetOptions(noun="cat", views=2)).views == 2


def test_nothing_is_written_beside_a_shard(shard, tmp_path):
    path = shard(("a.png", PNG), ("a.json", json.dumps({"noun": "cat"}).encode()))
    subjects(path)
    assert list(tmp_path.iterdir()) == [path]
    assert io.BytesIO(path.read_bytes()).read()
