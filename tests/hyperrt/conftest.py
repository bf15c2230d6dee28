"""Bundles, photos and the command line that the tests of the runtime share."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from hyperrt.cli import main
from hyperrt.runtime import Runtime
from tests.hyperrt import fake_bundle

TINY = Path(__file__).resolve().parents[2] / "hyperrt" / "bundles" / "tiny"


@pytest.fixture(scope="session")
def pretend_folder(tmp_path_factory) -> Path:
    return fake_bundle.write(tmp_path_factory.mktemp("bundles") / "pretend")


@pytest.fixture
def pretend(pretend_folder) -> Path:
    """Folder of a bundle for the fake backend; every graph counts its calls in `fake_bundle.calls`."""
    fake_bundle.register()
    return pretend_folder


@pytest.fixture
def tiny() -> str:
    """Name of the bundle in the wheel, on ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    if not (TINY / "bundle.json").is_file():
        pytest.skip("hyperrt/bundles/tiny is not there yet")
    return "tiny"


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of three photos."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo {k}.png")
    return folder


@pytest.fixture
def runtime(pretend):
    """A runtime of the fake bundle."""
    with Runtime.open(pretend, "fake") as runtime:
        yield runtime


@pytest.fixture
def subject(runtime, photos):
    """The subject of the photos."""
    return runtime.personalize(photos)


@pytest.fixture
def other(runtime):
    """Another subject, of one grey photo."""
    return runtime.personalize([np.full((40, 40, 3), 200, np.uint8)])


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No settings of the machine, and an empty current folder to write to."""
    for name in [name for name in os.environ if name.startswith("HYPERRT")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    logger = logging.getLogger("hyperrt")
    before = logger.handlers, logger.propagate
    yield
    logger.handlers, logger.propagate = before


@pytest.fixture
def run(alone, pretend, capsys):
    """Run a command on the fake bundle: (exit code, stdout, stderr)."""

    def run(command, *arguments, here=("--backend", "fake")):
        bundle = ["--bundle", str(pretend), *here] if here else []
        code = main.run([command, *bundle, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def subject_file(run, photos, tmp_path):
    """A subject file made from the photos with the fake bundle."""
    path = tmp_path / "robot.safetensors"
    assert run("personalize", "--images", photos, "-o", path)[0] == 0
    return path
