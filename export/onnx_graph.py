"""A graph to an ONNX file: the only call of torch.onnx.export, and what is put right after it.

The LoRA is traced with one set of factors per row. Its first dim is then renamed to "subjects": MatMul
broadcasts, so one set for all rows works in the same graph, provided that nothing reads the number of rows
from the LoRA.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import torch
from torch.export import Dim

from export import operators, storage
from export.errors import ExportError
from export.graphs import Graph

# GroupNormalization (21) has no CPU kernel in ONNX Runtime; below 18 the exporter converts down, and badly.
OPSET = 20
EXTERNAL_BYTES = 10**9  # weights go beside the graph from here on; protobuf ends at 2 GB
# Any sizes above 1 that differ from one another: the exporter takes 0 and 1 for constants.
SIZES = {"photos": 2, "prompts": 3, "images": 2, "branches": 3, "rows": 6, "subjects": 6}
TRACED_AS = {"subjects": "rows"}


def write(graph: Graph, folder: Path) -> Path:
    """Write `folder`/NAME.onnx (and NAME.onnx.data where the weights are large); returns its path.

    Raises:
        ExportError: the exporter cannot translate the model, or left out an input.
    """
    path = folder / f"{graph.name}.onnx"
    model = _traced(graph)
    _finish(model, graph)
    storage.store_half(model)
    bytes_of_weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    external = f"{graph.name}.onnx.data" if bytes_of_weights > EXTERNAL_BYTES else None
    ir.save(model, path, external_data=external)
    return path


def _traced(graph: Graph) -> ir.Model:
    dims = {name: Dim(name) for name in SIZES}
    shapes = {
        spec.name: {k: dims[TRACED_AS.get(d, d)] for k, d in enumerate(spec.shape) if isinstance(d, str)}
        for spec in graph.inputs
    }
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                graph.module,
                (),
                kwargs=graph.feeds(SIZES, seed=0),
                output_names=[spec.name for spec in graph.outputs],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=shapes,
                custom_translation_table=operators.TRANSLATIONS,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        why = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"PyTorch cannot export {graph.name}", why, "use the base model's original classes"
        ) from error
    return program.model


def _finish(model: ir.Model, graph: Graph) -> None:
    """Names and dims as the bundle format wants them; checks that no input was baked in or lost."""
    values = {value.name: value for value in model.graph.inputs}
    if (found := [v.name for v in model.graph.inputs]) != (wanted := [s.name for s in graph.inputs]):
        raise ExportError(f"{graph.name} was exported with other inputs", f"{found}, not {wanted}", "")
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
    """Where the graph asks the LoRA how many rows there are, let it ask the gate: one may serve them all."""
    for name in ("lora_q", "lora_kv"):
        if name not in inputs or "gate" not in inputs:
            continue
        for node, index in list(inputs[name].uses()):
            if node.op_type == "Shape":
                if node.attributes.get_int("start", 0) != 0 or node.attributes.get_int("end", 0) != 1:
                    raise ExportError(
                        f"the graph reads the whole shape of {name}", "one LoRA must serve all rows", ""
                    )
                node.replace_input_with(index, inputs["gate"])


def _strip(model: ir.Model) -> None:
    """Drop the shapes of inner values and all metadata.

    The shapes hold for one LoRA per row, and would mislead memory planning where one serves all rows; the
    metadata holds paths of this machine.
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
    """The exporter warns about its own insides, and about torchvision, which is not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
