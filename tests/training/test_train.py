"""Runs of a few steps on a random base model: what they log, write and compute. See also test_train_*.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from hyperrt.training import train
from hyperrt.training.model import lora_layers
from hyperrt.training.run import checkpoint, preview
from hyperrt.training.run import trainer as trainer_module
from hyperrt.training.run.config import TrainConfig
from hyperrt.training.run.sample import sample
from hyperrt.training.run.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


def test_the_smoke_preset_logs_monitors_from_step_0_and_writes_a_sheet_and_a_hypernetwork(
    world, tmp_path, entries
):
    out = tmp_path / "run"
    folders = ["--base", world.base, "--data", world.cache, "--output", out]
    arguments = ["--preset", "smoke", *folders, "--steps", 4]
    result = CliRunner().invoke(train.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    logged = entries(out)
    assert logged[0]["config"]["steps"] == 4
    assert {"own", "shuffled", "base", "gap", "cos_subjects"} <= logged[1]["monitor"].keys()
    assert (logged[1]["step"], logged[-1]["step"]) == (0, 4)
    figures = logged[2]
    assert {"loss", "ft", "reg", "grad_norm", "lr"} <= figures.keys()
    assert figures["rows_per_s"] > 0
    assert figures["peak_mb"] > 8 * figures["mb_per_sample"] > 0
    with Image.open(out / "samples" / "step-000004.png") as sheet:
        assert sheet.width > 5 * 64
    decoder, about = checkpoint.load_hypernet(out)
    assert (about["step"], about["token"]) == (4, "sks")
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


@pytest.mark.parametrize("module", ["training.train", "hyperrt.training.train"])
def test_it_is_a_module_of_the_repository_as_well_as_of_the_installation(module):
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"Usage: python -m {module} ")


def test_former_flags_still_work_and_are_not_in_the_help(settings, monkeypatch):
    configs = []
    monkeypatch.setattr(train, "run", lambda config, *_: configs.append(config))
    former = {"base": "model", "batch_size": "batch"}
    for names in ({}, former):
        flags = {names.get(name, name): value for name, value in settings.items()}
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        assert CliRunner().invoke(train.main, arguments).exit_code == 0
    assert configs[0] == configs[1]
    text = CliRunner().invoke(train.main, ["--help"]).stdout
    assert not {"--model", "--batch"} & set(text.split())


def test_a_dry_run_prints_memory_and_shapes_and_writes_nothing(settings, tmp_path):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    result = CliRunner().invoke(train.main, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert not list(tmp_path.iterdir())
    assert found["batch"]["latents"] == "[4, 8, 8, 8] float32"
    assert found["lora"]["rank"] == 2
    trainer = Trainer(TrainConfig(**settings))
    assert found["decoder"]["parameters"] == sum(p.numel() for p in trainer.decoder.parameters())
    layout = trainer.decoder.layout
    assert sum(found["lora"]["numbers"].values()) == sum(map(layout.size, ("lora_q", "lora_kv")))
    memory = found["memory_mb"]
    assert memory["peak"] == pytest.approx(memory["before"] + 4 * memory["per_sample"])
    assert found["step"]["loss"] > 0


def test_a_fresh_decoders_lora_changes_no_picture(settings):
    trainer = Trainer(TrainConfig(**{**settings, "photos": 1}))
    batch = trainer.batches.at(0)
    lora = trainer.decoder(batch.features)
    inputs = (batch.latents, batch.timesteps, batch.text)
    with torch.no_grad():
        torch.testing.assert_close(
            trainer.predict(*inputs, lora), trainer.predict(*inputs, None), atol=0, rtol=0
        )


@pytest.mark.parametrize(
    "decoder",
    [{}, {"kind": "resampler", "head_dim": 0, "output_dim": 24, "queries": "site", "shared_heads": True}],
    ids=["hyperdreambooth", "resampler"],
)
def test_a_decoder_of_either_kind_learns(settings, no_sheets, entries, decoder):
    changes = {"steps": 20, "lr": 0.02, "holdout": 8, "log_every": 20, "monitor_every": 20, **decoder}
    config = TrainConfig(**{**settings, **changes})
    before, after = [e["monitor"]["gain"] for e in entries(train.run(config)) if "monitor" in e]
    assert (before, after > 0.03) == (0, True)
    assert checkpoint.load_hypernet(config.output)[0].config == config.decoder


def test_a_run_without_held_out_subjects_has_no_monitors(settings, no_sheets, entries):
    run = train.run(TrainConfig(**{**settings, "holdout": 0, "steps": 2}))
    assert not [entry for entry in entries(run) if "monitor" in entry]


@pytest.mark.parametrize(("holdout", "rows"), [(0, 0), (3, 3), (9, preview.SUBJECTS)])
def test_a_sheet_has_a_row_for_each_held_out_subject_and_no_more(
    settings, tmp_path, monkeypatch, holdout, rows
):
    drawn = []

    def draw(base, prompts, *rest, **options):
        drawn.append(len(prompts))
        return np.zeros((len(prompts), 64, 64, 3), np.uint8)

    monkeypatch.setattr(preview, "sample", draw)
    trainer = Trainer(TrainConfig(**{**settings, "holdout": holdout}))
    preview.write(tmp_path / "sheet.png", trainer)
    assert drawn == [rows] * 4 * bool(rows)
    assert (tmp_path / "sheet.png").exists() == bool(rows)


def test_gradient_checkpointing_computes_twice_and_loses_no_gradient(settings, monkeypatch):
    calls, project = [], lora_layers.project
    monkeypatch.setattr(lora_layers, "project", lambda *arguments: calls.append(1) or project(*arguments))
    gradients, counts = [], []
    for saving in (False, True):
        trainer = Trainer(TrainConfig(**settings, gradient_checkpointing=saving))
        with torch.no_grad():
            for weight in trainer.decoder.heads.weights:  # fresh ones of B are zero: A has no gradient then
                weight.add_(0.01)
        calls.clear()
        trainer.losses(trainer.batches.at(0), None)["loss"].backward()
        counts.append(len(calls))
        gradients.append({name: p.grad for name, p in trainer.decoder.named_parameters()})
    assert counts[1] == 2 * counts[0]
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_are_of_the_precision_that_was_asked_for(settings, precision, monkeypatch):
    seen = set()
    project = lora_layers.project

    def watched(*arguments):
        result = project(*arguments)
        seen.add(result.dtype)
        return result

    monkeypatch.setattr(lora_layers, "project", watched)
    trainer = Trainer(TrainConfig(**settings, precision=precision))
    trainer.step(0)
    assert seen == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}


def test_frozen_weights_in_bf16_as_on_a_gpu_give_nearly_the_same(settings, monkeypatch):
    exact = Trainer(TrainConfig(**settings, precision="fp32")).step(0)
    monkeypatch.setattr(trainer_module.device, "frozen_dtype", lambda device, precision: torch.bfloat16)
    trainer = Trainer(TrainConfig(**settings, precision="bf16"))
    assert {p.dtype for p in trainer.base.unet.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(trainer.step(0), exact, rtol=2e-2, atol=1e-3)
    lora = trainer.optimizer.ema(trainer.batches.at(0).features[:1])
    pictures = sample(trainer.base, ["a mug"], ["a sks mug"], lora, rank=trainer.config.rank, steps=2)
    assert pictures.shape == (1, 64, 64, 3)
