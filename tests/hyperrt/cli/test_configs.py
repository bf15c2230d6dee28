"""The options of a command are checked once, before anything slow."""

from __future__ import annotations

import pytest

from hyperrt.cli.configs import ConvertConfig, ExportConfig, GenerateConfig, PersonalizeConfig
from hyperrt.errors import UsageError
from hyperrt.sampling.options import SamplingOptions


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
    assert asked.sampling(n=2) == SamplingOptions(kappa=0.5, n=2, seed=3)


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
