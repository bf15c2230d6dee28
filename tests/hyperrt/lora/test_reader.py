"""A LoRA file, opened: what is in it, whoever wrote it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hyperrt.errors import LoraError, LoraMismatch, NotFound
from hyperrt.lora import safetensors_file
from hyperrt.lora.reader import check_used, open_lora
from tests.hyperrt.lora_files import STYLES, change, random_pairs, sites, write, write_kohya

SITE = next(iter(sites()))
RANKS = dict.fromkeys(sites(), 2)
OTHERS = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": "2 tensors of self-at",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "2 tensors of the text encoder",
    "unet.mid_block.resnets.0.conv1.lora_A.weight": "2 tensors of convolutions",
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "other.safetensors"


def pattern(**options):
    """PEFT's configuration, as diffusers keeps it."""
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in options.items()})}


@pytest.mark.parametrize("style", STYLES)
def test_every_way_of_naming_gives_the_same_sites(path, style):
    pairs = random_pairs(RANKS)
    file = open_lora(write(path, pairs, style))
    assert file.format == ("peft" if style == "peft" else "diffusers")
    assert file.pairs.keys() == pairs.keys() and not file.odd and not file.unused
    for site, (a, b) in pairs.items():
        factors = file.factors(site)
        assert factors.alpha == factors.rank == 2
        assert factors.a.data == a.tobytes() and factors.b.data == b.tobytes()


def test_alpha_is_kohyas_tensor_and_where_there_is_none_the_rank(path):
    file = open_lora(write_kohya(path, random_pairs(RANKS), {SITE: 0.5}))
    assert file.format == "kohya"
    assert {site: pair.alpha for site, pair in file.pairs.items()} == {**dict.fromkeys(sites(), 2), SITE: 0.5}


@pytest.mark.parametrize(
    ("options", "here", "elsewhere"),
    [
        ({"lora_alpha": 8}, 8, 8),
        ({"lora_alpha": 8, "alpha_pattern": {SITE: 1}}, 1, 8),
        ({"lora_alpha": 8, "alpha_pattern": {f"^{SITE}": 1.5}}, 1.5, 8),
        ({"lora_alpha": 8, "alpha_pattern": {"transformer_blocks.0.attn2.to_q": 1}}, 1, 8),
        ({"lora_alpha": 8, "alpha_pattern": {"locks.0.attn2.to_q": 1}}, 8, 8),
        ({"lora_alpha": 8, "use_rslora": True}, 8 * 2**0.5, 8 * 2**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"^transformer_blocks.0.attn2.to_q": 1}}, 8, 8),
        ({"r": 2}, 8, 8),
    ],
)
def test_alpha_is_read_as_peft_reads_its_configuration(path, options, here, elsewhere):
    file = open_lora(write(path, random_pairs(RANKS), **pattern(**options)))
    last = list(sites())[1]
    assert file.pairs[SITE].alpha == pytest.approx(here)
    assert file.pairs[last].alpha == pytest.approx(elsewhere)


def test_a_unet_saved_alone_has_its_configuration_without_prefix(path):
    said = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 6})}
    file = open_lora(write(path, random_pairs(RANKS), "diffusers' UNet alone", **said))
    assert file.pairs[SITE].alpha == 6


def test_pefts_folder_has_its_configuration_in_a_file_and_without_it_something_is_assumed(tmp_path):
    write(tmp_path / "adapter_model.safetensors", random_pairs(RANKS), "peft")
    (note,) = open_lora(tmp_path).notes
    assert "adapter_config.json" in note and "the rank" in note
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "r": 2}))
    file = open_lora(tmp_path)
    assert (file.pairs[SITE].alpha, file.notes) == (4, ())


def test_diffusers_folder_is_found(tmp_path):
    write(tmp_path / "pytorch_lora_weights.safetensors", random_pairs(RANKS))
    assert open_lora(tmp_path).pairs.keys() == sites().keys()


