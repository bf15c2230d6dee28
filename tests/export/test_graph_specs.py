import dataclasses
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderTiny
from onnx import numpy_helper

from hyperrt import engines
from hyperrt.bundle.bundle import GRAPHS
from hyperrt.export import graph_specs, onnx_graph
from hyperrt.export.parts import ModelPart
from hyperrt.training.model import lora_layers


@pytest.fixture(scope="session")
def denoiser(exported):
    return onnx.load(exported / "denoiser.onnx").graph


def stored(graph):
    return [numpy_helper.to_array(tensor).astype(np.float32) for tensor in graph.initializer]


def holds(arrays, weight):
    return any(
        np.array_equal(a, weight) or np.array_equal(a, weight.T) for a in arrays if a.size == weight.size
    )


def test_there_is_a_graph_for_each_that_a_bundle_must_have(parts):
    assert tuple(parts) == GRAPHS


def test_every_attention_of_the_denoiser_is_one_node(denoiser, modules):
    counts = Counter(node.op_type for node in denoiser.node)
    assert counts["MultiHeadAttention"] == len(list(lora_layers.attentions(modules["unet"])))
    assert counts["Softmax"] == 0


def test_key_and_value_weights_are_in_context_and_not_in_the_denoiser(denoiser, exported, modules):
    in_step, in_context = stored(denoiser), stored(onnx.load(exported / "context.onnx").graph)
    for _, module in lora_layers.attentions(modules["unet"], "attn2"):
        for linear in (module.to_k, module.to_v):
            weight = linear.weight.numpy()
            assert not holds(in_step, weight)
            assert holds(in_context, weight)
        assert holds(in_step, module.to_q.weight.numpy())


def test_each_query_site_multiplies_with_its_two_factors(denoiser, source):
    reached, products = {"lora_q"}, []
    for node in denoiser.node:  # in topological order
        if reached & set(node.input[:1]) and node.op_type in ("Slice", "Split", "Reshape"):
            reached |= set(node.output)
        elif node.op_type == "MatMul" and node.input[1] in reached:
            products.append(node.name)
    assert len(products) == 2 * len(source.layout.sites_of("lora_q"))


def test_the_estimate_of_a_graphs_size_is_close(parts, source, exported):
    skeletons = {name: part.skeleton for name, part in source.parts.items()}
    for graph in parts.values():
        size = (exported / f"{graph.name}.onnx").stat().st_size
        numbers = graph_specs.numbers_of(graph, skeletons)
        assert 2 * numbers <= size <= 2 * numbers + 400_000


def test_the_decoder_of_an_autoencoder_tiny_is_exported_too(source, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        latent_channels=8, scaling_factor=0.5,
        encoder_block_out_channels=(8,) * 4, num_encoder_blocks=(0, 1, 1, 1),
        decoder_block_out_channels=(8,) * 4, num_decoder_blocks=(1, 1, 1, 0),
    ).eval().requires_grad_(False)  # fmt: skip
    part = ModelPart.of("vae", vae)
    *_, graph = graph_specs.build(dataclasses.replace(source, parts={**source.parts, "vae": part}))
    onnx_graph.write(graph, {"vae": part.skeleton}, {"vae": part.load()}, tmp_path)
    with engines.open(tmp_path / "vae_decoder.onnx") as engine:
        assert engine.outputs == graph.outputs
        latents = graph.feeds({"images": 1}, seed=0)["latents"]
        stored = part.load().float()
        expected = stored.decode(latents / vae.config.scaling_factor).sample
        found = engine.run({"latents": latents.numpy()})["pixels"]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
