"""Runs each kind of bench/gpu.py in a process, with a time limit, and measures its device memory."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gpu_timing
import report

MIB = 1024**2 / 1e9  # GB
ENGINES_KINDS = ("onnxruntime", "tensorrt")  # beginnings of the names of kinds that need a bundle


def measured(args: argparse.Namespace, family: str, kind: str) -> dict[str, Any]:
    """Measures a kind in a process; returns its figures, or {"absent": reason}."""
    print(f"{family} {kind}", file=sys.stderr, flush=True)
    command = [
        sys.executable, str(Path(__file__).with_name("gpu.py")), "--child", kind, "--family", family,
        "--rounds", str(args.rounds), "--warm-up", str(args.warm_up), "--steps", str(args.steps),
        "--precision", args.precision, *(["--quick"] if args.quick else []),
    ]  # fmt: skip
    if kind.startswith(ENGINES_KINDS):
        try:
            command += ["--bundle", bundle(args, family, "refit" if kind.endswith("_refit") else "inputs")]
        except gpu_timing.Absent as error:
            return {"absent": str(error)}
    log = args.work / f"{family}-{kind}.log"
    with DeviceMemory() as memory:
        results = run(command, log, args.limit, memory)
    if "absent" not in results and memory.peak_gb is not None:
        results["peak_gb"] = memory.peak_gb
    print(f"{family} {kind} {results}", file=sys.stderr, flush=True)
    return results


def run(command: list[str], log: Path, limit: float, memory: DeviceMemory) -> dict[str, Any]:
    """Runs a child; returns the JSON object in its last line, or {"absent": reason}."""
    timed_out = threading.Event()
    last = ""
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
    ):

        def end() -> None:
            timed_out.set()
            os.killpg(process.pid, signal.SIGKILL)  # with its children

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            for line in process.stdout or ():
                if line.strip() == gpu_timing.MEASURING:
                    memory.start_over()
                last = line.strip() or last
            code = process.wait()
        finally:
            timer.cancel()
    if timed_out.is_set():
        return {"absent": f"not done after {limit:.0f} s"}
    if code or not last.startswith("{"):
        message = gpu_timing.last_words(log.read_text(errors="replace"))
        return {"absent": f"the process ended with {code}\n{message}".strip()}
    results: dict[str, Any] = json.loads(last)
    return results


def bundle(args: argparse.Namespace, family: str, adapt: str) -> str:
    """Path of a family's bundle with that form of the LoRA: of an option, or in --work, exported if missing.

    Raises:
        Absent: the export failed.
    """
    folder = getattr(args, f"bundle_{family}", None)
    if family == "tiny":
        return "tiny"
    path = folder or args.work / f"{family}-{args.precision}"
    if adapt == "refit":
        path = path.with_name(f"{path.name}-refit")
    if not (path / "bundle.json").is_file():
        command = [
            sys.executable, "-m", "hyperrt", "export", "--model", family, "--random-weights", "0",
            "--precision", args.precision, "--verify", "none", "-o", str(path.absolute()),
            *(["--adapt", "refit"] if adapt == "refit" else []),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise gpu_timing.Absent(f"the export failed\n{gpu_timing.last_words(done.stderr)}")
    return str(path.absolute())


class DeviceMemory:
    """Measures by how much the used memory of the device grows at most, with nvidia-smi.

    Attributes:
        peak_gb: in GB; None if nvidia-smi is missing or gives no number.
    """

    def __init__(self) -> None:
        self._before: float | None = None
        self._max = self._now = 0.0
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._ready = threading.Event()

    @property
    def peak_gb(self) -> float | None:
        return None if self._before is None else max(0.0, self._max - self._before) * MIB

    def start_over(self) -> None:
        """Forgets the peak before now."""
        self._max = self._now

    def __enter__(self) -> DeviceMemory:
        if shutil.which("nvidia-smi"):
            device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
            command = ["nvidia-smi", "-i", device, "--query-gpu=memory.used", "-lms", "100"]
            command += ["--format=csv,noheader,nounits"]
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
            self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._reader is not None:
            self._process.terminate()
            self._reader.join()
            with self._process:  # closes its pipe
                self._process.wait()

    def _read(self) -> None:
        for line in (self._process.stdout if self._process else None) or ():
            try:
                self._now = float(line)
            except ValueError:  # "[N/A]"
                continue
            self._before = self._now if self._before is None else self._before
            self._max = max(self._max, self._now)
            self._ready.set()
        self._ready.set()
