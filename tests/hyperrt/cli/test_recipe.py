"""A recipe draws its picture again, with the command line's options above it; what does not fit is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperrt.cli import main
from hyperrt.sampling import recipe
from tests.hyperrt import fake_bundle
from tests.hyperrt.command_line import PROMPT, ROOT, is_three_lines

pytestmark = pytest.mark.usefixtures("alone")
A1111 = "a red robot\nNegative prompt: blurry\nSteps: 3, Sampler: Euler a, CFG scale: 7, Seed: 9, Size: 16x16"


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def same(*paths):
    first, *others = map(pixels, paths)
    return all(np.array_equal(first, other) for other in others)


@pytest.fixture
def drawn(run, subject_file):
    """Draw `a.png` of the subject, with these options."""

    def drawn(*options, subject=True):
        of_subject = ["-s", subject_file] if subject else []
        if "-p" not in options:
            options = ("-p", PROMPT if subject else "a red robot", *options)
        code, _, err = run("generate", *of_subject, "-o", "a.png", *options)
        assert code == 0, err

    return drawn


@pytest.fixture
def again(run, subject_file):
    """Draw the recipe of a file as `b.png`; returns the new recipe and stderr."""

    def again(*options, file="a.png", subject=True):
        of_subject = ["-s", subject_file] if subject else []
        code, _, err = run("generate", "--recipe", file, *of_subject, "-o", "b.png", "-f", *options)
        assert code == 0, err
        return recipe.read("b.png"), err

    return again


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--seed", 7, "--steps", 3, "--solver", "euler_ancestral"),
        ("--kappa", 0.4, "-g", 2, "--strength", 0.5),
        ("--cfg",),
        ("--cfg", "-g", 5),
        ("--negative", "blurry", "--generic-prompt", "a red robot"),
        ("--class", "mug", "-p", "a [V] on the beach"),
    ],
    ids=str,
)
def test_a_recipe_draws_its_picture_again_bit_for_bit(drawn, again, options):
    drawn(*options)
    assert again()[0] == recipe.read("a.png") and same("a.png", "b.png")


def test_so_does_one_without_a_subject_and_one_of_photos(run, drawn, again, photos):
    drawn("--seed", 7, subject=False)
    again(subject=False)
    assert same("a.png", "b.png")
    run("generate", "-i", photos, "-p", PROMPT, "--combine", "product", "-o", "a.png", "-f")
    again("-i", photos, subject=False)
    assert same("a.png", "b.png")


def test_so_does_the_bundle_in_the_wheel(tiny, capsys):
    mug = ["--images", str(ROOT / "examples" / "subjects" / "mug"), "--threads", "1"]
    first = ["-p", "a [V] mug on a beach", "--steps", "2", "--backend", "onnxruntime", "-o", "a.png"]
    assert main.run(["generate", *mug, *first]) == 0
    assert main.run(["generate", *mug, "--recipe", "a.png", "-o", "b.png"]) == 0
    assert recipe.read("b.png")["bundle"] == "tiny"
    assert same("a.png", "b.png") and "warning" not in capsys.readouterr().err


def test_so_does_the_json_of_info(run, drawn, again, capsys):
    drawn("--seed", 7)
    main.run(["info", "a.png", "--json"])
    Path("a.json").write_text(capsys.readouterr().out)
    again(file="a.json")
    assert same("a.png", "b.png")


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_rest(drawn, again, monkeypatch):
    drawn("--steps", 3, "--kappa", 0.4, "--seed", 7)
    for name, value in {
        "STEPS": 9,
        "CFG": 1,
        "PROMPT": "a mug",
        "NEGATIVE_PROMPT": "x",
        "STRENGTH": 0,
    }.items():
        monkeypatch.setenv(f"HYPERRT_GENERATE_{name}", str(value))
    again()
    assert same("a.png", "b.png")
    found = again("--kappa", 0.5, "--seed", 8)[0]
    assert [found[name] for name in ("steps", "kappa", "seed", "prompt")] == [3, 0.5, 8, PROMPT]


def test_a_new_prompt_is_of_the_noun_of_the_subject_that_is_given(drawn, again):
    drawn("--class", "mug", "-p", "a [V] on the beach")
    assert again("-p", "a [V] in snow")[0]["generic_prompt"] == "a robot in snow"  # the file's own noun


def test_another_prompt_takes_the_recipe_s_generic_prompt_with_it(drawn, again):
    drawn("--generic-prompt", "a red robot")
    assert again("-p", "a [V] robot in snow")[0]["generic_prompt"] == "a robot in snow"


@pytest.mark.parametrize(
    ("before", "options", "found"),
    [
        (["--kappa", 0.4, "-g", 2], ["--cfg"], (True, None, 4)),
        (["--cfg", "-g", 4], ["--kappa", 0.5], (None, 0.5, 2)),
        (["--cfg", "-g", 4], ["--cfg"], (True, None, 4)),
        (["--cfg", "-g", 4], ["-g", 3], (True, None, 3)),
    ],
    ids=str,
)
def test_guidance_of_the_other_kind_pulls_as_strongly(drawn, again, before, options, found):
    drawn(*before)
    told = again(*options)[0]
    assert tuple(map(told.get, ("cfg", "kappa", "guidance_scale"))) == found


def test_a_subject_that_the_recipe_lacks_is_drawn(drawn, again):
    drawn("-g", 2, subject=False)
    found, _ = again("-p", PROMPT)
    assert (found["kappa"], found["guidance_scale"], found["class_noun"]) == (1, 2, "robot")


def test_a_subject_that_is_missing_is_refused_unless_there_is_another_prompt(run, drawn, again):
    drawn("--cfg", "-g", 4)
    code, out, err = run("generate", "--recipe", "a.png")
    assert (code, out) == (2, "") and is_three_lines(err) and "--images or --subject" in err
    found, err = again("-p", "a robot", subject=False)
    assert found["guidance_scale"] == 2 and "warning" not in err


def test_another_subject_is_said_with_both_hashes(drawn, again, photos):
    drawn()
    _, err = again("-i", photos / "photo 0.png", subject=False)
    hashes = [recipe.read(path)["subject_sha256"][:12] for path in ("a.png", "b.png")]
    assert "warning: the subject is" in err and all(one in err for one in hashes)


def test_another_base_model_is_refused_unless_it_is_asked_for(
    run, drawn, subject_file, tmp_path, monkeypatch
):
    drawn("-p", "a robot", subject=False)
    hashes = {"base_model": "d" * 64, "hypernet": fake_bundle.HYPERNET}
    other = str(fake_bundle.write(tmp_path / "other one", hashes=hashes))
    monkeypatch.setenv("HYPERRT_GENERATE_BUNDLE", other)
    command = ("generate", "--recipe", "a.png", "--backend", "fake", "-o", "b.png")
    code, out, err = run(*command, here=())
    assert (code, out) == (5, "") and is_three_lines(err)
    assert "'bbbbbbbbbbbb'" in err and "'dddddddddddd'" in err and f"--bundle '{other}'" in err
    code, _, err = run(*command, "--bundle", other, here=())
    assert code == 0 and "warning: a.png was drawn with 'pretend'" in err


def test_parameters_of_another_program_are_drawn_as_far_as_they_go(again):
    Path("a.txt").write_text("\ufeff" + A1111)
    found, err = again(file="a.txt", subject=False)
    wanted = {"prompt": "a red robot", "negative_prompt": "blurry", "steps": 3, "solver": "euler_ancestral"}
    assert found.items() >= {**wanted, "guidance_scale": 3.5, "seed": 9, "kappa": 0.0}.items()
    assert found["branches"] == {"uncond": -6, "generic": 7}  # plain guidance of scale 7
    assert err.count("warning") == 1 and "another program's" in err
    assert again("--cfg", "-p", PROMPT, file="a.txt")[0]["guidance_scale"] == 7


def test_another_size_is_said(again):
    Path("a.txt").write_text(A1111.replace("16x16", "512x768"))
    assert (
        "a.txt is [512, 768] pixels large, pictures of 'pretend' are [16, 16]"
        in again(file="a.txt", subject=False)[1]
    )


@pytest.mark.parametrize(
    "value",
    [None, True, "7", "", -1, 10**400, 1e999, [1], {"a": 1}, "x" * 500_000, "\x1b[2J", {"a": [[[]]]}],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize(
    "name", ["prompt", "steps", "guidance_scale", "kappa", "cfg", "seed", "solver", "class_noun"]
)
def test_a_hostile_recipe_draws_or_is_refused_in_three_lines(run, subject_file, name, value):
    told = {"schema": 1, "prompt": PROMPT, "class_noun": "robot", name: value}
    Path("a.json").write_text(json.dumps(told).replace("Infinity", "1e999"))
    code, _, err = run("generate", "--recipe", "a.json", "-s", subject_file, "-o", "b.png")
    assert code == 0 or (code in (2, 3) and is_three_lines(err) and len(err) < 1000), err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    "name", ["subject_sha256", "backend", "bundle", "base_model", "size", "combine", "photos", "x"]
)
@pytest.mark.parametrize(
    "value", [None, True, 7, [1], {"a": 1}, "x" * 500_000, "\x1b[2J"], ids=lambda value: str(value)[:9]
)
def test_what_only_describes_a_picture_stops_no_drawing(run, photos, name, value):
    Path("a.json").write_text(json.dumps({"schema": 1, "prompt": PROMPT, "class_noun": "robot", name: value}))
    code, _, err = run("generate", "--recipe", "a.json", "-i", photos, "-o", "b.png")
    assert code == 0 and len(err) < 1000 and "\x1b" not in err, err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"schema": 1}', "no prompt"),
        ('{"schema": 1, "prompt": "a robot", "steps": 0}', "set by the recipe of a.json"),
        ('{"schema": 1, "prompt": "a robot", "steps": "many"}', "set by the recipe of a.json"),
        ('{"schema": 2, "prompt": "a robot"}', "schema 1"),
        ('{"recipe": [1]}', "holds no recipe"),
        ('{"schema": 1, "seed": NaN}', "holds no recipe"),
        ("[" * 100_000, "holds no recipe"),
        ("a robot", "holds no recipe"),
        ("x" * (1 << 20), "holds no recipe"),
        ("x" * (1 << 21), "not a sound PNG"),
        ("x\nSteps: 0, Seed: 1, Size: 1x1", "set by the recipe of a.json"),
        ("\0", "not a sound PNG"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_no_recipe_is_refused(run, content, words):
    Path("a.json").write_text(content)
    code, out, err = run("generate", "--recipe", "a.json", "-o", "b.png")
    assert code in (2, 3) and out == ""
    assert is_three_lines(err[err.index("error: ") :]) and words in err


def test_a_recipe_that_is_not_there_is_not_found(run):
    assert run("generate", "--recipe", "none.png")[0] == 4
