"""The way of a request, as the README tells it: the functions between the command and the vendor's call."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from hyperrt.cli.main import run

ROOT = Path(__file__).resolve().parents[1]
ENTRY = ("hyperrt.cli.generate", "generate")  # what comes before it parses the command line


def named_in_the_readme() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [way] = [way for way in re.findall(r"(?:`[\w.]+` → )+`[\w.]+`", text) if "Runtime." in way]
    return re.findall(r"`([\w.]+)`", way)


def name_of(frame) -> str:
    """A function as the README writes it: with its class, else with its module and, for a command, "cli."."""
    code = frame.f_code
    if "." in code.co_qualname:
        return ".".join(code.co_qualname.split(".")[-2:])
    module = frame.f_globals["__name__"].split(".")
    return f"cli.{code.co_name}" if module[1] == "cli" else f"{module[-1]}.{code.co_name}"


def stack_at_the_vendor(frame) -> list[str]:
    names = []
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("hyperrt."):
            names.insert(0, name_of(frame))
            if (module, frame.f_code.co_name) == ENTRY:
                return names
        frame = frame.f_back
    return []


def test_six_functions_lie_between_the_command_and_the_vendor(tmp_path, monkeypatch):
    ort = pytest.importorskip("onnxruntime")
    stacks = set()
    real = ort.InferenceSession.run_with_iobinding

    def recorded(self, *arguments):
        stacks.add(tuple(stack_at_the_vendor(sys._getframe(1))))
        return real(self, *arguments)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", recorded)
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--images", str(ROOT / "examples" / "subjects" / "mug")]
    options = ["--prompt", "a [V] mug", "--steps", "2", "--backend", "onnxruntime"]
    assert run([*command, *options]) == 0
    # Before the first step `Batch.bind` runs the graphs of the prompt.
    [hops] = [stack for stack in stacks if "loop.denoise" in stack and "Batch.bind" not in stack]
    assert list(hops) == named_in_the_readme()
    assert len(hops) == 6
