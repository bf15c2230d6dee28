"""The processes of bench/gpu.py: one for each kind, watched for its time and for the device's memory."""

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
ENGINES_KINDS = ("onnxruntime", "tensorrt")  # what the names of kinds begin with that need a bundle


def measured(args: argparse.Namespace, family: str, kind: str) -> dict[str, Any]:
    """Figures of a kind, or {"absent": reason}."""
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
        found = run(command, log, args.limit, memory)
    if "absent" not in found and memory.peak_gb is not None:
        found["peak_gb"] = memory.peak_gb
    print(f"{family} {kind} {found}", file=sys.stderr, flush=True)
    return found


def run(command: list[str], log: Path, limit: float, memory: DeviceMemory) -> dict[str, Any]:
    """What a child prints last; why it printed nothing, where it did not."""
    timed_out = threading.Event()
    last = ""
    with (
        log.open("w") as words,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=words, text=True, start_new_session=True
        ) as process,
    ):

        def end() -> None:
            timed_out.set()
            os.killpg(process.pid, signal.SIGKILL)  # and what it started

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
        said = gpu_timing.last_words(log.read_text(errors="replace"))
        return {"absent": f"the process ended with {code}\n{said}".strip()}
    found: dict[str, Any] = json.loads(last)
    return found


def bundle(args: argparse.Namespace, family: str, adapt: str) -> str:
    """The bundle of a family that takes its LoRA in that way: given, there already, or exported now.

    Raises:
        Absent: it cannot be exported.
    """
    given = getattr(args, f"bundle_{family}", None)
    if family == "tiny":
        return "tiny"
    path = given or args.work / f"{family}-{args.precision}"
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
            raise gpu_timing.Absent(f"there is no bundle\n{gpu_timing.last_words(done.stderr)}")
    return str(path.absolute())


class DeviceMemory:
    """The most of the device's memory that was in use, over what was in use at first, by nvidia-smi's count.

    Attributes:
        peak_gb: in GB; None where there is no nvidia-smi, or no number.
    """

    def __init__(self) -> None:
        self._before: float | None = None
        self._most = self._now = 0.0
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._known = threading.Event()

    @property
    def peak_gb(self) -> float | None:
        return None if self._before is None else max(0.0, self._most - self._before) * MIB

    def start_over(self) -> None:
        """Forget all but what is in use now."""
        self._most = self._now

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
            self._known.wait(20)
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
            self._most = max(self._most, self._now)
            self._known.set()
        self._known.set()
