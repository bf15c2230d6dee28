"""Settings of a base model's configurations: computed as diffusers does, or refused by name."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from hyperrt.export import expected, graph_specs, onnx_graph, supported, verify
from hyperrt.export.errors import ExportError
from hyperrt.export.parts import ModelPart, random_part
from hyperrt.training.data import clip_tokenizer
from hyperrt.training.model import lora_layers
from tests.export import small_models

STATISTICS = {"latents_mean": [-1.5, 0.5, 2.0, 0.0], "latents_std": [8.0, 5.0, 0.5, 3.0]}
REFINER = {"projection_class_embeddings_input_dim": 24 + 5 * 8}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A small model of each family."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {family: small_models.source(family, folder / family) for family in ("sd15", "sdxl")}


def changed(source, **builders):
    """The model with other networks of random weights."""
    parts = {name: random_part(name, build, 0) for name, build in builders.items()}
    return dataclasses.replace(source, parts={**source.parts, **parts})


def unet_of(source, **settings):
    config = {k: v for k, v in source.config("unet").items() if not k.startswith("_")}
    return changed(source, unet=lambda: UNet2DConditionModel(**config | settings))


def vae_of(source, **settings):
    return changed(source, vae=lambda: small_models.vae(**settings))


def test_published_models_are_supported(sources):
    for source in sources.values():
        supported.check(source)


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("sd15", {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}),
        ("sdxl", {"addition_embed_type": None}),
        ("sdxl", REFINER),
        ("sd15", {"class_embed_type": "timestep"}),
        ("sd15", {"num_class_embeds": 10}),
        ("sd15", {"class_embeddings_concat": True}),
        ("sd15", {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16}),
        ("sd15", {"time_cond_proj_dim": 16}),
        ("sd15", {"in_channels": 9}),
        ("sd15", {"out_channels": 8}),
        ("sd15", {"cross_attention_dim": 24}),
        ("sd15", {"only_cross_attention": True}),
        ("sd15", {"only_cross_attention": (False, True)}),
        ("sd15", {"dual_cross_attention": True}),
        ("sd15", {"attention_type": "gated"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_unet_that_reads_something_else_is_refused_by_name(family, setting, sources):
    with pytest.raises(ExportError, match=rf"the UNet is of a kind(?s:.*){next(iter(setting))} is"):
        supported.check(unet_of(sources[family], **setting))


@pytest.mark.parametrize(
    "blocks",
    [("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")],
)
def test_attention_of_another_kind_is_refused(blocks, sources):
    down, up = ("DownBlock2D", blocks[0]), (blocks[1], "UpBlock2D")
    source = unet_of(sources["sd15"], down_block_types=down, up_block_types=up)
    with pytest.raises(ExportError, match="the UNet is of a kind"):
        supported.check(source)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("sd15", STATISTICS, "latents_mean .* only SDXL's pipeline reads"),
        ("sdxl", {"shift_factor": 0.5}, "shift_factor is 0.5"),
        ("sd15", {"out_channels": 6}, "out_channels is 6"),
    ],
)
def test_a_vae_that_diffusers_pipeline_does_not_read_is_refused_by_name(family, settings, words, sources):
    with pytest.raises(ExportError, match=rf"the VAE is of a kind(?s:.*){words}"):
        supported.check(vae_of(sources[family], **settings))


def test_a_tiny_vae_that_enlarges_otherwise_is_refused(sources):
    build = lambda: AutoencoderTiny(  # noqa: E731
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), upsampling_scaling_factor=4,
    )  # fmt: skip
    with pytest.raises(ExportError, match="upsampling_scaling_factor is 4"):
        supported.check(changed(sources["sd15"], vae=build))


def test_a_text_encoder_that_masks_its_padding_is_refused_where_diffusers_reads_that(sources):
    config = CLIPTextConfig(**small_models.TEXT, use_attention_mask=True)
    part = ModelPart.of("text_encoder", CLIPTextModel(config))
    for family in ("sd15", "sdxl"):
        source = dataclasses.replace(sources[family], parts={**sources[family].parts, "text_encoder": part})
        if family == "sdxl":
            supported.check(source)
        else:
            with pytest.raises(ExportError, match="use_attention_mask is True"):
                supported.check(source)


# What is computed: exported, and compared with diffusers.


def error_of(name, source, folder):
    """The relative error of a graph of the model on ONNX Runtime."""
    supported.check(source)
    graph = next(graph for graph in graph_specs.build(source) if graph.name == name)
    skeletons = {name: part.skeleton for name, part in source.parts.items()}
    modules = {name: source.parts[name].load() for name in graph.parts}
    onnx_graph.write(graph, skeletons, modules, folder)
    right = expected.of_graph(graph, source, modules, verify.LARGE_SIZES)
    return verify.graph_error(folder / f"{name}.onnx", backend="onnxruntime", expected=right)


def test_a_vae_with_statistics_draws_what_diffusers_does(sources, tmp_path):
    assert error_of("vae_decoder", vae_of(sources["sdxl"], **STATISTICS), tmp_path) < 1e-4


def test_the_reference_does_not_share_what_the_graph_leaves_out(sources, tmp_path, monkeypatch):
    scale = "hyperrt.training.model.latents.LatentScale.for_vae"
    monkeypatch.setattr(scale, lambda self, latents: latents / self.factor)
    assert error_of("vae_decoder", vae_of(sources["sdxl"], **STATISTICS), tmp_path) > 0.1


def test_a_vae_without_some_of_its_parts_draws_what_diffusers_does(sources, tmp_path):
    settings = {"use_post_quant_conv": False, "mid_block_add_attention": False, "act_fn": "gelu"}
    assert error_of("vae_decoder", vae_of(sources["sd15"], **settings), tmp_path) < 1e-4


def test_a_unet_without_a_middle_block_is_exported(sources, tmp_path):
    source = unet_of(sources["sd15"], mid_block_type=None)
    layout = lora_layers.layout_of(source.parts["unet"].skeleton, 2)
    source = dataclasses.replace(source, layout=layout)
    assert error_of("denoiser", source, tmp_path) < 1e-4


def test_a_time_embedding_of_another_width_is_exported(sources, tmp_path):
    source = unet_of(sources["sdxl"], time_embedding_dim=40)
    assert error_of("denoiser", source, tmp_path) < 1e-4


def test_ids_of_prompts_are_those_of_the_models_tokenizers(sources):
    """Stable Diffusion 2 pads its only tokenizer with "!", SDXL its second."""
    padded = clip_tokenizer.padded(sources["sd15"].tokenizer, "!")
    for source in (dataclasses.replace(sources["sd15"], tokenizer=padded), *sources.values()):
        found = expected.token_ids(source, expected.PROMPTS)
        tokenizers = {"input_ids": source.tokenizer, "input_ids_2": source.tokenizer_2}
        for name, ids in found.items():
            options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            assert torch.equal(ids, tokenizers[name](list(expected.PROMPTS), **options).input_ids)
    assert (sources["sdxl"].pad, sources["sdxl"].pad_2) == (None, 0)
    assert (dataclasses.replace(sources["sd15"], tokenizer=padded).pad, sources["sd15"].pad_2) == (0, None)
