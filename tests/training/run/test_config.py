from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("torch")

from hyperrt.training.model.decoder_config import FULL_CLOSED, FULL_OPEN, DecoderConfig
from hyperrt.training.run.config import (
    TrainConfig,
    differences,
    resolve,
    to_json,
)
from hyperrt.training.run.presets import PRESETS

PATHS = {"base": "b", "data": "c", "output": "o"}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_configuration(preset):
    assert isinstance(resolve(PATHS, preset), TrainConfig)


def test_the_file_may_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"steps": 7}), encoding="utf-8-sig")
    assert resolve(PATHS, file=file).steps == 7


def test_a_file_may_have_former_names(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"model": "b", "batch": 6}))
    config = resolve({"data": "c", "output": "o"}, file=file)
    assert (config.base, config.batch_size) == ("b", 6)


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
    with pytest.raises(ValueError, match="missing: --data, --output"):
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
        {"batch_size": 6, "targets": 4},
        {"lr": 0},
        {"seed": -1},
        {"precision": "fp16"},
        {"image_scale": 11},
        {"kind": "perceiver"},
        {"output_dim": 64},
        {"steps": "7"},
        {"lr": True},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_number_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        resolve({**PATHS, **wrong})


def test_the_papers_presets_have_its_numbers():
    """Tables 6 and 8; the rate is constant after the warm-up."""
    from hyperrt.training.run.optimizer import Schedule

    known = {"celeba": (3, 1e-5, 30_000), "afhq": (3, 1e-5, 4000), "open": (2, 1e-6, 4000)}
    for name, (rank, lr, steps) in known.items():
        config = resolve(PATHS, name)
        assert (config.rank, config.lr, config.steps, config.batch_size) == (rank, lr, steps, 64)
        assert (config.weight_decay, config.warmup) == (1e-4, 500)
        schedule = Schedule(steps, lr, config.warmup, config.final_lr)
        assert schedule.rate(500) == schedule.rate(steps - 1) == lr
    assert resolve(PATHS, "celeba").decoder == resolve(PATHS, "afhq").decoder == FULL_CLOSED
    assert resolve(PATHS, "open").decoder == FULL_OPEN
    assert resolve(PATHS, "paper_literal").decoder.dim == 4


def test_the_weight_of_the_penalty_comes_with_its_reduction():
    found = {name: (resolve(PATHS, name).lambda_, resolve(PATHS, name).reduction) for name in PRESETS}
    assert found["celeba"] == (0.15, "matrix_fro_mean")
    assert found["afhq"] == (0.5, "matrix_fro_mean")
    assert found["open"] == found["celeba_table_6"] == found["afhq_table_6"] == (100.0, "mean")


def test_every_field_of_a_decoder_can_be_set():
    shape = {"kind": "resampler", "dim": 64, "layers": 3, "iterations": 1, "head_dim": 16}
    shape |= {"output_dim": 32, "queries": "site", "shared_heads": True}
    assert resolve({**PATHS, **shape}).decoder == DecoderConfig(**shape)


def test_differences_are_those_that_change_the_numbers():
    config = TrainConfig(**PATHS)
    before = {**to_json(config), "output": "elsewhere", "steps": 1, "clip": 2.0, "gone": 1}
    del before["kind"]
    assert differences(before, config) == {"clip": (2.0, 1.0)}


def test_every_field_is_an_option_of_hyperrt_train():
    train = pytest.importorskip("hyperrt.training.train")
    options = {parameter.name for parameter in train.main.params}
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= options
