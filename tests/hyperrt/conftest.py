"""Bundles and photos that the tests of the runtime share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
