"""An argument of another type is refused by name in every public function; NumPy's numbers are taken."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from hyperrt import Bundle, Runtime, Subject
from hyperrt.arguments import checked, taken
from hyperrt.engines import EngineError
from hyperrt.errors import HyperRTError, UsageError
from hyperrt.lora.subject_file import load_subject
from hyperrt.sampling import options as config
from hyperrt.sampling import recipe
from hyperrt.text import short_repr
from tests.hyperrt import fake_bundle

PROMPT = "a [V] robot on the beach"
PHOTO = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
ODD = [
    None, True, "7", "", b"x", 1.5, float("nan"), float("inf"), -1, 10**400, 10**5000, 1j, [], {}, [1],
    {1: 2}, object(), int, iter([1]), range(3), io.BytesIO(), Path("x"), Fraction(1, 2), Decimal(1),
    "x" * 10**5, "\udc80", "a\0b", np.int64(1), np.float32(0.5), np.float64("nan"), np.bool_(True),
    np.array(1), np.array("x"), np.zeros(3), np.datetime64(3, "s"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("hint", "value", "found"),
    [
        (int, np.int64(7), 7),
        (int, np.array(7), 7),
        (float, 1, 1.0),
        (float, np.float32(0.5), 0.5),
        (float, Fraction(1, 2), 0.5),
        (float, 10**400, float("inf")),
        (bool, np.bool_(True), True),
        (str, np.str_("a"), "a"),
        (tuple[str, ...], ["a"], ("a",)),
        (str | os.PathLike[str], Path("a"), Path("a")),
        (int | None, None, None),
        (Mapping[str, int], {"a": np.int8(1)}, {"a": 1}),
    ],
)
def test_a_value_that_means_the_annotated_type_becomes_it(hint, value, found):
    got = taken("x", value, hint)
    assert got == found and type(got) is type(found)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True), (int, 2.0), (int, "7"), (int, None), (float, "1"), (float, True), (float, 1j), (bool, 1),
        (str, b"x"), (str, 7), (tuple[str, ...], "ab"), (tuple[str, ...], [1]),
        (str | os.PathLike[str], b"x"), (Mapping[str, int], {1: 1}), (Mapping[str, int], {"a": "b"}),
        (Subject | None, "mug.safetensors"),
    ],
    ids=str,
)  # fmt: skip
def test_another_type_is_refused_in_three_lines_that_name_it(hint, value):
    with pytest.raises(UsageError, match=r"^a b is ") as caught:
        taken("a_b", value, hint)
    assert len(str(caught.value).splitlines()) == 3 and type(value).__name__ in caught.value.why


def test_none_is_the_default():
    function = checked(lambda a, b=2: (a, b))
    function.__annotations__ = function.__wrapped__.__annotations__ = {"a": int, "b": int}
    assert function(1, None) == (1, 2)
    with pytest.raises(UsageError, match="a is None"):
        function(None)
    optional = {field.name for field in dataclasses.fields(config.SamplingOptions)}
    assert config.SamplingOptions(**dict.fromkeys(optional)) == config.SamplingOptions()


@pytest.fixture
def runtime(pretend):
    with Runtime.open(pretend, "fake") as runtime:
        yield runtime


def calls(runtime, folder, odd):
    """Every public function with `odd` in the place of each of its arguments in turn."""
    subject = runtime.personalize([PHOTO])
    path, layout, base = folder / "s.safetensors", runtime.bundle.layout, fake_bundle.BASE_MODEL

    def opened(**options):
        with Runtime.open(**{"bundle": runtime.bundle.path, "backend": "fake", **options}) as other:
            other.prepare(other.request("a robot"))

    arguments = {
        runtime.generate: {"prompt": PROMPT, "subject": subject, **vars(config.SamplingOptions())},
        runtime.prepare: {"request": runtime.request(PROMPT, subject)},
        runtime.sample: {"request": runtime.request(PROMPT, subject)},
        runtime.load_subject: {"path": path, "partial": False},
        runtime.decode: {"latents": np.ones((1, 4, 4, 4), np.float32)},
        opened: dict.fromkeys(("bundle", "backend", "threads", "low_memory", "device", "backend_options")),
        Bundle.open: {"bundle": runtime.bundle.path},
        subject.save: {"path": path, "format": "diffusers", "force": True},
        load_subject: {"path": path, "layout": layout, "base_model_hash": base, "token_shape": None},
        recipe.save_png: {"path": folder / "a.png", "image": PHOTO, "recipe": {}, "force": True},
        recipe.read: {"path": folder / "a.png"},
    }  # fmt: skip
    for function, good in arguments.items():
        for name in good:
            yield lambda f=function, a={**good, name: odd}: f(**a)
    for name in ("class_noun", "strict", "combine"):
        yield lambda name=name: runtime.personalize([PHOTO], **{name: odd})
    yield lambda: runtime.generate([odd], [subject])
    yield lambda: runtime.generate([PROMPT], [odd])
    yield lambda: runtime.generate(odd, odd)
    for name in vars(subject):
        yield lambda name=name: runtime.generate(PROMPT, dataclasses.replace(subject, **{name: odd}))
        yield lambda name=name: dataclasses.replace(subject, **{name: odd}).save(path, force=True)
    for name in subject.lora:
        lora = {**subject.lora, name: odd}
        yield lambda lora=lora: runtime.generate(PROMPT, dataclasses.replace(subject, lora=lora))
        yield lambda lora=lora: dataclasses.replace(subject, lora=lora).save(path, force=True)
    for name in subject.metadata:
        told = {**subject.metadata, name: odd}
        yield lambda told=told: runtime.generate(PROMPT, dataclasses.replace(subject, metadata=told))
    for name in ("prompt", "seed", "size", "base_model", "more"):
        yield lambda name=name: recipe.save_png(folder / "a.png", PHOTO, {name: odd}, force=True)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: f"{type(odd).__name__} {short_repr(odd)[:20]}")
def test_whatever_is_passed_works_or_is_refused_by_an_error_of_ours(runtime, tmp_path, monkeypatch, odd):
    monkeypatch.chdir(tmp_path)
    for call in calls(runtime, tmp_path, odd):
        try:
            call()
        except (HyperRTError, EngineError) as error:
            assert len(str(error).splitlines()) <= 3
            assert len(str(error)) < 1000 or "cannot open the graph" in str(error)  # the fake backend's own


def test_an_option_that_does_not_exist_is_refused(runtime):
    with pytest.raises(TypeError, match="unexpected keyword argument 'sed'"):
        runtime.generate(PROMPT, sed=7)
    other = Runtime.open(runtime.bundle.path, "fake", backend_options={"nonsense": 1})
    with pytest.raises(EngineError, match="has no option 'nonsense'"):
        other.prepare(other.request("a robot"))


def test_after_numpy_s_numbers_the_recipe_is_json(runtime):
    options = {"seed": np.int64(7), "n": np.int8(1), "kappa": np.float32(0.5), "cfg": np.bool_(False)}
    result = runtime.generate(PROMPT, runtime.personalize([PHOTO]), **options)
    found = json.loads(json.dumps(dict(result.recipe)))
    assert (found["seed"], found["kappa"]) == (7, 0.5)


def test_the_name_of_a_subject_file_is_answered_with_how_to_read_it(pretend):
    with Runtime.open(pretend, "fake") as runtime, pytest.raises(UsageError, match="load_subject first"):
        runtime.generate("a [V] robot", "mug.safetensors")
