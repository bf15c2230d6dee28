"""DreamBooth: what PEFT learned is what our rows compute, the loss falls, and nothing else moves."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from hyperrt.errors import BadInput, BadPrompt, Incompatible, UsageError
from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.lora.subject_file import load_subject
from hyperrt.training import finetune as dreambooth
from hyperrt.training.finetune import DreamBoothConfig, finetune
from hyperrt.training.model import weight_hash
from hyperrt.training.model.lora_layers import Rows, install, layout_of, unpack

CONFIG = DreamBoothConfig(steps=6, batch_size=2, lr=0.02, warmup=0)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (80, 64, 3), np.uint8) for _ in range(3)]


@pytest.fixture(scope="module")
def layout(parts) -> LoraLayout:
    return layout_of(parts.unet, 2)


@pytest.fixture(scope="module")
def found(parts, photos, layout):
    """The same subject after two, four and six steps."""
    return finetune(parts, photos, "robot", layout, CONFIG, stops=(2, 4))


def weights(one) -> np.ndarray:
    return np.concatenate([one.subject.lora[name] for name in ("lora_q", "lora_kv")])


def test_a_stop_is_what_a_run_of_so_many_steps_gives(parts, photos, layout, found):
    short = finetune(parts, photos, "robot", layout, dataclasses.replace(CONFIG, steps=4))
    assert [one.steps for one in found] == [2, 4, 6]
    assert np.array_equal(weights(short[0]), weights(found[1]))
    assert not np.array_equal(weights(found[1]), weights(found[2]))


def test_the_base_model_stays_as_it_was(parts, photos, layout):
    before = weight_hash.hash_of(parts.unet)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = finetune(parts, photos, "robot", layout, dataclasses.replace(CONFIG, steps=1))[0]
    assert torch.equal(torch.rand(1), expected)  # and so does the global generator
    assert weight_hash.hash_of(parts.unet) == before == one.subject.metadata["base_model"]
    assert not any(parameter.requires_grad for parameter in parts.unet.parameters())


def test_the_loss_falls_on_the_photos(parts, photos, layout):
    config = dataclasses.replace(CONFIG, steps=30, batch_size=6)
    stops = finetune(parts, photos, "robot", layout, config, stops=range(1, 30))
    losses = [one.loss for one in stops]
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])


def test_our_rows_compute_what_peft_learned(parts, photos, layout, found):
    tuning = dreambooth._Tuning(
        parts, layout, CONFIG, (dreambooth.latents_of(parts, photos), torch.randn(3, 16, 32)), None
    )
    with torch.no_grad():
        for path, (a, b) in layout.unpack(found[-1].subject.lora).items():
            layer = tuning.unet.get_submodule(path)
            layer.lora_A["default"].weight.copy_(torch.from_numpy(a.T.copy()))
            layer.lora_B["default"].weight.copy_(torch.from_numpy(b.T.copy()))
    again = tuning.factors()
    assert all(np.array_equal(a, again[p][0]) for p, (a, _) in layout.unpack(found[-1].subject.lora).items())
    packed = {name: torch.from_numpy(vector)[None] for name, vector in found[-1].subject.lora.items()}
    ours = copy.deepcopy(parts.unet)
    install(ours)
    inputs = torch.randn(2, 8, 8, 8), torch.tensor([20, 700]), torch.randn(2, 16, 32)
    rows = Rows(unpack(layout, packed), torch.ones(2, 1, 1))
    with torch.no_grad():
        by_peft = tuning.unet(*inputs).sample
        by_rows = ours(*inputs, cross_attention_kwargs={"rows": rows}).sample
        plain = ours(*inputs).sample
    torch.testing.assert_close(by_rows, by_peft, atol=1e-4, rtol=1e-4)
    assert (by_peft - plain).abs().max() > 1e-3


def test_prior_preservation_changes_what_is_learned(parts, photos, layout):
    config = dataclasses.replace(CONFIG, steps=2, prior_weight=1.0, prior_pictures=2)
    without = finetune(parts, photos, "robot", layout, dataclasses.replace(config, prior_weight=0.0))
    assert not np.array_equal(
        weights(finetune(parts, photos, "robot", layout, config)[0]), weights(without[0])
    )


def test_latents_are_undone_by_the_decoder_of_samples(parts, photos):
    """Both know scale and shift of the VAE; the VAE itself is random."""
    latents = dreambooth.latents_of(parts, photos)
    assert latents.shape == (3, 8, 8, 8)
    config = parts.vae.config
    pixels = torch.from_numpy(dreambooth.preprocess(photos[:1], dreambooth.Preprocess(
        64, dreambooth.HALVES, dreambooth.HALVES, "bicubic", "center")))  # fmt: skip
    with torch.no_grad():
        code = parts.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(latents[:1] / config.scaling_factor, code, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"photos": []}, BadInput, "no photos"),
        ({"photos": [np.zeros((64, 64), np.float32)]}, BadInput, "cannot use the image"),
        ({"prompts": ["a [V] robot"]}, UsageError, "1 prompts and 3 usable photos"),
        ({"prompts": ["a robot"] * 3}, BadPrompt, "where the subject is"),
        ({"stops": [7]}, UsageError, "outside the run"),
        ({"stops": [0]}, UsageError, "outside the run"),
        (
            {"layout": LoraLayout((Site("mid_block.attn2.to_q", 8, 8),), 2)},
            Incompatible,
            "mid_block.attn2.to_q",
        ),
    ],
    ids=["no photos", "no pictures", "prompts", "no token", "late stop", "stop 0", "layout"],
)
def test_bad_input_is_refused_before_any_step(parts, photos, layout, change, error, words):
    arguments = {"photos": photos, "noun": "robot", "layout": layout, "config": CONFIG} | change
    with pytest.raises(error, match=words.replace("[", r"\[")):
        finetune(parts, **arguments)


def test_a_subject_of_a_large_base_model_fits_its_bundle(parts, photos, layout):
    """Whose bundle has the hash of half precision."""
    wide = copy.deepcopy(parts.unet)
    wide.register_to_config(cross_attention_dim=weight_hash.WIDE_TEXT)
    base = dataclasses.replace(parts, unet=wide)
    [one] = finetune(base, photos, "robot", layout, dataclasses.replace(CONFIG, steps=1))
    assert one.subject.metadata["base_model"] == weight_hash.hash_of(wide, half=True)


def test_an_sdxl_is_refused(sdxl, photos):
    with pytest.raises(UsageError, match="SDXL cannot be fine-tuned") as caught:
        finetune(sdxl.base, photos, "robot", layout_of(sdxl.base.unet, 2), CONFIG)
    assert caught.value.why and caught.value.do


@pytest.mark.parametrize("setting", [{"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"prior_weight": -1.0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(UsageError, match=f"{next(iter(setting))} is"):
        DreamBoothConfig(**setting)


def test_the_command_writes_a_subject_file_that_the_layout_reads(world, parts, photos, layout, tmp_path):
    (tmp_path / "photos").mkdir()
    for k, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / "photos" / f"{k}.png")
    out = tmp_path / "robot.safetensors"
    command = ["--base", str(world.base), "--images", str(tmp_path / "photos"), "--class-noun", "robot"]
    command += ["--output", str(out), "--steps", "2", "--rank", "2"]
    result = CliRunner().invoke(dreambooth.main, command)
    assert result.exit_code == 0, result.output
    subject = load_subject(out, layout, weight_hash.hash_of(parts.unet))
    assert (subject.class_noun, subject.photos) == ("robot", 3)
    assert np.any(subject.lora["lora_kv"])


def test_a_file_that_exists_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(dreambooth.bases, "opened", lambda folder: pytest.fail("the model was read"))
    out = tmp_path / "robot.safetensors"
    out.write_bytes(b"mine")
    command = ["--base", "none", "--images", "none", "--class-noun", "robot", "--output", str(out)]
    result = CliRunner().invoke(dreambooth.main, command)
    assert result.exit_code == 2
    assert "exists" in result.output and "--force" in result.output
    assert out.read_bytes() == b"mine"


def test_the_former_flag_of_the_output_still_works(tmp_path):
    (tmp_path / "robot.safetensors").write_bytes(b"mine")
    command = ["--base", "none", "--images", "none", "--class-noun", "robot"]
    for flag in ("--output", "-o", "--out"):
        result = CliRunner().invoke(dreambooth.main, [*command, flag, str(tmp_path / "robot.safetensors")])
        assert result.exit_code == 2 and "exists" in result.output


def test_a_missing_base_model_is_one_message(tmp_path):
    command = ["--base", str(tmp_path), "--images", ".", "--class-noun", "robot", "--output", "x.safetensors"]
    result = CliRunner().invoke(dreambooth.main, command)
    assert result.exit_code == 4
    assert "is not a base model" in result.output and "Traceback" not in result.output
