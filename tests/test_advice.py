"""Every command that a message gives: found in the source, provoked, pasted, and seen to end well.

A command stands at the end of a message or after a colon (pasting.py).  A message has a test here, or in
`ELSEWHERE`, or the first test fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hyperrt import files
from hyperrt.cli import doctor
from hyperrt.cli.training import require
from hyperrt.engines import BACKENDS, EngineError
from hyperrt.errors import HyperRTError
from hyperrt.photos import load
from hyperrt.plans import cache as plans
from hyperrt.plans import private_folder
from hyperrt.sampling import recipe
from hyperrt.session import decode, finite
from tests.advice import ROOT, fits, run, sites
from tests.hyperrt import some_plans
from tests.pasting import commands_in

AWKWARD = "it's (a) folder"  # in which commands without quotes fall apart
# Messages that are pasted by the tests of their own module.
IMAGES = "tests/hyperrt/cli/test_images.py"
LORA = "tests/hyperrt/lora/test_layout_advice.py"
ABSENT = "test_a_file_that_is_not_there_leads_to_how_one_is_made"
LINKS = "test_a_folder_of_links_is_refused_with_the_command_that_names_the_files"
ELSEWHERE = {
    "hyperrt/cli/images.py:invoke": f"{IMAGES}::{LINKS}",
    "hyperrt/photos/load.py:_linked": f"{IMAGES}::{LINKS}",
    "hyperrt/lora/reader.py:check_used": f"{LORA}::test_what_a_file_adapts_that_cannot_be_used_is_shown",
    "hyperrt/lora/reader.py:how_to_reduce": f"{LORA}::test_a_shell_runs_the_command_as_it_is_printed",
    "hyperrt/lora/safetensors_file.py:read_header": f"{LORA}::{ABSENT}",
}
# What looks like a command and is none: no message, or words that begin like one.
NO_COMMANDS = {
    "hyperrt/cli/commands.py:hyperrt": "the version",
    "hyperrt/sampling/infotext.py:": "the name of the program in A1111's parameters",
    "export/assemble.py:manifest": "who made a bundle",
}


PROVOKED: dict[str, Callable[..., str]] = {}


def message(site: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Marks the function that provokes the message of a site, and returns its text."""

    def mark(function: Callable[..., str]) -> Callable[..., str]:
        PROVOKED[site] = function
        return function

    return mark


def advice_of(function: Callable[..., object], *arguments: object) -> str:
    """What the error of a call says to do."""
    with pytest.raises((HyperRTError, EngineError)) as caught:
        function(*arguments)
    return caught.value.do


@message("engines/backends.py:")
def _(folder, monkeypatch):
    return "; or: ".join(about.install for about in BACKENDS.values() if about.install)


@message("engines/onnxruntime.py:check")
def _(folder, monkeypatch):
    module = pytest.importorskip("hyperrt.engines.onnxruntime")
    monkeypatch.setattr(module.ort, "get_available_providers", lambda: [module.CPU])
    return advice_of(module.check, module.CUDA)


@message("engines/onnxruntime.py:_gpu_session")
def _(folder, monkeypatch):
    module = pytest.importorskip("hyperrt.engines.onnxruntime")
    without_cuda = SimpleNamespace(get_providers=lambda: [module.CPU])
    monkeypatch.setattr(module, "_session", lambda *_: without_cuda)
    graph = ROOT / "tests" / "engines" / "graphs" / "affine.onnx"
    return advice_of(module._gpu_session, graph, None, module.TENSORRT, False, 0)


@message("engines/openvino.py:_private")
def _(folder, monkeypatch):
    module = pytest.importorskip("hyperrt.engines.openvino")
    cache = folder / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    return advice_of(module._private, cache, ROOT / "graph.onnx")


@message("engines/nvidia/cuda.py:_call")
def _(folder, monkeypatch):
    from tests.engines import fake_nvidia

    cuda, _ = fake_nvidia.install(monkeypatch)
    from hyperrt.engines.nvidia import cuda as module

    return advice_of(module._call, lambda: (next(code for code in type(cuda).cudaError_t if int(code) > 2),))


@message("engines/nvidia/tensorrt.py:_compile")
def _(folder, monkeypatch):
    from tests.engines import fake_nvidia

    fake_nvidia.install(monkeypatch)
    from hyperrt.engines.nvidia import tensorrt as module

    return advice_of(lambda: module.open(folder / "denoiser.onnx", vendor="tensorrt"))


@message("hyperrt/cli/training.py:require")
def _(folder, monkeypatch):
    return advice_of(require, "training", "train", ("no_such_package",))


@message("hyperrt/cli/plans.py:rm")
def _(folder, monkeypatch):
    return said_by("plans", "rm")


@message("hyperrt/cli/plans.py:list_")
def _(folder, monkeypatch):
    (private_folder.base_folder() / "plans" / ("0" * 32)).mkdir(parents=True)
    return said_by("plans", "list")


@message("hyperrt/cli/plans.py:verify")
def _(folder, monkeypatch):
    for digit in "01":
        (private_folder.base_folder() / "plans" / (digit * 32)).mkdir(parents=True)
    return said_by("plans", "verify")


