"""One small base model, one hypernetwork and one real export of them, for all tests of export."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

TINY_BASE = Path(__file__).resolve().parents[1] / "training" / "tiny_base.py"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> SimpleNamespace:
    """Folders of a base model and of a hypernetwork that fits it: `base`, `hypernet`."""
    from export import families
    from training import base, checkpoint
    from training.config import TrainConfig

    spec = importlib.util.spec_from_file_location("tiny_base", TINY_BASE)
    tiny_base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_base)

    folder = tmp_path_factory.mktemp("trained")
    tiny_base.make(folder / "base")
    torch.manual_seed(1)
    parts = base.load(folder / "base")
    config = TrainConfig(
        base=str(folder / "base"), cache="cache", out="hypernet",
        rank=2, dim=32, layers=1, iterations=2, head_dim=8,
    )  # fmt: skip
    source = families.random_source(parts, config.rank, config.decoder)
    (folder / "hypernet").mkdir()
    checkpoint.save_hypernet(folder / "hypernet", source.decoder, config, 1, checkpoint.hash_of(parts.unet))
    return SimpleNamespace(base=folder / "base", hypernet=folder / "hypernet")


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory) -> Path:
    """A bundle, made by the real export."""
    from export import export_bundle

    output = tmp_path_factory.mktemp("exported") / "small"
    return export_bundle("tiny", trained.base, trained.hypernet, output)


@pytest.fixture(scope="session")
def source(trained):
    """What `exported` was made from, weights rounded as they are stored there."""
    from export import families, storage

    source = families.get("tiny").load(trained.base, trained.hypernet)
    for name, module in source.modules().items():
        storage.round_weights(module, name)
    return source


@pytest.fixture(scope="session")
def parts(source):
    """The graphs of `source` by name."""
    from export import graphs

    return {graph.name: graph for graph in graphs.build(source.base, source.decoder)}
