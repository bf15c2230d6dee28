import dataclasses
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from hyperrt import engines
from hyperrt.bundle.bundle import GRAPHS
from hyperrt.export import onnx_graph
from hyperrt.export.errors import ExportError
from hyperrt.export.modules import GraphModule

ROOT = Path(__file__).resolve().parents[2]
each_graph = pytest.mark.parametrize("name", GRAPHS)


@each_graph
def test_onnx_runtime_sees_the_inputs_and_outputs_that_the_manifest_names(name, exported, parts):
    with engines.open(exported / f"{name}.onnx") as engine:
        assert engine.inputs == parts[name].inputs
        assert engine.outputs == parts[name].outputs


@each_graph
def test_no_path_of_the_machine_is_in_a_graph(name, exported):
    content = (exported / f"{name}.onnx").read_bytes()
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content


@each_graph
def test_a_graph_is_valid_onnx_of_the_chosen_opset(name, exported):
    model = onnx.load(exported / f"{name}.onnx")
    assert {entry.version for entry in model.opset_import if not entry.domain} == {onnx_graph.OPSET}
    onnx.checker.check_model(model, skip_opset_compatibility_check=True)


def test_no_node_reads_the_number_of_rows_from_the_lora(exported):
    for name, lora in (("denoiser", "lora_q"), ("context", "lora_kv")):
        nodes = onnx.load(exported / f"{name}.onnx").graph.node
        readers = {node.op_type for node in nodes if lora in node.input}
        assert readers == {"Split"}


def test_an_input_that_becomes_a_constant_is_refused(parts, write, tmp_path):
    class Constant(GraphModule):
        def __init__(self, shape):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, *shape))

        def forward(self, input_ids):
            return self.weight * 2.0

    graph = parts["text_encoder"]
    constant = dataclasses.replace(graph, make=lambda _: Constant(graph.outputs[0].shape[1:]))
    with pytest.raises(ExportError, match="does not read input_ids"):
        write(constant, tmp_path)


def test_large_weights_go_beside_the_graph(parts, write, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "EXTERNAL_BYTES", 1000)
    monkeypatch.setattr(onnx_graph, "INLINE_BYTES", 1000)
    path = write(parts["context"], tmp_path)
    assert (tmp_path / "context.onnx.data").stat().st_size > path.stat().st_size
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # ONNX Runtime wants sizes of a Split before it reads other files: what is small stays in the graph.
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        assert not outside or tensor.data_type == onnx.TensorProto.FLOAT16
