"""What lies between a VAE's latents and a UNet's: as diffusers' pipelines have it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline

from hyperrt.training.data import features
from hyperrt.training.model import encode
from hyperrt.training.model.base_model import Encoders
from hyperrt.training.model.latents import LatentScale
from hyperrt.training.run import sample
from tests.export import small_models

STATISTICS = {"latents_mean": [-1.5, 0.5, 2.0, 0.0], "latents_std": [8.0, 5.0, 0.5, 3.0]}


def config(**settings):
    return AutoencoderKL(**settings).config


@pytest.fixture
def sdxl():
    """The encoders that an SDXL's pictures go through, whose VAE has statistics and next to no variance."""
    vae = small_models.vae(scaling_factor=0.5, **STATISTICS).eval().requires_grad_(False)
    vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -60
    others = dict.fromkeys(("text_encoder", "tokenizer", "image_encoder"), None)
    return Encoders(vae=vae, text_encoder_2=SimpleNamespace(), **others)


def test_pictures_become_the_latents_that_diffusers_starts_from(sdxl):
    pictures = np.random.default_rng(0).integers(256, size=(1, 32, 32, 3), dtype=np.uint8)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet"), None)
    pipe = StableDiffusionXLImg2ImgPipeline(vae=sdxl.vae, scheduler=EulerDiscreteScheduler(), **parts)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    expected = pipe.prepare_latents(
        pixels, None, 1, 1, torch.float32, torch.device("cpu"), generator, add_noise=False
    )
    torch.testing.assert_close(encode.encode_latents(sdxl, pictures), expected)


def test_decoding_is_the_inverse_of_encoding(sdxl):
    latents, scale = torch.randn(2, 4, 8, 8), sdxl.latent_scale
    torch.testing.assert_close(scale.for_unet(scale.for_vae(latents)), latents)
    torch.testing.assert_close(scale.for_vae(torch.zeros(1, 4, 1, 1)).flatten(), torch.tensor(scale.mean))


def test_a_preview_is_decoded_with_the_statistics(sdxl):
    latents = torch.randn(1, 4, 8, 8)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in STATISTICS.values())
    pixels = sdxl.vae.decode(latents * std / 0.5 + mean).sample
    expected = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(sample.decode(sdxl, latents) - expected).max() <= 0.51


def test_the_latents_of_a_vae_with_statistics_have_another_name(sdxl, monkeypatch):
    monkeypatch.setattr(features, "fingerprint", lambda *of: of[2:])
    assert features._of_vae(sdxl, None) == (sdxl.latent_scale,)
    sdxl.vae.register_to_config(latents_mean=None, latents_std=None)
    assert features._of_vae(sdxl, None) == ()


def test_without_statistics_there_is_one_factor():
    found = LatentScale.of(config(scaling_factor=0.25), is_sdxl=True)
    assert torch.equal(found.for_vae(torch.ones(1)), torch.tensor([4.0]))
    assert LatentScale.of(AutoencoderTiny().config, is_sdxl=False) == LatentScale(1.0)


@pytest.mark.parametrize(
    ("settings", "is_sdxl", "words"),
    [
        (STATISTICS, False, "latents_mean .* only SDXL's pipeline reads"),
        ({"latents_std": [1.0] * 4}, False, "latents_std"),
        ({"latents_mean": [1.0] * 4}, True, "alone does nothing"),
        (STATISTICS | {"latents_std": [1.0] * 3}, True, "it must be 4 numbers"),
        (STATISTICS | {"latents_mean": [1.0, "a", 1.0, 1.0]}, True, "it must be 4 numbers"),
        (STATISTICS | {"latents_mean": 3.0}, True, "it must be 4 numbers"),
        (STATISTICS | {"latents_std": [1.0, 0.0, 1.0, 1.0]}, True, "0 leaves nothing"),
        (STATISTICS | {"latents_std": [1.0, float("nan"), 1.0, 1.0]}, True, "it must be 4 numbers"),
        ({"shift_factor": 0.1}, True, "shift_factor is 0.1"),
        ({"shift_factor": 0.1}, False, "shift_factor is 0.1"),
        ({"scaling_factor": None}, True, "scaling_factor is None"),
        ({"scaling_factor": 0.0}, True, "scaling_factor is 0.0"),
        ({"scaling_factor": float("inf")}, True, "scaling_factor is inf"),
    ],
)
def test_what_diffusers_pipelines_do_not_read_is_refused_by_name(settings, is_sdxl, words):
    with pytest.raises(ValueError, match=words):
        LatentScale.of(config(**settings), is_sdxl)


def test_what_says_nothing_is_no_fault():
    settings = {"shift_factor": 0.0, "latents_mean": None, "latents_std": None}
    assert LatentScale.of(config(**settings), is_sdxl=False) == LatentScale(0.18215)
