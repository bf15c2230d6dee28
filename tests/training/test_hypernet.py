from __future__ import annotations

import pytest
import torch

from hyperrt.lora import LoraLayout, Site
from training.config import DecoderConfig
from training.hypernet import WeightDecoder
from training.lora_layers import unpack

PATH = "blocks.{}.attn2.to_{}"
LAYOUT = LoraLayout(
    tuple(
        Site(PATH.format(block, name), d_in, d_out)
        for block, (width, text) in enumerate([(8, 6), (12, 6), (8, 6)])
        for name, d_in, d_out in [("q", width, width), ("k", text, width), ("v", text, width)]
    ),
    rank=2,
)
PHOTOS, TOKENS, WIDTH = 3, 5, 10


def decoder(**changes) -> WeightDecoder:
    torch.manual_seed(0)
    return WeightDecoder(LAYOUT, WIDTH, DecoderConfig(**{"dim": 16, "layers": 2, "head_dim": 8, **changes}))


@pytest.fixture
def features():
    return torch.randn(PHOTOS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("head_dim", [0, 8], ids=["heads as in the paper", "heads behind a bottleneck"])
def test_output_is_the_layouts_packed_vectors(features, head_dim):
    packed = decoder(head_dim=head_dim)(features)
    assert {name: tuple(vector.shape) for name, vector in packed.items()} == {
        name: (PHOTOS, LAYOUT.size(name)) for name in ("lora_q", "lora_kv")
    }


def test_a_fresh_decoder_predicts_the_base_model_but_not_a_zero_a(features):
    for A, B in unpack(LAYOUT, decoder()(features)).values():
        assert B.abs().max() == 0
        assert A.abs().mean() > 0


def test_every_b_of_a_fresh_decoder_has_a_gradient(features):
    packed = decoder()(features)
    for vector in packed.values():
        vector.retain_grad()
    sum((A @ B).sum() for A, B in unpack(LAYOUT, packed).values()).backward()
    for name, vector in packed.items():
        for _, part_a, part_b in LAYOUT.slices(name):
            assert (vector.grad[:, part_b] != 0).all()
            assert (vector.grad[:, part_a] == 0).all()  # until B is not zero


def test_each_head_writes_to_its_own_factor_in_packed_order(features):
    model = decoder()
    tokens = torch.zeros(1, 2 * len(LAYOUT.sites), 16)
    names = [(name, k) for name in ("lora_q", "lora_kv") for k in range(2 * len(LAYOUT.sites_of(name)))]
    with torch.no_grad():
        for weight in model.heads.weights:
            weight.fill_(1.0)
        model.heads.squeeze.weight.fill_(1.0)
    for name, factor in names:
        token = model.heads.order[name][factor]
        one = tokens.clone()
        one[:, token] = 1.0
        vector = model.heads(one)[name][0]
        parts = [part for _, *both in LAYOUT.slices(name) for part in both]
        assert (vector[parts[factor]] != 0).all()
        assert (vector != 0).sum() == parts[factor].stop - parts[factor].start


def test_a_photos_lora_does_not_depend_on_the_other_photos(features):
    model = decoder()
    together, alone = model(features), model(features[1:2])
    torch.testing.assert_close(together["lora_kv"][1:2], alone["lora_kv"], atol=1e-6, rtol=1e-5)


def test_the_penalty_does_not_see_the_static_a(features):
    model = decoder()
    for weight in model.heads.weights:
        weight.data.zero_()
    assert all(delta.abs().max() < 1e-6 for delta in model.deltas(model(features)).values())


def test_the_penalty_sees_the_bias_of_b(features):
    model = decoder()
    for weight in model.heads.weights:
        weight.data.zero_()
    _, _, part_b = LAYOUT.slices("lora_q")[0]
    model.offsets["lora_q"].data[part_b] = 0.5
    deltas = model.deltas(model(features))
    assert torch.all(deltas["lora_q"][:, part_b] == 0.5)


def test_feature_statistics_make_the_decoder_blind_to_scale_and_offset(features):
    plain, shifted = decoder(), decoder()
    shifted.set_feature_statistics(torch.full((WIDTH,), 3.0), torch.full((WIDTH,), 2.0))
    torch.testing.assert_close(
        plain(features)["lora_q"], shifted(features * 2 + 3)["lora_q"], atol=1e-5, rtol=1e-5
    )


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of"):
        DecoderConfig(dim=129)
