"""Writes a graph to an ONNX file: the only call of torch.onnx.export, and the corrections after it.

A graph is traced through skeletons, whose weights have no data, and gets its weights when it is written.
The LoRA is traced with one set of factors per row. Its first dim is then renamed to "subjects": MatMul
broadcasts, so one set for all rows works in the same graph, as long as no node reads the number of rows
from the LoRA.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim

from hyperrt.export import operators, precision, refit_form, storage
from hyperrt.export.errors import ExportError
from hyperrt.export.graph_specs import GraphSpec
from hyperrt.export.parts import FAKE
from hyperrt.export.precision import Precision
from hyperrt.export.storage import Weight

# ONNX Runtime has no CPU kernel for GroupNormalization (21); below 18 the exporter's conversion has faults.
OPSET = 20
EXTERNAL_BYTES = 10**9  # larger weights go into a second file; protobuf ends at 2 GB
INLINE_BYTES = 2**16  # smaller tensors stay: backends read the sizes of a Split before they read other files
# The exporter takes sizes 0 and 1 for constants.
SIZES = {"photos": 2, "prompts": 3, "images": 2, "branches": 3, "rows": 6, "subjects": 6, "h": 10, "w": 14}
TRACED_AS = {"subjects": "rows"}


@dataclass(frozen=True)
class Written:
    """Memory of an open graph in bytes: its weights, and the largest set of activations per row.

    Operators run one after the other. Graphs without rows count per picture.
    """

    weight_bytes: int
    row_bytes: int


def write(
    graph: GraphSpec,
    skeletons: Mapping[str, nn.Module],
    modules: Mapping[str, nn.Module],
    folder: Path,
    bundle_precision: Precision = "fp32",
    int8: bool = False,
) -> Written:
    """Writes `folder`/NAME.onnx (and NAME.onnx.data if the weights are large).

    Args:
        skeletons: the graph's parts without data, through which it is traced.
        modules: the same parts with data; read one weight after the other.
        bundle_precision: see `precision.of_graph`.
        int8: store weights of products in eight bits.

    Raises:
        ExportError: the exporter cannot translate the model, left out an input, or made a graph whose LoRA
            cannot be refitted.
    """
    with FAKE:
        module = graph.make(skeletons)
    precision.apply(module, precision.of_graph(bundle_precision, module))
    model = _traced(graph, module)
    weights = _weights(model)
    written = Written(_bytes_of(model.graph.initializers.values()), _activation_bytes(model))
    _finish(model, graph)
    if graph.refit is not None:
        refit_form.apply(model, graph.refit)
    storage.fill(model, weights, graph.hold(modules).state_dict(keep_vars=True), int8)
    size = _bytes_of(model.graph.initializers.values())
    external = f"{graph.name}.onnx.data" if size > EXTERNAL_BYTES else None
    path = folder / f"{graph.name}.onnx"
    ir.save(model, path, external_data=external, size_threshold_bytes=INLINE_BYTES)
    return written


def _traced(graph: GraphSpec, module: nn.Module) -> ir.Model:
    dims = {name: Dim(name) for name in SIZES}
    shapes = {
        spec.name: {k: dims[TRACED_AS.get(d, d)] for k, d in enumerate(spec.shape) if isinstance(d, str)}
        for spec in graph.inputs
    }
    feeds = graph.feeds(SIZES, seed=0)
    with FAKE:
        feeds = {name: torch.empty_like(tensor) for name, tensor in feeds.items()}
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                (),
                kwargs=feeds,
                output_names=[spec.name for spec in graph.outputs],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=shapes,
                custom_translation_table=operators.TRANSLATIONS,
                optimize=False,  # it would read weights, which have no data
                verbose=False,
            )
            for value in program.model.graph.initializers.values():
                if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
                    value.const_value = None
            onnxscript.optimizer.optimize_ir(program.model)
    except torch.onnx.errors.OnnxExporterError as error:
        why = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"PyTorch cannot export {graph.name}", why, "use the base model's original classes"
        ) from error
    return program.model


def _weights(model: ir.Model) -> dict[str, Weight]:
    """The initialisers without data; the Transpose of an initialiser becomes another initialiser."""
    graph = model.graph
    weights = {name: Weight(name) for name, value in graph.initializers.items() if value.const_value is None}
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.name not in weights or weights[source.name].perm:
            continue
        perm = tuple(node.attributes.get_ints("perm"))
        name = f"{source.name}.{''.join(map(str, perm))}"
        if name not in graph.initializers:
            shape = ir.Shape([source.shape[axis] for axis in perm])
            graph.register_initializer(_without_data(name, shape, source.type))
            weights[name] = Weight(source.name, perm)
        node.outputs[0].replace_all_uses_with(graph.initializers[name])
        graph.remove(node, safe=True)
    for name in [name for name in weights if not graph.initializers[name].uses()]:
        del graph.initializers[name], weights[name]
    return weights


def _without_data(name: str, shape: ir.Shape, kind: ir.TypeProtocol) -> ir.Value:
    value = ir.Value(name=name, shape=shape, type=kind)
    value.const_value = ir.tensor([0.0])  # a registered initialiser must have data
    return value


def _bytes_of(values: Iterable[ir.Value]) -> int:
    return sum(_size(value) for value in values)


def _size(value: ir.Value) -> int:
    """Bytes of a tensor with 1 for every symbolic dim; 0 if its shape is unknown."""
    if value.shape is None or value.dtype is None:
        return 0
    sizes = [dim if isinstance(dim, int) else 1 for dim in value.shape]
    return int(math.prod(sizes) * value.dtype.itemsize)


def _activation_bytes(model: ir.Model) -> int:
    """The largest sum of tensors that are alive at one time, if nodes run in their order."""
    nodes = list(model.graph)
    kept = {*model.graph.initializers.values(), *model.graph.inputs}
    last = {value: k for k, node in enumerate(nodes) for value in node.inputs if value is not None}
    alive, most, ends = 0, 0, {}
    for k, node in enumerate(nodes):
        for value in node.outputs:
            alive += _size(value)
            ends.setdefault(last.get(value, k), []).append(value)
        most = max(most, alive)
        alive -= sum(_size(value) for value in ends.pop(k, []) if value not in kept)
    return most


def _finish(model: ir.Model, graph: GraphSpec) -> None:
    """Gives names and dims of the bundle format; checks that no input was lost or became a constant."""
    values = {value.name: value for value in model.graph.inputs}
    names, expected = list(values), [spec.name for spec in graph.inputs]
    if names != expected:
        raise ExportError(f"{graph.name} was exported with other inputs", f"{names}, not {expected}", "")
    _take_rows_from_gate(values)
    _strip(model)
    for value, spec in zip(
        (*model.graph.inputs, *model.graph.outputs), (*graph.inputs, *graph.outputs), strict=True
    ):
        value.shape = ir.Shape(spec.shape)
    unused = [name for name, value in values.items() if not value.uses()]
    if unused:
        why = "the exporter took them for constants"
        raise ExportError(
            f"{graph.name} does not read {', '.join(unused)}", why, "check how they enter the model"
        )
    model.producer_name, model.producer_version = "hyperrt", ""


def _take_rows_from_gate(inputs: dict[str, ir.Value]) -> None:
    """Reads the number of rows from the gate, not from the LoRA, which may be one for all rows."""
    for name in ("lora_q", "lora_kv"):
        if name not in inputs or "gate" not in inputs:
            continue
        for node, index in list(inputs[name].uses()):
            if node.op_type == "Shape":
                if node.attributes.get_int("start", 0) != 0 or node.attributes.get_int("end", 0) != 1:
                    raise ExportError(
                        f"the graph reads the whole shape of {name}", "one LoRA must fit all rows", ""
                    )
                node.replace_input_with(index, inputs["gate"])


def _strip(model: ir.Model) -> None:
    """Removes the shapes of inner values and all metadata.

    The shapes are those of one LoRA per row, and would mislead memory planning for one LoRA for all rows. The
    metadata contains paths of this machine.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None
    kept = {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
    for value in kept:
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in kept:
                value.shape = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter, which warns about its internals, weights without data, and torchvision."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
