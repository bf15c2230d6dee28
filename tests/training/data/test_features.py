"""What the frozen encoders make of a cache: of ViT and CLIP, of one text encoder and of SDXL's two."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from hyperrt.errors import Incompatible, NumericError
from hyperrt.training import prepare
from hyperrt.training.data import features
from hyperrt.training.data.cache import PictureCache
from hyperrt.training.model import base_model as bases
from hyperrt.training.model import model_config
from hyperrt.training.run.config import TrainConfig
from hyperrt.training.run.trainer import Trainer
from tests.export import small_models
from tests.training import data_sets

PADDED = 77


@pytest.fixture
def faces(world):
    """The encoders of the tiny base, and its drawn cache."""
    return bases.load_encoders(world.base), PictureCache.open(world.cache)


def test_a_training_step_of_a_small_sd15_can_be_made(tmp_path, settings):
    small_models.save(tmp_path / "base", small_models.SD15)
    source = data_sets.celeba(tmp_path / "faces")
    cache = prepare.prepare(
        prepare.PrepareConfig(
            layout="celeba", source=source, base=tmp_path / "base", output=tmp_path / "cache", device="cpu"
        )
    )
    assert cache.images.shape == (4, 1, 32, 32, 3)
    assert cache.latents.shape == (4, 1, 4, 16, 16)
    folders = {"base": str(tmp_path / "base"), "data": str(cache.path)}
    trainer = Trainer(TrainConfig(**{**settings, **folders, "holdout": 1, "photos": 1, "batch_size": 2}))
    assert trainer.data.features.shape == (4, 1, 5, 16)
    assert torch.isfinite(trainer.step(0)).all()


def test_the_text_of_an_sdxl_is_what_its_pipeline_in_diffusers_makes(sdxl):
    parts = {name: getattr(sdxl.base, name) for name in (*bases.OF_TINY, *bases.OF_SDXL)}
    pipeline = StableDiffusionXLPipeline(**{k: v for k, v in parts.items() if k != "image_encoder"})
    subject, generic = sdxl.table.subject[1, 0], sdxl.table.generic[0, 1]
    for row, prompt in ((subject, "a sks dog in the snow"), (generic, "a cat")):
        hidden, empty, pooled, empty_pooled = pipeline.encode_prompt(prompt, device="cpu")
        rows = np.array([0, row])
        for found, expected in (
            (sdxl.table.text(rows).hidden_states, torch.cat([empty, hidden])),
            (sdxl.table.text(rows).pooled, torch.cat([empty_pooled, pooled])),
        ):
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    assert not sdxl.table.text(np.array([0])).hidden_states.any()
    assert sdxl.table.hidden.shape[1:] == (PADDED, 16 + 24)


def test_a_cache_holds_all_that_the_unet_of_an_sdxl_reads(sdxl):
    latents = torch.from_numpy(sdxl.cache.latents[:2, 0].astype(np.float32)).requires_grad_()
    rows = sdxl.table.subject[:2, 0]
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    text = sdxl.table.text(rows)
    added = {"text_embeds": text.pooled, "time_ids": sizes}
    predicted = sdxl.base.unet(latents, 10, text.hidden_states, added_cond_kwargs=added).sample
    predicted.square().mean().backward()
    assert latents.grad.abs().sum() > 0


def test_clip_sees_pictures_as_its_own_processor_makes_them(sdxl):
    from transformers import CLIPImageProcessorPil

    picture = np.array(sdxl.cache.images[0, 0])
    size = sdxl.base.image_encoder.config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    pixels = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = sdxl.base.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
    found = features.encode_images(sdxl.base, picture[None])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    stored = features.image_features(sdxl.base, sdxl.cache)[0, 0]
    np.testing.assert_allclose(stored, expected[0].numpy(), atol=2e-3, rtol=2e-3)


def test_few_pictures_are_in_memory_at_once(faces, monkeypatch):
    base, cache = faces
    expected = np.array(features.image_features(base, cache))
    counts = []

    def encode(base, pictures, whole=features.encode_images):
        counts.append(len(pictures))
        return whole(base, pictures)

    monkeypatch.setattr(features, "encode_images", encode)
    monkeypatch.setattr(features, "PICTURES_AT_ONCE", 8)
    (cache.path / features.image_features(base, cache).filename).unlink()
    np.testing.assert_allclose(features.image_features(base, cache), expected, atol=2e-3)
    assert max(counts) <= 8
    assert sum(counts) == 40 * 3


def test_another_encoder_and_other_pictures_make_other_files(faces):
    base, cache = faces
    name = features.fingerprint(base.image_encoder, cache)
    assert features.fingerprint(base.vae, cache) != name
    other = PictureCache(
        cache.path, cache.names, cache.images[::-1], cache.nouns, cache.texts, cache.metadata
    )
    assert features.fingerprint(base.image_encoder, other) != name
    half = bases.load_encoders(cache.path.parent / "base").image_encoder.half()
    assert features.fingerprint(half, cache) == features.fingerprint(half.float(), cache)


@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_what_float16_cannot_hold_is_refused(value, faces, monkeypatch):
    base, cache = faces
    monkeypatch.setattr(features, "encode_latents", lambda *_: torch.full((63, 2), value))
    with pytest.raises(NumericError, match="subjects 0 to 20"):
        features.latents(base, cache)
    assert not list(cache.path.glob("latents-*"))


@pytest.mark.parametrize(
    "change",
    [lambda latents: latents[::-1], lambda latents: 1.2 * latents, lambda latents: latents[..., :4]],
    ids=["of other pictures", "of another scale", "of another size"],
)
def test_latents_that_the_vae_does_not_make_are_warned_about(faces, tmp_path, change, caplog):
    base, cache = faces
    features.check_latents(base, cache)
    assert not caplog.messages
    other = shutil.copytree(cache.path, tmp_path / "other")
    np.save(other / "latents.npy", change(np.load(other / "latents.npy")).astype(np.float16))
    features.check_latents(base, PictureCache.open(other))
    [said] = caplog.messages
    assert "off what the VAE makes" in said and len(said.splitlines()) == 3


def test_prepared_latents_are_told_by_their_name(sdxl, faces, monkeypatch):
    monkeypatch.setattr(features, "encode_latents", None)
    features.check_latents(sdxl.base, sdxl.cache)
    with pytest.raises(Incompatible, match="prepared for a base model with another VAE"):
        features.check_latents(faces[0], sdxl.cache)


def test_a_part_that_the_folder_lacks_is_named(world, tmp_path):
    base = bases.load(world.base)
    bases.save(base, tmp_path / "base")
    (tmp_path / "base" / "image_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no image_encoder; add the folder of the ViT"):
        bases.load_encoders(tmp_path / "base")
    assert model_config.picture_size(tmp_path / "base") == (64, 16)
