from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hyperrt.training.model import lora_layers
from hyperrt.training.model.lora_layers import Rows
from tests.training import full_size

RANK, ROWS, TOKENS, WIDTH = 2, 3, 16, 32


@pytest.fixture
def unet(parts):
    unet = copy.deepcopy(parts.unet)
    lora_layers.install(unet)
    return unet


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(ROWS, 8, 8, 8, generator=generator),
        torch.tensor([10, 500, 900]),
        torch.randn(ROWS, TOKENS, WIDTH, generator=generator),
    )


@pytest.fixture
def packed(unet):
    layout = lora_layers.layout_of(unet, RANK)
    generator = torch.Generator().manual_seed(1)
    return {
        name: 0.2 * torch.randn(ROWS, layout.size(name), generator=generator)
        for name in ("lora_q", "lora_kv")
    }


def call(unet, inputs, packed=None, gate=1.0):
    kwargs = None
    if packed is not None:
        layout = lora_layers.layout_of(unet, RANK)
        gates = torch.as_tensor(gate).expand(len(inputs[0])).reshape(-1, 1, 1)
        kwargs = {"rows": Rows(lora_layers.unpack(layout, packed), gates)}
    latents, timesteps, text = inputs
    return unet(latents, timesteps, encoder_hidden_states=text, cross_attention_kwargs=kwargs).sample


def merged(unet, packed, row, strength=1.0):
    """The UNet with one row's LoRA added into its weights: the definition of LoRA."""
    unet = copy.deepcopy(unet)
    factors = lora_layers.unpack(lora_layers.layout_of(unet, RANK), packed)
    for path, (A, B) in factors.items():
        unet.get_submodule(path).weight.data += strength * (A[row] @ B[row]).T
    return unet


def test_install_leaves_the_unet_as_it_was(parts, unet, inputs):
    torch.testing.assert_close(call(unet, inputs), call(parts.unet, inputs), atol=1e-5, rtol=1e-5)


def test_every_row_has_the_lora_that_merging_would_give_it(unet, inputs, packed):
    together = call(unet, inputs, packed)
    for row in range(ROWS):
        alone = call(merged(unet, packed, row), [part[row : row + 1] for part in inputs])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def peft_adapted(parts, packed, row):
    """The UNet with one row's LoRA as PEFT applies it, beside the weights."""
    peft = pytest.importorskip("peft")
    unet = copy.deepcopy(parts.unet)
    factors = {
        path: (A[row], B[row])
        for path, (A, B) in lora_layers.unpack(lora_layers.layout_of(unet, RANK), packed).items()
    }
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(factors))
    unet = peft.inject_adapter_in_model(config, unet)
    for path, (A, B) in factors.items():
        layer = unet.get_submodule(path)
        layer.lora_A.default.weight.data.copy_(A.T)
        layer.lora_B.default.weight.data.copy_(B.T)
    return unet


