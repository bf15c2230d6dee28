"""Training a matrix of nine numbers: rate, log, resume, stop, errors."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from torch import nn

from hyperrt.errors import Incompatible, IntegrityError, NumericError
from hyperrt.training.messages import first_line
from hyperrt.training.run import checkpoint
from hyperrt.training.run.loop import fit
from hyperrt.training.run.optimizer import Optimizer, Schedule

SCHEDULE = Schedule(steps=12, lr=0.1, warmup=2, log_every=1, report_every=4)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def train(out, schedule=SCHEDULE, at=None, action=None, factor=1.0):
    """`fit` on random regression; before step `at`, calls `action`."""
    net = model()

    def loss(step, generator):
        if step == at:
            action()
        inputs = torch.randn(8, 3, generator=generator)
        return {"loss": factor * (net(inputs) - inputs.flip(1)).square().mean()}

    return fit(
        out, net, loss, schedule, seed=3, report=lambda step, ema: {"weight": float(ema.weight.mean())}
    )


def curve(out):
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


class Crash(BaseException):
    pass


def crash():
    raise Crash


def test_the_rate_warms_up_and_ends_at_its_share():
    schedule = Schedule(steps=100, lr=2.0, warmup=10, final_lr=0.25)
    assert schedule.rate(0) == pytest.approx(0.2)
    assert schedule.rate(9) == schedule.rate(10) == 2.0
    assert schedule.rate(55) == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert schedule.rate(100) == schedule.rate(500) == pytest.approx(0.5)


def test_the_log_has_the_rate_of_the_step_that_it_logs(tmp_path):
    train(tmp_path)
    logged = {entry["step"]: entry["lr"] for entry in curve(tmp_path) if "lr" in entry}
    assert logged == {step + 1: SCHEDULE.rate(step) for step in range(SCHEDULE.steps)}


def test_vectors_and_named_matrices_do_not_decay():
    groups = Optimizer(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), SCHEDULE, ("1.weight",)
    ).adamw.param_groups
    assert [len(group["params"]) for group in groups] == [1, 3]
    assert [group["weight_decay"] for group in groups] == [SCHEDULE.weight_decay, 0.0]


def test_the_average_follows_the_weights(tmp_path):
    net = model()
    optimizer = Optimizer(net, Schedule(steps=1, lr=0.1, warmup=0, ema=0.5))
    before = net.weight.detach().clone()
    optimizer.step(100, {"loss": net.weight.sum()})
    torch.testing.assert_close(optimizer.ema.weight, (before + net.weight) / 2)
    assert not torch.equal(before, net.weight)


def test_the_average_of_a_short_run_is_not_its_beginning():
    """With 0.999 from the first step on, 98 % of it would be the fresh weights after these 20."""
    net = model()
    optimizer = Optimizer(net, Schedule(steps=20, lr=0.1, warmup=0, final_lr=1.0))
    before = net.weight.detach().clone()
    for step in range(20):
        optimizer.step(step, {"loss": net.weight.sum()})
    left_behind = (optimizer.ema.weight - net.weight).norm() / (before - net.weight).norm()
    assert optimizer.schedule.ema == 0.999
    assert 0 < left_behind < 0.2


@pytest.mark.parametrize("at", [1, 4, 5, 11])
def test_a_run_that_died_goes_on_with_the_same_curve(tmp_path, at):
    straight, died = tmp_path / "straight", tmp_path / "died"
    whole = train(straight)
    with pytest.raises(Crash):
        train(died, at=at, action=crash)
    resumed = train(died)
    assert curve(died) == curve(straight)
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_it_ends_the_run(tmp_path, number):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(straight)
    with pytest.raises(SystemExit) as end:
        train(stopped, at=6, action=lambda: os.kill(os.getpid(), number))
    assert end.value.code == 128 + number
    assert checkpoint.read_state(stopped)[1]["step"] == "7"
    train(stopped)
    assert curve(stopped) == curve(straight)


def test_the_handlers_are_those_of_before_when_a_run_has_ended(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_run_is_read_and_its_log_left_alone(tmp_path):
    first = train(tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    assert torch.equal(train(tmp_path, at=0, action=crash).weight, first.weight)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, at=6, action=crash)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    train(tmp_path)
    assert [entry["step"] for entry in curve(tmp_path) if "loss" in entry] == list(range(1, 13))


def test_a_loss_that_is_not_a_number_stops_and_leaves_the_weights(tmp_path):
    net = model()
    before = net.weight.detach().clone()
    with pytest.raises(NumericError, match=r"step 0: the loss is not a finite number\n.*loss nan"):
        fit(tmp_path, net, lambda step, generator: {"loss": net.weight.sum() * float("nan")}, SCHEDULE)
    assert torch.equal(net.weight, before)
    assert not (tmp_path / checkpoint.STATE).exists()


@pytest.mark.parametrize("length", [0, 5, 300])
def test_a_truncated_state_is_refused_by_name(tmp_path, length):
    train(tmp_path)
    os.truncate(tmp_path / checkpoint.STATE, length)
    with pytest.raises(IntegrityError, match=r"state\.safetensors is damaged"):
        train(tmp_path)


def test_a_state_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"a pickle")
    with pytest.raises(Incompatible, match=r"state\.pt cannot be resumed\n.*state\.safetensors\n.*remove"):
        train(tmp_path)


def test_moments_keep_the_memory_layout_of_their_parameters(tmp_path):
    """AdamW's fused kernel reads a parameter and its moments in the order of their memory."""

    def loss(step, generator):
        return {"loss": net(torch.randn(2, 3, 8, 8, generator=generator)).square().mean()}

    curves = []
    for stops in ([8], [3, 8]):
        for steps in stops:
            torch.manual_seed(0)
            net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            schedule = Schedule(steps=steps, lr=0.1, warmup=0, final_lr=1.0, log_every=1)
            fit(tmp_path / str(len(stops)), net, loss, schedule)
        curves.append(curve(tmp_path / str(len(stops))))
    assert curves[0] == curves[1]


def test_a_state_of_another_model_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(IntegrityError, match="is another model's"):
        fit(tmp_path, nn.Linear(4, 4), lambda step, generator: {}, SCHEDULE)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError(""), "ValueError('')"),
        (ValueError("\n"), r"ValueError('\n')"),
        (FileNotFoundError(2, "No such file", "weights"), "weights: No such file"),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
    ],
    ids=["lines", "empty", "blank", "of a file", "of no file"],
)
def test_the_first_line_of_an_error_says_something(error, said):
    assert first_line(error) == said
