"""Small bundles with the structure of SD1.5 and SDXL: export, comparison and pictures."""

import dataclasses
import importlib.util

import numpy as np
import onnx
import pytest
import torch

from hyperrt import Runtime
from hyperrt.bundle.bundle import Bundle
from hyperrt.cli import main as command
from hyperrt.export import expected, export_bundle, families, graph_specs, read_source, verify
from hyperrt.export.errors import ParityError
from hyperrt.plans import build
from hyperrt.plans.cache import PlanCache
from tests.engines import fake_nvidia
from tests.export import small_models
from tests.export.command_line import config

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="half precision on a CPU is OpenVINO's"
)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def family(request, tmp_path_factory):
    """The name of a family whose random models are small."""
    source = small_models.source(request.param, tmp_path_factory.mktemp("tokenizer"))
    smaller = dataclasses.replace(families.get(request.param), random=lambda seed: source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, request.param, smaller)
        yield request.param


@pytest.fixture(scope="module")
def plain(family, tmp_path_factory):
    """Its bundle in fp32."""
    return exported(family, tmp_path_factory.mktemp("bundles") / "plain")


def exported(family, folder, **options):
    return export_bundle(config(family, folder, random_weights=0, **options))


def test_the_runtime_draws_with_them(plain, drawn_photos):
    path = plain
    assert Bundle.open(path).parity.keys() == {*Bundle.open(path).graphs, "solvers"}
    with Runtime.open(path, backend="onnxruntime") as runtime:
        subject = runtime.personalize(drawn_photos)
        plain, personal, again = (
            runtime.generate("a [V] toy", subject, steps=2, strength=strength).latents
            for strength in (0, 1, 1)
        )
    assert np.array_equal(personal, again)
    assert np.abs(personal - plain).max() > 1e-3 * np.abs(plain).max()


def test_on_a_device_a_photo_becomes_a_subject_without_the_host(plain, drawn_photos, monkeypatch, tmp_path):
    """Neither do SDXL's image tokens.  CUDA and TensorRT are stand-ins, in which ONNX Runtime computes."""
    cuda, _ = fake_nvidia.machine(monkeypatch, tmp_path)
    bundle, prompt = Bundle.open(plain), "a [V] toy"
    for _ in build.compile_bundle(bundle, "tensorrt", ["current"], build.sizes_of(bundle, 1, 3)):
        pass
    with Runtime.open(plain, "tensorrt") as there, Runtime.open(plain, "onnxruntime") as here:
        there.prepare(there.request(prompt, there.personalize(drawn_photos[:1])))
        cuda.copies.clear()  # from here on the prompt is known
        subject = there.personalize(drawn_photos[1:2])
        there.prepare(there.request(prompt, subject))
        assert "down" not in {kind for kind, _ in cuda.copies}
        found = there.generate(prompt, subject, steps=2)
        expected = here.generate(prompt, here.personalize(drawn_photos[1:2]), steps=2)
        elsewhere = here.generate(prompt, subject, steps=2)
    for one in (found, elsewhere):
        np.testing.assert_allclose(one.latents, expected.latents, rtol=1e-3, atol=1e-4)


def test_no_two_attentions_of_a_graph_read_one_query(plain):
    """TensorRT-RTX 1.7.1 crashes over two, even with an Identity between: export/operators.py."""
    with_attention = set()
    for path in plain.glob("*.onnx"):
        nodes = onnx.load(path, load_external_data=False).graph.node
        queries = [node.input[0] for node in nodes if node.op_type == "MultiHeadAttention"]
        assert len(set(queries)) == len(queries), path.name
        with_attention |= {path.stem} if queries else set()
    assert "denoiser" in with_attention


