"""What tests of all packages share.  Needs neither torch nor the shared data to be imported."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED_DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"

# Read by huggingface_hub when it is imported, and inherited by the commands that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is here: the one place that decides what is run of the tests marked `gpu`."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of pictures and files that lies beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared data (../shared/data beside the checkout) is absent")
    return SHARED_DATA.resolve()


@pytest.fixture(scope="session")
def drawn_photos() -> list[Any]:
    """Four photos [96, 96, 3] uint8 of one drawn robot that is not in training, before four scenes."""
    import numpy as np

    from hyperrt.training.data import scenes

    rng = np.random.default_rng(0)
    robot = scenes.drawn_subject("robot", "test", 0)
    return [scenes.scene(robot, background, rng, size=96) for background in scenes.BACKGROUNDS[:4]]


@pytest.fixture
def subject_folder(tmp_path: Path, drawn_photos: list[Any]) -> Path:
    """A folder of photos of one subject: 1.png to 4.png, the test's own to add to."""
    from PIL import Image

    folder = tmp_path / "robot"
    folder.mkdir()
    for number, photo in enumerate(drawn_photos, start=1):
        Image.fromarray(photo).save(folder / f"{number}.png")
    return folder


@pytest.fixture(autouse=True, scope="session")
def no_chance() -> Iterator[None]:
    """A seed that a test does not give is 0, not a random one."""
    from hyperrt.sampling import options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "random_seed", lambda pictures: 0)
        yield


@pytest.fixture(autouse=True)
def same_torch_draws() -> None:
    """`torch.randn` without a generator draws the same in every run of a test."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """A test that reaches for the network fails, and says where to."""

    def guarded(connect: Any) -> Any:
        def only_this_machine(self: socket.socket, address: Any) -> Any:
            host = address[0] if isinstance(address, tuple) else "localhost"  # a local socket has a name
            if host not in ("127.0.0.1", "::1", "localhost"):
                raise RuntimeError(f"a test tried to connect to {address!r}; tests do not use the network")
            return connect(self, address)

        return only_this_machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        yield
