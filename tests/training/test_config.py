from __future__ import annotations

import json

import pytest

from training.config import PRESETS, TrainConfig, resolve

PATHS = {"base": "b", "cache": "c", "out": "o"}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_configuration(preset):
    assert isinstance(resolve(PATHS, preset), TrainConfig)


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"steps": 7, "lr": 0.5}))
    config = resolve({**PATHS, "lr": 0.25, "dim": None}, "smoke", file)
    assert (config.steps, config.lr, config.dim) == (7, 0.25, PRESETS["smoke"]["dim"])


def test_an_unknown_setting_is_named(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"learning_rate": 1}))
    with pytest.raises(ValueError, match="unknown settings: learning_rate"):
        resolve(PATHS, file=file)


def test_missing_folders_are_named_as_flags():
    with pytest.raises(ValueError, match="missing: --cache, --out"):
        resolve({"base": "b"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"ema": 1.5},
        {"lambda_": -1},
        {"reduction": "median"},
        {"regularised": "weights"},
        {"prior": "none"},
        {"batch": 6, "targets": 4},
        {"lr": 0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_number_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        resolve({**PATHS, **wrong})
