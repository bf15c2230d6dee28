"""Image tokens in a subject file: kept bit for bit, checked, and no hindrance to other programs."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load

from hyperrt.errors import LoraError, LoraMismatch
from hyperrt.lora import reader
from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.lora.safetensors_file import read_header
from hyperrt.lora.subject_file import load_subject
from tests.hyperrt.lora_files import change, save_subject

ATTN = "mid_block.attentions.0.transformer_blocks.0.attn2"
LAYOUT = LoraLayout(tuple(Site(f"{ATTN}.{name}", 5, 4) for name in ("to_q", "to_k", "to_v")), 2)
BASE, SHAPE = "b" * 64, (16, 8)
METADATA = {"base_model": BASE, "hypernet": "a" * 64, "class_noun": "mug", "photos": "3", "trigger": "sks"}


@pytest.fixture
def packed():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=LAYOUT.size(name)).astype(np.float32) for name in ("lora_q", "lora_kv")}


@pytest.fixture
def tokens():
    return np.random.default_rng(1).normal(size=(1, *SHAPE)).astype(np.float32)


@pytest.fixture
def write(tmp_path, packed):
    def write(tokens, format="diffusers"):
        path = tmp_path / "s.safetensors"
        save_subject(path, packed, LAYOUT, METADATA, format, force=True, image_tokens=tokens)
        return path

    return write


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_tokens_come_back_bit_for_bit_beside_the_same_lora(write, packed, tokens, format):
    subject = load_subject(write(tokens, format), LAYOUT, BASE, SHAPE)
    np.testing.assert_array_equal(subject.image_tokens, tokens)
    assert all(np.array_equal(subject.lora[name], packed[name]) for name in packed)


def test_of_several_photos_the_mean_is_saved(write):
    tokens = np.stack([np.zeros(SHAPE, np.float32), np.full(SHAPE, 3, np.float32)])
    found = load_subject(write(tokens), LAYOUT, BASE, SHAPE).image_tokens
    assert found.shape == (1, *SHAPE) and (found == 1.5).all()


def test_a_file_without_tokens_is_the_lora_alone(write):
    assert load_subject(write(None), LAYOUT, BASE, SHAPE).image_tokens is None


def test_a_kohya_file_has_none_and_says_so(write, tokens, caplog):
    path = write(tokens, "kohya")
    assert caplog.text.count("cannot hold image tokens") == 1
    assert load_subject(path, LAYOUT, BASE, SHAPE).image_tokens is None


@pytest.mark.parametrize("shape", [None, (16, 9), (4, 8)], ids=["no image prompt", "width", "tokens"])
def test_tokens_of_another_shape_are_a_mismatch(write, tokens, shape):
    with pytest.raises(LoraMismatch, match="image tokens"):
        load_subject(write(tokens), LAYOUT, BASE, shape)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_tokens_that_are_no_numbers_are_refused(write, tokens, value):
    path = write(tokens)
    tokens[0, 3, 3] = value
    change(path, {reader.IMAGE_TOKENS: tokens})
    with pytest.raises(LoraError, match="image tokens"):
        load_subject(path, LAYOUT, BASE, SHAPE)


def test_every_name_has_what_diffusers_looks_for(write, tokens):
    assert all("lora" in name for name in load(write(tokens).read_bytes()))


def test_the_tokens_are_last_in_the_file(write, tokens):
    *_, last = read_header(write(tokens))[1]
    assert last == reader.IMAGE_TOKENS


def test_keys_of_a_later_version_do_not_matter(write, tokens):
    path = write(tokens)
    change(path, metadata={"hyperrt.of_a_later_version": "1"})
    np.testing.assert_array_equal(load_subject(path, LAYOUT, BASE, SHAPE).image_tokens, tokens)
