"""Configs are checked once, before anything slow."""

from __future__ import annotations

import dataclasses

import pytest

from hyperrt.errors import UsageError
from hyperrt.sampling import options as config
from hyperrt.sampling.options import (
    RANDOM,
    ConvertConfig,
    ExportConfig,
    GenerateConfig,
    PersonalizeConfig,
    SamplingConfig,
    random_seed,
)


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("kappa", [0, 1, 2], [-0.1, 2.1, float("nan")]),
        ("guidance_scale", [0, 7.5, 100], [-1, 101, float("inf")]),
        ("image_scale", [0, 0.55, 10], [-1, 11, float("nan")]),
        ("steps", [1, 1000], [0, 1001]),
        ("n", [1, 1000], [0, 1001]),
        ("batch_size", [1, 1000], [0, 1001]),
        ("seed", [0, 2**63 - 2], [-2, 2**63 - 1]),
        ("strength", [-10, 0, 10], [11, float("nan")]),
        ("solver", config.SOLVER_NAMES, ["magic", ""]),
    ],
)
def test_a_value_out_of_range_is_refused_and_named(field, good, bad):
    for value in good:
        assert getattr(SamplingConfig(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(UsageError, match=f"{field.replace('_', ' ')} is ") as caught:
            SamplingConfig(**{field: value})
        assert caught.value.why


@pytest.mark.parametrize("options", [{}, {"seed": None}, {"seed": RANDOM}], ids=str)
def test_no_seed_is_a_random_one_that_the_config_tells(monkeypatch, options):
    monkeypatch.setattr(config, "random_seed", random_seed)
    seeds = {SamplingConfig(n=1000, **options).seed for _ in range(20)}
    assert len(seeds) > 15 and all(seed >= 0 and seed + 999 < 2**32 for seed in seeds)


@pytest.mark.parametrize("chance", [0, 1])
def test_a_random_seed_leaves_room_for_every_picture(monkeypatch, chance):
    monkeypatch.setattr("secrets.randbelow", lambda most: chance * (most - 1))
    assert random_seed(1000) == chance * (2**32 - 1000)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingConfig().steps = 3


@pytest.mark.parametrize(
    "options",
    [
        {"images": ("a",), "subject": "b"},
        {"output": "-", "n": 2},
        {"images": ("",)},
        {"subject": ""},
        {"threads": 0},
        {"device": -1},
        {"kappa": 1.0},
        {"cfg": True},
        {"cfg": True, "kappa": 1.0, "subject": "b"},
        {"cfg": True, "kappa": 0.0, "subject": "b"},
        {"image_scale": 0.5},
        {"images": ("a",), "combine": "concat"},
        {"images": ("a",), "combine": ""},
        {"subject": "b", "combine": "product"},
        {"partial": True},
        {"partial": True, "images": ("a",)},
    ],
    ids=str,
)
def test_options_that_exclude_each_other_or_name_nothing_are_refused(options):
    with pytest.raises(UsageError):
        GenerateConfig(prompt="a robot", **options)


def test_the_sampling_options_are_taken_over_and_changed():
    asked = GenerateConfig(prompt="a [V] robot", subject="s", kappa=0.5, n=8, seed=3)
    assert asked.sampling(n=2) == SamplingConfig(kappa=0.5, n=2, seed=3)


@pytest.mark.parametrize(
    "options",
    [{"format": "zip"}, {"images": ()}, {"images": ("",)}, {"output": ""}, {"combine": "median"}],
    ids=str,
)
def test_personalize_refuses_what_it_cannot_do(options):
    with pytest.raises(UsageError):
        PersonalizeConfig(**{"images": ("photos",), "output": "a.safetensors", **options})


@pytest.mark.parametrize(
    "options", [{"format": "zip"}, {"rank": 0}, {"rank": 1025}, {"source": ""}, {"output": ""}], ids=str
)
def test_convert_refuses_what_it_cannot_do(options):
    ConvertConfig(**(asked := {"source": "a", "output": "b", "format": "kohya"}))
    with pytest.raises(UsageError):
        ConvertConfig(**{**asked, **options})


def test_export_refuses_a_seed_that_is_none():
    with pytest.raises(UsageError, match=r"random.weights"):
        ExportConfig(model="tiny", output="bundle", random_weights=-1)
