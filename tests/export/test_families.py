import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch

from hyperrt.export import families, read_source
from hyperrt.export.errors import ExportError
from hyperrt.export.source import betas, image_prompt_section
from hyperrt.training.model import image_prompt, weight_hash
from tests.export import small_models
from tests.export.command_line import config


def hashes(seed):
    source = families.get("tiny").random(seed)
    return [weight_hash.hash_of(part.read()) for part in source.parts.values()]


def test_random_weights_depend_on_their_seed_alone():
    first = hashes(0)
    torch.manual_seed(5)
    assert hashes(0) == first
    assert not set(hashes(1)) & set(first)


def test_drawing_random_weights_leaves_the_callers_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    families.get("tiny").random(3)
    assert torch.equal(torch.rand(1), expected)


def test_a_noise_schedule_that_the_runtime_does_not_know_is_refused(source):
    changed = dataclasses.replace(source, scheduler={**source.scheduler, "beta_schedule": "sigmoid"})
    with pytest.raises(ExportError, match="'sigmoid'"):
        betas(changed)


@pytest.fixture(scope="module")
def open_category(tmp_path_factory):
    """A small SDXL: its folder `base`, its `unet`; `prompt` and `other`, files of image prompts."""
    folder = tmp_path_factory.mktemp("open")
    unet = small_models.save(folder / "base", small_models.SDXL)["unet"]
    prompt, other = (small_models.save_prompt(folder / f"{k}.safetensors", unet, k) for k in range(2))
    return SimpleNamespace(base=folder / "base", unet=unet, prompt=prompt, other=other)


def opened(of, folder, given, **training):
    """The source for a hypernetwork with these training settings and an image prompt, or None."""
    hypernet = small_models.save_hypernet(folder / "hypernet", of.base, of.unet, **training)
    return read_source.read(config("sdxl", base=of.base, hypernet=hypernet, image_prompt=given))


def test_a_bundle_has_the_image_scale_that_its_hypernetwork_was_trained_with(open_category, tmp_path):
    training = {"image_prompt": str(open_category.prompt), "image_scale": 0.78}
    source = opened(open_category, tmp_path, open_category.prompt, **training)
    assert image_prompt_section(source).scale == 0.78


def test_a_hypernetwork_is_not_exported_without_its_image_prompt(open_category, tmp_path):
    with pytest.raises(ExportError, match="lacks its image prompt") as caught:
        opened(open_category, tmp_path, None, image_prompt="ip.safetensors")
    assert "ip.safetensors" in caught.value.why and "--image-prompt" in caught.value.do


def test_a_hypernetwork_that_saw_no_image_prompt_is_not_exported_with_one(open_category, tmp_path):
    with pytest.raises(ExportError, match="trained without an image prompt"):
        opened(open_category, tmp_path, open_category.prompt)


def test_the_image_prompt_of_a_bundle_is_the_one_of_training_wherever_it_lies(open_category, tmp_path):
    of, moved = open_category, tmp_path / "moved.safetensors"
    prompt_hash = weight_hash.prompt_hash(image_prompt.load(of.prompt, of.unet))
    trained = {"image_prompt": "elsewhere.safetensors", "prompt_hash": prompt_hash}
    shutil.copy(of.prompt, moved)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    assert "image_prompt" in opened(of, tmp_path / "a", moved, **trained).parts
    with pytest.raises(ExportError, match="of another image prompt") as caught:
        opened(of, tmp_path / "b", of.other, **trained)
    assert prompt_hash[:12] in caught.value.why
