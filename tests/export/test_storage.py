import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from export import storage
from export.errors import ExportError


def model_of(array):
    """y = x + array"""
    x = ir.Value(name="x", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(
        name="w",
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(array, name="w"),
    )
    add = ir.Node("", "Add", [x, weight])
    graph = ir.Graph([x], add.outputs, nodes=[add], initializers=[weight], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def test_rounded_weights_are_fp16_numbers():
    module = nn.Linear(16, 16)
    storage.round_weights(module, "a layer")
    assert torch.equal(module.weight, module.weight.half().float())


def test_a_weight_beyond_fp16_is_refused_by_name():
    module = nn.Linear(4, 4)
    module.weight.data[0, 0] = 1e5
    with pytest.raises(ExportError, match=r"weights of a layer(?s:.*)weight holds values up to 1e\+05"):
        storage.round_weights(module, "a layer")


def test_weights_that_fp16_holds_are_stored_as_fp16_and_cast():
    model = model_of(np.arange(512, dtype=np.float32))
    storage.store_half(model)
    assert [node.op_type for node in model.graph] == ["Cast", "Add"]
    assert [value.dtype for value in model.graph.initializers.values()] == [ir.DataType.FLOAT16]


def test_a_table_that_fp16_would_round_stays_as_it_is():
    model = model_of(np.linspace(0, 1, 512, dtype=np.float32))
    storage.store_half(model)
    assert [node.op_type for node in model.graph] == ["Add"]


def test_every_large_weight_of_an_export_is_stored_as_fp16(exported):
    import onnx

    for path in exported.glob("*.onnx"):
        large = [t for t in onnx.load(path).graph.initializer if np.prod(t.dims) >= 10_000]
        assert {t.data_type for t in large} <= {onnx.TensorProto.FLOAT16}
