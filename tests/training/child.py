"""One process of a training that a test starts; `runpy.run_path` gives it `config` and `options`.

options: "environment" of the process, "resume", "die": (k, when) to be killed in the k-th publishing of a
file, "written" before its name is given, or "named" after.
"""

from __future__ import annotations

import os
import signal

import torch

from hyperrt import files
from hyperrt.training import train
from hyperrt.training.run import preview


def die_in_publishing(count: int, when: str) -> None:
    """SIGKILL in the `count`-th `files.publish`, from 0."""
    name_file, calls = files._name_file, []

    def killed(*arguments):
        if when == "named":
            name_file(*arguments)
        calls.append(1)
        if len(calls) > count:
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "written":
            name_file(*arguments)

    files._name_file = killed


config, options = globals()["config"], globals()["options"]
os.environ.update(options.get("environment", {}))
torch.set_num_threads(1)
preview.write = lambda path, trainer: None  # the longest part of a short run
if "die" in options:
    die_in_publishing(*options["die"])
train.run(config, resume=options.get("resume", False))
