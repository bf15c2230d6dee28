"""What tests of the command line share: a process with the fake bundle, and how its output is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a [V] robot on the beach"
# The command line with the fake graphs, as a process that says "ready" when it starts; WAIT slows steps down.
PROCESS = """
import sys, time
from hyperrt.cli import main as cli
true_run = cli.run
def run(arguments):
    print("ready", file=sys.stderr, flush=True)
    from tests.hyperrt import fake_bundle
    def slow(tensors):
        time.sleep(WAIT)
        return fake_bundle.GRAPHS["denoiser"](tensors)
    fake_bundle.register(denoiser=slow)
    return true_run(arguments)
cli.run = run
sys.exit(cli.main())
"""


def start(arguments: list[Any], wait: str = "0.05", **options: Any) -> subprocess.Popen[str]:
    """A process of the command line that has just begun; stderr is a pipe unless `options` say otherwise."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", PROCESS.replace("WAIT", wait), *map(str, arguments)]
    process = subprocess.Popen(command, env=env, text=True, **{"stderr": subprocess.PIPE, **options})
    if process.stderr:
        assert process.stderr.readline() == "ready\n"
    return process


def events(text: str) -> list[dict[str, Any]]:
    """The JSON events of stdout."""
    return [json.loads(line) for line in text.splitlines()]


def is_three_lines(text: str) -> bool:
    """Whether stderr is one error of three lines at most."""
    lines = text.splitlines()
    return lines[0].startswith("error: ") and 1 <= len(lines) <= 3 and "Traceback" not in text
