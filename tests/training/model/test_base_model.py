import json

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from hyperrt.training.model import base_model as bases


def modules(base):
    return base.unet, base.vae, base.text_encoder, base.image_encoder


@pytest.fixture
def folder(parts, tmp_path):
    """A base folder of the test's own."""
    bases.save(parts, tmp_path / "base")
    return tmp_path / "base"


def test_every_part_is_loaded_with_its_weights_and_frozen(parts, folder):
    loaded = bases.load(folder)
    for before, after in zip(modules(parts), modules(loaded), strict=True):
        expected = before.state_dict()
        assert after.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in after.state_dict().items())
        assert not after.training
        assert not any(parameter.requires_grad for parameter in after.parameters())


def test_the_autoencoder_is_of_the_class_that_its_config_names(folder):
    vae = AutoencoderTiny(
        latent_channels=8, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    )
    vae.save_pretrained(folder / "vae")
    assert isinstance(bases.load(folder).vae, AutoencoderTiny)


def test_the_index_names_the_classes_of_the_parts(parts, folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", type(parts.vae).__name__]


@pytest.mark.parametrize(
    ("part", "file"),
    [("unet", "diffusion_pytorch_model.safetensors"), ("image_encoder", "model.safetensors")],
)
@pytest.mark.parametrize("change", ["absent", "of another shape"])
def test_weights_that_do_not_fill_a_part_are_refused(part, file, change, folder):
    tensors = load_file(folder / part / file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    weight = tensors.pop(name)
    if change != "absent":
        tensors[name] = weight.flatten()[:4].clone()
    save_file(tensors, folder / part / file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part}(?s:.*){name}"):
        bases.load(folder)


def test_a_part_that_is_missing_is_named(folder):
    (folder / "scheduler").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="it has no scheduler"):
        bases.load(folder)


@pytest.mark.parametrize(
    ("part", "setting", "words"),
    [
        ("unet", {"_class_name": "UNetMotionModel"}, "of the class 'UNetMotionModel'"),
        ("text_encoder", {"model_type": "roberta"}, "of the class 'roberta'"),
        ("vae", {"shift_factor": 0.1}, "shift_factor is 0.1"),
        ("unet", {"sample_size": [8, 16]}, r"sample_size is \[8, 16\]"),
    ],
)
def test_a_setting_of_another_kind_of_model_is_refused_by_name(part, setting, words, folder):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ValueError, match=words):
        bases.load(folder)


def test_a_noise_schedule_that_cannot_be_exported_is_refused_before_the_training(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "EDMEulerScheduler"}))
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match="its scheduler is EDMEulerScheduler"):
        bases.load(folder)


def test_a_tokenizer_that_knows_no_length_is_refused(folder):
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 10**30}))
    with pytest.raises(ValueError, match="model_max_length is 1e\\+30, and the text encoder has"):
        bases.load(folder)
