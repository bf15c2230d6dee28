"""A folder gives its usable photos in order, whatever else lies in it; what is left out is said."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hyperrt.errors import BadImage, BadInput, LinkedPhotos, NotFound
from hyperrt.photos import load
from hyperrt.photos.read import read_photos
from tests.hyperrt.pictures import half_and_half

ROOT = Path(__file__).resolve().parents[3]


def test_a_folder_gives_its_photos_in_natural_order(tmp_path):
    for number in (10, 2, 1):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"IMG_{number}.png")
    photos = load.load_folder(tmp_path)
    assert photos.names == ["IMG_1.png", "IMG_2.png", "IMG_10.png"]
    assert [image[0, 0, 0] for image in photos.images] == [1, 2, 10]
    assert photos.rejected == photos.ignored == []


def test_names_that_begin_alike_have_an_order_with_and_without_a_number():
    names = ["dog2", "dog", "1.png2", "1.png", "DOG", "dog10"]
    assert sorted(names, key=load.natural_key) == ["1.png", "1.png2", "DOG", "dog", "dog2", "dog10"]


def test_one_bad_photo_among_good_ones_is_left_out_with_its_reason(subject_folder):
    (subject_folder / "2b.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    photos = load.load_folder(subject_folder)
    assert photos.names == ["1.png", "2.png", "3.png", "4.png"]
    [(name, reason)] = photos.rejected
    assert name == "2b.jpg"
    assert "damaged" in reason


def test_strict_refuses_the_first_bad_photo_by_name(subject_folder):
    (subject_folder / "2b.jpg").write_bytes(b"")
    with pytest.raises(BadImage, match=r"'2b\.jpg'\n.*empty"):
        load.load_folder(subject_folder, strict=True)


def test_strict_is_content_with_good_photos_beside_other_things(subject_folder):
    (subject_folder / "notes.txt").write_text("of a robot")
    (subject_folder / "raw").mkdir()
    (subject_folder / ".DS_Store").write_bytes(b"\0")
    photos = load.load_folder(subject_folder, strict=True)
    assert len(photos.images) == 4
    assert photos.ignored == [("notes.txt", "not a picture"), ("raw", "a folder")]
    assert photos.rejected == []


def test_a_photo_without_a_known_suffix_is_found_by_its_contents(subject_folder):
    (subject_folder / "1.png").rename(subject_folder / "download")
    assert load.load_folder(subject_folder).names == ["2.png", "3.png", "4.png", "download"]


def test_pipes_sockets_links_and_folders_do_not_stop_the_good_photos(subject_folder, monkeypatch):
    monkeypatch.chdir(subject_folder)  # a socket's name must be short
    os.mkfifo("pipe.png")
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
    os.symlink(".", "loop")
    os.symlink("self.png", "self.png")
    os.symlink("/dev/zero", "zero.png")
    os.symlink("1.png", "link.png")
    os.mkdir("folder.png")
    photos = load.load_folder(subject_folder)
    assert photos.names == ["1.png", "2.png", "3.png", "4.png"]
    reasons = dict(photos.rejected)
    assert sorted(reasons) == ["link.png", "pipe.png", "self.png", "socket.jpg", "zero.png"]
    assert "a named pipe" in reasons["pipe.png"]
    assert all("a symbolic link" in reasons[name] for name in ("link.png", "self.png", "zero.png"))
    assert sorted(dict(photos.ignored)) == ["folder.png", "loop", "pipe"]


def linked(subject_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "my links"
    folder.mkdir()
    for path in subject_folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "gone.png").symlink_to("nowhere")
    return folder


@pytest.mark.parametrize("strict", [False, True])
def test_a_folder_of_links_says_so_and_names_the_files_which_are_followed(subject_folder, tmp_path, strict):
    folder = linked(subject_folder, tmp_path)
    with pytest.raises(LinkedPhotos, match=r"symbolic link.*\n.*name the files: '") as caught:
        load.load_folder(folder, strict=strict)
    assert caught.value.files == tuple(f"{folder}/{number}.png" for number in (1, 2, 3, 4))
    assert len(read_photos(caught.value.files)) == 4


def test_a_bad_photo_beside_links_is_refused_for_its_own_reason(subject_folder, tmp_path):
    folder = linked(subject_folder, tmp_path)
    (folder / "0.png").touch()
    with pytest.raises(BadImage, match="empty"):
        load.load_folder(folder, strict=True)


def test_the_folder_itself_may_be_a_link(subject_folder, tmp_path):
    (tmp_path / "link").symlink_to(subject_folder)
    assert len(load.load_folder(tmp_path / "link").images) == 4


def test_the_same_picture_twice_is_used_once_and_said(subject_folder):
    (subject_folder / "5.png").write_bytes((subject_folder / "2.png").read_bytes())
    photos = load.load_folder(subject_folder, strict=True)
    assert len(photos.images) == 4
    assert photos.rejected == [("5.png", "it is the same picture as 2.png")]


def test_of_ten_thousand_photos_the_first_are_used_and_the_rest_is_said(tmp_path):
    for number in range(load.MAX_PHOTOS + 2):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    for number in range(load.MAX_PHOTOS + 2, 10_000):
        (tmp_path / f"{number}.png").touch()
    photos = load.load_folder(tmp_path)
    assert photos.names == [f"{number}.png" for number in range(load.MAX_PHOTOS)]
    assert photos.rejected == [("16.png and 9,983 more", "only the first 16 photos of a folder are used")]


def test_a_folder_of_more_files_than_any_folder_of_photos_is_refused(subject_folder, monkeypatch):
    monkeypatch.setattr(load, "MAX_ENTRIES", 3)
    with pytest.raises(BadInput, match="more than 3 files"):
        load.load_folder(subject_folder)


@pytest.mark.parametrize("content", ["nothing", "text", "folder"])
def test_a_folder_without_photos_says_what_it_holds(content, tmp_path):
    if content == "text":
        (tmp_path / "notes").write_text("notes")
    elif content == "folder":
        (tmp_path / "robot").mkdir()
    count = 0 if content == "nothing" else 1
    with pytest.raises(BadInput, match=rf"holds no photos\n.*{count} files or folders.*\n.*JPEG, PNG"):
        load.load_folder(tmp_path)


def test_when_no_photo_is_left_the_first_reasons_are_given(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"none of the 5 photos .*\n.*0\.png: it is empty.*and 2 more\n"):
        load.load_folder(tmp_path)


def test_a_missing_folder_and_a_file_in_its_place_are_refused(subject_folder):
    with pytest.raises(NotFound, match="gone"):
        load.load_folder(subject_folder / "gone")
    with pytest.raises(BadInput, match="Not a directory"):
        load.load_folder(subject_folder / "1.png")


def test_a_hostile_file_name_is_printed_harmlessly(subject_folder):
    name = b"\x1b[2J\n\xff\xe2\x80\xaenet.png"
    with open(os.path.join(os.fsencode(subject_folder), name), "wb"):
        pass
    [(shown, _)] = load.load_folder(subject_folder).rejected
    assert shown == r"\x1b[2J\n\udcff\u202enet.png"
    assert shown.encode("ascii")


def test_reading_a_photo_imports_only_the_readers_it_may_need(tmp_path):
    (tmp_path / "text.png").write_text("no photo: every allowed reader is asked")
    half_and_half().save(tmp_path / "photo.png")
    code = (
        "import sys; from hyperrt.photos import load as images; photos = images.load_folder(sys.argv[1]); "
        "print(len(photos.images), len(photos.rejected), 'PIL.PsdImagePlugin' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["1", "1", "False"]
