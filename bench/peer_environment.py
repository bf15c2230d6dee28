"""Makes the environments and random models of the peers, and runs scripts in them.

    .peers/NAME/        virtual environment of bench/peers/NAME.txt, remade when that file changes
    .peers/models/      models of peer_model.py, by family
    .peers/bundles/     our bundles of random weights, by family

Nothing is installed into the project's environment.  A peer runs in a separate process with the Python of its
environment; the last line on its stdout is JSON.
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
    """Number of CPUs that this process may use, and of threads of every peer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def python(name: str) -> Path:
    """The Python of a peer's environment, which is made if it is missing or out of date."""
    packages = BENCH / "peers" / f"{name}.txt"
    digest = hashlib.sha256(packages.read_bytes()).hexdigest()
    folder, mark = HOME / name, HOME / name / "done"
    path = folder / "bin" / "python"
    if mark.is_file() and mark.read_text().strip() == digest:
        return path
    print(f"making the environment of {name} from {packages.relative_to(BENCH.parent)}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([path, "-m", "pip", "install", "-q", "-r", packages], check=True, stdout=sys.stderr)
    mark.write_text(digest + "\n")
    return path


def model(family: str, *parts: str) -> Path:
    """The folder of a family's random model; writes the parts that are missing."""
    folder = HOME / "models" / family
    for part in parts:
        if not (folder / part / "done").is_file():
            call("diffusers", "peer_model.py", str(folder), "--family", family, "--part", part)
    return folder


def bundle(family: str) -> Path:
    """Our bundle of a family with random weights; exported once."""
    folder = HOME / "bundles" / family
    if not (folder / "bundle.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "hyperrt", "export", "--model", family, "--random-weights", "0"]
        subprocess.run([*command, "-o", str(folder)], cwd=BENCH.parent, check=True, stdout=sys.stderr)
    return folder


def call(name: str, script: str, *arguments: str) -> dict[str, Any]:
    """Runs a script of this folder in a peer's environment; returns the JSON object in its last line."""
    return run([str(python(name)), str(BENCH / script), *arguments])


def run(command: Sequence[str]) -> dict[str, Any]:
    """Runs a command; returns the JSON object in its last line, and passes other lines on to stderr.

    Raises:
        SystemExit: the command failed.
    """
    print("running", *command[1:], file=sys.stderr, flush=True)
    # No peer may download: all files are in its folder.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OPENVINO_TELEMETRY_DISABLE": "1"}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **offline})
    lines = result.stdout.splitlines()
    print(*lines[:-1], sep="\n", file=sys.stderr)
    if result.returncode or not lines:
        raise SystemExit(f"{Path(command[1]).name} failed with exit code {result.returncode}")
    results: dict[str, Any] = json.loads(lines[-1])
    return results
