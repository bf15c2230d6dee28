"""A bundle whose LoRA enters by refit: the runtime draws the same pictures as with the other form."""

import importlib
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hyperrt import Runtime
from hyperrt.bundle.bundle import Bundle
from hyperrt.engines import EngineUnusable
from hyperrt.errors import BundleMismatch, NumericError
from hyperrt.export import export_bundle, onnx_graph
from hyperrt.plans import build
from hyperrt.plans.cache import PlanCache
from tests.engines import fake_nvidia, fake_ort_gpu
from tests.export.command_line import config_of

BENCH = Path(__file__).resolve().parents[2] / "bench"
PROMPT, PLAIN = "a [V] robot on a beach", "a robot on a beach"


@pytest.fixture(scope="module")
def refitted(trained, exported, tmp_path_factory):
    """`exported` in the form for a refit; graphs that are the same in both are copied."""
    output = tmp_path_factory.mktemp("refit") / "small"
    described, really = Bundle.open(exported).graphs, onnx_graph.write

    def write(graph, skeletons, modules, folder, *options):
        if graph.refit is not None:
            return really(graph, skeletons, modules, folder, *options)
        shutil.copy(exported / f"{graph.name}.onnx", folder)
        return onnx_graph.Written(described[graph.name].weight_bytes, described[graph.name].row_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "write", write)
        return export_bundle(config_of(trained, output, adapt="refit"))


@pytest.fixture(scope="module")
def runtime(refitted):
    with Runtime.open(refitted, "onnxruntime") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def subjects(runtime, drawn_photos):
    return [runtime.personalize(drawn_photos[:1]), runtime.personalize(drawn_photos[1:])]


def draw(runtime, subject, **options):
    return runtime.generate(PROMPT if subject else PLAIN, subject, steps=3, **options).latents


def test_the_manifest_names_the_constants_and_no_packed_input(refitted, exported):
    bundle, other = Bundle.open(refitted), Bundle.open(exported)
    assert bundle.adapt == "refit"
    for name, graph in bundle.graphs.items():
        assert graph.weights == (bundle.layout.constants("lora_q") if name == "denoiser" else ())
    assert not bundle.graphs["denoiser"].takes("lora_q")
    assert bundle.graphs["context"].takes("lora_kv")
    same = bundle.graphs.keys() - {"denoiser"}
    assert all(bundle.graphs[name] == other.graphs[name] for name in same)
    assert bundle.parity.keys() == other.parity.keys()


def test_a_subject_comes_back_bit_for_bit_after_another_and_so_does_the_base_model(runtime, subjects):
    a, b = subjects
    base, first, other, again, back = (draw(runtime, who).tobytes() for who in (None, a, b, a, None))
    assert first == again != other
    assert base == back != first


