from __future__ import annotations

import copy
import hashlib
import json
import os

import numpy as np
import pytest
import torch

from hyperrt.training.model import weight_hash
from hyperrt.training.model.decoder_config import DecoderConfig
from hyperrt.training.model.hypernet import ResamplerDecoder, WeightDecoder
from hyperrt.training.model.lora_layers import layout_of
from hyperrt.training.run import checkpoint
from hyperrt.training.run.config import TrainConfig

FEATURES = 32


@pytest.fixture
def saved(parts, settings, tmp_path):
    """A decoder and the folder that it was saved in."""
    config = TrainConfig(**settings)
    torch.manual_seed(0)
    decoder = WeightDecoder(layout_of(parts.unet, config.rank), FEATURES, config.decoder)
    checkpoint.save_hypernet(tmp_path, decoder, config, 7, weight_hash.hash_of(parts.unet))
    return decoder, tmp_path


@pytest.mark.parametrize("name", ["", "hypernet.safetensors", "hypernet.json"])
def test_a_saved_decoder_comes_back_by_any_of_its_names(saved, name):
    decoder, folder = saved
    found, about = checkpoint.load_hypernet(folder / name)
    features = torch.randn(2, 5, FEATURES, generator=torch.Generator().manual_seed(0))
    assert about["step"] == 7
    with torch.no_grad():  # attention with a gradient is another operator: training/model/attention.py
        pairs = zip(found(features).values(), decoder(features).values(), strict=True)
    assert all(torch.equal(vector, expected) for vector, expected in pairs)


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
    first = weight_hash.hash_of(parts.text_encoder)
    assert first == weight_hash.hash_of(parts.text_encoder)
    assert first != weight_hash.hash_of(parts.image_encoder)


def test_the_half_hash_does_not_depend_on_the_precision_that_a_model_was_loaded_in(parts):
    encoder = parts.text_encoder
    found = weight_hash.hash_of(encoder, half=True)
    assert found == weight_hash.hash_of(copy.deepcopy(encoder).half(), half=True)
    assert found != weight_hash.hash_of(encoder)


def test_the_hash_is_that_of_names_and_float_values():
    """Checkpoints and bundles hold it: it may not change."""
    layer = torch.nn.Linear(2, 1)
    layer.load_state_dict({"weight": torch.tensor([[1.0, -2.5]]), "bias": torch.tensor([0.125])})
    content = b"bias" + np.float32(0.125).tobytes() + b"weight" + np.float32([1.0, -2.5]).tobytes()
    assert weight_hash.hash_of(layer) == hashlib.sha256(content).hexdigest()


def test_a_decoder_of_the_open_category_comes_back_with_what_training_needs(parts, settings, tmp_path):
    config = TrainConfig(**settings)
    shape = DecoderConfig(kind="resampler", dim=16, layers=1, head_dim=0, shared_heads=True, queries="site")
    torch.manual_seed(0)
    decoder = ResamplerDecoder(layout_of(parts.unet, config.rank), FEATURES, shape)
    checkpoint.save_hypernet(tmp_path, decoder, config, 7, weight_hash.hash_of(parts.unet))
    found, _ = checkpoint.load_hypernet(tmp_path)
    features = torch.randn(2, 5, FEATURES, generator=torch.Generator().manual_seed(0))
    assert found.config == shape
    with torch.no_grad():  # as `found` computes: attention has another kernel for gradients
        expected = decoder(features)
    for name, vector in found(features).items():
        assert torch.equal(vector, expected[name])
        assert torch.equal(found.deltas({name: vector})[name], decoder.deltas(expected)[name])


def test_a_checkpoint_from_before_there_were_kinds_is_hyperdreambooths(saved):
    decoder, folder = saved
    about = json.loads((folder / "hypernet.json").read_text())
    about["decoder"] = {name: about["decoder"][name] for name in ("dim", "layers", "iterations", "head_dim")}
    (folder / "hypernet.json").write_text(json.dumps(about))
    found, _ = checkpoint.load_hypernet(folder)
    assert type(found) is WeightDecoder
    assert found.config == decoder.config


def test_the_step_is_that_of_the_weights_where_a_run_died_between_the_two_files(saved):
    _, folder = saved
    about = json.loads((folder / "hypernet.json").read_text())
    (folder / "hypernet.json").write_text(json.dumps({**about, "step": 9}))
    assert checkpoint.load_hypernet(folder)[1]["step"] == 7


def test_settings_that_had_other_names_have_their_present_ones(saved):
    _, folder = saved
    about = json.loads((folder / "hypernet.json").read_text())
    about["training"]["model"] = about["training"].pop("base")
    (folder / "hypernet.json").write_text(json.dumps(about))
    assert checkpoint.load_hypernet(folder)[1]["training"]["base"] == about["training"]["model"]


def test_large_base_models_are_told_apart_at_half_precision(parts):
    unet = parts.unet
    assert weight_hash.base_hash(unet) == weight_hash.hash_of(unet)
    wide = copy.deepcopy(unet)
    wide.register_to_config(cross_attention_dim=768)
    assert weight_hash.base_hash(wide) == weight_hash.hash_of(unet, half=True)