def test_a_folder_without_a_lora_is_not_found(tmp_path):
    with pytest.raises(NotFound, match="no subject file in the folder") as caught:
        open_lora(tmp_path)
    assert "adapter_model.safetensors" in caught.value.why


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_alpha": 0}, "alpha is 0"),
        ({"lora_alpha": -1}, "alpha is -1"),
        ({"lora_alpha": 1e300}, "alpha is 1e"),
        ({"lora_alpha": "8"}, "alpha is '8'"),
        ({"lora_alpha": True}, "alpha is True"),
        ({"lora_alpha": None}, "alpha is None"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern"),
    ],
    ids=str,
)
def test_an_alpha_that_is_none_is_refused(path, options, words):
    write(path, random_pairs(RANKS), **pattern(**options))
    with pytest.raises(LoraError, match=words):
        open_lora(path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": NaN}', "\ud7ff{}"])
def test_a_configuration_that_is_damaged_is_refused(tmp_path, text):
    write(tmp_path / "adapter_model.safetensors", random_pairs(RANKS), "peft")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(LoraError, match=r"configuration in adapter_config\.json is damaged"):
        open_lora(tmp_path)


@pytest.mark.parametrize(
    ("a", "b"), [((2, 4), (6, 3)), ((2, 4, 1, 1), (6, 2, 1, 1)), ((4,), (6, 2)), ((0, 4), (6, 0))]
)
def test_a_pair_that_is_none_is_refused(path, a, b):
    write(path, {SITE: (np.zeros(a, np.float32), np.zeros(b, np.float32))})
    with pytest.raises(LoraError, match=r"to_q.lora_A.weight is \("):
        open_lora(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e5])
def test_a_number_that_is_none_is_refused_by_the_name_of_its_tensor(path, value):
    a, b = random_pairs(RANKS)[SITE]
    b[1, 1] = value
    file = open_lora(write(path, {SITE: (a, b)}))
    with pytest.raises(LoraError, match=r"to_q.lora_B.weight cannot be used"):
        file.factors(SITE)


def test_a_scale_that_makes_numbers_too_large_is_refused(path):
    write(path, random_pairs(RANKS), **pattern(lora_alpha=1e6))
    with pytest.raises(LoraError, match="cannot be used"):
        open_lora(path).factors(SITE)


# check_used


@pytest.mark.parametrize(("name", "words"), OTHERS.items())
def test_other_modules_are_refused_with_what_they_are_unless_asked_to_be_left_out(path, name, words):
    write(path, random_pairs(RANKS))
    extra = np.zeros((2, 2), np.float32)
    change(path, {name: extra, name.replace("lora_A", "lora_B"): extra})
    file = open_lora(path)
    with pytest.raises(LoraMismatch, match="adapts more than") as caught:
        check_used(file)
    assert words in caught.value.why and "--partial" in caught.value.do
    check_used(file, partial=True)
    change(path, metadata={"hyperrt.version": "1"})
    with pytest.raises(LoraMismatch):
        check_used(open_lora(path), partial=True)


@pytest.mark.parametrize(
    "name",
    [
        f"unet.{SITE}.lora_magnitude_vector",
        f"unet.{SITE}.lora_B.bias",
        f"unet.{SITE}.lora.down.weight",
        f"unet.{SITE.replace('to_q', 'to_k').replace('down', 'up')}.lora_A.weight",
    ],
    ids=["DoRA", "bias", "twice", "half a pair"],
)
def test_what_is_no_pair_at_a_site_is_refused_even_in_part(path, name):
    write(path, random_pairs(RANKS))
    change(path, {name: np.zeros((2, 2), np.float32)})
    with pytest.raises(LoraError, match="not a LoRA of pairs"):
        check_used(open_lora(path), partial=True)


def test_what_is_no_pair_is_called_by_the_name_of_its_method(path):
    write(path, random_pairs(RANKS))
    change(path, {f"unet.{SITE}.dora_scale": np.zeros((6, 1), np.float32)})
    with pytest.raises(LoraError, match="is DoRA and not a LoRA of pairs"):
        check_used(open_lora(path))


@pytest.mark.parametrize(
    "name", ["transformer.single_blocks.0.proj.lora_A.weight", "lora_unet_double_blocks_0.alpha"]
)
def test_a_lora_of_another_kind_of_model_is_refused_with_its_first_name(path, name):
    write(path, {})
    change(path, {name: np.ones((2, 2), np.float32)})
    with pytest.raises(LoraError, match="no layer that HyperRT can use") as caught:
        check_used(open_lora(path), partial=True)
    assert name in caught.value.why


def test_a_file_without_tensors_is_refused(path):
    with pytest.raises(LoraError, match="no layer that HyperRT can use"):
        check_used(open_lora(write(path, {})))


def test_only_the_tensors_that_are_used_are_read(path, monkeypatch):
    read, whole = [], safetensors_file.read_tensor

    def spy(path, name, *more):
        read.append(name)
        return whole(path, name, *more)

    monkeypatch.setattr(safetensors_file, "read_tensor", spy)
    file = open_lora(write(path, random_pairs(RANKS)))
    assert read == []
    file.factors(SITE)
    assert read == list(file.pairs[SITE][:2])