def test_a_picture_is_that_of_the_bundle_with_inputs(runtime, exported, subjects):
    with Runtime.open(exported, "onnxruntime") as by_inputs:
        for who in (*subjects, None):
            ours, theirs = (draw(one, who, n=2, batch_size=2) for one in (runtime, by_inputs))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_threads_that_draw_at_once_never_mix_their_subjects(runtime, subjects):
    expected = [draw(runtime, who).tobytes() for who in subjects]
    mixed = []

    def repeat(k):
        for _ in range(4):
            if draw(runtime, subjects[k]).tobytes() != expected[k]:
                mixed.append(k)

    threads = [threading.Thread(target=repeat, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mixed == []


def test_with_low_memory_the_subject_is_put_into_the_new_engine(refitted, runtime, subjects):
    expected = [draw(runtime, who).tobytes() for who in (*subjects, None)]
    with Runtime.open(refitted, "onnxruntime", low_memory=True) as low:
        assert [draw(low, who).tobytes() for who in (*subjects, None)] == expected


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Stand-ins for CUDA and TensorRT."""
    return fake_nvidia.machine(monkeypatch, tmp_path)


@pytest.fixture
def on_tensorrt(refitted, gpu):
    """The bundle on TensorRT's stand-in, in which ONNX Runtime computes."""
    bundle = Bundle.open(refitted)
    for branches in (3, 2):
        sizes = build.sizes_of(bundle, 1, branches)
        plans = [one.plan for one in build.compile_bundle(bundle, "tensorrt", ["current"], sizes)]
    weights = {plan.graph_name: plan.weights for plan in plans}
    assert weights["denoiser"] == tuple(spec.name for spec in bundle.graphs["denoiser"].weights)
    with Runtime.open(refitted, "tensorrt") as opened:
        yield opened


def test_on_tensorrt_subjects_come_and_go_by_refit(on_tensorrt, runtime, subjects, gpu):
    a, b = subjects
    _, trt = gpu
    found = [draw(on_tensorrt, subject) for subject in (a, b, a, None)]
    trt.refit_stops = 5
    with pytest.raises(EngineUnusable):
        draw(on_tensorrt, b)
    trt.refit_stops = None
    assert np.array_equal(draw(on_tensorrt, a), found[0])
    assert np.array_equal(found[0], found[2])
    for one, subject in zip(found, (a, b, a, None), strict=True):
        np.testing.assert_allclose(one, draw(runtime, subject), rtol=1e-4, atol=1e-5)


def test_on_tensorrt_a_refit_reads_what_the_weight_decoder_wrote(on_tensorrt, runtime, drawn_photos, gpu):
    cuda, _ = gpu
    on_tensorrt.prepare(on_tensorrt.request(PROMPT, on_tensorrt.personalize(drawn_photos[:1])))
    cuda.copies.clear()  # from here on the prompt is known
    subject = on_tensorrt.personalize(drawn_photos[1:2])
    on_tensorrt.prepare(on_tensorrt.request(PROMPT, subject))
    assert "down" not in {kind for kind, _ in cuda.copies}
    expected = draw(runtime, runtime.personalize(drawn_photos[1:2]))
    np.testing.assert_allclose(draw(on_tensorrt, subject), expected, rtol=1e-4, atol=1e-5)


def test_a_plan_that_does_not_take_what_it_is_refitted_with_is_not_published(refitted, gpu, monkeypatch):
    """As exported it is the base model: its LoRA is zeros."""
    monkeypatch.setattr(fake_nvidia.Refitter, "_write", lambda *_: None)
    bundle = Bundle.open(refitted)
    sizes = build.sizes_of(bundle, 1, 3)
    with pytest.raises(NumericError, match="the plan of denoiser computes something else"):
        list(build.compile_bundle(bundle, "tensorrt", ["current"], sizes, ["denoiser"]))
    assert PlanCache().list() == []


@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}], ids=["plain", "captured"])
def test_on_cuda_subjects_come_and_go_by_refit(refitted, runtime, subjects, monkeypatch, options):
    """ONNX Runtime's provider for CUDA is a stand-in: its own for the CPU."""
    fake_ort_gpu.install(monkeypatch)
    with Runtime.open(refitted, "onnxruntime-cuda", backend_options=options) as on_gpu:
        for subject in (*subjects, subjects[0], None):
            ours, theirs = draw(on_gpu, subject), draw(runtime, subject)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_change_of_subject_is_measured(refitted, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)
    switch = importlib.import_module("switch")
    switch.small(SimpleNamespace(bundle=refitted, quick=True, changes=None))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert found["aba_max_diff"] == found["a_base_max_diff"] == 0
    assert found["row_alone_max_rel"] < 1e-5 and found["switch_ms"] > 0


def test_onnx_runtimes_tensorrt_has_no_constants_to_refit_and_is_refused(refitted):
    with pytest.raises(BundleMismatch) as caught:
        Runtime.open(refitted, "onnxruntime-tensorrt")
    assert caught.value.code == 5 and str(caught.value).count("\n") == 2
    assert "onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx do not" in caught.value.why
    assert "--adapt inputs" in caught.value.do
