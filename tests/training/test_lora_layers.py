from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from training import lora_layers
from training.lora_layers import Rows

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
