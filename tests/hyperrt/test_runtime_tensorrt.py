"""The whole line on the TensorRT backend, ONNX Runtime computing in place of a GPU's plans.

What is tested is everything around the arithmetic: plans found by their keys, sizes, the loop on the device,
subjects that come and go.
"""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest

from hyperrt import Runtime
from hyperrt.bundle.bundle import Bundle
from hyperrt.engines.dlpack import DeviceArray
from hyperrt.errors import Incompatible, NotFound, NumericError
from hyperrt.lora.layout import VECTORS
from hyperrt.plans import build
from tests.engines import fake_nvidia

pytest.importorskip("onnxruntime")
OPTIONS = {"seed": 3, "steps": 4}
SUBJECT_PROMPT, PLAIN_PROMPT = "a [V] mug on a beach", "a mug on a beach"


@pytest.fixture
def nvidia(monkeypatch, tmp_path):
    """A machine with a GPU of sm89, and a cache of its own."""
    return fake_nvidia.machine(monkeypatch, tmp_path / "home")


def compiled(bundle, images=1, branches=3, **options):
    sizes = build.sizes_of(bundle, images, branches, **options)
    return list(build.compile_bundle(bundle, "tensorrt", ["current"], sizes))


def subjects(runtime, drawn_photos):
    return [runtime.personalize([photo], "mug") for photo in drawn_photos[:2]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder with the plans of three branches and of two, compiled once."""
    home = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        fake_nvidia.machine(patch, home)
        for branches in (3, 2):
            compiled(Bundle.open("tiny"), branches=branches)
    return home


@pytest.fixture
def runtime(cache, nvidia, tmp_path):
    shutil.copytree(cache, tmp_path / "home")
    with Runtime.open("tiny", "tensorrt") as opened:
        yield opened


@pytest.fixture
def plain():
    """The same bundle on the CPU."""
    with Runtime.open("tiny", "onnxruntime", threads=1) as opened:
        yield opened


def same(found, expected):
    np.testing.assert_allclose(found.latents, expected.latents, rtol=1e-4, atol=1e-5)
    return np.abs(found.images.astype(int) - expected.images).max() <= 1


@pytest.mark.parametrize("photos", [1, 4])
def test_pictures_are_those_of_the_cpu(runtime, plain, drawn_photos, photos):
    ours, theirs = (one.personalize(drawn_photos[:photos], "mug") for one in (runtime, plain))
    found, expected = (
        one.generate(SUBJECT_PROMPT, subject, **OPTIONS)
        for one, subject in ((runtime, ours), (plain, theirs))
    )
    assert same(found, expected)
    # In this stand-in even the bits of the LoRA are those of the CPU.
    assert {**found.recipe, "backend": ""} == {**expected.recipe, "backend": ""}


def test_nothing_comes_to_the_host_between_a_photo_and_the_denoiser(runtime, nvidia, drawn_photos):
    cuda, _ = nvidia
    runtime.prepare(runtime.request(SUBJECT_PROMPT, runtime.personalize(drawn_photos[:1], "mug"), **OPTIONS))
    cuda.copies.clear()  # from here on the prompt is known
    subject = runtime.personalize(drawn_photos[1:2], "mug")
    runtime.prepare(runtime.request(SUBJECT_PROMPT, subject, **OPTIONS))
    next(runtime.sample(runtime.request(SUBJECT_PROMPT, subject, **OPTIONS)))
    assert [size for kind, size in cuda.copies if kind == "down"] == []
    lora = {4 * runtime.bundle.layout.size(name) for name in VECTORS}
    assert not lora & {size for kind, size in cuda.copies if kind == "up"}
    assert lora <= {size for kind, size in cuda.copies if kind == "there"}


def test_who_asks_for_the_weights_gets_them_on_the_host_and_once(runtime, plain, nvidia, drawn_photos):
    cuda, _ = nvidia
    subject, expected = (one.personalize(drawn_photos[:1], "mug") for one in (runtime, plain))
    cuda.copies.clear()
    for _ in range(2):
        assert list(subject.lora) == list(VECTORS)
        for name, vector in subject.lora.items():
            assert isinstance(vector, np.ndarray)
            np.testing.assert_allclose(vector, expected.lora[name], rtol=1e-4, atol=1e-6)
    assert [kind for kind, _ in cuda.copies] == ["down", "down"]
    again = pickle.loads(pickle.dumps(subject))
    assert type(again.lora) is dict and np.array_equal(again.lora["lora_q"], subject.lora["lora_q"])


def test_a_subject_of_the_gpu_is_saved_and_drawn_elsewhere_after_its_runtime_was_closed(
    runtime, plain, drawn_photos, tmp_path
):
    subject = runtime.personalize(drawn_photos[:1], "mug")
    expected = runtime.generate(SUBJECT_PROMPT, subject, **OPTIONS)
    runtime.close()
    path = tmp_path / "mug.safetensors"
    subject.save(path)
    for who in (subject, plain.load_subject(path)):
        assert same(plain.generate(SUBJECT_PROMPT, who, **OPTIONS), expected)
    with Runtime.open("tiny", "tensorrt") as other:
        assert same(other.generate(SUBJECT_PROMPT, subject, **OPTIONS), expected)


def test_a_weight_that_is_no_number_is_found_in_the_picture_or_when_it_is_saved(
    runtime, drawn_photos, tmp_path, monkeypatch
):
    really = fake_nvidia.OnnxContext._compute

    def spoiled(self, at):
        really(self, at)
        if "lora_q" in self.engine.plan["outputs"]:
            at("lora_q")[:] = np.nan

    monkeypatch.setattr(fake_nvidia.OnnxContext, "_compute", spoiled)
    subject = runtime.personalize(drawn_photos[:1], "mug")
    with pytest.raises(NumericError, match="the picture is not a number"):
        runtime.generate(SUBJECT_PROMPT, subject, **OPTIONS)
    with pytest.raises(NumericError, match="lora_q cannot be saved"):
        subject.save(tmp_path / "s.safetensors")
    with pytest.raises(NumericError, match="the predicted LoRA"):
        runtime.personalize(drawn_photos[:2], "mug")  # whose mean is the host's


def test_subjects_come_and_go_without_a_trace(runtime, drawn_photos):
    a, b = subjects(runtime, drawn_photos)
    base, first, other, again, base_again = (
        runtime.generate(SUBJECT_PROMPT if subject else PLAIN_PROMPT, subject, **OPTIONS).latents
        for subject in (None, a, b, a, None)
    )
    assert np.array_equal(first, again) and np.array_equal(base, base_again)
    assert not np.array_equal(first, other)


def test_the_loop_stays_on_the_device(runtime, nvidia, drawn_photos):
    cuda, _ = nvidia
    subject = runtime.personalize(drawn_photos, "mug")
    runtime.prepare(runtime.request(SUBJECT_PROMPT, subject, **OPTIONS))
    waits = cuda.waits
    sampling = runtime.sample(runtime.request(SUBJECT_PROMPT, subject, **OPTIONS))
    steps = [step for step in sampling if step.index < 3]
    assert all(isinstance(step.latents, DeviceArray) for step in steps)
    looked_at = np.asarray(steps[0].denoised)  # a preview, long after
    assert np.isfinite(looked_at).all()
    loop = runtime.sample(runtime.request(SUBJECT_PROMPT, subject, **OPTIONS))
    waits = cuda.waits
    for _ in range(3):
        next(loop)
    assert cuda.waits == waits


def test_a_subject_of_one_gpu_is_drawn_on_another(runtime, nvidia, drawn_photos):
    cuda, _ = nvidia
    subject = runtime.personalize(drawn_photos[:1], "mug")
    expected = runtime.generate(SUBJECT_PROMPT, subject, **OPTIONS)
    cuda.devices, streams = 2, len(cuda.queues)
    with Runtime.open("tiny", "tensorrt", device=1) as second:
        found = second.generate(SUBJECT_PROMPT, subject, **OPTIONS)
    assert {queue.device for queue in cuda.queues[streams:]} == {1}
    np.testing.assert_array_equal(found.latents, expected.latents)


def test_a_call_that_no_plan_was_compiled_for_says_which_there_is(nvidia, drawn_photos):
    with Runtime.open("tiny", "tensorrt") as runtime:
        with pytest.raises(NotFound, match="hyperrt compile tiny --backend tensorrt"):
            runtime.generate(PLAIN_PROMPT, **OPTIONS)
        compiled(Bundle.open("tiny"))
        with pytest.raises(Incompatible, match=r"branches=3(?s:.*)branches=2"):
            runtime.generate(PLAIN_PROMPT, **OPTIONS)  # the base model alone: two rows


def test_several_subjects_and_pictures_share_a_call(nvidia, plain, drawn_photos):
    """One subject is of the GPU, the other of the host; keys and values are repeated for the pictures."""
    compiled(Bundle.open("tiny"), images=4, several=True)
    with Runtime.open("tiny", "tensorrt") as runtime:
        there, here = (
            one.personalize(drawn_photos[k : k + 1], "mug") for k, one in enumerate((runtime, plain))
        )
        asked = [SUBJECT_PROMPT] * 2, [there, here]
        found, expected = (one.generate(*asked, n=2, batch_size=2, **OPTIONS) for one in (runtime, plain))
    for ours, theirs in zip(found, expected, strict=True):
        assert same(ours, theirs)
