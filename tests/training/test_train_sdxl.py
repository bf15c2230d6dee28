"""The open category: a small SDXL, whose UNet reads pooled text and sizes, and an image prompt."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from hyperrt.errors import Incompatible, UsageError
from hyperrt.training import train
from hyperrt.training.model import base_model as bases
from hyperrt.training.model import weight_hash
from hyperrt.training.model.image_prompt import ImagePrompt
from hyperrt.training.model.lora_layers import Rows, unpack
from hyperrt.training.model.predictor import Predictor
from hyperrt.training.run import checkpoint
from hyperrt.training.run.config import TrainConfig
from hyperrt.training.run.trainer import Trainer

TOKENS = 3


def prompt_file(path, unet, width: int, seed: int = 0):
    torch.manual_seed(seed)
    prompt = ImagePrompt(unet, width, TOKENS, dim=16, heads=1)
    save_file({name: tensor.contiguous() for name, tensor in prompt.state_dict().items()}, path)
    return str(path)


@pytest.fixture
def open_settings(settings, sdxl, tmp_path):
    """Settings of a run on it."""
    width = sdxl.base.image_encoder.config.hidden_size
    return {
        **settings, "base": str(sdxl.model), "data": str(sdxl.cache.path),
        "kind": "resampler", "head_dim": 0, "photos": 2, "batch_size": 2, "holdout": 1, "steps": 3,
        "precision": "fp32",
        "image_prompt": prompt_file(tmp_path / "prompt.safetensors", sdxl.base.unet, width),
    }  # fmt: skip


def test_a_run_with_an_image_prompt_is_logged_and_goes_on(open_settings, entries):
    run = train.run(TrainConfig(**open_settings))
    logged = entries(run)
    begin = logged[1]["monitor"]
    known = checkpoint.load_hypernet(run)[1]["base_model"]
    unet = bases.load(open_settings["base"]).unet
    assert known == weight_hash.hash_of(unet, half=True)  # as export has it
    assert begin["gap"] == 0
    assert begin["own"] != begin["base"]  # a fresh LoRA does nothing, the image prompt does
    train.run(TrainConfig(**{**open_settings, "steps": 4}), resume=True)
    assert [entry["step"] for entry in entries(run) if "loss" in entry] == [2, 3, 4]


@pytest.fixture(scope="module")
def prompts(sdxl, tmp_path_factory):
    """Two image prompts of the small SDXL."""
    folder, width = tmp_path_factory.mktemp("prompts"), sdxl.base.image_encoder.config.hidden_size
    return [prompt_file(folder / f"{k}.safetensors", sdxl.base.unet, width, k) for k in range(2)]


def test_the_image_prompt_of_a_run_is_told_by_its_weights(open_settings, prompts, tmp_path, no_sheets):
    used = {**open_settings, "image_prompt": str(tmp_path / "used.safetensors"), "steps": 1}
    shutil.copy(prompts[0], used["image_prompt"])
    run = train.run(TrainConfig(**used))
    known = checkpoint.load_hypernet(run)[1]["image_prompt"]
    assert len(known) == 64
    train.run(TrainConfig(**{**used, "image_prompt": prompts[0], "steps": 2}), resume=True)  # moved
    shutil.copy(prompts[1], used["image_prompt"])
    for other, now in ((used["image_prompt"], "[0-9a-f]{12}"), (None, "nothing")):
        said = f"the content of --image-prompt was {known[:12]} and is {now}"
        with pytest.raises(UsageError, match=said):
            train.run(TrainConfig(**{**used, "image_prompt": other, "steps": 3}), resume=True)
    train.run(TrainConfig(**{**used, "steps": 3}), resume=True, allow_changes=True)
    assert checkpoint.load_hypernet(run)[1]["image_prompt"] != known


def test_a_state_of_before_image_prompts_were_told_by_their_weights_goes_on(
    open_settings, prompts, no_sheets
):
    used = {**open_settings, "image_prompt": prompts[0], "steps": 1}
    path = train.run(TrainConfig(**used)) / checkpoint.STATE
    tensors, metadata = checkpoint.read(path)
    save_file(tensors, path, {k: v for k, v in metadata.items() if k != "image_prompt"})
    with pytest.raises(UsageError, match="the content of --image-prompt was another and is nothing"):
        train.run(TrainConfig(**{**used, "image_prompt": None, "steps": 2}), resume=True)
    train.run(TrainConfig(**{**used, "steps": 2}), resume=True)
    known = checkpoint.load_hypernet(path.parent)[1]["image_prompt"]
    assert checkpoint.read(path)[1]["image_prompt"] == known != ""


def test_the_unet_reads_what_diffusers_pipeline_gives_it(open_settings, sdxl):
    trainer = Trainer(TrainConfig(**open_settings))
    rows = sdxl.table.subject[:2, 0]
    latents = torch.from_numpy(trainer.data.cache.latents[:2, 0].astype("float32"))
    timesteps = torch.tensor([10, 500])
    side = trainer.data.cache.images.shape[2]
    sizes = torch.tensor([[side, side, 0, 0, side, side]] * 2)
    text = sdxl.table.text(rows)
    added = {"text_embeds": text.pooled, "time_ids": sizes}
    with torch.no_grad():
        found = trainer.predict(latents, timesteps, trainer.data.captions.text(rows), None)
        expected = sdxl.base.unet(latents, timesteps, text.hidden_states, added_cond_kwargs=added).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_image_prompt_is_the_mean_of_the_photos_tokens_at_the_papers_scale(open_settings):
    trainer = Trainer(TrainConfig(**open_settings))
    batch = trainer.batches.at(1)
    photos = torch.from_numpy(trainer.data.features[:2, :2].astype("float32"))
    tokens = trainer.predict.image_tokens(photos.flatten(0, 1), photos=2)
    prompt = trainer.predict.image_prompt
    expected = prompt.tokens(photos.flatten(0, 1)).unflatten(0, (2, 2)).mean(1)
    torch.testing.assert_close(tokens, expected)
    lora = trainer.decoder(photos[:, 0])
    rows = trainer.predict.rows(lora, tokens)
    expected = prompt.key_values(tokens, torch.full((2,), 0.55))
    assert rows.image.keys() == expected.keys()
    assert all(torch.equal(a, b) for k in expected for a, b in zip(rows.image[k], expected[k], strict=True))
    assert isinstance(rows, Rows) and rows.factors.keys() == unpack(trainer.decoder.layout, lora).keys()
    inputs = (batch.latents, batch.timesteps, batch.text)
    with torch.no_grad():
        with_prompt, without = (trainer.predict(*inputs, lora, image) for image in (tokens, None))
    assert (with_prompt - without).abs().max() > 1e-3


def test_the_pictures_of_the_prior_have_no_image_prompt(open_settings, monkeypatch):
    trainer = Trainer(TrainConfig(**open_settings, gamma=0.5))
    seen = []
    predict = Predictor.__call__
    monkeypatch.setattr(Predictor, "__call__", lambda *given: seen.append(given[-1]) or predict(*given))
    assert torch.isfinite(trainer.step(0)).all()
    own, prior = seen[0].chunk(2)
    assert own.abs().max() > 0
    assert not prior.any()


def test_the_open_categorys_decoder_without_an_image_prompt_is_warned_about(open_settings, caplog):
    for prompt in (open_settings["image_prompt"], None):
        Trainer(TrainConfig(**{**open_settings, "image_prompt": prompt}))
    ours = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "hyperrt.training"]
    [(level, said)] = [one for one in ours if one[0] != "INFO"]
    assert level == "WARNING"
    what, why, do = said.split("\n")
    assert "without an image prompt" in what and "IP-Adapter-Plus" in why and "--image-prompt" in do


def test_an_image_prompt_for_another_image_encoder_is_refused(open_settings, sdxl, tmp_path):
    width = sdxl.base.image_encoder.config.hidden_size
    other = prompt_file(tmp_path / "other.safetensors", sdxl.base.unet, width + 8)
    with pytest.raises(Incompatible, match=f"features of {width + 8} numbers, .* makes {width}"):
        Trainer(TrainConfig(**{**open_settings, "image_prompt": other}))
