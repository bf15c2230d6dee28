"""The options of a sampling are checked once, before anything slow."""

from __future__ import annotations

import dataclasses

import pytest

from hyperrt.errors import UsageError
from hyperrt.sampling import options as config
from hyperrt.sampling.options import RANDOM, SamplingOptions, random_seed


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("kappa", [0, 1, 2], [-0.1, 2.1, float("nan")]),
        ("guidance_scale", [0, 7.5, 100], [-1, 101, float("inf")]),
        ("image_scale", [0, 0.55, 10], [-1, 11, float("nan")]),
        ("steps", [1, 1000], [0, 1001]),
        ("n", [1, 1000], [0, 1001]),
        ("batch_size", [1, 1000], [0, 1001]),
        ("seed", [0, 2**63 - 2], [-2, 2**63 - 1]),
        ("strength", [-10, 0, 10], [11, float("nan")]),
        ("solver", config.SOLVER_NAMES, ["magic", ""]),
    ],
)
def test_a_value_out_of_range_is_refused_and_named(field, good, bad):
    for value in good:
        assert getattr(SamplingOptions(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(UsageError, match=f"{field.replace('_', ' ')} is ") as caught:
            SamplingOptions(**{field: value})
        assert caught.value.why


@pytest.mark.parametrize("options", [{}, {"seed": None}, {"seed": RANDOM}], ids=str)
def test_no_seed_is_a_random_one_that_the_config_tells(monkeypatch, options):
    monkeypatch.setattr(config, "random_seed", random_seed)
    seeds = {SamplingOptions(n=1000, **options).seed for _ in range(20)}
    assert len(seeds) > 15 and all(seed >= 0 and seed + 999 < 2**32 for seed in seeds)


@pytest.mark.parametrize("chance", [0, 1])
def test_a_random_seed_leaves_room_for_every_picture(monkeypatch, chance):
    monkeypatch.setattr("secrets.randbelow", lambda most: chance * (most - 1))
    assert random_seed(1000) == chance * (2**32 - 1000)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingOptions().steps = 3
