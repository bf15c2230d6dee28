"""One training as two processes, on a processor: the run of one process, in half the rows each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from hyperrt.errors import UsageError
from hyperrt.training import train
from hyperrt.training.run import checkpoint, distributed, preview
from hyperrt.training.run.config import TrainConfig
from hyperrt.training.run.optimizer import Optimizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def exact(short_run) -> dict:
    """fp32: of bf16 products, the sum of two halves is another than that of the whole in the third digit."""
    return {**short_run, "precision": "fp32", "log_every": 1, "gamma": 0.5, "targets": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def alone(exact, tmp_path_factory) -> Path:
    """The run of one process with all rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "write", lambda path, trainer: None)
        return train.run(TrainConfig(**exact, output=str(tmp_path_factory.mktemp("alone") / "run")))


def joined(started) -> list[int]:
    for process in started:
        process.join(300)
    return [process.exitcode for process in started]


def assert_same_curve(entries, found: Path, expected: Path, tolerance: float) -> None:
    assert entries(found)[0]["processes"] == 2
    names = ("step", "loss", "ft", "reg", "prior", "grad_norm")
    one, other = ([[e[k] for k in names] for e in entries(run) if "loss" in e] for run in (found, expected))
    assert len(one) == 6
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=0)


def assert_same_state(one: Path, other: Path) -> None:
    (found, _), (expected, _) = (checkpoint.read(folder / checkpoint.STATE) for folder in (one, other))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-4)


def test_two_processes_that_share_the_moments_leave_a_state_that_two_or_one_can_resume(
    exact, alone, together, tmp_path, entries, no_sheets
):
    config = TrainConfig(**exact, output=str(tmp_path / "run"), shard_optimizer=True)
    assert joined(together(2, config)) == [0, 0]
    run = Path(config.output)
    assert_same_curve(entries, run, alone, 1e-4)
    assert_same_state(run, alone)
    longer, whole = {**exact, "steps": 7}, Path(shutil.copytree(alone, tmp_path / "whole"))
    assert joined(together(2, replace(config, **longer), resume=True)) == [0, 0]
    train.run(TrainConfig(**longer, output=str(whole)), resume=True)
    assert_same_state(run, whole)
    train.run(TrainConfig(**{**exact, "steps": 8}, output=config.output), resume=True)
    assert [e["step"] for e in entries(run) if "loss" in e] == list(range(1, 9))


@pytest.mark.gpu
def test_a_gpu_goes_on_with_moments_that_were_shared(exact, together, tmp_path, entries):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    config = TrainConfig(**{**exact, "device": "cuda"}, output=str(tmp_path / "run"), shard_optimizer=True)
    assert joined(together(1, config, method="spawn")) == [0]
    assert joined(together(1, replace(config, steps=7), method="spawn", resume=True)) == [0]
    assert entries(config.output)[-1]["step"] == 7


def test_steps_are_put_back_where_a_fused_adamw_reads_them():
    """On a stand-in for a GPU: PyTorch's ZeroRedundancyOptimizer leaves them on the host."""
    weight = nn.Parameter(torch.zeros(2, device="meta"))

    class Sharded(ZeroRedundancyOptimizer):
        def __init__(self):
            self.param_groups, self.state = [{"params": [weight]}], {}
            self.optim = SimpleNamespace(state={})

        def load_state_dict(self, given):
            values = given["state"][0]
            self.state[weight] = values
            self.optim.state[weight] = {k: v if v.dim() == 0 else v.to("meta") for k, v in values.items()}

    optimizer = Optimizer.__new__(Optimizer)
    optimizer.named, optimizer.adamw = {"weight": weight}, Sharded()
    optimizer._restore_moments({"weight": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}})
    found = optimizer.adamw.optim.state[weight]
    assert {tensor.device.type for tensor in found.values()} == {"meta"}
    assert not optimizer.adamw.state


def test_processes_that_find_another_state_are_refused_together(exact, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda accelerator, number: [3, number])
    config = TrainConfig(**exact, output=str(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"different steps\n.* finds step 3, process 1 step 0\n.*share"):
        train.run(config, resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("compress", "hook"), [(False, "no"), (True, "bf16")])
def test_gradients_travel_as_they_were_asked_to(compress, hook):
    """To accelerate; to try it takes two GPUs."""
    assert distributed.start(True, compress).ddp_handler.comm_hook.value == hook


def test_processors_that_cannot_compress_gradients_say_so(monkeypatch):
    monkeypatch.setattr(distributed.Accelerator, "num_processes", 2)
    with pytest.raises(UsageError, match="these processes use cpu"):
        distributed.start(True, compress=True)


@pytest.mark.parametrize(("count", "seen"), [("2", ""), ("1", "0")])
def test_processes_that_share_a_processor_see_no_gpu(monkeypatch, count, seen):
    accelerator = SimpleNamespace(num_processes=int(count))
    monkeypatch.setattr(distributed, "Accelerator", lambda **options: accelerator)
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    distributed.start(True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_a_signal_to_one_process_stops_all_at_the_same_step(exact, together, tmp_path, entries):
    config = TrainConfig(**{**exact, "steps": 100_000}, output=str(tmp_path / "run"))
    started = together(2, config)
    log = Path(config.output) / "log.jsonl"
    while all(process.is_alive() for process in started) and not (
        log.exists() and log.read_bytes().count(b"\n") > 3
    ):
        time.sleep(0.01)
    os.kill(started[1].pid, signal.SIGTERM)
    assert joined(started) == [143, 143]
    _, metadata = checkpoint.read(Path(config.output) / checkpoint.STATE)
    assert int(metadata["step"]) == entries(config.output)[-1]["step"]


@pytest.mark.slow
def test_two_processes_have_the_curve_of_one(exact, alone, tmp_path, entries):
    """As on several GPUs, by torchrun; `accelerate launch` starts several processes on GPUs only."""
    config = {**exact, "output": str(tmp_path / "run")}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in config.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launcher, "-m", "hyperrt.training.train", *arguments], cwd=ROOT, check=True)
    assert_same_curve(entries, tmp_path / "run", alone, 1e-4)


def test_subjects_that_cannot_be_shared_equally_are_refused():
    with pytest.raises(UsageError, match="5 subjects cannot be divided among 2 processes"):
        distributed.share(5, SimpleNamespace(num_processes=2, process_index=0))


def test_all_subjects_are_shared_and_none_twice():
    parts = [distributed.share(6, SimpleNamespace(num_processes=3, process_index=k)) for k in range(3)]
    assert [list(range(6))[part] for part in parts] == [[0, 1], [2, 3], [4, 5]]
