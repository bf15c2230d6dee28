from __future__ import annotations

import json
import os

import pytest
import torch

from training import checkpoint
from training.config import TrainConfig
from training.hypernet import WeightDecoder
from training.lora_layers import layout_of

FEATURES = 32


@pytest.fixture
def saved(parts, settings, tmp_path):
    """A decoder and the folder that it was saved in."""
    config = TrainConfig(**settings)
    torch.manual_seed(0)
    decoder = WeightDecoder(layout_of(parts.unet, config.rank), FEATURES, config.decoder)
    checkpoint.save_hypernet(tmp_path, decoder, config, 7, checkpoint.hash_of(parts.unet))
    return decoder, tmp_path


@pytest.mark.parametrize("name", ["", "hypernet.safetensors", "hypernet.json"])
def test_a_saved_decoder_comes_back_by_any_of_its_names(saved, name):
    decoder, folder = saved
    found, about = checkpoint.load_hypernet(folder / name)
    features = torch.randn(2, 5, FEATURES, generator=torch.Generator().manual_seed(0))
    assert about["step"] == 7
    for vector, expected in zip(found(features).values(), decoder(features).values(), strict=True):
        assert torch.equal(vector, expected)


def test_the_file_holds_no_pickle(saved):
    _, folder = saved
    header = (folder / "hypernet.safetensors").read_bytes()
    json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])


@pytest.mark.parametrize("name", ["hypernet.json", "hypernet.safetensors"])
def test_a_truncated_file_is_refused_by_name(saved, name):
    _, folder = saved
    os.truncate(folder / name, 100)
    with pytest.raises(ValueError, match="hypernet is damaged"):
        checkpoint.load_hypernet(folder)


def test_another_format_is_refused(saved):
    _, folder = saved
    about = json.loads((folder / "hypernet.json").read_text())
    (folder / "hypernet.json").write_text(json.dumps({**about, "format": 9}))
    with pytest.raises(ValueError, match="has format 9"):
        checkpoint.load_hypernet(folder)


def test_weights_of_another_shape_are_refused(saved):
    _, folder = saved
    about = json.loads((folder / "hypernet.json").read_text())
    about["decoder"]["dim"] = 32
    (folder / "hypernet.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="does not fit"):
        checkpoint.load_hypernet(folder)


def test_the_hash_tells_models_apart_and_not_copies(parts):
    first = checkpoint.hash_of(parts.text_encoder)
    assert first == checkpoint.hash_of(parts.text_encoder)
    assert first != checkpoint.hash_of(parts.image_encoder)
