"""A picture carries its recipe, in forms that other programs read, and nothing else."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import hyperrt
from hyperrt.errors import BadImage, BadInput, NotFound, UsageError
from hyperrt.sampling import infotext, recipe
from hyperrt.sampling.options import SOLVER_NAMES

PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
RECIPE = {
    "prompt": "a [V] cat on a beach",
    "negative_prompt": "blurry, dark",
    "generic_prompt": "a cat on a beach",
    "steps": 30,
    "solver": "euler_ancestral",
    "guidance_scale": 3.5,
    "kappa": 1.2,
    "strength": 1.0,
    "seed": 42,
    "class_noun": "cat",
    "bundle": "tiny",
    "base_model": "0123456789abcdef",
    "branches": {"uncond": -6.0, "subject": 4.2, "generic": 2.8},
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "out.png"
    recipe.save_png(path, PICTURE, RECIPE)
    return path


def chunks(content):
    """(type, data) of every chunk of a PNG, parsed by hand."""
    offset = 8
    while offset < len(content):
        length, kind = struct.unpack(">I4s", content[offset : offset + 8])
        yield kind, content[offset + 8 : offset + 8 + length]
        offset += length + 12


def png(*entries):
    """A PNG of one pixel with text chunks (key, value)."""
    info = PngInfo()
    for key, value in entries:
        info.add_itxt(key, value)
    content = io.BytesIO()
    Image.new("RGB", (1, 1)).save(content, "PNG", pnginfo=info)
    return content.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_recipe_is_read_back_as_it_was_written(saved):
    ours = {"schema": 1, "version": hyperrt.__version__, "size": [64, 48]}
    assert recipe.read(saved) == {**RECIPE, **ours}


def test_the_pixels_are_kept(saved):
    with Image.open(saved) as image:
        np.testing.assert_array_equal(np.asarray(image), PICTURE)


def test_the_parameters_are_written_as_a1111_does(saved):
    with Image.open(saved) as image:
        assert image.info["parameters"] == (
            "a [V] cat on a beach\n"
            "Negative prompt: blurry, dark\n"
            "Steps: 30, Sampler: Euler a, CFG scale: 7.0, Seed: 42, Size: 64x48, Model hash: 0123456789, "
            "Model: tiny, Kappa: 1.2, Subject: cat, Subject strength: 1.0, "
            f"Version: hyperrt {hyperrt.__version__}"
        )


@pytest.mark.parametrize(("prompt", "kind"), [("a [V] café", b"tEXt"), ("a [V] 猫 👨‍👩‍👧", b"iTXt")])
def test_the_parameters_are_text_that_every_reader_decodes(tmp_path, prompt, kind):
    path = tmp_path / "out.png"
    recipe.save_png(path, PICTURE, {**RECIPE, "prompt": prompt})
    kinds = {
        data.split(b"\0")[0]: found
        for found, data in chunks(path.read_bytes())
        if found in (b"tEXt", b"iTXt")
    }
    assert kinds == {b"parameters": kind, b"hyperrt": b"iTXt", b"XML:com.adobe.xmp": b"iTXt"}
    with Image.open(path) as image:
        assert image.info["parameters"].startswith(prompt)
    assert recipe.read(path)["prompt"] == prompt


def test_the_picture_is_marked_as_generated_for_iptc_readers(saved):
    from xml.etree import ElementTree

    (xmp,) = (data for kind, data in chunks(saved.read_bytes()) if data.startswith(b"XML:com.adobe.xmp"))
    packet = xmp[
        len(b"XML:com.adobe.xmp") + 5 :
    ].decode()  # end of the key, two flags, no language, no translation
    description = ElementTree.fromstring(packet.lstrip("\ufeff")).find(".//{*}Description")
    source = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert description.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"] == source


def test_a_picture_holds_no_chunks_but_these(saved):
    assert [kind for kind, _ in chunks(saved.read_bytes()) if kind != b"IDAT"] == [
        b"IHDR", b"tEXt", b"iTXt", b"iTXt", b"IEND",
    ]  # fmt: skip


def test_the_same_picture_and_recipe_are_the_same_bytes():
    assert recipe.encode_png(PICTURE, RECIPE) == recipe.encode_png(PICTURE, RECIPE)


def test_numpy_values_are_written_as_numbers(tmp_path):
    path = tmp_path / "out.png"
    recipe.save_png(path, PICTURE, {"seed": np.int64(3), "kappa": np.float32(0.5), "weights": np.arange(2)})
    assert {"seed": 3, "kappa": 0.5, "weights": [0, 1]}.items() <= recipe.read(path).items()


@pytest.mark.parametrize("value", [object(), float("nan"), b"bytes"])
def test_what_json_has_no_form_for_is_refused_and_leaves_no_file(tmp_path, value):
    with pytest.raises(ValueError):
        recipe.save_png(tmp_path / "out.png", PICTURE, {"seed": value})
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_replaced_only_by_force(saved):
    with pytest.raises(UsageError, match="exists"):
        recipe.save_png(saved, PICTURE, {})
    recipe.save_png(saved, PICTURE, {"seed": 7}, force=True)
    assert recipe.read(saved)["seed"] == 7


def test_text_behind_the_pixels_is_found(saved):
    """Some programs move text there."""
    content = saved.read_bytes()
    kept = list(chunks(content))
    kept.sort(key=lambda entry: {b"IHDR": 0, b"IDAT": 1, b"IEND": 3}.get(entry[0], 2))
    saved.write_bytes(content[:8] + b"".join(chunk(*entry) for entry in kept))
    assert recipe.read(saved)["seed"] == 42


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFound, match=re.escape("none.png")):
        recipe.read(tmp_path / "none.png")
    with pytest.raises(NotFound, match="there is no file 'xxx"):
        recipe.read("x" * 5000)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a sound PNG"),
        (b"GIF89a" + bytes(20), "not a sound PNG"),
        (png()[:20], "not a sound PNG"),
        (png(("hyperrt", '{"schema": 1}'))[:60], "not a sound PNG"),
        (png(), "no recipe"),
        (png(("parameters", "a cat\nSteps: 3")), "no recipe"),
        (png(("parameters", "a cat" * 30_000 + "\nSteps: 3, Seed: 5, Size: 8x8")), "no recipe"),
        (png(("hyperrt", "")), "not a JSON object"),
        (png(("hyperrt", "[1]")), "not a JSON object"),
        (png(("hyperrt", "[" * 100_000)), "not a JSON object"),
        (png(("hyperrt", '{"schema": 1, "seed": NaN}')), "not a JSON object"),
        (png(("hyperrt", '{"seed": ' + "9" * 10_000 + "}")), "not a JSON object"),
        (png(("hyperrt", '{"schema": 1, "x": "' + "x" * (1 << 20) + '"}')), "not a JSON object"),
        (png(("hyperrt", '{"schema": 2}')), "not of schema 1"),
        (png(("hyperrt", '{"seed": 2}')), "not of schema 1"),
    ],
)  # fmt: skip
def test_a_file_without_a_sound_recipe_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    for read in (recipe.read, recipe.read_any):
        with pytest.raises(BadImage, match=r"picture\.png") as caught:
            read(path)
        assert reason in caught.value.reason
        assert str(tmp_path) not in str(caught.value)


def test_any_text_and_any_png_with_parameters_is_a_recipe(tmp_path):
    text = "a cat\nSteps: 3, Seed: 5, Size: 8x8"
    files = {
        "ours.png": png(("hyperrt", '{"schema": 1, "prompt": "a cat", "seed": 5}'), ("parameters", "x")),
        "theirs.png": png(("parameters", text)),
        "theirs.txt": text.encode(),
        "bom.txt": b"\xef\xbb\xbf" + text.encode(),
        "choice.txt": b"{a|b} cat\nSteps: 3, Seed: 5, Size: 8x8",
        "ours.json": b'{"seed": 5, "branches": ["subject"]}',
        "info.json": b'{"event": "result", "recipe": {"schema": 1, "seed": 5}}',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert recipe.read_any(tmp_path / name)["seed"] == 5, name
        if name != "ours.png":
            with pytest.raises(BadImage):
                recipe.read(tmp_path / name)


@pytest.mark.parametrize("content", ['{"prompt": "a mug", "seed": 1, "guidance_scale": 7.5}', "{}"])
def test_json_of_another_program_is_no_recipe(content, tmp_path):
    (tmp_path / "theirs.json").write_text(content)
    with pytest.raises(BadInput, match="JSON of another program"):
        recipe.read_any(tmp_path / "theirs.json")


def test_options_are_those_that_the_recipe_names():
    assert recipe.options_of({**RECIPE, "n": 9, "batch_size": 9, "x": 1}) == {
        **{name: RECIPE[name] for name in recipe.options_of(RECIPE) if name != "cfg"},
        "cfg": False,
    }
    assert recipe.options_of(RECIPE).keys() >= {"prompt", "generic_prompt", "kappa", "seed", "steps"}
    assert recipe.options_of({"prompt": "a cat", "kappa": 0.0}) == {"prompt": "a cat", "cfg": False}
    with pytest.raises(UsageError, match="no prompt"):
        recipe.options_of({"seed": 1})


def test_a_jpeg_is_no_png(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png", "JPEG")
    with pytest.raises(BadImage, match="not a sound PNG"):
        recipe.read(tmp_path / "photo.png")


def test_a_picture_of_a_billion_pixels_is_not_decoded(tmp_path):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(png()[:8] + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    with pytest.raises(BadImage, match=r"bomb\.png"):
        recipe.read(path)


def test_a_compressed_chunk_that_grows_without_end_is_refused(tmp_path):
    text = b"hyperrt\0\1\0\0\0" + zlib.compress(b" " * 80_000_000)
    content = png()
    path = tmp_path / "bomb.png"
    path.write_bytes(content[:33] + chunk(b"iTXt", text) + content[33:])
    with pytest.raises(BadImage, match=r"bomb\.png"):
        recipe.read(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_pipe_is_refused_without_waiting(tmp_path, make):
    make(tmp_path / "odd.png")
    with pytest.raises(BadImage, match="plain file"):
        recipe.read(tmp_path / "odd.png")


def test_damaged_bytes_anywhere_end_in_a_recipe_or_in_bad_image(saved):
    content = saved.read_bytes()[:2000]
    rng = np.random.default_rng(0)
    for _ in range(300):
        mutant = bytearray(content)
        for position in rng.integers(0, len(mutant), 4):
            mutant[position] = rng.integers(256)
        saved.write_bytes(mutant)
        with contextlib.suppress(BadImage):
            assert recipe.read(saved)["schema"] == 1


def test_every_solver_has_its_name_in_a1111():
    assert infotext.SAMPLERS.keys() == set(SOLVER_NAMES)
