import copy
import json

import numpy as np
import pytest
import torch

from hyperrt import engines
from hyperrt.export import expected, verify
from hyperrt.export.errors import ParityError


def test_the_manifest_holds_the_figure_of_every_rung(exported):
    parity = json.loads((exported / "bundle.json").read_text())["parity"]
    assert parity.keys() == verify.TOLERANCE.keys() - {"image_prompt"}
    assert all(error <= verify.TOLERANCE[rung] for rung, error in parity.items())


def test_a_graph_that_differs_from_its_module_is_seen(exported, source, parts, modules):
    changed = {"unet": copy.deepcopy(modules["unet"])}
    with torch.no_grad():
        changed["unet"].conv_out.weight.mul_(1.01)
    errors = [
        verify.graph_error(
            exported / "denoiser.onnx",
            backend="onnxruntime",
            expected=expected.of_graph(parts["denoiser"], source, unets, verify.GRAPH_SIZES[:1]),
        )
        for unets in (modules, changed)
    ]
    assert errors[0] <= verify.TOLERANCE["denoiser"] < errors[1]


def test_a_rung_above_its_tolerance_ends_the_export():
    with pytest.raises(ParityError, match=r"loop(?s:.*)relative error 0.5; allowed is 0.001"):
        verify.checked("loop", 0.5, 0.001)


@pytest.mark.parametrize("error", [float("inf"), float("nan")])
def test_an_error_that_is_no_number_is_no_parity(error):
    with pytest.raises(ParityError):
        verify.checked("loop", error, 0.001)


def test_nan_in_a_result_is_an_infinite_error():
    assert verify.relative({"y": np.array([np.nan])}, {"y": np.array([1.0])}) == float("inf")


def test_the_lora_of_one_row_does_not_reach_the_others(exported, parts):
    feeds = {k: v.numpy() for k, v in parts["context"].feeds(verify.GRAPH_SIZES[1], seed=0).items()}
    changed = feeds["lora_kv"].copy()
    changed[2] += 1
    with engines.open(exported / "context.onnx") as engine:
        before, after = (
            engine.run(feeds | {"lora_kv": lora})["context"] for lora in (feeds["lora_kv"], changed)
        )
    moved = np.abs(after - before).max(axis=(1, 2)) > 0
    assert moved.tolist() == [False, False, True, False]
