import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from hyperrt import engines
from hyperrt.export import expected, reference, verify
from hyperrt.export.errors import ParityError
from hyperrt.export.source import betas
from hyperrt.sampling.options import SOLVER_NAMES


def test_the_manifest_holds_the_error_of_every_check(exported):
    parity = json.loads((exported / "bundle.json").read_text())["parity"]
    assert parity.keys() == verify.TOLERANCE.keys() - {"image_prompt"}
    assert parity["lora_zero"] == 0 < parity["denoiser"]  # measured: a graph of fp32 differs in a few bits


def test_a_graph_that_differs_from_its_module_has_a_large_error(exported, source, parts, modules):
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


def test_every_solver_has_its_scheduler_of_diffusers():
    assert reference.SCHEDULERS.keys() == set(SOLVER_NAMES)


@pytest.mark.parametrize(
    "setting",
    [
        {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"num_train_timesteps": 500},
        {"prediction_type": "epsilon"}, {"prediction_type": "sample"}, {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": True, "steps_offset": 0, "set_alpha_to_one": True, "solver_order": 3},
    ],
    ids=str,
)  # fmt: skip
def test_tables_are_diffusers_schedulers_for_whatever_the_configuration_says(setting, source):
    changed = dataclasses.replace(source, scheduler={**source.scheduler, **setting})
    assert verify.solvers_error(changed) <= verify.TOLERANCE["solvers"]


def test_a_wrong_noise_schedule_has_a_large_error(source, monkeypatch):
    wrong = dataclasses.replace(source, scheduler={**source.scheduler, "beta_end": 0.02})
    monkeypatch.setattr(verify, "betas", lambda _: betas(wrong))
    assert verify.solvers_error(source) > verify.TOLERANCE["solvers"]


def test_comparing_leaves_the_networks_as_they_were(source, parts, modules):
    unet = modules["unet"]

    def kinds():
        modules = {name: type(module) for name, module in unet.named_modules()}
        return modules, {name: type(processor) for name, processor in unet.attn_processors.items()}

    before, weights = kinds(), {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    for name in ("context", "denoiser"):
        expected.of_graph(parts[name], source, modules, verify.GRAPH_SIZES[1:])
    assert kinds() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unet.state_dict().items())


def test_an_error_above_its_tolerance_ends_the_export():
    with pytest.raises(ParityError, match=r"loop(?s:.*)relative error 0.5; allowed is 0.001"):
        verify.checked("loop", 0.5, 0.001)


@pytest.mark.parametrize("error", [float("inf"), float("nan")])
def test_an_error_that_is_not_finite_ends_the_export(error):
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
