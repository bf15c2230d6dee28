"""Where the peers live: an environment each, a random model for all of them, and calls into both.

    .peers/NAME/        virtual environment from bench/peers/NAME.txt, made anew when that file changes
    .peers/models/      what peer_model.py writes, by family
    .peers/bundles/     our own of random weights, by family

Nothing of this is ever installed into the project's environment.  A peer runs in a process of its own, with
its own environment's Python; what it says is one JSON line, the last on its stdout.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
HOME = BENCH.parent / ".peers"
PEERS = ("diffusers", "openvino_genai", "onnxruntime")


def cpus() -> int:
    """How many CPUs this process may use; every peer gets as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def python(name: str) -> Path:
    """The Python of a peer's environment, which is made where it is missing or out of date."""
    wanted = BENCH / "peers" / f"{name}.txt"
    digest = hashlib.sha256(wanted.read_bytes()).hexdigest()
    home, mark = HOME / name, HOME / name / "done"
    found = home / "bin" / "python"
    if mark.is_file() and mark.read_text().strip() == digest:
        return found
    print(f"making the environment of {name} from {wanted.relative_to(BENCH.parent)}", file=sys.stderr)
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    subprocess.run([found, "-m", "pip", "install", "-q", "-r", wanted], check=True, stdout=sys.stderr)
    mark.write_text(digest + "\n")
    return found


def model(family: str, *parts: str) -> Path:
    """The folder of a family's random model, with the parts that these peers need."""
    folder = HOME / "models" / family
    for part in parts:
        if not (folder / part / "done").is_file():
            call("diffusers", "peer_model.py", str(folder), "--family", family, "--part", part)
    return folder


def bundle(family: str) -> Path:
    """Our bundle of a family, of random weights; exported once."""
    folder = HOME / "bundles" / family
    if not (folder / "bundle.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "hyperrt", "export", "--model", family, "--random-weights", "0"]
        subprocess.run([*command, "-o", str(folder)], cwd=BENCH.parent, check=True, stdout=sys.stderr)
    return folder


def call(name: str, script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of this folder in a peer's environment; returns the JSON object that it ends with."""
    return run([str(python(name)), str(BENCH / script), *arguments])


def run(command: Sequence[str]) -> dict[str, Any]:
    """Run a command whose last line on stdout is a JSON object; its other output goes to stderr.

    Raises:
        SystemExit: it failed.
    """
    print("running", *command[1:], file=sys.stderr, flush=True)
    # No peer may ask a model hub: everything is in the folder that it is given.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OPENVINO_TELEMETRY_DISABLE": "1"}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **offline})
    lines = result.stdout.splitlines()
    print(*lines[:-1], sep="\n", file=sys.stderr)
    if result.returncode or not lines:
        raise SystemExit(f"{Path(command[1]).name} failed with exit code {result.returncode}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found
