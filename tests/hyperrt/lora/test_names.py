"""Names of tensors: those of three programs, to a module of the UNet and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperrt.lora import names
from hyperrt.lora.names import FORMATS, Part, SiteNames, keys, kind_of

PUBLISHED = SiteNames()
layers = st.integers(1, 4)
TWO = st.just(2)


@st.composite
def paths(draw, layers=TWO):
    """The path of a site, and how many layers a block of its UNet has."""
    count = draw(layers)
    side = draw(st.sampled_from(["down", "mid", "up"]))
    block, transformer = draw(st.integers(0, 5)), draw(st.integers(0, 11))
    layer = draw(st.integers(0, count - (side == "down")))
    start = "mid_block.attentions.0" if side == "mid" else f"{side}_blocks.{block}.attentions.{layer}"
    projection = draw(st.sampled_from("qkv"))
    return f"{start}.transformer_blocks.{transformer}.attn2.to_{projection}", count


@given(paths(layers), st.sampled_from(sorted(FORMATS)), st.booleans())
def test_a_name_means_the_site_that_it_was_made_from(drawn, format, first):
    path, count = drawn
    site_names = SiteNames(layers=count)
    for name, role in zip(keys(format, path, count if first else None), "AB", strict=True):
        assert site_names.part_of(name) == Part(format, path, role)
    if format == "kohya":
        assert site_names.part_of(names.alpha_key(path, count if first else None)).role == "alpha"


@given(st.lists(paths(), min_size=1, unique=True))
def test_different_sites_have_different_names(drawn):
    found = [names.stem(path, among) for path, count in drawn for among in (None, count)]
    assert len(set(found)) == len(found)


# As they stand in files of kohya's trainer for SDXL.
FIRST_PUBLICATION = {
    "input_blocks_4_1_transformer_blocks_0_attn2_to_k": "down_blocks.1.attentions.0.transformer_blocks.0",
    "input_blocks_5_1_transformer_blocks_1_attn2_to_k": "down_blocks.1.attentions.1.transformer_blocks.1",
    "input_blocks_7_1_transformer_blocks_9_attn2_to_k": "down_blocks.2.attentions.0.transformer_blocks.9",
    "input_blocks_8_1_transformer_blocks_0_attn2_to_k": "down_blocks.2.attentions.1.transformer_blocks.0",
    "middle_block_1_transformer_blocks_9_attn2_to_k": "mid_block.attentions.0.transformer_blocks.9",
    "output_blocks_0_1_transformer_blocks_0_attn2_to_k": "up_blocks.0.attentions.0.transformer_blocks.0",
    "output_blocks_2_1_transformer_blocks_9_attn2_to_k": "up_blocks.0.attentions.2.transformer_blocks.9",
    "output_blocks_5_1_transformer_blocks_1_attn2_to_k": "up_blocks.1.attentions.2.transformer_blocks.1",
}


@pytest.mark.parametrize(("name", "start"), FIRST_PUBLICATION.items())
def test_the_blocks_of_the_first_publication_are_diffusers_blocks(name, start):
    path = f"{start}.attn2.to_k"
    assert names.stem(path, 2) == f"lora_unet_{name}"
    assert PUBLISHED.part_of(f"lora_unet_{name}.lora_up.weight").site == path


SITE = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"


@pytest.mark.parametrize(
    ("name", "format", "role"),
    [
        (f"unet.{SITE}.lora.down.weight", "diffusers", "A"),
        (f"unet.{SITE}.lora.up.weight", "diffusers", "B"),
        (f"{SITE}.lora_A.weight", "diffusers", "A"),
        (f"unet.{SITE.replace('attn2.', 'attn2.processor.')}_lora.down.weight", "diffusers", "A"),
        (f"{SITE.replace('attn2.', 'attn2.processor.')}_lora.up.weight", "diffusers", "B"),
        (f"base_model.model.{SITE}.lora_magnitude_vector", "peft", ".lora_magnitude_vector"),
        (f"base_model.model.{SITE}.lora_B.bias", "peft", ".lora_B.bias"),
        (f"lora_unet_{SITE.replace('.', '_')}.dora_scale", "kohya", "dora_scale"),
        (f"lora_unet_{SITE.replace('.', '_')}.hada_w1_a", "kohya", "hada_w1_a"),
    ],
)
def test_older_names_and_other_tensors_of_a_site_are_known(name, format, role):
    assert PUBLISHED.part_of(name) == Part(format, SITE, role)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "the text encoder"),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight", "the text encoder"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "the text encoder"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "self-attention"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha", "self-attention"),
        (
            "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0.alpha",
            "the output of the cross-attention",
        ),
        ("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.lora_A.weight", "feed-forward layers"),
        ("lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight", "convolutions and layers beside them"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "convolutions and layers beside them"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "other modules"),
        ("transformer.transformer_blocks.0.attn2.to_q.lora_A.weight", "other modules"),
    ],
)
def test_what_is_no_site_is_told_apart_for_people(name, kind):
    assert PUBLISHED.part_of(name).site == ""
    assert kind_of(name) == kind


@given(st.text(max_size=80))
def test_any_name_is_taken_apart_without_an_error(name):
    assert isinstance(PUBLISHED.part_of(f"lora_unet_{name}"), Part)
    assert isinstance(PUBLISHED.part_of(name), Part)


@given(layers)
def test_the_layers_of_a_block_are_told_by_its_sites(count):
    full = [f"down_blocks.0.attentions.{k}.transformer_blocks.0.attn2.to_q" for k in range(count)]
    assert names.layers_of(full) == count
    assert names.layers_of([f"up_blocks.0.attentions.{count}.x", "mid_block.attentions.0.x"]) == count
    assert names.layers_of(["mid_block.attentions.0.x"]) == 2
