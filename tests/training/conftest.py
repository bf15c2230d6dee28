"""A base model with random weights and a small scene cache, made once for all tests of training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """Folders of a base model and of its cache: `base`, `cache`."""
    source = Path(__file__).with_name("tiny_base.py")
    spec = importlib.util.spec_from_file_location("tiny_base", source)
    tiny_base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_base)
    folder = tmp_path_factory.mktemp("world")
    return SimpleNamespace(base=tiny_base.make(folder / "base"), cache=tiny_base.make_cache(folder / "cache"))


@pytest.fixture(scope="session")
def parts(world):
    """The loaded base model."""
    from training import base

    return base.load(world.base)


@pytest.fixture
def settings(world, tmp_path) -> dict:
    """Settings of a run of a few steps."""
    return {
        "base": str(world.base),
        "cache": str(world.cache),
        "out": str(tmp_path / "run"),
        "steps": 6,
        "batch": 4,
        "rank": 2,
        "dim": 16,
        "layers": 1,
        "iterations": 2,
        "head_dim": 8,
        "warmup": 2,
        "holdout": 16,
        "log_every": 2,
        "monitor_every": 3,
        "save_every": 3,
        "device": "cpu",
    }
