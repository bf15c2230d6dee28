"""The pretraining with a few steps of each stage, a small UNet and a small cache."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel

from hyperrt.errors import UsageError
from hyperrt.training import pretrain
from hyperrt.training.data import cache as data
from hyperrt.training.model import base_model as bases
from hyperrt.training.model.encode import encode_text
from hyperrt.training.run import contrastive
from hyperrt.training.run.optimizer import Schedule
from hyperrt.training.run.sample import sample

SCHEDULE = Schedule(steps=4, lr=1e-3, warmup=2, log_every=1, report_every=2)
STAGES = pretrain.STAGES


class Crash(BaseException):
    pass


def small_unet():
    return UNet2DConditionModel(
        sample_size=8, in_channels=bases.LATENT_CHANNELS, out_channels=bases.LATENT_CHANNELS,
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=bases.TEXT_WIDTH,
    )  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small():
    """Everything that takes long, made small."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VAE", "IMAGE_ENCODER", "DECODER", "UNET"):
            patch.setattr(pretrain, name, SCHEDULE)
        patch.setattr(contrastive, "VALIDATION", 8)
        patch.setattr(pretrain, "sample", lambda *args, **options: sample(*args, **{**options, "steps": 1}))
        patch.setattr(bases, "tiny_unet", small_unet)
        yield


