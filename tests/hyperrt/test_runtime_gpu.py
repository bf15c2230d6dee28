"""Pictures on the backends for NVIDIA GPUs: the runtime's own part of it, the device being this CPU."""

from __future__ import annotations

import numpy as np
import pytest

from hyperrt import Runtime

backend = pytest.importorskip("hyperrt.engines.onnxruntime")
fake_ort_gpu = pytest.importorskip("tests.engines.fake_ort_gpu")
PROMPTS = ("a [V] mug on a beach", "a [V] mug in the snow")


@pytest.fixture
def captured(monkeypatch):
    """Stems of the files whose graphs were captured; every provider is the CPU's."""
    return fake_ort_gpu.install(monkeypatch)


def drawn(name, subjects, **options):
    """Latents of every prompt with every subject and of the base model, on one open runtime."""
    with Runtime.open("tiny", name, **options) as runtime:
        pairs = [(prompt, subject) for prompt in PROMPTS for subject in subjects]
        found = [runtime.generate(*pair, steps=2, seed=3).latents for pair in [*pairs, *pairs[:1]]]
        found.append(runtime.generate("a mug on a beach", steps=2, seed=3).latents)
        return found


def test_a_captured_step_draws_what_a_plain_one_does_for_all_subjects_and_prompts(captured, tiny):
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2)]
    with Runtime.open(tiny, "onnxruntime") as runtime:
        subjects = [runtime.personalize([photo], "mug") for photo in photos]
    plain = drawn("onnxruntime", subjects)
    graphs = drawn("onnxruntime-cuda", subjects, backend_options={"cuda_graph": True})
    assert np.array_equal(graphs[0], graphs[4]) and not np.array_equal(graphs[0], graphs[1])
    for one, other in zip(plain, graphs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    assert set(captured) == {"denoiser", "vae_decoder"}
    assert captured.count("denoiser") == 2  # three rows, and the base model's two


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}], ids=["plain", "captured"])
def test_a_gpu_draws_what_the_cpu_does(tiny, options):
    if backend.CUDA not in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("this is not the package for GPUs")
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with Runtime.open(tiny, "onnxruntime") as runtime:
        subjects = [runtime.personalize([photo], "mug")]
    plain = drawn("onnxruntime", subjects)
    for one, other in zip(plain, drawn("onnxruntime-cuda", subjects, backend_options=options), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-2)
