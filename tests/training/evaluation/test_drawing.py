"""Pictures of an evaluation, drawn with the default bundle at one step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from hyperrt import Runtime
from hyperrt.bundle.bundle import packaged
from hyperrt.errors import NumericError
from hyperrt.sampling import recipe
from hyperrt.training.evaluation import drawing
from hyperrt.training.evaluation.drawing import DrawResult, DrawSettings

PROMPTS = ["a [V] robot on a beach", "a [V] robot in the snow", "a [V] robot in a forest"]
SETTINGS = DrawSettings(pictures=2, seed=7, steps=1, batch_size=4)


@pytest.fixture(scope="module")
def runtime():
    if "tiny" not in packaged():
        pytest.skip("the default bundle is not in this checkout")
    with Runtime.open("tiny", "onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def robot(runtime, drawn_photos):
    return runtime.personalize(drawn_photos, "robot")


def draw(runtime, subject, folder, settings=SETTINGS, prompts=PROMPTS, calls=None) -> DrawResult:
    result = DrawResult()
    for done, _ in enumerate(drawing.draw(runtime, subject, prompts, folder, settings, result), start=1):
        if done == calls:
            break
    return result


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(runtime, robot, tmp_path_factory):
    """A finished folder."""
    folder = tmp_path_factory.mktemp("whole")
    assert draw(runtime, robot, folder) == DrawResult(drawn=6, kept=0)
    return folder


def test_every_prompt_has_its_pictures_as_the_runtime_draws_them(runtime, robot, whole):
    assert set(contents(whole)) == {f"{number:02}-{k}.png" for number in range(3) for k in range(2)}
    alone = runtime.generate(PROMPTS[1], robot, seed=8, steps=1).images[0].astype(int)
    assert np.abs(np.asarray(Image.open(whole / "01-1.png")) - alone).max() <= 1
    parameters = recipe.read(whole / "02-1.png")
    assert (parameters["prompt"], parameters["seed"], parameters["steps"]) == (PROMPTS[2], 8, 1)


def test_existing_pictures_are_kept(runtime, robot, whole):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert draw(runtime, robot, whole) == DrawResult(drawn=0, kept=6)
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_run_resumes_with_the_same_bits(runtime, robot, tmp_path, count):
    settings = dataclasses.replace(SETTINGS, pictures=count, batch_size=2)
    draw(runtime, robot, tmp_path / "straight", settings)
    draw(runtime, robot, tmp_path / "killed", settings, calls=1)
    some = contents(tmp_path / "killed")
    assert 0 < len(some) < 3 * count
    (tmp_path / "killed" / "00-0.png").write_bytes(some["00-0.png"][:-200])  # killed while it wrote
    draw(runtime, robot, tmp_path / "killed", settings)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    "change",
    [{"kappa": 1.5}, {"cfg": True}, {"guidance_scale": 1.0}, {"steps": 2}, {"solver": "ddim"}, {"seed": 9}],
)
def test_a_picture_with_another_recipe_is_drawn_again(runtime, robot, whole, tmp_path, change):
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert draw(runtime, robot, tmp_path, dataclasses.replace(SETTINGS, **change)) == DrawResult(
        drawn=6, kept=0
    )


def test_another_subject_means_another_recipe(runtime, drawn_photos, robot, whole, tmp_path):
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    other = runtime.personalize(drawn_photos[:1], "robot")
    assert draw(runtime, other, tmp_path).drawn == 6


def test_only_the_bad_picture_of_a_call_is_left_out(runtime, robot, tmp_path, monkeypatch):
    real = runtime.generate

    def generate(prompts, subjects, **options):
        if PROMPTS[1] in prompts and 8 in range(options["seed"], options["seed"] + options["n"]):
            raise NumericError("the picture is all of one colour")
        return real(prompts, subjects, **options)

    monkeypatch.setattr(runtime, "generate", generate)
    (tmp_path / "01-1.png").write_bytes(b"of an earlier run")
    result = draw(runtime, robot, tmp_path)
    assert (result.drawn, result.failed) == (5, [("01-1.png", "the picture is all of one colour")])
    assert set(contents(tmp_path)) == {"00-0.png", "00-1.png", "01-0.png", "02-0.png", "02-1.png"}


def test_pictures_are_found_by_their_names_in_order(whole):
    pictures, left_out = drawing.find(whole, PROMPTS, 2)
    assert [(picture.number, picture.image, picture.seed) for picture in pictures] == [
        (number, k, 7 + k) for number in range(3) for k in range(2)
    ]
    assert left_out == []
    assert len(drawing.find(whole, PROMPTS, 1)[0]) == 3
    assert drawing.find(whole / "absent", PROMPTS, 1) == ([], [])


def test_pictures_of_other_programs_need_no_recipe_but_must_be_readable(tmp_path, whole):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "0-0.jpg")
    (tmp_path / "01-0.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    Image.new("RGB", (40, 40)).save(tmp_path / "07-0.png")
    (tmp_path / "02-0.png").write_bytes((whole / "00-0.png").read_bytes())
    (tmp_path / "notes.txt").write_text("")
    pictures, left_out = drawing.find(tmp_path, PROMPTS, 1)
    assert [(picture.file.name, picture.number, picture.seed) for picture in pictures] == [
        ("0-0.jpg", 0, None)
    ]
    reasons = dict(left_out)
    assert "damaged" in reasons["01-0.png"]
    assert "prompts 0 to 2" in reasons["07-0.png"]
    assert PROMPTS[0] in reasons["02-0.png"]
