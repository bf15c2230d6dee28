from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch

from hyperrt.errors import UsageError
from hyperrt.training.data import features
from hyperrt.training.data.cache import PictureCache
from hyperrt.training.run import batches
from hyperrt.training.run.config import TrainConfig


@pytest.fixture(scope="module")
def read(world, parts):
    """The cache, and what the frozen encoders see of it."""
    cache = PictureCache.open(world.cache)
    return cache, features.image_features(parts, cache), features.caption_table(parts, cache, "sks")


@pytest.fixture
def make(read, settings):
    return lambda **changes: batches.Batches(*read, TrainConfig(**{**settings, **changes}), 1000)


def tensors_of(batch):
    """All tensors of a batch by name."""
    tensors = vars(batch) | {name: getattr(batch, name).hidden_states for name in ("text", "generic")}
    return {name: torch.as_tensor(value) for name, value in tensors.items()}


def test_a_batch_depends_on_seed_and_step_alone(make):
    first, same, other = (tensors_of(make(seed=seed).at(3)) for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not torch.equal(first["noise"], other["noise"])


def test_what_is_drawn_ahead_is_what_each_step_asks_for():
    asked = []

    def draw(step):
        asked.append((step, threading.current_thread() is threading.main_thread()))
        if step == 9:
            raise ValueError("nine")
        return 2 * step

    ahead = batches.Ahead(draw)
    assert [ahead(step) for step in (0, 1, 2, 7, 8)] == [0, 2, 4, 14, 16]
    with pytest.raises(ValueError, match="nine"):
        ahead(9)
    ahead.close()
    # Only what was not foreseen is drawn when it is asked for, and nothing is drawn twice.
    assert sorted(asked) == [(k, k in (0, 7)) for k in (0, 1, 2, 3, 7, 8, 9)]


def test_an_epoch_has_every_training_identity_once_and_no_held_out_one(make, settings):
    source = make()
    count = 40 - settings["holdout"]
    seen = np.concatenate([source.at(step).subjects for step in range(2 * count // settings["batch_size"])])
    for epoch in np.split(seen, 2):
        assert sorted(epoch) == list(range(count))


def test_the_parts_of_a_step_are_the_step(make, read, settings):
    config = TrainConfig(**{**settings, "batch_size": 8, "targets": 2, "photos": 2})
    whole = make(batch_size=8, targets=2, photos=2)
    parts = [batches.Batches(*read, config, 1000, part) for part in (slice(0, 2), slice(2, 4))]
    for source in (whole, *parts):
        source.mirrored = -source.latents
    for draw in ("at", "prior_at"):
        expected = tensors_of(getattr(whole, draw)(3))
        found = [tensors_of(getattr(part, draw)(3)) for part in parts]
        assert found[0].pop("photos") == found[1].pop("photos") == expected.pop("photos")
        for name, value in expected.items():
            both = [part[name] for part in found]
            assert torch.equal(torch.cat(both), value), name
            assert len(both[0]) == len(both[1])


def test_targets_share_their_subject_and_photos(make):
    batch = make(batch_size=6, targets=3, photos=2).at(1)
    assert len(batch.subjects) == 2
    assert len(batch.features) == 2 * batch.photos
    assert len(batch.latents) == len(batch.text) == len(batch.timesteps) == 6


@pytest.mark.parametrize("cross_view", [0.0, 1.0])
def test_the_target_is_one_of_the_photos_or_another_view(make, read, cross_view):
    cache = read[0]
    source = make(cross_view=cross_view, photos=1)
    for step in range(5):
        batch = source.at(step)
        for who, photo, latents in zip(batch.subjects, batch.features, batch.latents, strict=True):
            seen = [view for view in range(3) if np.allclose(read[1][who, view], photo)]
            target = [view for view in range(3) if np.array_equal(cache.latents[who, view], latents)]
            assert (seen == target) == (cross_view == 0)


def test_text_dropout_gives_the_empty_prompt(make, read):
    [empty] = read[2].text(np.array([0])).hidden_states
    assert all(torch.equal(text, empty) for text in make(text_dropout=1.0).at(0).text.hidden_states)
    assert not any(torch.equal(text, empty) for text in make(text_dropout=0.0).at(0).text.hidden_states)


def test_the_prior_is_of_other_subjects_of_the_noun_without_the_token(make, read):
    cache, _, captions = read
    source = make()
    batch, prior = source.at(2), source.prior_at(2)
    for who, latents, text in zip(batch.subjects, prior.latents, prior.text.hidden_states, strict=True):
        matches = np.argwhere((cache.latents == latents.numpy()).all((2, 3, 4)))
        other, view = matches[0]
        assert other != who
        assert cache.nouns[other] == cache.nouns[who]
        assert torch.equal(text, captions.text(captions.generic[None, other, view]).hidden_states[0])


def test_a_subject_that_is_alone_with_its_noun_has_no_prior_and_is_warned_about(read, settings, caplog):
    cache, *seen = read
    nouns = np.zeros_like(cache.nouns)
    nouns[[1, 4]] = 1, 2
    nouns[-1] = 1  # held out: no subject of a prior
    cache = dataclasses.replace(cache, nouns=nouns)
    config = TrainConfig(**{**settings, "gamma": 1.0, "batch_size": 38, "targets": 2, "holdout": 2})
    source = batches.Batches(cache, *seen, config, 1000)
    both = [source.prior_at(step) for step in range(2)]  # an epoch
    alone = np.isin(np.repeat(np.concatenate([one.subjects for one in both]), 2), (1, 4))
    assert alone.sum() == 4
    assert np.array_equal(np.concatenate([one.weight for one in both]), np.where(alone, 0, 1))
    assert source.at(0).weight.min() == 1
    [said] = caplog.messages
    assert "2 of 38 subjects" in said and "--prior matching" in said
    for change in ({"gamma": 0.0}, {"prior": "matching"}):
        batches.Batches(cache, *seen, dataclasses.replace(config, **change), 1000)
    assert len(caplog.messages) == 1


def test_timesteps_cover_the_schedule_and_a_shift_makes_them_noisier(make):
    plain, shifted = (make(batch_size=32, noise_shift=shift).at(0).timesteps for shift in (1.0, 3.0))
    middles = (torch.arange(32) + 0.5) * 1000 / 32
    assert (plain.sort().values - middles).abs().max() < 17  # one in each of 32 parts of 31.25
    assert shifted.float().mean() > plain.float().mean() + 100
    assert plain.min() >= 0
    assert shifted.max() < 1000


@pytest.mark.parametrize(
    ("wrong", "said"), [({"holdout": 40}, "no subject is left"), ({"photos": 9}, "photos is 9")]
)
def test_what_the_cache_cannot_give_is_refused(make, wrong, said):
    with pytest.raises(UsageError, match=said):
        make(**wrong)


def test_features_are_computed_once_for_an_encoder(read, parts, monkeypatch):
    monkeypatch.setattr(features, "encode_images", None)
    again = features.image_features(parts, read[0])
    assert np.array_equal(again, read[1])
