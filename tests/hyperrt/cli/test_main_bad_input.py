"""Bad photos, prompts, subject files, bundles and outputs on the command line: refused by name, or left out.

Each ends with its exit code and an error of three lines, and no picture is written.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperrt.photos import load
from tests.hyperrt import fake_bundle, lora_files
from tests.hyperrt.command_line import PROMPT, events, is_three_lines
from tests.hyperrt.pictures import encoded, half_and_half, noise, png_that_claims

pytestmark = pytest.mark.usefixtures("alone")

BAD_PHOTOS = {
    "empty.png": b"",
    "text.png": b"not a picture",
    "cut.jpg": encoded(noise(), "JPEG")[:400],
    "cut.webp": encoded(noise(), "WEBP")[:400],
    "cut.tif": encoded(noise(), "TIFF")[:400],
    "bomb.png": png_that_claims(100_000, 100_000),
    "dot.png": encoded(half_and_half((1, 1))),
    "layers.psd": b"8BPS\0\1" + bytes(40),
    "phone.heic": b"\0\0\0\x18ftypheic" + bytes(40),
    "vector.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
}
ODD_PHOTOS = {
    "gif.jpg": encoded(noise(), "GIF"),
    "frames.gif": encoded(noise(), "GIF", save_all=True, append_images=[half_and_half()]),
    "cmyk.jpg": encoded(noise().convert("CMYK"), "JPEG"),
    "grey.png": encoded(half_and_half(mode="LA")),
    "deep.png": encoded(Image.fromarray(np.arange(6400, dtype=np.uint16).reshape(80, 80))),
    "badexif.jpg": encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "clear.webp": encoded(half_and_half(mode="RGBA"), "WEBP"),
}


@pytest.fixture
def folder(photos, tmp_path):
    """A copy of the photos that a test may add to."""
    return Path(shutil.copytree(photos, tmp_path / "mine"))


def no_picture():
    return not list(Path().rglob("*.png"))


# photos


@pytest.mark.parametrize("name", BAD_PHOTOS)
def test_a_bad_photo_alone_is_refused_by_name(run, tmp_path, name):
    (tmp_path / name).write_bytes(BAD_PHOTOS[name])
    code, out, err = run("generate", "-i", tmp_path / name, "-p", PROMPT)
    assert (code, out) == (3, "")
    assert is_three_lines(err) and len(err.splitlines()) == 3 and name in err
    assert no_picture()


@pytest.mark.parametrize("name", ODD_PHOTOS)
def test_an_odd_photo_is_used(run, tmp_path, name):
    (tmp_path / name).write_bytes(ODD_PHOTOS[name])
    code, _, err = run("generate", "-i", tmp_path / name, "-p", PROMPT)
    assert code == 0 and "1 photo of a robot" in err


@pytest.mark.parametrize("command", ["generate", "personalize"])
def test_bad_photos_among_good_ones_are_said_and_left_out_and_strictly_refused(run, folder, command):
    for name, content in BAD_PHOTOS.items():
        (folder / name).write_bytes(content)
    arguments = [
        command,
        "-i",
        folder,
        *(["-p", PROMPT] if command == "generate" else ["-o", "s.safetensors"]),
    ]
    code, _, err = run(*arguments)
    assert code == 0 and "subject: 3 photos" in err
    assert {name for name in BAD_PHOTOS if f"left out {name}: " in err} == set(BAD_PHOTOS) - {"vector.eps"}
    code, out, err = run(*arguments, "--force", "--strict-images")
    assert (code, out) == (3, "") and is_three_lines(err) and "bomb.png" in err


@pytest.mark.skipif(os.name != "posix", reason="needs pipes, sockets and links")
def test_pipes_sockets_and_links_in_a_folder_are_not_opened(run, folder, monkeypatch):
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder)
    with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as listener:
        patch.chdir(folder)  # a socket's name must be short
        listener.bind("socket.jpg")
    code, _, err = run("generate", "-i", folder, "-p", PROMPT)
    assert code == 0 and "3 photos" in err
    assert all(f"left out {name}" in err for name in ("pipe.png", "endless.png", "socket.jpg"))


def test_a_folder_without_photos_is_refused(run, tmp_path):
    (tmp_path / "nothing").mkdir()
    code, out, err = run("generate", "-i", tmp_path / "nothing", "-p", PROMPT)
    assert (code, out) == (3, "") and is_three_lines(err) and "holds no photos" in err


def test_ten_thousand_bad_photos_are_a_few_lines(run, folder):
    for number in range(10_000):
        (folder / f"{number}.png").touch()
    code, _, err = run("generate", "-i", folder, "-p", PROMPT)
    assert code == 0 and "3 photos" in err
    assert "left out 9,990 more photos" in err and len(err.splitlines()) < 20


# prompts


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty"),
        (" \n", "prompt is empty"),
        ("a robot", "[V]"),
        ("[V] " + "x" * 10**6, "too long"),
    ],
    ids=["empty", "blank", "no placeholder", "1 MB"],
)
def test_a_prompt_that_cannot_be_used_is_refused_shortly(run, subject_file, prompt, words):
    code, out, err = run("generate", "-s", subject_file, "-p", prompt)
    assert (code, out) == (3, "")
    assert is_three_lines(err) and words in err and len(err) < 1000
    assert no_picture()


@pytest.mark.parametrize("character", ["\0", "\x1b", "\udcff"])
def test_a_character_that_is_no_text_is_named_and_not_printed(run, character):
    code, _, err = run("generate", "-p", f"a {character} robot")
    assert code == 3 and f"U+{ord(character):04X}" in err and character not in err


def test_emoji_are_text_and_stored(run, capsys):
    code, out, _ = run("generate", "-p", "a robot 🤖 on the beach", "--json")
    assert code == 0 and events(out)[-1]["recipe"]["prompt"] == "a robot 🤖 on the beach"


def test_what_does_not_fit_of_a_prompt_is_said(run):
    code, _, err = run("generate", "-p", "a robot on the beach in the snow")
    assert code == 0 and "warning: prompt cut to 8 tokens; dropped: 'the snow'" in err


# subject files


def first_replaced(value):
    """Every number of the first tensor; None: the tensor is taken away."""

    def replaced(path):
        tensors, _ = lora_files.read(path)
        name = min(tensors)
        lora_files.change(path, {name: None if value is None else np.full_like(tensors[name], value)})

    return replaced


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), 3, "damaged"),
        (lambda path: path.write_bytes(b""), 3, "damaged"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), 3, "pickle"),
        (first_replaced(None), 3, "1 missing (12 expected): unet."),
        (lambda path: lora_files.change(path, {"extra": np.zeros(1, np.float32)}), 3, "1 unknown"),
        (first_replaced(np.nan), 3, "to_k.lora_A.weight cannot be used"),
        (first_replaced(np.inf), 3, "to_k.lora_A.weight cannot be used"),
        (lambda path: lora_files.change(path, metadata={"hyperrt.base_model": "d" * 64}), 5, "dddddddddddd"),
        (lambda path: lora_files.change(path, metadata={"hyperrt.layout": "e" * 64}), 5, "eeeeeeeeeeee"),
        (lambda path: (path.unlink(), path.mkdir()), 4, "there is no subject file"),
    ],
    ids=["cut", "empty", "pickle", "missing", "extra", "NaN", "infinity", "base", "layout", "folder"],
)
def test_a_subject_file_that_is_wrong_is_refused_by_name(run, subject_file, change, code, words):
    change(subject_file)
    found, out, err = run("generate", "-s", subject_file, "-p", PROMPT)
    assert (found, out) == (code, "")
    assert is_three_lines(err) and words in err
    assert no_picture()


# bundles


def manifest_changed(change):
    def apply(folder):
        manifest = json.loads((folder / "bundle.json").read_text())
        change(manifest)
        (folder / "bundle.json").write_text(json.dumps(manifest))

    return apply


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda folder: os.truncate(folder / "bundle.json", 200), 8, "bundle.json"),
        (lambda folder: os.truncate(folder / "denoiser.onnx", 20), 8, "denoiser.onnx"),
        (lambda folder: (folder / "vae_decoder.onnx").unlink(), 8, "vae_decoder.onnx"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), 8, "tokenizer.json"),
        (manifest_changed(lambda manifest: manifest.pop("lora")), 8, "lora"),
        (manifest_changed(lambda manifest: manifest.update(extra=1)), 8, "extra"),
        (
            manifest_changed(lambda manifest: manifest["defaults"].update(kappa=float("nan"))),
            8,
            "bundle.json",
        ),
        (manifest_changed(lambda manifest: manifest.update(format=99)), 5, "99"),
        (lambda folder: (folder / "bundle.json").unlink(), 4, "bundle.json"),
    ],
    ids=["cut", "graph cut", "no graph", "tokenizer", "missing", "extra", "NaN", "format", "no manifest"],
)
def test_a_bundle_that_is_wrong_is_refused_by_name(run, tmp_path, change, code, words):
    folder = fake_bundle.write(tmp_path / "bundle")
    change(folder)
    found, out, err = run("generate", "-p", "a robot", "--bundle", folder)
    assert (found, out) == (code, "")
    assert is_three_lines(err) and words in err
    assert no_picture()


def test_a_subject_of_another_bundle_is_refused(run, subject_file, tmp_path):
    hashes = {"base_model": "d" * 64, "hypernet": fake_bundle.HYPERNET}
    other = fake_bundle.write(tmp_path / "other", hashes=hashes)
    code, _, err = run("generate", "-s", subject_file, "-p", PROMPT, "--bundle", other)
    assert code == 5 and is_three_lines(err)
    assert "bbbbbbbbbbbb" in err and "dddddddddddd" in err


# outputs


@pytest.mark.parametrize("output", ["x" * 300, "x" * 300 + ".png", "new/" + "x" * 300])
def test_a_name_that_is_too_long_is_refused(run, output):
    code, out, err = run("generate", "-p", "a robot", "-o", output)
    assert (code, out) == (2, "") and is_three_lines(err) and "too long" in err


@pytest.mark.parametrize("output", ["shut/a.png", "shut", "shut/new"])
def test_a_folder_that_is_not_writable_is_refused_before_the_work(run, monkeypatch, output):
    Path("shut").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    may = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut" and may(path, mode))
    fake_bundle.calls.clear()
    code, out, err = run("generate", "-p", "a robot", "-o", output)
    assert (code, out) == (2, "") and is_three_lines(err) and "not writable" in err
    assert fake_bundle.calls == []


def test_a_file_in_the_way_of_a_folder_is_refused(run):
    Path("taken").write_bytes(b"mine")
    for output in ("taken", "taken/a.png", "taken/new"):
        code, _, err = run("generate", "-p", "a robot", "-o", output, "--force")
        assert code == 2 and is_three_lines(err)
    assert Path("taken").read_bytes() == b"mine"


def test_a_picture_of_many_that_exists_stops_the_work_before_it_begins(run):
    Path("a-2.png").write_bytes(b"mine")
    code, out, err = run("generate", "-p", "a robot", "-n", 4, "-o", "a.png")
    assert (code, out) == (2, "") and "a-2.png exists" in err
    assert [path.name for path in Path().iterdir()] == ["a-2.png"]


def test_at_most_the_photos_of_a_folder_that_help_are_used(run, tmp_path):
    for number in range(load.MAX_PHOTOS + 2):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    code, _, err = run("generate", "-i", tmp_path, "-p", PROMPT)
    assert code == 0 and f"{load.MAX_PHOTOS} photos" in err and "only the first 16" in err
