"""A small base model, a hypernetwork and their real export, for all tests of export."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.export.command_line import config_of

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

TINY_BASE = Path(__file__).resolve().parents[1] / "training" / "tiny_base.py"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> SimpleNamespace:
    """Folders of a base model and its hypernetwork: `base`, `hypernet`."""
    from hyperrt.training.model import base_model, lora_layers, weight_hash
    from hyperrt.training.model.hypernet import decoder_of
    from hyperrt.training.run import checkpoint
    from hyperrt.training.run.config import TrainConfig

    spec = importlib.util.spec_from_file_location("tiny_base", TINY_BASE)
    tiny_base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_base)

    folder = tmp_path_factory.mktemp("trained")
    tiny_base.make(folder / "base")
    torch.manual_seed(1)
    parts = base_model.load(folder / "base")
    config = TrainConfig(
        base=str(folder / "base"), data="cache", output="hypernet",
        rank=2, dim=32, layers=1, iterations=2, head_dim=8,
    )  # fmt: skip
    layout = lora_layers.layout_of(parts.unet, config.rank)
    decoder = decoder_of(layout, parts.image_encoder.config.hidden_size, config.decoder)
    with torch.no_grad():
        for vector in decoder.offsets.values():  # a fresh one predicts no change at all
            vector.add_(torch.randn_like(vector), alpha=0.05)
    (folder / "hypernet").mkdir()
    checkpoint.save_hypernet(folder / "hypernet", decoder, config, 1, weight_hash.hash_of(parts.unet))
    return SimpleNamespace(base=folder / "base", hypernet=folder / "hypernet")


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory) -> Path:
    """A bundle, made by the real export."""
    from hyperrt.export import export_bundle

    output = tmp_path_factory.mktemp("exported") / "small"
    return export_bundle(config_of(trained, output))


@pytest.fixture(scope="session")
def source(trained):
    """The source of `exported`."""
    from hyperrt.export import read_source

    return read_source.read(config_of(trained))


@pytest.fixture(scope="session")
def modules(source):
    """Its networks, fp32, weights rounded as they are stored."""
    return {name: part.load().float() for name, part in source.parts.items()}


@pytest.fixture(scope="session")
def parts(source):
    """Its graphs by name."""
    from hyperrt.export import graph_specs

    return {graph.name: graph for graph in graph_specs.build(source)}


@pytest.fixture(scope="session")
def write(source, modules):
    """Writes NAME.onnx of a graph into a folder, and returns its path."""
    from hyperrt.export import onnx_graph

    def write(graph, folder, **options):
        skeletons = {name: part.skeleton for name, part in source.parts.items()}
        onnx_graph.write(graph, skeletons, modules, folder, **options)
        return folder / f"{graph.name}.onnx"

    return write
