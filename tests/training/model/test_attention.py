from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hyperrt.training.model import attention as module
from hyperrt.training.model.attention import attention


def inputs(queries, keys, learns):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, 8)]
    return [torch.randn(shape, generator=generator).requires_grad_(learns) for shape in shapes]


@pytest.mark.parametrize("keys", [7, 5], ids=["self", "cross"])
def test_values_and_gradients_are_those_of_the_fused_operator(keys):
    ours, fused = inputs(7, keys, True), inputs(7, keys, True)
    found, expected = attention(*ours), F.scaled_dot_product_attention(*fused)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours, fused, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_half_precision_sums_its_weights_in_full():
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(*inputs(7, 64, True))
    torch.testing.assert_close(found.float(), attention(*inputs(7, 64, True)), rtol=0.03, atol=0.03)
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize(("learns", "few"), [(False, 1e9), (True, 1)], ids=["frozen", "many tokens"])
def test_what_has_no_gradient_or_many_tokens_goes_through_the_fused_operator(learns, few, monkeypatch):
    monkeypatch.setattr(module, "FEW", few)
    seen = []
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda *given: seen.append(given))
    attention(*inputs(7, 7, learns))
    assert seen
