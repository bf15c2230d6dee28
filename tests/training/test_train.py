"""Runs of a few steps on a random base model: logged, stopped, killed, resumed, refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from hyperrt.errors import Incompatible, IntegrityError, NumericError, UsageError
from training import checkpoint, train
from training.config import TrainConfig

KILLS = 3


def entries(folder: Path | str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def curve(folder: Path | str) -> list[dict]:
    """The log without what the clock and the folder's name decide."""
    return [
        {k: v for k, v in entry.items() if k not in ("rows_per_s", "config")} for entry in entries(folder)
    ]


@pytest.fixture
def no_sheets(monkeypatch):
    """Sample sheets are tested once; they are the longest part of a short run."""
    monkeypatch.setattr(train.preview, "write", lambda path, trainer: None)


@pytest.fixture(scope="module")
def straight(short_run, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.preview, "write", lambda path, trainer: None)
        return train.run(TrainConfig(**short_run, out=str(tmp_path_factory.mktemp("straight") / "run")))


@pytest.fixture
def finished(straight, settings) -> Path:
    """A copy of that run, in the folder of `settings`."""
    return Path(shutil.copytree(straight, settings["out"]))


def stop_before(monkeypatch, step: int, action) -> None:
    """Calls `action` when the trainer begins that step."""
    whole = train.Trainer.step

    def interrupted(self, number):
        if number == step:
            action()
        return whole(self, number)

    monkeypatch.setattr(train.Trainer, "step", interrupted)


def test_the_smoke_preset_logs_monitors_from_step_0_and_writes_a_sheet_and_a_hypernetwork(world, tmp_path):
    out = tmp_path / "run"
    arguments = [
        "--preset",
        "smoke",
        "--base",
        world.base,
        "--cache",
        world.cache,
        "--out",
        out,
        "--steps",
        4,
    ]
    result = CliRunner().invoke(train.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    logged = entries(out)
    assert logged[0]["config"]["steps"] == 4
    assert {"own", "shuffled", "base", "gap", "cos_subjects"} <= logged[1]["monitor"].keys()
    assert (logged[1]["step"], logged[-1]["step"]) == (0, 4)
    assert {"loss", "ft", "reg", "grad_norm", "lr"} <= logged[2].keys()
    with Image.open(out / "samples" / "step-000004.png") as sheet:
        assert sheet.width > 5 * 64
    decoder, about = checkpoint.load_hypernet(out)
    assert (about["step"], about["token"]) == (4, "sks")
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


def test_a_fresh_decoders_lora_changes_no_picture(settings):
    trainer = train.Trainer(TrainConfig(**{**settings, "photos": 1}))
    batch = trainer.batches.at(0)
    lora = trainer.decoder(batch.features)
    inputs = (batch.latents, batch.timesteps, batch.text)
    with torch.no_grad():
        torch.testing.assert_close(
            trainer.predict(*inputs, lora), trainer.predict(*inputs, None), atol=0, rtol=0
        )


def test_the_loss_falls(settings, no_sheets):
    config = TrainConfig(**{**settings, "steps": 20, "lr": 0.02, "log_every": 5, "monitor_every": 20})
    first, *_, last = [entry["loss"] for entry in entries(train.run(config)) if "loss" in entry]
    assert last < first


def test_a_killed_run_goes_on_with_the_same_curve(settings, straight, no_sheets):
    """SIGKILL at random moments, from start-up to the last step, until a run gets through."""
    seed = random.randrange(2**32)
    print(f"random.seed({seed})")
    moments = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.train"])
    config = TrainConfig(**settings)
    run = Path(config.out)
    for _ in range(KILLS):
        process = context.Process(target=train.run, args=(config, True))
        process.start()
        wait_for_line(process, run, moments.randrange(8))
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
    train.run(config, resume=True)
    assert curve(run) == curve(straight)
    assert (run / "hypernet.safetensors").read_bytes() == (straight / "hypernet.safetensors").read_bytes()


def wait_for_line(process, run: Path, count: int) -> None:
    """Until the log has so many lines, or the process has ended."""
    while process.is_alive():
        log = run / "log.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_exits_128_plus_the_signal_and_goes_on(
    settings, straight, no_sheets, monkeypatch, number
):
    config = TrainConfig(**settings)
    with monkeypatch.context() as patch:
        stop_before(patch, 4, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped:
            train.run(config)
    assert stopped.value.code == 128 + number
    assert checkpoint.load_hypernet(config.out)[1]["step"] == 5
    train.run(config, resume=True)
    assert curve(config.out) == curve(straight)


def test_a_loss_that_is_not_a_number_stops_with_the_step_and_the_identities(settings, no_sheets, monkeypatch):
    config = TrainConfig(**settings)
    whole = train.row_loss
    calls = []

    def broken(prediction, target):
        calls.append(1)
        return whole(prediction, target) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(train, "row_loss", broken)
    with pytest.raises(NumericError, match=r"step 4: .*\n.*loss nan.*identities \[\d+, \d+, \d+, \d+\]"):
        train.run(config)
    assert checkpoint.load_hypernet(config.out)[1]["step"] == 3


def test_a_folder_with_a_run_is_refused_without_resume(settings, finished):
    with pytest.raises(UsageError, match="holds a run"):
        train.run(TrainConfig(**settings))


def test_resuming_on_another_base_model_is_refused(settings, finished, monkeypatch):
    monkeypatch.setattr(train.checkpoint, "hash_of", lambda module: "0" * 64)
    with pytest.raises(Incompatible, match="of another base model"):
        train.run(TrainConfig(**settings), resume=True)


def test_resuming_with_another_rank_is_refused(settings, finished):
    with pytest.raises(Incompatible, match="rank was 2 and is 3"):
        train.run(TrainConfig(**{**settings, "rank": 3}), resume=True)


@pytest.mark.parametrize("length", [0, 7, 200, 5000])
def test_a_truncated_state_is_refused_by_name(settings, finished, length):
    os.truncate(finished / checkpoint.STATE, length)
    with pytest.raises(IntegrityError, match=r"state.safetensors is damaged"):
        train.run(TrainConfig(**settings), resume=True)


def test_a_setting_that_changes_with_the_resume_is_said(settings, finished, no_sheets, caplog):
    train.run(TrainConfig(**{**settings, "steps": 7, "lr": 1e-4}), resume=True)
    assert "lr was 0.001 and is 0.0001 now" in caplog.text
    assert entries(finished)[-1]["step"] == 7


def test_the_command_ends_with_the_errors_message_and_code(settings, finished):
    folders = {name: settings[name] for name in ("base", "cache", "out")}

    def ended(*flags, **changed):
        named = [
            part for name, folder in {**folders, **changed}.items() for part in (f"--{name}", str(folder))
        ]
        result = CliRunner().invoke(train.main, [*named, *flags])
        return result.exit_code, result.output

    assert ended()[0] == 2
    assert "do:  add --resume" in ended()[1]
    assert ended(base="nowhere", out=finished / "new")[0] == 4
    assert ended(cache=settings["base"], out=finished / "new")[0] == 4
    assert "no identity is left" in ended("--holdout", "40", out=finished / "new")[1]
    code, output = ended("--lr", "0")
    assert (code, "lr" in output) == (2, True)