def test_every_row_has_the_lora_that_peft_would_give_it(parts, unet, inputs, packed):
    together = call(unet, inputs, packed)
    for row in range(ROWS):
        alone = call(peft_adapted(parts, packed, row), [part[row : row + 1] for part in inputs])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_a_gate_of_zero_gives_the_base_model_and_a_half_gives_half_the_lora(unet, inputs, packed):
    mixed = call(unet, inputs, packed, gate=torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(mixed[:1], call(unet, [part[:1] for part in inputs]), atol=1e-6, rtol=1e-5)
    half = call(merged(unet, packed, 1, 0.5), [part[1:2] for part in inputs])
    torch.testing.assert_close(mixed[1:2], half, atol=1e-4, rtol=1e-4)


def test_one_lora_for_all_rows_is_broadcast(unet, inputs, packed):
    one = {name: vector[:1] for name, vector in packed.items()}
    every = {name: vector.expand(ROWS, -1) for name, vector in one.items()}
    torch.testing.assert_close(call(unet, inputs, one), call(unet, inputs, every), atol=1e-6, rtol=1e-5)


def test_keys_and_values_computed_ahead_change_nothing(unet, inputs, packed):
    layout = lora_layers.layout_of(unet, RANK)
    latents, timesteps, text = inputs
    gate = torch.tensor([0.0, 1.0, 0.5])
    ahead = lora_layers.context(unet, text, gate, packed["lora_kv"], layout)
    rows = Rows(
        lora_layers.unpack(layout, {"lora_q": packed["lora_q"]}),
        gate.view(-1, 1, 1),
        lora_layers.split_context(unet, ahead),
    )
    split = unet(latents, timesteps, encoder_hidden_states=text, cross_attention_kwargs={"rows": rows}).sample
    torch.testing.assert_close(split, call(unet, inputs, packed, gate), atol=1e-5, rtol=1e-5)


def test_unpack_agrees_with_the_layout(unet, packed):
    layout = lora_layers.layout_of(unet, RANK)
    ours = lora_layers.unpack(layout, packed)
    theirs = layout.unpack({name: vector[1].numpy() for name, vector in packed.items()})
    assert ours.keys() == theirs.keys()
    for path, (A, B) in theirs.items():
        np.testing.assert_array_equal(ours[path][0][1].numpy(), A)
        np.testing.assert_array_equal(ours[path][1][1].numpy(), B)


def test_gradients_of_a_row_come_from_that_row_alone(unet, inputs, packed):
    leaves = {name: vector.clone().requires_grad_() for name, vector in packed.items()}
    call(unet, inputs, leaves)[1].square().sum().backward()
    for leaf in leaves.values():
        assert leaf.grad[1].abs().sum() > 0
        assert leaf.grad[[0, 2]].abs().sum() == 0


def test_an_attention_mask_is_refused(unet, inputs):
    latents, timesteps, text = inputs
    with pytest.raises(ValueError, match="masks are not supported"):
        unet(latents, timesteps, text, encoder_attention_mask=torch.ones(ROWS, TOKENS))


IMAGE_TOKENS = 4


@pytest.fixture
def image(unet):
    """K and V of an image prompt for every attn2."""
    generator = torch.Generator().manual_seed(2)
    return {
        path: tuple(torch.randn(ROWS, IMAGE_TOKENS, m.to_k.out_features, generator=generator) for _ in "kv")
        for path, m in lora_layers.attentions(unet, "attn2")
    }


def scaled(image, scale):
    """V times the scale of its row."""
    return {path: (key, value * torch.tensor(scale).view(-1, 1, 1)) for path, (key, value) in image.items()}


def prompted(unet, inputs, rows):
    latents, timesteps, text = inputs
    return unet(latents, timesteps, text, cross_attention_kwargs={"rows": rows}).sample


def test_a_row_without_image_scale_is_the_plain_unet_bit_for_bit(unet, inputs, image):
    rows = Rows({}, torch.ones(ROWS, 1, 1), image=scaled(image, [0.0, 0.55, 0.0]))
    mixed, plain = prompted(unet, inputs, rows), call(unet, inputs)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(mixed[1], plain[1], rtol=1e-3)


def test_the_image_adds_an_attention_of_its_own_and_does_not_share_the_softmax(unet, inputs, image):
    path, attn = next(lora_layers.attentions(unet, "attn2"))
    hidden = torch.randn(ROWS, 5, attn.to_q.in_features, generator=torch.Generator().manual_seed(3))
    text = inputs[2]
    query = attn.to_q(hidden)
    expected = lora_layers.attend(query, attn.to_k(text), attn.to_v(text), attn.heads)
    expected = attn.to_out[0](expected + lora_layers.attend(query, *image[path], attn.heads))
    found = attn(hidden, text, rows=Rows({}, torch.ones(ROWS, 1, 1), image=image))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_image_prompt_computed_ahead_changes_nothing(unet, inputs, packed, image):
    layout = lora_layers.layout_of(unet, RANK)
    gate = torch.tensor([0.0, 1.0, 0.5])
    image = scaled(image, [0.0, 0.55, 1.0])
    ahead = lora_layers.context(unet, inputs[2], gate, packed["lora_kv"], layout, image)
    plain = lora_layers.context(unet, inputs[2], gate, packed["lora_kv"], layout)
    assert ahead.shape == (ROWS, TOKENS + IMAGE_TOKENS, plain.shape[2])
    assert torch.equal(ahead[:, :TOKENS], plain)
    split = Rows(
        lora_layers.unpack(layout, {"lora_q": packed["lora_q"]}),
        gate.view(-1, 1, 1),
        *lora_layers.split_text_and_image(unet, ahead, IMAGE_TOKENS),
    )
    direct = Rows(lora_layers.unpack(layout, packed), gate.view(-1, 1, 1), image=image)
    torch.testing.assert_close(
        prompted(unet, inputs, split), prompted(unet, inputs, direct), atol=1e-5, rtol=1e-5
    )


def test_a_context_without_an_image_prompt_has_none_to_split_off(unet, inputs, packed):
    ahead = lora_layers.context(
        unet, inputs[2], torch.ones(ROWS), packed["lora_kv"], lora_layers.layout_of(unet, RANK)
    )
    text, image = lora_layers.split_text_and_image(unet, ahead, 0)
    assert image == {}
    assert next(iter(text.values()))[0].shape[1] == TOKENS


@pytest.mark.parametrize(
    ("unet_of", "rank", "sites", "numbers"),
    [(full_size.sdxl, 2, 210, 1_239_040), (full_size.sd15, 3, 48, 223_488)],
    ids=["sdxl", "sd15"],
)
def test_the_full_size_layouts_have_the_sizes_of_the_paper(unet_of, rank, sites, numbers):
    layout = lora_layers.layout_of(unet_of(), rank)
    assert len(layout.sites) == sites
    assert layout.size("lora_q") + layout.size("lora_kv") == numbers


@pytest.mark.parametrize("unet_of", [full_size.sdxl, full_size.sd15], ids=["sdxl", "sd15"])
def test_the_full_size_unets_can_be_adapted(unet_of):
    unet = unet_of()
    lora_layers.install(unet)
    assert {type(processor) for processor in unet.attn_processors.values()} == {lora_layers.RowAttention}