def run(folder, until="unet", seed=0):
    cache = data.build(folder / "cache", 24, 2, bases.IMAGE_SIZE, workers=1)
    pretrain.train(folder, cache, 1.0, 8, seed, until)
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A pretraining that nothing interrupted."""
    return run(tmp_path_factory.mktemp("straight"))


def curve(folder, stage):
    lines = (folder / stage / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def weights(folder):
    return {path.relative_to(folder): path.read_bytes() for path in (folder / "base").rglob("*.safetensors")}


def crash_at_sheet(monkeypatch, number):
    """Dies when the sheet of that number is put together: two are of each stage that draws them."""
    whole, calls = pretrain.write_sheet, []

    def write_sheet(path, rows):
        calls.append(rows)
        if len(calls) == number:
            raise Crash
        whole(path, rows)

    monkeypatch.setattr(pretrain, "write_sheet", write_sheet)


def test_the_base_model_is_written_and_can_be_loaded(straight):
    base = bases.load(straight / "base")
    assert base.vae.config.scaling_factor > 0
    assert base.unet.config.in_channels == bases.LATENT_CHANNELS
    assert encode_text(base, ["a robot on a beach"]).shape == (1, bases.MAX_TOKENS, bases.TEXT_WIDTH)
    assert {path.name for path in (straight / "unet").glob("*.png")} == {"000002.png", "000004.png"}


def test_every_stage_logs_its_losses_and_what_it_measures(straight):
    for stage, measured in zip(STAGES, ("psnr", "held_out_top1", "psnr", None), strict=True):
        entries = curve(straight, stage)
        assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
        assert measured is None or measured in entries[-1]


def test_latents_are_scaled_to_a_unit_deviation(straight):
    latents = data.PictureCache.open(straight / "cache").latents
    assert latents.shape == (24, 2, bases.LATENT_CHANNELS, 8, 8)
    assert np.std(latents.astype(np.float32)) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("sheet", [2, 3, 6])
def test_a_run_that_died_goes_on_with_the_same_curve_and_weights(straight, tmp_path, monkeypatch, sheet):
    with monkeypatch.context() as patch:
        crash_at_sheet(patch, sheet)
        with pytest.raises(Crash):
            run(tmp_path)
    run(tmp_path)
    for stage in STAGES:
        assert curve(tmp_path, stage) == curve(straight, stage)
    assert weights(tmp_path) == weights(straight)


def test_stages_one_after_the_other_are_the_whole(straight, tmp_path):
    for stage in STAGES:
        run(tmp_path, until=stage)
    assert weights(tmp_path) == weights(straight)


def test_half_of_the_captions_are_described(straight, tmp_path, monkeypatch):
    asked, forward = [], pretrain.Denoiser.forward

    def listen(self, latents, timesteps, ids):
        asked.extend(ids.tolist())
        return forward(self, latents, timesteps, ids)

    monkeypatch.setattr(pretrain.Denoiser, "forward", listen)
    monkeypatch.setattr(pretrain, "UNET", dataclasses.replace(SCHEDULE, steps=40, report_every=40))
    run(tmp_path, until="decoder")
    run(tmp_path)
    texts = bases.load(straight / "base").tokenizer.batch_decode(asked, skip_special_tokens=True)
    shares = {name: np.mean([name in text for text in texts]) for name in (" with ", "sks")}
    empty = np.mean([not text for text in texts])
    assert shares == {" with ": pytest.approx(0.45, abs=0.1), "sks": pytest.approx(0.225, abs=0.1)}
    assert empty == pytest.approx(pretrain.TEXT_DROPOUT, abs=0.06)


def test_another_seed_is_another_run(straight, tmp_path):
    run(tmp_path, until="vae", seed=1)
    assert curve(tmp_path, "vae") != curve(straight, "vae")


def test_no_stage_draws_a_held_out_identity():
    cache = dataclasses.make_dataclass("Cache", ["shape"])((24, 2))
    who, views = pretrain.draw(cache, 500, torch.Generator().manual_seed(0))
    assert set(who.tolist()) == set(range(16))
    assert set(views.tolist()) == {0, 1}


def test_the_command_mixes_cutouts_in_and_names_the_errors_of_its_options(
    tmp_path, monkeypatch, cutout_folder
):
    caches = []
    monkeypatch.setattr(pretrain, "train", lambda out, cache, *rest: caches.append(cache))
    folder = cutout_folder(tmp_path / "cutouts", [("red", "toy")])
    always = ["--output", str(tmp_path / "run"), "--identities", "256", "--views", "2", "--workers", "1"]

    def ended(*options):
        result = CliRunner().invoke(pretrain.main, [*always, *options])
        return result.exit_code, result.output

    assert ended("--cutouts", str(folder), "--cutout-share", "0.1")[0] == 0
    assert "toy" in caches[0].names
    code, output = ended("--cutouts", str(tmp_path / "absent"))
    assert (code, "there is no folder" in output) == (4, True)
    for option in (["--scale", "0"], ["--views", "1"], ["--identities", "20"], ["--until", "all"]):
        code, output = ended(*option)
        assert (code, option[0] in output) == (2, True)


def test_a_folder_that_is_no_base_model_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "train_vae", lambda *_: pytest.fail("work was done"))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no model_index"):
        pretrain.train(tmp_path, None, 1.0, 8, 0, "unet")


def test_other_settings_ask_for_force_before_they_replace_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "train", lambda *_: None)
    always = ["--output", str(tmp_path), "--views", "2", "--workers", "1", "--identities"]
    assert CliRunner().invoke(pretrain.main, [*always, "256"]).exit_code == 0
    result = CliRunner().invoke(pretrain.main, [*always, "257"])
    assert result.exit_code == 2 and "--force" in result.output
    assert len(data.PictureCache.open(tmp_path / "cache").nouns) == 256
    assert CliRunner().invoke(pretrain.main, [*always, "257", "--force"]).exit_code == 0


def test_a_run_that_dies_while_the_base_model_is_written_leaves_the_one_before(
    straight, tmp_path, monkeypatch
):
    shutil.copytree(straight, tmp_path / "run")

    def dies(base, folder):
        (folder / "model_index.json").write_text("half of")
        raise Crash

    monkeypatch.setattr(pretrain.bases, "save", dies)
    with pytest.raises(Crash):
        run(tmp_path / "run")
    assert weights(tmp_path / "run") == weights(straight)
    before, after = ((folder / "base" / "model_index.json") for folder in (straight, tmp_path / "run"))
    assert before.read_text() == after.read_text()


def test_former_flags_still_work_and_are_not_in_the_help(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(pretrain.data, "build", lambda *arguments, **options: None)
    monkeypatch.setattr(pretrain, "train", lambda *arguments: calls.append(arguments))
    for output, batch in (("--output", "--batch-size"), ("--out", "--batch")):
        assert CliRunner().invoke(pretrain.main, [output, str(tmp_path), batch, "16"]).exit_code == 0
    assert calls[0] == calls[1]
    assert not {"--out", "--batch"} & set(CliRunner().invoke(pretrain.main, ["--help"]).stdout.split())
