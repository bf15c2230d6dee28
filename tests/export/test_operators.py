import numpy as np
import torch

from hyperrt.export import operators
from hyperrt.sampling import guidance
from hyperrt.training.model import lora_layers


def test_rows_are_branch_major():
    images = torch.randn(2, 1, 3, 3)
    rows = operators.rows_from_images(images, torch.zeros(6))
    for row in range(6):
        assert torch.equal(rows[row], images[row % 2])


def test_combine_is_the_runtimes_guidance_sum():
    rows, weights = torch.randn(6, 1, 3, 3), torch.tensor([-6.5, 3.0, 4.5])
    result = operators.combine(rows, weights, torch.zeros(2, 1, 3, 3))
    expected = guidance.combine(weights.tolist(), rows.numpy().reshape(3, 2, 1, 3, 3))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_attention_outside_an_export_is_that_of_training():
    query, key, value = torch.randn(3, 2, 5, 8)
    rows = [tensor.reshape(2, 5, 2, 4).transpose(1, 2) for tensor in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2).reshape(2, 5, 8)
    for attend in (operators.attend, operators.attend_again, lora_layers.attend):
        torch.testing.assert_close(attend(query, key, value, 2), expected)
