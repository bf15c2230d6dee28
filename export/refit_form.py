"""Gives a graph the `refit` form: instead of one packed LoRA input, a named constant for each factor.

    lora_q [subjects, Nq] (-> Cast) -> Split -> Reshape -> MatMul           is replaced by
    PATH.lora_A [1, d_in, r], PATH.lora_B [1, r, d_out] (-> Cast) -> MatMul

The constants are float32 zeros at every precision. They are also the defaults of inputs of the same names:
ONNX Runtime lets a run override these, TensorRT's parser takes them for constants that can be refitted by
name, OpenVINO for plain constants. All rows share one LoRA; the row gate stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from hyperrt.engines.tensors import TensorSpec
from hyperrt.export.errors import ExportError
from hyperrt.lora.layout import LoraLayout


def apply(model: ir.Model, layout: LoraLayout, vector: str = "lora_q") -> None:
    """Changes a traced graph in place.

    Raises:
        ExportError: the graph does not split its LoRA as expected, or a factor reaches no product.
    """
    graph = model.graph
    packed = next((value for value in graph.inputs if value.name == vector), None)
    if packed is None:
        raise _unexpected(f"there is no input {vector}")
    split, cast_to = _split_of(packed, layout)
    factors = [_reshaped(part) for part in split.outputs]
    specs = layout.constants(vector)
    for k in range(0, len(specs), 2):
        _check_site(specs[k].name, *factors[k : k + 2])
    names = {value.name for node in graph for value in node.outputs} | {*graph.initializers}
    for spec, factor in zip(specs, factors, strict=True):
        if spec.name in names:
            raise _unexpected(f"there is a tensor {spec.name} already")
        factor.replace_all_uses_with(_constant(graph, spec, cast_to))
    RemoveUnusedNodesPass()(model)  # which removes all that reads the vector
    graph.inputs.remove(packed)


def with_lora(path: Path, values: Mapping[str, np.ndarray], to: Path) -> None:
    """Writes a copy of a graph in this form with other constants, into its folder (for external data)."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name in values:
            array = np.ascontiguousarray(values[tensor.name])
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, to)


def _split_of(packed: ir.Value, layout: LoraLayout) -> tuple[ir.Node, int | None]:
    """The node that splits the vector, and the type that it is cast to before, or None."""
    node, cast_to = _only_reader(packed), None
    if node.op_type == "Cast":
        cast_to = node.attributes.get_int("to")
        node = _only_reader(node.outputs[0])
    sizes = [part.stop - part.start for _, *both in layout.slices(str(packed.name)) for part in both]
    split = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) == 2 else None
    if node.op_type != "Split" or node.attributes.get_int("axis", 0) != 1 or split is None:
        raise _unexpected(f"{packed.name} goes to {node.op_type}, and not to a Split of its numbers")
    if split.numpy().tolist() != sizes:
        raise _unexpected(f"{packed.name} is not split as the layout says")
    return node, cast_to


def _only_reader(value: ir.Value) -> ir.Node:
    readers = [node for node, _ in value.uses()]
    if len(readers) != 1 or value.is_graph_output():
        raise _unexpected(f"{value.name} goes to {', '.join(node.op_type for node in readers) or 'nothing'}")
    return readers[0]


def _reshaped(part: ir.Value) -> ir.Value:
    node = _only_reader(part)
    if node.op_type != "Reshape":
        raise _unexpected(f"a part of the LoRA goes to {node.op_type}, and not to Reshape")
    return node.outputs[0]


def _check_site(name: str, a: ir.Value, b: ir.Value) -> None:
    """Checks that a site is ((x A) m) B: two products with the gate between them."""
    for factor in (a, b):
        readers = [(node.op_type, index) for node, index in factor.uses()]
        if readers != [("MatMul", 1)]:
            raise _unexpected(f"a factor at {name} is read by {readers or 'nothing'}, and not by one product")
    gate = _only_reader(_only_reader(a).outputs[0])
    if gate.op_type != "Mul" or _only_reader(gate.outputs[0]) is not _only_reader(b):
        raise _unexpected(f"there is no gate between the two products at {name}")


def _constant(graph: ir.Graph, spec: TensorSpec, cast_to: int | None) -> ir.Value:
    """Adds a constant of float32 zeros, also as an input; returns it cast to the type of the arithmetic."""
    value = ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = ir.tensor(np.zeros(spec.shape, np.float32), name=spec.name)
    graph.register_initializer(value)
    graph.inputs.append(value)
    if cast_to is None:
        return value
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", cast_to)])
    cast.outputs[0].name = f"{spec.name}.cast"
    graph.insert_before(graph[0], [cast])
    return cast.outputs[0]


def _unexpected(why: str) -> ExportError:
    return ExportError(
        "the denoiser cannot be written for a refit", why, "export it with --adapt inputs, and report this"
    )