def test_every_graph_compiles_for_an_absent_gpu(plain, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    bundle = Bundle.open(plain)
    sizes = build.sizes_of(bundle, images=1, branches=3)
    cache = PlanCache(tmp_path / "plans")
    made = list(build.compile_bundle(bundle, "tensorrt-rtx", ["sm89"], sizes, cache=cache))
    assert len(made) == len(bundle.graphs)
    assert {"lora_q", "lora_kv"} <= {name for plan in made for name in plan.built.inputs}


def test_a_prompt_of_more_than_77_tokens_is_cut_and_the_rest_is_logged(plain, tmp_path, capfd):
    picture, prompt = tmp_path / "robot.png", f"a robot {'very ' * 80}red"
    options = ["--bundle", str(plain), "-p", prompt, "--steps", "1", "-o", str(picture)]
    assert command.run(["generate", *options, "--backend", "onnxruntime"]) == 0
    assert "warning: prompt cut to 77 tokens; dropped: " in capfd.readouterr().err
    assert picture.exists()


@needs_openvino
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_precision_products_are_typed_and_norms_are_not(family, precision, tmp_path):
    path = exported(family, tmp_path / "b", precision=precision)
    bundle = Bundle.open(path)
    assert bundle.precision == precision
    assert max(bundle.parity.values()) <= verify.REDUCED[precision]
    model = onnx.shape_inference.infer_shapes(onnx.load(path / "denoiser.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    expected = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
    convolutions = {types[node.output[0]] for node in model.graph.node if node.op_type == "Conv"}
    norms = {types[node.output[0]] for node in model.graph.node if node.op_type == "LayerNormalization"}
    assert convolutions == {expected}
    assert norms == {onnx.TensorProto.FLOAT}
    assert all(
        spec.dtype in ("float32", "int64") for graph in bundle.graphs.values() for spec in graph.inputs
    )


REFITTED = [("fp32", "none"), ("fp32", "int8"), pytest.param("bf16", "none", marks=needs_openvino)]


@pytest.mark.parametrize(("precision", "quantize"), REFITTED)
def test_the_lora_may_enter_by_refit(family, precision, quantize, tmp_path, monkeypatch):
    monkeypatch.setattr("hyperrt.export.storage.SMALLEST_INT8", 256)
    path = exported(family, tmp_path / "b", precision=precision, quantize=quantize, adapt="refit")
    bundle = Bundle.open(path)
    reduction = "int8" if quantize == "int8" else precision
    assert bundle.parity["denoiser"] <= verify.REDUCED[reduction]
    graph = onnx.load(path / "denoiser.onnx").graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for spec in bundle.graphs["denoiser"].weights:
        assert constants[spec.name].data_type == onnx.TensorProto.FLOAT
        reader = "MatMul" if precision == "fp32" else "Cast"
        assert [node.op_type for node in graph.node if spec.name in node.input] == [reader]
    assert sorted(file.suffix for file in path.glob("denoiser*")) == [".onnx"]


def test_eight_bits_halve_the_denoiser_and_stay_close(family, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("hyperrt.export.storage.SMALLEST_INT8", 256)
    full, small = plain, exported(family, tmp_path / "small", quantize="int8")
    assert Bundle.open(small).storage == "int8"
    weights = [
        sum(np.prod(t.dims) * (1 if t.data_type == onnx.TensorProto.INT8 else 2) for t in graph.initializer)
        for graph in (onnx.load(path / "denoiser.onnx").graph for path in (full, small))
    ]
    assert weights[1] < 0.7 * weights[0]


def test_a_graph_that_computes_something_else_ends_the_export(family, tmp_path, monkeypatch):
    right = expected.of_graph

    def wrong(*of):
        return [(feeds, {k: v * 1.01 for k, v in found.items()}) for feeds, found in right(*of)]

    monkeypatch.setattr(expected, "of_graph", wrong)
    with pytest.raises(ParityError, match="image_encoder"):
        exported(family, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_another_size_of_picture_is_that_of_the_latents(family):
    source = read_source.read(config(family, random_weights=0, size=48))
    by_name = {graph.name: graph for graph in graph_specs.build(source)}
    assert by_name["denoiser"].inputs[0].shape == ("images", 4, 24, 24)


def test_random_weights_are_reproducible(family):
    source = families.get(family).random(0)
    first, again = (source.parts["unet"].load().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
