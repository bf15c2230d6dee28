"""A writer that is killed at any moment leaves the old contents, the new, or (a folder) none."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from hyperrt import files

ROOT = Path(__file__).resolve().parents[2]

WRITER = """
import sys
from pathlib import Path
from hyperrt import files

def folder(number):
    def write(folder):
        for name in ("bundle.json", "a", "b"):
            (folder / name).write_text(str(number) * 50_000)
    return write

number = 0
print("ready", flush=True)
while True:
    number = (number + 1) % 10
    files.publish("out.png", lambda file: file.write(str(number).encode() * 50_000), force=True)
    files.publish_folder("robot", folder(number), marker="bundle.json", force=True)
"""


def test_a_kill_at_any_moment_leaves_old_or_new_or_none_and_the_next_run_sweeps(tmp_path):
    moments = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(moments.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
        for path in (tmp_path / "out.png", *(tmp_path / "robot").glob("*")):
            if path.exists():
                content = path.read_text()
                assert len(content) == 50_000 and len(set(content)) == 1, path
        if (tmp_path / "robot").exists():
            assert len(os.listdir(tmp_path / "robot")) == 3
            assert len({path.read_text() for path in (tmp_path / "robot").iterdir()}) == 1
    assert (tmp_path / "out.png").exists() and (tmp_path / "robot").exists()
    files.sweep(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(files.PREFIX)]
