import pytest
import torch
from torch import nn

from hyperrt.export.errors import ExportError
from hyperrt.export.parts import ModelPart, numbers_of, random_part


class Tied(nn.Module):
    """Two names for one weight, a buffer that is stored and one that is computed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_a_skeleton_has_shapes_and_no_data():
    skeleton = ModelPart.of("p", Tied()).skeleton
    assert {name: tuple(t.shape) for name, t in skeleton.state_dict().items()} == {
        name: tuple(t.shape) for name, t in Tied().state_dict().items()
    }
    assert all("Fake" in type(t).__name__ for t in skeleton.state_dict().values())
    assert skeleton.first.weight is skeleton.second.weight
    assert torch.equal(skeleton.table, torch.arange(4.0))


def test_tied_weights_are_counted_once():
    assert numbers_of(Tied()) == 8 * 8 + 8 + 3


def test_loaded_weights_are_fp16_and_the_module_is_left_alone():
    module = nn.Linear(16, 16)
    before = module.weight.clone()
    loaded = ModelPart.of("p", module).load()
    assert torch.equal(loaded.weight, before.half())
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("value", [1e5, float("nan"), float("inf")])
def test_a_weight_that_fp16_cannot_hold_is_refused_by_name(value):
    module = nn.Linear(4, 4)
    module.weight.data[0, 0] = value
    with pytest.raises(ExportError, match=r"weights of a layer: weight cannot be stored"):
        ModelPart.of("a layer", module).load()


def test_random_weights_depend_on_seed_and_names_alone():
    first, again = (random_part("p", Tied, 0).load().state_dict() for _ in range(2))
    other = random_part("q", Tied, 0).load().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["first.weight"], other["first.weight"])


def test_random_parts_have_different_hashes_without_being_drawn():
    hashes = {random_part(name, Tied, seed).hash(half=True) for name in "pq" for seed in range(2)}
    assert len(hashes) == 4
