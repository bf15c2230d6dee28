from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from training.losses import Noising, regulariser, row_loss

TIMESTEPS = torch.tensor([0, 300, 999])


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


def test_noising_and_velocity_agree_with_diffusers(latents, noise):
    ours, theirs = Noising(scheduler()), scheduler()
    torch.testing.assert_close(
        ours.noised(latents, noise, TIMESTEPS), theirs.add_noise(latents, noise, TIMESTEPS)
    )
    torch.testing.assert_close(
        ours.target(latents, noise, TIMESTEPS), theirs.get_velocity(latents, noise, TIMESTEPS)
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_the_target_is_what_the_scheduler_says_the_model_predicts(prediction_type, latents, noise):
    target = Noising(scheduler(prediction_type)).target(latents, noise, TIMESTEPS)
    assert target is (noise if prediction_type == "epsilon" else latents)


def test_an_unknown_prediction_type_is_refused():
    strange = scheduler()
    strange.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="'flow' is not supported"):
        Noising(strange)


def test_min_snr_weighs_the_three_targets_alike(latents, noise):
    """An error of size 1 in x0 has the same weighted loss in each parametrisation."""
    losses = []
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        noising = Noising(scheduler(prediction_type))
        snr = noising.snr[TIMESTEPS]
        error = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
        losses.append(noising.weights(TIMESTEPS, 5.0) * error)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_without_min_snr_every_row_counts_the_same():
    assert torch.equal(Noising(scheduler()).weights(TIMESTEPS, 0.0), torch.ones(3))


def test_the_row_loss_is_the_mean_over_a_row(latents, noise):
    expected = torch.stack([(a - b).square().mean() for a, b in zip(latents, noise, strict=True)])
    torch.testing.assert_close(row_loss(latents, noise), expected)


def test_the_three_reductions_differ_by_the_counts_they_divide_by():
    deltas = {"lora_q": torch.full((2, 30), 2.0), "lora_kv": torch.full((2, 70), 2.0)}
    assert regulariser(deltas, "sum", 10) == pytest.approx(400)
    assert regulariser(deltas, "mean", 10) == pytest.approx(4)
    assert regulariser(deltas, "per_factor", 10) == pytest.approx(40)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="not one of mean, sum, per_factor"):
        regulariser({"lora_q": torch.zeros(1, 1)}, "median", 1)
