from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.training.model.lora_layers import layout_of, unpack
from hyperrt.training.model.losses import REDUCTIONS, REGULARISED, NoiseScheduler, Regulariser, row_loss
from tests.training import full_size

TIMESTEPS = torch.tensor([0, 300, 999])


FULL_SIZE = {"sd15": (full_size.sd15, 3), "sdxl": (full_size.sdxl, 2)}  # the paper's ranks


def scheduler(prediction_type="v_prediction"):
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


@pytest.fixture
def latents():
    return torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise():
    return torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1))


def test_noise_and_velocity_agree_with_diffusers(latents, noise):
    ours, theirs = NoiseScheduler(scheduler()), scheduler()
    torch.testing.assert_close(
        ours.add_noise(latents, noise, TIMESTEPS), theirs.add_noise(latents, noise, TIMESTEPS)
    )
    torch.testing.assert_close(
        ours.target(latents, noise, TIMESTEPS), theirs.get_velocity(latents, noise, TIMESTEPS)
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_the_target_is_what_the_scheduler_says_the_model_predicts(prediction_type, latents, noise):
    target = NoiseScheduler(scheduler(prediction_type)).target(latents, noise, TIMESTEPS)
    assert target is (noise if prediction_type == "epsilon" else latents)


def test_an_unknown_prediction_type_is_refused():
    strange = scheduler()
    strange.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="'flow' is not supported"):
        NoiseScheduler(strange)


def test_min_snr_weighs_the_three_targets_alike(latents, noise):
    """An error of size 1 in x0 has the same weighted loss in each parametrisation."""
    losses = []
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler_ = NoiseScheduler(scheduler(prediction_type))
        snr = scheduler_.snr[TIMESTEPS]
        error = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
        losses.append(scheduler_.min_snr_weights(TIMESTEPS, 5.0) * error)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_without_min_snr_every_row_counts_the_same():
    assert torch.equal(NoiseScheduler(scheduler()).min_snr_weights(TIMESTEPS, 0.0), torch.ones(3))


def test_the_row_loss_is_the_mean_over_a_row(latents, noise):
    expected = torch.stack([(a - b).square().mean() for a, b in zip(latents, noise, strict=True)])
    torch.testing.assert_close(row_loss(latents, noise), expected)


# R(h)


@pytest.fixture
def layout():
    return LoraLayout((Site("0.to_k", 5, 3), Site("0.to_q", 4, 6), Site("0.to_v", 5, 7)), rank=2)


@pytest.fixture
def lora(layout):
    """Of two photos; "lora_q" comes last, which must not matter."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(2, layout.size(name), generator=generator, dtype=torch.float64)
        for name in ("lora_kv", "lora_q")
    }


def matrices(layout, lora, on):
    """The matrices of R(h), written out: [[B, ...] of each]."""
    pairs = [pair for vector in lora for pair in unpack(layout, {vector: lora[vector]}).values()]
    return [A @ B for A, B in pairs] if on == "product" else [factor for pair in pairs for factor in pair]


@pytest.mark.parametrize("on", REGULARISED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_reduction_is_what_it_is_called(layout, lora, reduction, on):
    found = matrices(layout, lora, on)
    squares = torch.stack([matrix.square().sum((1, 2)) for matrix in found])  # [M, B]
    sizes = torch.tensor([[matrix[0].numel()] for matrix in found])
    expected = {
        "sum": squares.sum(0),
        "mean": squares.sum(0) / sizes.sum(),
        "matrix_fro_mean": squares.mean(0),
        "matrix_mean_sum": (squares / sizes).sum(0),
    }[reduction].mean()
    single = {name: vector.float() for name, vector in lora.items()}
    regulariser = Regulariser(layout, reduction, on)
    torch.testing.assert_close(regulariser(single, single), expected.float(), rtol=1e-5, atol=0)


def test_the_product_costs_the_same_however_scale_is_shared_and_the_factors_do_not(layout, lora):
    """Gauge: A G and G^-1 B are the same change of the weights."""
    gauge = torch.tensor([[3.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    other = {
        name: torch.cat(
            [
                x.flatten(1)
                for A, B in unpack(layout, {name: v}).values()
                for x in (A @ gauge, gauge.inverse() @ B)
            ],
            1,
        )
        for name, v in lora.items()
    }
    product, factors = (Regulariser(layout, "sum", on) for on in REGULARISED[::-1])
    one, two = ({name: vector.float() for name, vector in lora.items()} for lora in (lora, other))
    torch.testing.assert_close(product(one, one), product(two, two), rtol=1e-4, atol=0)
    assert factors(two, two) > 2 * factors(one, one)


def test_the_factors_are_weighed_without_the_static_a0_and_the_product_with_it(layout, lora):
    lora = {name: vector.float() for name, vector in lora.items()}
    nothing = {name: torch.zeros_like(vector) for name, vector in lora.items()}
    assert Regulariser(layout, "mean", "factors")(lora, nothing) == 0
    assert Regulariser(layout, "mean", "product")(lora, nothing) > 0


@pytest.mark.parametrize("on", REGULARISED)
def test_its_gradient_is_that_of_the_matrices_written_out(layout, lora, on):
    single = {name: vector.float().requires_grad_() for name, vector in lora.items()}
    double = {name: vector.requires_grad_() for name, vector in lora.items()}
    Regulariser(layout, "matrix_fro_mean", on)(single, single).backward()
    torch.stack([x.square().sum((1, 2)).mean() for x in matrices(layout, double, on)]).mean().backward()
    for name, vector in single.items():
        torch.testing.assert_close(vector.grad, double[name].grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "reduction", "lambda_", "rms"),
    [
        ("sd15", "sum", 0.15, 1.2e-3),
        ("sd15", "mean", 0.15, 0.58),
        ("sd15", "matrix_fro_mean", 0.15, 1.2e-2),
        ("sd15", "matrix_mean_sum", 0.15, 5.9e-2),
        ("sd15", "matrix_fro_mean", 0.5, 6.6e-3),
        ("sd15", "mean", 100, 2.2e-2),
        ("sdxl", "sum", 100, 2.0e-5),
        ("sdxl", "mean", 100, 2.2e-2),
        ("sdxl", "matrix_fro_mean", 100, 4.1e-4),
        ("sdxl", "matrix_mean_sum", 100, 1.1e-3),
    ],
)
def test_the_rms_at_which_the_papers_lambdas_cost_a_third_of_a_usual_loss(family, reduction, lambda_, rms):
    unet, rank = FULL_SIZE[family]
    layout = layout_of(unet(), rank)
    assert Regulariser(layout, reduction).rms_at(0.05 / lambda_) == pytest.approx(rms, rel=0.05)


@pytest.mark.parametrize("words", [("median", "factors"), ("mean", "weights")])
def test_an_unknown_word_is_refused(layout, words):
    with pytest.raises(ValueError, match=f"{words[0]}.*{words[1]}.*matrix_fro_mean"):
        Regulariser(layout, *words)
