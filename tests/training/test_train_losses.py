"""Eq. 5 as the trainer puts it together: prior preservation, prior matching, the regulariser."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hyperrt.training.model.losses import PRIORS, REGULARISED
from hyperrt.training.run.config import TrainConfig
from hyperrt.training.run.trainer import Trainer


@pytest.fixture
def trainer(settings):
    """One whose LoRAs change the picture; a fresh decoder's do not."""

    def make(learned=True, **changes):
        trainer = Trainer(TrainConfig(**{**settings, **changes}))
        if learned:
            with torch.no_grad():
                for offset in trainer.decoder.offsets.values():
                    offset.add_(0.3 * torch.randn(offset.shape, generator=torch.Generator().manual_seed(0)))
        return trainer

    return make


def terms_of(trainer, step=0):
    batch, prior = trainer.draw(step)
    return batch, trainer.losses(batch, prior)


def predicted(trainer, batch, lora):
    """What the model says of the batch's rows, captioned without the token."""
    noised = trainer.loss.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        return trainer.predict(noised, batch.timesteps, batch.generic, lora)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("regularised", REGULARISED)
def test_the_loss_is_the_sum_of_its_terms(trainer, prior, regularised):
    options = {"gamma": 0.7, "lambda_": 0.2, "prior": prior, "regularised": regularised}
    _, terms = terms_of(trainer(**options))
    assert min(term.item() for term in terms.values()) > 0
    expected = terms["ft"] + 0.7 * terms["prior"] + 0.2 * terms["reg"]
    torch.testing.assert_close(terms["loss"], expected)


@pytest.mark.parametrize("targets", [1, 2])
def test_matching_is_the_distance_from_the_base_model_on_the_same_rows(trainer, targets):
    matching = trainer(gamma=1.0, prior="matching", targets=targets, photos=1)
    batch, terms = terms_of(matching)
    with torch.no_grad():
        lora = matching.decoder(batch.features)
    lora = {name: vector.repeat_interleave(targets, 0) for name, vector in lora.items()}
    distance = predicted(matching, batch, lora) - predicted(matching, batch, None)
    assert distance.abs().max() > 1e-3
    expected = distance.square().mean().item()
    assert terms["prior"].item() == pytest.approx(expected, rel=0.02)  # the trainer's decoder may be in bf16


def test_rows_without_a_prior_weigh_nothing(trainer):
    preserving = trainer(gamma=1.0)
    batch, prior = preserving.draw(0)
    found = [
        preserving.losses(batch, dataclasses.replace(prior, weight=torch.tensor(weight)))["prior"].item()
        for weight in ([1.0] * 4, [0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4)
    ]
    assert found[1] + found[2] == pytest.approx(found[0])
    assert min(found[:3]) > 0 == found[3]


def test_a_fresh_decoder_is_the_base_model_so_matching_costs_nothing_and_preservation_does(trainer):
    fresh = {prior: trainer(learned=False, gamma=1.0, prior=prior) for prior in PRIORS}
    cost = {prior: terms_of(one)[1]["prior"].item() for prior, one in fresh.items()}
    assert cost["matching"] < 1e-4 and cost["preservation"] > 0.1


def test_matching_pulls_the_lora_back_to_the_base_model(trainer):
    """Down the gradient of the term alone, the base's side being a constant."""
    matching = trainer(gamma=1.0, prior="matching")
    _, terms = terms_of(matching)
    before = terms["prior"].item()
    terms["prior"].backward()
    with torch.no_grad():
        for parameter in matching.decoder.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    assert terms_of(matching)[1]["prior"].item() < 0.95 * before


def test_the_rows_of_matching_are_the_batchs_own_and_of_preservation_others(trainer):
    for prior, own in (("matching", True), ("preservation", False)):
        one = trainer(gamma=1.0, prior=prior)
        batch, rows = one.draw(0)
        assert torch.equal(rows.latents, batch.latents) is own
        assert torch.equal(rows.noise, batch.noise) is own
        assert torch.equal(rows.text.hidden_states, batch.generic.hidden_states) is own
