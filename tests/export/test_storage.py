import numpy as np
import onnx_ir as ir
import pytest
import torch

from hyperrt.export import storage
from hyperrt.export.storage import Weight


def filled(tensor, op="MatMul", int8=False, dtype=ir.DataType.FLOAT):
    """The nodes and initialisers of y = op(x, w) after `fill`."""
    x = ir.Value(name="x", shape=ir.Shape([2, tensor.shape[0]]), type=ir.TensorType(dtype))
    weight = ir.Value(name="w", shape=ir.Shape(tensor.shape), type=ir.TensorType(dtype))
    weight.const_value = ir.tensor([0.0])
    node = ir.Node("", op, [x, weight])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    storage.fill(model, {"w": Weight("key", (1, 0))}, {"key": tensor.T.contiguous()}, int8)
    return [node.op_type for node in graph], {name: v.const_value for name, v in graph.initializers.items()}


def test_fp32_weights_are_stored_as_fp16_and_cast():
    tensor = torch.randn(16, 32).half().float()
    nodes, stored = filled(tensor)
    assert nodes == ["Cast", "MatMul"]
    assert stored["w.fp16"].dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(stored["w.fp16"].numpy(), tensor.numpy())


def test_few_numbers_stay_fp32():
    nodes, stored = filled(torch.randn(4, 4))
    assert nodes == ["MatMul"]
    assert stored["w"].dtype == ir.DataType.FLOAT


def test_weights_of_half_precision_arithmetic_are_stored_as_they_are():
    tensor = torch.randn(16, 32).half()
    nodes, stored = filled(tensor, dtype=ir.DataType.BFLOAT16)
    assert nodes == ["MatMul"]
    np.testing.assert_array_equal(stored["w"].numpy().astype(np.float32), tensor.bfloat16().float().numpy())


def test_eight_bits_have_a_scale_for_each_output_channel():
    tensor = torch.randn(64, 128) * torch.logspace(-3, 0, 128)
    nodes, stored = filled(tensor, int8=True)
    assert nodes == ["Cast", "Mul", "MatMul"]
    assert stored["w.int8"].dtype == ir.DataType.INT8
    assert stored["w.scale"].shape == (1, 128)
    found = stored["w.int8"].numpy().astype(np.float32) * stored["w.scale"].numpy()
    assert np.abs(found - tensor.numpy()).max(axis=0) == pytest.approx(tensor.abs().amax(0) / 254, rel=0.5)


def test_what_no_product_reads_keeps_its_precision():
    nodes, _ = filled(torch.randn(64, 128), op="Gather", int8=True)
    assert nodes == ["Cast", "Gather"]


def test_every_large_weight_of_an_export_is_stored_as_fp16(exported):
    import onnx

    graphs = [onnx.load(path).graph for path in exported.glob("*.onnx")]
    large = [t for graph in graphs for t in graph.initializer if np.prod(t.dims) >= 10_000]
    assert {t.data_type for t in large} == {onnx.TensorProto.FLOAT16}
