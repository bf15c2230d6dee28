import dataclasses

import pytest
import torch

from export import families
from export.errors import ExportError
from export.source import betas
from training import checkpoint


def hashes(seed):
    source = families.get("tiny").random(seed)
    return [checkpoint.hash_of(part.read()) for part in source.parts.values()]


def test_random_weights_depend_on_their_seed_alone():
    first = hashes(0)
    torch.manual_seed(5)
    assert hashes(0) == first
    assert not set(hashes(1)) & set(first)


def test_drawing_random_weights_leaves_the_callers_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    families.get("tiny").random(3)
    assert torch.equal(torch.rand(1), expected)


def test_a_noise_schedule_that_the_runtime_does_not_know_is_refused(source):
    changed = dataclasses.replace(source, scheduler={**source.scheduler, "beta_schedule": "sigmoid"})
    with pytest.raises(ExportError, match="'sigmoid'"):
        betas(changed)
