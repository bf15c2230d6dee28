"""Runs that end early: killed, asked to stop, out of numbers, out of disk. What is there afterwards?"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from hyperrt import files
from hyperrt.errors import NumericError
from hyperrt.training import train
from hyperrt.training.model import losses
from hyperrt.training.run import checkpoint
from hyperrt.training.run.config import TrainConfig
from hyperrt.training.run.run_log import RunLog
from hyperrt.training.run.trainer import Trainer

KILLS = 20


def stop_before(monkeypatch, step: int, action) -> None:
    """Calls `action` when the trainer begins that step."""
    whole = Trainer.step

    def interrupted(self, number):
        if number == step:
            action()
        return whole(self, number)

    monkeypatch.setattr(Trainer, "step", interrupted)


def lines(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_line(process, run: Path, count: int) -> None:
    """Until the log has so many lines, or the process has ended."""
    while process.is_alive() and lines(run) < count:
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_killed_at_20_random_moments_has_the_curve_of_one_that_was_not(
    short_run, tmp_path, no_sheets, launch, curve
):
    """SIGKILL at any time from the opening of the folder to the last step.

    The imports before are not covered: the process is forked from a server that has them, and they write
    nothing. The moments come from HYPERRT_KILL_SEED, so that a failure can be repeated; each is printed.
    """
    seed = int(os.environ.get("HYPERRT_KILL_SEED", "0"))
    moments = random.Random(seed)
    print(f"HYPERRT_KILL_SEED={seed}")
    settings = {**short_run, "steps": 30, "log_every": 1, "save_every": 2, "monitor_every": 30}
    straight = train.run(TrainConfig(**settings, output=str(tmp_path / "straight")))
    config = TrainConfig(**settings, output=str(tmp_path / "run"))
    run, killed = Path(config.output), 0
    while killed < KILLS:
        process = launch(config, resume=True)
        line, seconds = lines(run) + moments.randrange(-2, 3), moments.uniform(0, 0.05)
        wait_for_line(process, run, line)
        time.sleep(seconds)
        print(f"kill {killed}: {seconds:.4f} s after line {line}, {lines(run)} are written")
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it got through
            assert curve(run) == curve(straight)
            shutil.rmtree(run)
    train.run(config, resume=True)
    assert curve(run) == curve(straight)
    for name in ("hypernet.safetensors", "state.safetensors"):
        assert same_tensors(run / name, straight / name)


def same_tensors(one: Path, other: Path) -> bool:
    (found, _), (expected, _) = checkpoint.read(one), checkpoint.read(other)
    return found.keys() == expected.keys() and all(found[k].equal(expected[k]) for k in found)


# Publishing 0 is of the log; 1 to 3 of hypernet.json, hypernet.safetensors and state at step 3, 4 to 6 at 6.
MOMENTS = [(1, "written", None), (5, "written", 3), (5, "named", 6), (6, "written", 6)]


@pytest.mark.parametrize(("count", "when", "step"), MOMENTS)
def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_good_one(
    settings, straight, no_sheets, launch, curve, count, when, step
):
    config = TrainConfig(**settings)
    process = launch(config, die=(count, when))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run = Path(config.output)
    assert bool(list(run.glob(".hyperrt-*"))) == (when == "written")
    if step is None:
        assert not (run / checkpoint.STATE).exists()
    else:
        assert checkpoint.load_hypernet(run)[1]["step"] == step
        assert checkpoint.read(run / checkpoint.STATE)[1]["step"] == "3"
    train.run(config, resume=True)
    assert curve(run) == curve(straight)
    assert same_tensors(run / "hypernet.safetensors", straight / "hypernet.safetensors")
    assert not list(run.glob(".hyperrt-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_exits_128_plus_the_signal_and_goes_on(
    settings, straight, no_sheets, monkeypatch, curve, number
):
    config = TrainConfig(**settings)
    with monkeypatch.context() as patch:
        stop_before(patch, 4, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped:
            train.run(config)
    assert stopped.value.code == 128 + number
    assert checkpoint.load_hypernet(config.output)[1]["step"] == 5
    train.run(config, resume=True)
    assert curve(config.output) == curve(straight)


def test_a_loss_that_is_not_a_number_stops_with_the_step_and_the_subjects(settings, no_sheets, monkeypatch):
    config = TrainConfig(**settings)
    whole = losses.row_loss
    calls = []

    def broken(prediction, target):
        calls.append(1)
        return whole(prediction, target) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(losses, "row_loss", broken)
    with pytest.raises(NumericError, match=r"step 4: .*\n.*loss nan.*subjects \[\d+, \d+, \d+, \d+\]"):
        train.run(config)
    assert checkpoint.load_hypernet(config.output)[1]["step"] == 3


def command(settings, *more: str):
    """The training as the command runs it."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return CliRunner().invoke(train.main, [*arguments, *more])


@pytest.mark.parametrize("name", ["state.safetensors", "hypernet.safetensors"])
def test_a_full_disk_ends_in_three_lines_and_keeps_the_last_checkpoint(
    settings, straight, no_sheets, monkeypatch, curve, name
):
    """At the second checkpoint, that of step 6."""
    run, seen, publish = Path(settings["output"]), [], files.publish

    def full(path, write, **options):
        seen.append(Path(path).name)
        if seen.count(name) < 2:
            return publish(path, write, **options)

        def fails(file):
            write(file)
            file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return publish(path, fails, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", full)
        result = command(settings)
    assert result.exit_code == 6, result.output
    error = result.stderr[result.stderr.index("Error:") :].splitlines()
    assert len(error) == 3 and "No space left" in error[1]
    assert not list(run.glob(".hyperrt-*"))
    assert checkpoint.load_hypernet(run)[1]["step"] == (6 if name == checkpoint.STATE else 3)
    assert checkpoint.read(run / checkpoint.STATE)[1]["step"] == "3"
    assert command(settings, "--resume").exit_code == 0
    assert curve(run) == curve(straight)


def test_a_log_on_a_full_disk_ends_in_three_lines(settings, no_sheets, monkeypatch):
    begin = RunLog.__init__

    def on_a_full_disk(self, *arguments):
        begin(self, *arguments)
        self.path = Path("/dev/full")

    monkeypatch.setattr(RunLog, "__init__", on_a_full_disk)
    result = command(settings)
    assert result.exit_code == 6
    assert "/dev/full could not be written\n  why: No space left" in result.stderr
