from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection

from hyperrt.training.model.resampler import PerceiverAttention, Resampler, use_attention

FEATURES, OUTPUT, QUERIES, DIM, HEADS, DIM_HEAD, DEPTH = 20, 24, 3, 16, 2, 8, 2


@pytest.fixture
def resampler():
    torch.manual_seed(0)
    return Resampler(FEATURES, OUTPUT, QUERIES, DIM, HEADS, DIM_HEAD, DEPTH).eval()


@pytest.fixture
def features():
    return torch.randn(2, 5, FEATURES, generator=torch.Generator().manual_seed(1))


def diffusers_twin(resampler):
    """diffusers' module with the same weights under its own names."""
    twin = IPAdapterPlusImageProjection(FEATURES, OUTPUT, DIM, DEPTH, DIM_HEAD, HEADS, QUERIES)
    names = {
        "0.norm1": "ln0", "0.norm2": "ln1", "0.to_q": "attn.to_q", "0.to_out": "attn.to_out.0",
        "1.0": "ff.0", "1.1": "ff.1.net.0.proj", "1.3": "ff.1.net.2",
    }  # fmt: skip
    tensors = {}
    for name, tensor in resampler.state_dict().items():
        if not name.startswith("layers."):
            tensors[name] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        if part == "0.to_kv":
            for key, half in zip(("to_k", "to_v"), tensor.chunk(2), strict=True):
                tensors[f"layers.{layer}.attn.{key}.{kind}"] = half
        else:
            tensors[f"layers.{layer}.{names[part]}.{kind}"] = tensor
    twin.load_state_dict(tensors)
    return twin.eval()


def test_it_is_diffusers_module(resampler, features):
    ours, theirs = resampler(features), diffusers_twin(resampler)(features)
    assert ours.shape == (2, QUERIES, OUTPUT)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_parameters_have_the_names_of_the_published_files(resampler):
    layer = [
        "0.norm1.bias", "0.norm1.weight", "0.norm2.bias", "0.norm2.weight", "0.to_kv.weight",
        "0.to_out.weight", "0.to_q.weight", "1.0.bias", "1.0.weight", "1.1.weight", "1.3.weight",
    ]  # fmt: skip
    outside = [f"{n}.{k}" for n in ("proj_in", "proj_out", "norm_out") for k in ("weight", "bias")]
    expected = {"latents", *outside, *(f"layers.{n}.{name}" for n in range(DEPTH) for name in layer)}
    assert set(resampler.state_dict()) == expected


def test_every_layer_attends_with_the_operator_that_it_is_given(resampler, features):
    calls = []

    def attend(query, key, value, heads):
        calls.append((query.shape, key.shape, value.shape, heads))
        return torch.zeros_like(query)

    use_attention(resampler, attend)
    resampler(features)
    inner, seen = HEADS * DIM_HEAD, 5 + QUERIES
    assert calls == [((2, QUERIES, inner), (2, seen, inner), (2, seen, inner), HEADS)] * DEPTH


def test_the_attention_of_one_resampler_leaves_others_alone(resampler):
    other = PerceiverAttention(DIM, HEADS, DIM_HEAD)
    before = other.attend
    use_attention(resampler, lambda query, key, value, heads: query)
    assert other.attend is before
