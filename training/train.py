"""Trains the hypernetwork end to end through the frozen UNet, with its own LoRA in every row (paper eq. 5).

    hyperrt train --preset celeba --base DIR --data CACHE --output OUT [--lambda 1 ...]
    python -m training.train ...                          the same, in the repository
    accelerate launch -m hyperrt.training.train ...       the same run on several GPUs or machines, faster

OUT gets log.jsonl, samples/*.png, and the checkpoints of training/run/checkpoint.py. `--resume` continues a
killed run with the loss curve that it would have had; it may change the settings in
`hyperrt.training.run.config.FREE`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import torch

from hyperrt.cli.options import RenamedOption
from hyperrt.errors import UsageError
from hyperrt.training.messages import reported
from hyperrt.training.run import checkpoint, device, distributed, dry_run
from hyperrt.training.run.config import TrainConfig, resolve
from hyperrt.training.run.loop import take_steps
from hyperrt.training.run.presets import PRESETS
from hyperrt.training.run.reporter import Reporter
from hyperrt.training.run.run_log import LOG
from hyperrt.training.run.signals import stopping
from hyperrt.training.run.trainer import LOSSES, Trainer

FLAGS = {"lambda_": "--lambda"}  # the only field that is not named like its flag: `lambda` is a keyword
FORMER_FLAGS = {"base": ["--model"], "batch_size": ["--batch"]}


def run(config: TrainConfig, resume: bool = False, allow_changes: bool = False) -> Path:
    """Trains to the end, or saves and stops at SIGTERM or SIGINT; returns the run's folder.

    Raises:
        UsageError: the folder holds a run and `resume` is off; or settings other than `config.FREE` differ
            from the run's and `allow_changes` is off; or the processes find different states in the folder.
        NotFound: a folder is missing.
        Incompatible, IntegrityError: the state in the folder is another decoder's or base model's; the state,
            the base model or the data is damaged.
        NumericError: the loss is not a finite number; the last checkpoint is kept.
        ResourceError: the disk is full; the last checkpoint is kept.
        SystemExit: 128 + the number of the signal.
    """
    out = Path(config.output)
    if not resume and (out / LOG).exists():
        what, why = f"{out} holds a run", "nothing is overwritten unasked"
        raise UsageError(what, why, "add --resume, or choose another --output")
    device.prepare(config.threads)
    trainer = Trainer(config)
    start, window = 0, torch.zeros(0, len(LOSSES))
    if resume and (out / checkpoint.STATE).exists():
        start, window = trainer.resume(out, allow_changes)
    accelerator = trainer.accelerator
    distributed.check_start(accelerator, start, out)
    with stopping(launched=accelerator.num_processes > 1) as signals:
        steps = start, config.steps
        if accelerator.is_main_process:
            reporter = Reporter(trainer, out, start, window)
            callbacks = reporter.step, reporter.report, lambda done: trainer.save(out, done, reporter.window)
        else:
            callbacks = trainer.step, lambda done: None, lambda done: trainer.save(out, done, window)
        take_steps(*steps, *callbacks, config.save_every, signals, accelerator)
        trainer.close()
    return out


def _options(command: click.Command) -> click.Command:
    """Adds an option for every field of TrainConfig; None if unset, so that preset and file are used."""
    for field in dataclasses.fields(TrainConfig):
        kind = {"int": int, "float": float, "bool": bool}.get(str(field.type).partition(" ")[0], str)
        name = FLAGS.get(field.name, "--" + field.name.replace("_", "-"))
        switch = {"is_flag": True} if kind is bool else {"type": kind}
        text = field.metadata["help"]
        if field.default not in (dataclasses.MISSING, None, False):
            text += f" [default: {field.default}]"
        former = FORMER_FLAGS.get(field.name, [])
        option = RenamedOption([name, field.name], former=former, default=None, help=text, **switch)
        command.params.append(option)
    return command


@click.command(epilog="Defaults are those of the preset 'tiny'; the others are in training/run/presets.py.")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="tiny", show_default=True)
@click.option(
    "--config",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file of settings; flags override it.",
)
@click.option("--resume", is_flag=True, help="Continue the run in --output, if there is one.")
@click.option("--allow-changes", is_flag=True, help="Resume even if settings differ from the run's.")
@click.option(
    "--dry-run", "dry", is_flag=True, help="Take two steps, print memory and shapes, and write nothing."
)
def main(preset: str, file: Path | None, resume: bool, allow_changes: bool, dry: bool, **flags: Any) -> None:
    """Train a hypernetwork on a frozen base model.

    \b
    Examples:
      hyperrt train --base runs/world/base --data runs/world/cache --output runs/hypernet
      hyperrt train --base runs/world/base --data runs/world/cache --output runs/hypernet --resume
      accelerate launch -m hyperrt.training.train --base base --data cache --output runs/faces
    """
    with reported():
        try:
            config = resolve(flags, preset, file)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        if not dry:
            run(config, resume, allow_changes)
            return
        device.prepare(config.threads)
        trainer = Trainer(config)
        figures = dry_run.measure(trainer)
        if trainer.accelerator.is_main_process:
            click.echo(json.dumps(figures, indent=1))
        trainer.close()


_options(main)

if __name__ == "__main__":
    main()