@message("hyperrt/cli/doctor.py:_one_onnxruntime")
def _(folder, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    return advice_of(doctor._one_onnxruntime)


@message("hyperrt/cli/doctor.py:_dependencies")
def _(folder, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "")
    missing = doctor._dependencies().do

    def not_installed(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", not_installed)
    return f"{doctor._dependencies().do}; or: {missing}"


@message("hyperrt/files.py:remove")
def _(folder, monkeypatch):
    (folder / "old").mkdir()
    (folder / "old" / "file").touch()
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
    return advice_of(files.remove, folder / "old")


@message("hyperrt/files.py:_check_parent")
def _(folder, monkeypatch):
    return advice_of(files.check_file, folder / "no such folder" / "file")


@message("hyperrt/plans/private_folder.py:open_file")
def _(folder, monkeypatch):
    (folder / "plan").mkdir()
    return advice_of(lambda: private_folder.open_file(folder / "plan").__enter__())


@message("hyperrt/plans/private_folder.py:_open")
def _(folder, monkeypatch):
    (folder / "plan").symlink_to(folder)
    return advice_of(lambda: private_folder.open_file(folder / "plan").__enter__())


@message("hyperrt/plans/private_folder.py:_judge")
def _(folder, monkeypatch):
    (folder / "plan").touch()
    (folder / "plan").chmod(0o666)
    first = advice_of(lambda: private_folder.open_file(folder / "plan").__enter__())
    monkeypatch.setattr(private_folder.os, "geteuid", lambda: 12345)
    return f"{first}; or: {advice_of(lambda: private_folder.open_file(folder / 'plan').__enter__())}"


@message("hyperrt/photos/formats.py:_heic")
def _(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    return advice_of(load.load_image, b"\0\0\0\x18ftypheic\0\0\0\0heicmif1")


@message("hyperrt/photos/formats.py:_open")
def _(folder, monkeypatch):
    from PIL import AvifImagePlugin

    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    return advice_of(load.load_image, b"\0\0\0\x18ftypavif\0\0\0\0avifmif1")


@message("hyperrt/session/finite.py:check_finite")
def _(folder, monkeypatch):
    return advice_of(finite.check_finite, {"x": np.array([np.nan])}, "it")


@message("hyperrt/session/decode.py:check_not_flat")
def _(folder, monkeypatch):
    return advice_of(decode.check_not_flat, np.zeros((1, 3, 8, 8), np.float32))


@message("hyperrt/plans/messages.py:compile_command")
def _(folder, monkeypatch):
    cache = plans.PlanCache(folder / "plans")
    return advice_of(lambda: cache.load(some_plans.KEY, bundle=str(folder)))


@message("hyperrt/plans/messages.py:rebuild_command")
def _(folder, monkeypatch):
    from hyperrt.plans import messages

    some_plans.publish(plans.PlanCache())
    return messages.rebuild_command(some_plans.KEY, str(folder))


@message("hyperrt/plans/cache.py:_read")
def _(folder, monkeypatch):
    plan = some_plans.publish(plans.PlanCache())
    some_plans.flip(plan.path.with_name("plan.json"), 100)
    return advice_of(plans.PlanCache().load, some_plans.KEY)


@message("hyperrt/plans/cache.py:_only")
def _(folder, monkeypatch):
    return advice_of(plans.PlanCache().remove, ["abc"])


@message("hyperrt/sampling/recipe.py:_known")
def _(folder, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(recipe, "SCHEMA", 9)
        content = recipe.encode_png(np.zeros((8, 8, 3), np.uint8), {"prompt": "a mug"})
    (folder / "picture.png").write_bytes(content)
    return advice_of(recipe.read, folder / "picture.png")


@message("training/evaluation/scorers.py:__init__")
def _(folder, monkeypatch):
    pytest.importorskip("torch")
    from hyperrt.training.evaluation import scorers

    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(scorers.ScorerUnavailable) as caught:
        scorers.Face("cpu")
    return str(caught.value)


@message("training/data/subjects200k.py:_pyarrow")
def _(folder, monkeypatch):
    pytest.importorskip("torch")
    from hyperrt.training.data import subjects200k

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    return advice_of(subjects200k._pyarrow)


@message("training/prepare.py:_claimed")
def _(folder, monkeypatch):
    pytest.importorskip("torch")
    from hyperrt.training import prepare

    cache = folder / "no such folder" / "cache"
    return advice_of(lambda: prepare._claimed(cache, folder / "photos").__enter__())


@message("export/verify.py:checked")
def _(folder, monkeypatch):
    pytest.importorskip("torch")
    from hyperrt.export import verify

    return advice_of(verify.checked, "graph", 1.0, 0.5)


def said_by(*words: str) -> str:
    """What a command says on stderr, as one line."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hyperrt", *words]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return result.stderr.strip().splitlines()[-1].removeprefix("  do:  ")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with an awkward name; HyperRT's own folder lies beside it."""
    monkeypatch.setenv("HYPERRT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / AWKWARD).mkdir()
    return tmp_path / AWKWARD


def test_every_message_with_a_command_is_pasted_in_a_test():
    found = sites().keys() - NO_COMMANDS.keys()
    assert not found - PROVOKED.keys() - ELSEWHERE.keys(), "write a test that pastes it"
    known = PROVOKED.keys() | ELSEWHERE.keys() | NO_COMMANDS.keys()
    assert not known - sites().keys(), "gone from the source"


@pytest.mark.parametrize("test", ELSEWHERE.values(), ids=ELSEWHERE)
def test_the_tests_elsewhere_are_there(test):
    path, name = test.split("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("site", PROVOKED)
def test_a_command_in_a_message_runs_as_it_stands(site, folder, monkeypatch):
    text = PROVOKED[site](folder, monkeypatch)
    templates = sites()[site]
    assert any(fits(template, text) for template in templates), f"{text!r} is not of {templates}"
    commands = commands_in(text)
    assert commands
    monkeypatch.undo()
    monkeypatch.setenv("HYPERRT_HOME", str(folder.parent / "home"))
    for words in commands:
        run(words, folder)


