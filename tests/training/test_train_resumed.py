"""What a run may be told otherwise when it goes on, and what it refuses to begin with."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from hyperrt.errors import Incompatible, IntegrityError, UsageError
from hyperrt.training import train
from hyperrt.training.model import weight_hash
from hyperrt.training.run import checkpoint, config
from hyperrt.training.run.config import TrainConfig


def resume(settings, allow_changes=False, **changes) -> Path:
    return train.run(TrainConfig(**{**settings, **changes}), resume=True, allow_changes=allow_changes)


def test_a_folder_with_a_run_is_refused_without_resume(settings, finished):
    with pytest.raises(UsageError, match="holds a run"):
        train.run(TrainConfig(**settings))


def test_a_run_may_go_on_longer_report_otherwise_and_compute_elsewhere(
    settings, finished, world, tmp_path, no_sheets, entries
):
    moved = shutil.copytree(world.base, tmp_path / "moved")
    resume(
        settings, base=str(moved), steps=8, log_every=1, monitor_every=7, sample_every=9, save_every=4,
        threads=1, gradient_checkpointing=True, shard_optimizer=True, compress_gradients=True,
    )  # fmt: skip
    assert [e["step"] for e in entries(finished) if "loss" in e] == [2, 4, 6, 7, 8]
    assert checkpoint.load_hypernet(finished)[1]["training"]["base"] == str(moved)


def test_what_is_free_to_change_are_settings():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names >= config.FREE | config.FIXED
    assert not config.FREE & config.FIXED


def test_other_settings_are_refused_with_the_differences(settings, finished):
    changes = {"lr": 1e-4, "steps": 7, "lambda_": 0.5, "reduction": "sum"}
    said = r"lr was 0\.001 and is 0\.0001, lambda_ was 0\.05 and is 0\.5, reduction was mean and is sum\n"
    with pytest.raises(UsageError, match=said) as refused:
        resume(settings, **changes)
    assert "steps" not in str(refused.value)
    assert "--allow-changes" in refused.value.do


def test_other_settings_can_be_allowed(settings, finished, no_sheets, entries, caplog):
    resume(settings, allow_changes=True, steps=7, lr=1e-4)
    assert caplog.text.count("lr was 0.001 and is 0.0001 now") == 1
    assert entries(finished)[-1]["step"] == 7


@pytest.mark.parametrize(("allowed", "error"), [(False, UsageError), (True, Incompatible)])
@pytest.mark.parametrize(("name", "value"), [("rank", 3), ("shared_heads", True)])
def test_another_decoder_is_refused_even_if_changes_are_allowed(
    settings, finished, name, value, allowed, error
):
    with pytest.raises(error, match=rf"{name} was {settings.get(name, False)} and is {value}") as refused:
        resume(settings, allow_changes=allowed, **{name: value})
    assert "--allow-changes" not in refused.value.do


def test_other_pictures_are_refused(settings, finished, world, tmp_path):
    other = Path(shutil.copytree(world.cache, tmp_path / "other"))
    for name in ("images.npy", "latents.npy"):
        np.save(other / name, np.load(other / name)[::-1])
    with pytest.raises(UsageError, match=r"the content of --data was [0-9a-f]{12} and is "):
        resume(settings, data=str(other))


def test_another_base_model_is_refused(settings, finished, monkeypatch):
    monkeypatch.setattr(weight_hash, "hash_of", lambda module, half=False: "0" * 64)
    with pytest.raises(Incompatible, match="trained with another base model"):
        resume(settings)


def test_a_state_of_before_settings_had_their_present_names_goes_on(settings, finished, no_sheets, entries):
    tensors, metadata = checkpoint.read(finished / checkpoint.STATE)
    before = json.loads(metadata["config"])
    added = ("kind", "output_dim", "queries", "shared_heads", "precision", "gradient_checkpointing")
    old = {name: value for name, value in before.items() if name not in added}
    former = {"base": "model", "batch_size": "batch", "data": "cache", "output": "out"}
    old = {former.get(name, name): value for name, value in old.items()}
    tensors = {name.replace("model/", "decoder/", 1): tensor for name, tensor in tensors.items()}
    metadata = {"step": "6", "base_model": metadata["base_model"], "config": json.dumps(old)}
    save_file(tensors, finished / checkpoint.STATE, metadata)
    resume(settings, steps=7)
    assert entries(finished)[-1]["step"] == 7


@pytest.mark.parametrize("length", [0, 7, 200, 5000])
def test_a_truncated_state_is_refused_by_name(settings, finished, length):
    os.truncate(finished / checkpoint.STATE, length)
    with pytest.raises(IntegrityError, match=r"state.safetensors is damaged"):
        resume(settings)


def ended(settings, *flags: str) -> tuple[int, list[str]]:
    """Exit code of the command, and the lines of its error."""
    folders = [f"--{name}={settings[name]}" for name in ("base", "data", "output")]
    result = CliRunner().invoke(train.main, [*folders, *flags])
    start = result.stderr.find("Error:")
    return result.exit_code, result.stderr[start:].splitlines() if start >= 0 else []


def test_the_command_ends_with_the_errors_message_and_code(settings, finished, tmp_path):
    code, lines = ended(settings)
    assert (code, lines[2].strip()) == (2, "do:  add --resume, or choose another --output")
    new = {**settings, "output": str(tmp_path / "new")}
    assert ended({**new, "base": "nowhere"})[0] == 4
    code, lines = ended(new, "--lr", "0")
    assert (code, "lr" in lines[0]) == (2, True)
    assert not (tmp_path / "new").exists()


def one_picture(folder: Path) -> None:
    for name in ("images", "latents", "nouns", "backgrounds"):
        np.save(folder / f"{name}.npy", np.load(folder / f"{name}.npy")[:1])


def truncated(name: str):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 100)


def short_of_latents(folder: Path) -> None:
    np.save(folder / "latents.npy", np.load(folder / "latents.npy")[:-1])


def bad_nouns(folder: Path) -> None:
    np.save(folder / "nouns.npy", np.full(40, 99, np.int16))


def features_cut(folder: Path) -> None:
    [features] = folder.glob("features-*.npy")
    os.truncate(features, 5000)


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (lambda folder: shutil.rmtree(folder), 4, "not a finished"),
        (lambda folder: (folder / "cache.json").unlink(), 4, "not a finished"),
        (lambda folder: (folder / "latents.npy").unlink(), 4, "no latents"),
        (one_picture, 2, "the data has 1 subjects"),
        (truncated("images.npy"), 8, ""),
        (truncated("latents.npy"), 8, ""),
        (truncated("nouns.npy"), 8, ""),
        (short_of_latents, 8, "latents"),
        (bad_nouns, 8, ""),
        (features_cut, 8, ""),
    ],
    ids=[
        "none", "not a cache", "no latents", "one picture", "cut images", "cut latents", "cut nouns",
        "fewer latents", "unknown nouns", "cut features",
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_is_refused_in_three_lines(
    settings, straight, world, tmp_path, damage, code, said
):
    """`straight`: so that the features of the pictures are there."""
    data = Path(shutil.copytree(world.cache, tmp_path / "data"))
    damage(data)
    found, lines = ended({**settings, "data": str(data)})
    assert found == code, lines
    assert len(lines) == 3 and lines[1].startswith("  why: ") and lines[2].startswith("  do:  ")
    assert said in "\n".join(lines)
    assert not Path(settings["output"]).exists()


def test_a_damaged_base_model_is_refused_in_three_lines(settings, world, tmp_path):
    model = Path(shutil.copytree(world.base, tmp_path / "model"))
    tensors = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    tensors.pop("conv_in.weight")
    save_file(tensors, model / "unet" / "diffusion_pytorch_model.safetensors")
    code, lines = ended({**settings, "base": str(model)})
    assert (code, len(lines)) == (8, 3)
    assert "conv_in.weight" in lines[1]
    assert torch.is_tensor(tensors["conv_out.weight"])
