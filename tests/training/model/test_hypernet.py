from __future__ import annotations

import doctest

import pytest
import torch

from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.training.model import hypernet
from hyperrt.training.model.decoder_config import FULL_CLOSED, FULL_OPEN, OPEN_VARIANTS, DecoderConfig
from hyperrt.training.model.hypernet import ResamplerDecoder, WeightDecoder, decoder_of
from hyperrt.training.model.lora_layers import layout_of, unpack
from tests.training import full_size

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


KINDS = {
    "closed": {},
    "closed with shared heads": {"shared_heads": True},
    "open": {"kind": "resampler"},
    "open without bottleneck": {"kind": "resampler", "head_dim": 0},
    "open with a narrow output": {"kind": "resampler", "head_dim": 0, "output_dim": 4},
    "open with shared heads": {"kind": "resampler", "head_dim": 0, "shared_heads": True},
    "open with a query per site": {"kind": "resampler", "queries": "site"},
}
each_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def decoder(**changes):
    torch.manual_seed(0)
    return decoder_of(LAYOUT, WIDTH, DecoderConfig(**{"dim": 16, "layers": 2, "head_dim": 8, **changes}))


@pytest.fixture
def features():
    return torch.randn(PHOTOS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_the_configuration_names_the_kind():
    assert type(decoder()) is WeightDecoder
    assert type(decoder(kind="resampler")) is ResamplerDecoder


@each_kind
def test_output_is_the_layouts_packed_vectors(features, changes):
    packed = decoder(**changes)(features)
    assert {name: tuple(vector.shape) for name, vector in packed.items()} == {
        name: (PHOTOS, LAYOUT.size(name)) for name in ("lora_q", "lora_kv")
    }


@each_kind
def test_a_fresh_decoder_predicts_the_base_model_but_not_a_zero_a(features, changes):
    for A, B in unpack(LAYOUT, decoder(**changes)(features)).values():
        assert B.abs().max() == 0
        assert A.abs().mean() > 0


@each_kind
def test_every_b_of_a_fresh_decoder_has_a_gradient(features, changes):
    packed = decoder(**changes)(features)
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


def randomised(**changes):
    """A decoder whose B, too, depends on the photo."""
    model = decoder(**changes)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def test_a_site_reads_one_query_for_its_a_and_its_b(features):
    model = randomised(kind="resampler", queries="site")
    tokens = model.encode(features)
    assert tokens.shape[1] == len(LAYOUT.sites)
    names = [site.path for name in ("lora_q", "lora_kv") for site in LAYOUT.sites_of(name)]
    before = unpack(LAYOUT, model.heads(tokens))
    tokens = tokens.clone()
    tokens[:, 4] += 1.0
    after = unpack(LAYOUT, model.heads(tokens))
    for number, path in enumerate(names):
        moved = [not torch.equal(old, new) for old, new in zip(before[path], after[path], strict=True)]
        assert moved == [number == 4] * 2


def test_layers_that_share_a_head_differ_by_their_embedding(features):
    model = randomised(kind="resampler", head_dim=0, shared_heads=True)
    same = torch.ones(1, 2 * len(LAYOUT.sites), 16)
    first, _, third = (PATH.format(block, "k") for block in range(3))  # blocks 0 and 2 are of one size
    A = {path: A for path, (A, _) in unpack(LAYOUT, model.heads(same)).items()}
    assert not torch.allclose(A[first], A[third])
    model.heads.layer.data.zero_()
    A = {path: A for path, (A, _) in unpack(LAYOUT, model.heads(same)).items()}
    torch.testing.assert_close(A[first], A[third])


def test_shared_heads_are_one_per_projection_width_and_factor():
    widths, projections, factors = 2, 3, 2
    assert len(decoder(shared_heads=True).heads.weights) == widths * projections * factors


@each_kind
def test_a_photos_lora_does_not_depend_on_the_other_photos(features, changes):
    model = randomised(**changes)
    together, alone = model(features), model(features[1:2])
    torch.testing.assert_close(together["lora_kv"][1:2], alone["lora_kv"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together["lora_kv"][:1], alone["lora_kv"], rtol=1e-2)


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


@each_kind
def test_feature_statistics_make_the_decoder_blind_to_scale_and_offset(features, changes):
    plain, shifted = decoder(**changes), decoder(**changes)
    shifted.set_feature_statistics(torch.full((WIDTH,), 3.0), torch.full((WIDTH,), 2.0))
    torch.testing.assert_close(
        plain(features)["lora_q"], shifted(features * 2 + 3)["lora_q"], atol=1e-5, rtol=1e-5
    )


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of"):
        DecoderConfig(dim=129)


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "mlp"}, {"kind": "resampler", "queries": "photo"}, {"output_dim": 8}, {"queries": "site"}],
)
def test_an_option_that_the_kind_does_not_have_is_refused(wrong):
    with pytest.raises(ValueError, match="kind"):
        DecoderConfig(**wrong)


def millions(module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("config", "heads", "resampler"),
    [
        (FULL_OPEN, 634.4, 13.7),
        (OPEN_VARIANTS["width_128"], 159, 13.7),
        (OPEN_VARIANTS["bottleneck_64"], 79, 13.7),
        (OPEN_VARIANTS["shared_heads"], 16.25, 13.7),
        (OPEN_VARIANTS["wide"], 634.4, 81.5),
        (OPEN_VARIANTS["query_per_site"], 634.4, 13.7),
    ],
    ids=["paper", *OPEN_VARIANTS],
)
def test_the_open_decoder_of_sdxl_has_the_size_that_the_method_says(config, heads, resampler):
    with torch.device("meta"):
        model = decoder_of(layout_of(full_size.sdxl(), 2), 1280, config)
    assert millions(model.heads) == pytest.approx(heads, rel=0.02)
    assert millions(model.resampler) == pytest.approx(resampler, rel=0.02)
    lora = model(torch.empty(2, 257, 1280, device="meta"))
    assert sum(vector.shape[1] for vector in lora.values()) == 1_239_040


def test_the_closed_decoder_of_sd15_is_hyperdreambooths_at_rank_three():
    with torch.device("meta"):
        model = decoder_of(layout_of(full_size.sd15(), 3), 768, FULL_CLOSED)
    assert type(model) is WeightDecoder
    assert model.position.shape == (96, 512)
    assert (len(model.blocks), model.config.iterations, model.blocks[0].heads) == (4, 4, 8)
    assert millions(model.heads) == pytest.approx(512 * 0.223488)
    lora = model(torch.empty(2, 197, 768, device="meta"))
    assert sum(vector.shape[1] for vector in lora.values()) == 223_488


def test_the_examples_of_the_module_hold():
    results = doctest.testmod(hypernet)
    assert (results.attempted > 0, results.failed) == (True, 0)
