"""log.jsonl: what a training logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from hyperrt import files
from hyperrt.errors import explained

log = logging.getLogger("hyperrt.training")

LOG = "log.jsonl"
JsonValue = float | int | str | bool | None | Sequence[object] | Mapping[str, object]


class RunLog:
    """log.jsonl in a run's folder, one JSON object per line; its plain numbers also go to stderr.

    Args:
        step: steps done. Lines logged after them are dropped: a resumed run logs them again.
        steps: of the whole run.
    """

    def __init__(self, folder: Path, step: int, steps: int) -> None:
        self.path, self.steps = folder / LOG, steps
        lines = self.path.read_text().splitlines(keepends=True) if step and self.path.exists() else []
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        files.publish(self.path, lambda file: file.write("".join(lines).encode()), force=True)

    def write(self, step: int, **values: JsonValue) -> None:
        """Appends a line.

        Raises:
            ResourceError: the disk is full or broken.
        """
        with explained(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if numbers := [f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float)]:
            log.info("%s: step %d of %d, %s", self.path.parent.name, step, self.steps, ", ".join(numbers))
