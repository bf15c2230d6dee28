"""AUTOMATIC1111's text of settings: made of a recipe, and read as far as it has a meaning here."""

from __future__ import annotations

import pytest

from hyperrt.sampling import infotext
from hyperrt.sampling.options import SOLVER_NAMES

RECIPE = {
    "prompt": "a [V] cat, on a beach",
    "negative_prompt": "blurry: very",
    "steps": 30,
    "solver": "euler_ancestral",
    "guidance_scale": 3.5,
    "kappa": 1.2,
    "strength": 0.8,
    "seed": 42,
    "class_noun": "cat",
    "bundle": "tiny, mine",
    "base_model": "0123456789abcdef",
    "size": [64, 48],
}
A1111 = """a (red:1.2) house,
in the snow
Negative prompt: blurry,
dark
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1234567890, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned, VAE hash: 551eac7037, VAE: "a, b: c", Clip skip: 2, \
Lora hashes: "x: 1, y: 2", Version: v1.10.1"""


def settings(**recipe):
    return infotext.write(recipe).split("\n")[-1]


def test_no_negative_prompt_is_no_line():
    assert (
        infotext.write({"prompt": "a cat", "negative_prompt": "", "steps": 1})
        .split("\n")[1]
        .startswith("Steps: 1,")
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("a, b", '"a, b"'), ("a: b", '"a: b"'), ("a\nb", r'"a\nb"'), ('say "hi"', r'"say \"hi\""'),
        ("café", "café"), ("plain name", "plain name"),
    ],
)  # fmt: skip
def test_a_value_that_would_break_the_line_is_quoted_as_json(value, written):
    assert f"Model: {written}, Version" in settings(bundle=value)


def test_a_prompt_cannot_pass_for_the_lines_below_it():
    text = infotext.write({"prompt": "a cat\nNegative prompt: x\nSteps: 1, Seed: 2", "steps": 30})
    assert text.split("\n")[0] == "a cat Negative prompt: x Steps: 1, Seed: 2"
    assert len(text.split("\n")) == 2


def test_the_scale_is_the_one_that_pulls_as_strongly_in_other_programs():
    assert "CFG scale: 7.0" in settings(guidance_scale=3.5)
    assert "CFG scale: 5.0" in settings(guidance_scale=5.0, cfg=True)


def test_what_is_written_is_read_back(caplog):
    found = {**RECIPE, "base_model": "0123456789", "cfg": False}
    assert infotext.read(infotext.write(RECIPE)) == found
    plain = {**RECIPE, "cfg": True, "kappa": None}
    assert infotext.read(infotext.write(plain)).items() >= {"cfg": True, "guidance_scale": 3.5}.items()
    assert not caplog.text


def test_a_text_of_another_program_is_read_as_far_as_it_means_something(caplog):
    assert infotext.read(A1111) == {
        "prompt": "a (red:1.2) house,\nin the snow",
        "negative_prompt": "blurry,\ndark",
        "steps": 20,
        "solver": "dpmpp_2m",
        "guidance_scale": 3.5,
        "seed": 1234567890,
        "size": [512, 768],
        "base_model": "6ce0161689",
        "bundle": "v1-5-pruned",
    }
    [warning] = caplog.messages
    assert "'DPM++ 2M Karras' is drawn as dpmpp_2m" in warning
    assert "VAE hash, VAE, Clip skip, Lora hashes" in warning and "Model" not in warning


@pytest.mark.parametrize(
    ("sampler", "solver"),
    [
        *((shown, name) for name, shown in infotext.SAMPLERS.items()),
        ("Euler a Karras", "euler_ancestral"), ("euler a", "euler_ancestral"), ("DPM++ 2M SDE", "dpmpp_2m"),
        ("Euler", "euler"), ("Eulerian", None), ("UniPC", None), ("DPM++ 2S a", None),
    ],
)  # fmt: skip
def test_a_sampler_is_the_solver_that_its_name_begins_with(caplog, sampler, solver):
    found = infotext.read(f"x\nSteps: 1, Sampler: {sampler}, Seed: 2")
    assert found.get("solver") == solver
    is_one = sampler.lower() in (shown.lower() for shown in infotext.SAMPLERS.values())
    assert (f"sampler {sampler!r}" in caplog.text) != is_one


def test_every_solver_has_a_name_in_other_programs():
    assert set(infotext.SAMPLERS) == set(SOLVER_NAMES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a cat\nSteps: 3",
        "Steps: 1, Seed: 2",
        "a, b: c, d: e, f: g",
        "\n" * 10_000,
        "Steps:" * 10_000,
    ],
    ids=lambda text: text[:20],
)
def test_what_holds_no_settings_is_no_recipe(text):
    assert infotext.read(text) is None


@pytest.mark.parametrize(
    "mark", ["(", '"', 'a:"', "a: ", "a:\\", " ", ",", "a", "{", "a: b,", 'a: "\\'], ids=repr
)
def test_a_hostile_line_takes_no_longer_than_an_honest_one(mark):
    text = "x\nSteps: 1, Seed: 2, Size: 8x8, " + mark * 100_000
    assert infotext.read(text)["seed"] == 2


@pytest.mark.parametrize("value", ["many", "9" * 400, "1e5", "nan", "١", '"\\ud800"', "1.", "0x1"])
def test_what_is_no_number_stays_a_text(value):
    found = infotext.read(f"x\nSteps: {value}, CFG scale: {value}, Seed: 3, Size: {value}x{value}")
    assert isinstance(found["steps"], str) and isinstance(found["guidance_scale"], str)
    assert "size" not in found
