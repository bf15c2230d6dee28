"""The whole line on the TensorRT backend, ONNX Runtime computing in place of a GPU's plans.

What is tested is everything around the arithmetic: plans found by their keys, sizes, the loop on the device,
subjects that come and go.
"""

from __future__ import annotations

import numpy as np
import pytest

from engines.dlpack import DeviceArray
from hyperrt import Runtime, compiling
from hyperrt.bundle import Bundle
from hyperrt.errors import Incompatible, NotFound
from tests.engines import fake_nvidia

pytest.importorskip("onnxruntime")
OPTIONS = {"seed": 3, "steps": 4}
SUBJECT_PROMPT, PLAIN_PROMPT = "a [V] mug on a beach", "a mug on a beach"


@pytest.fixture
def nvidia(monkeypatch, tmp_path):
    """A machine with a GPU of sm89, and a cache of its own."""
    return fake_nvidia.machine(monkeypatch, tmp_path / "home")


def compiled(bundle, images=1, branches=3, **options):
    sizes = compiling.sizes_of(bundle, images, branches, **options)
    return list(compiling.compile_bundle(bundle, "tensorrt", ["current"], sizes))


def subjects(runtime, drawn_photos):
    return [runtime.personalize([photo], "mug") for photo in drawn_photos[:2]]


@pytest.fixture
def runtime(nvidia):
    for branches in (3, 2):
        compiled(Bundle.open("tiny"), branches=branches)
    with Runtime.open("tiny", "tensorrt") as opened:
        yield opened


def test_pictures_are_those_of_the_cpu(runtime, drawn_photos):
    with Runtime.open("tiny", "onnxruntime", threads=1) as plain:
        expected = plain.generate(SUBJECT_PROMPT, plain.personalize(drawn_photos, "mug"), **OPTIONS)
    found = runtime.generate(SUBJECT_PROMPT, runtime.personalize(drawn_photos, "mug"), **OPTIONS)
    np.testing.assert_allclose(found.latents, expected.latents, rtol=1e-4, atol=1e-5)
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1


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
    runtime.prepare(SUBJECT_PROMPT, subject, **OPTIONS)
    waits = cuda.waits
    steps = [step for step in runtime.steps(SUBJECT_PROMPT, subject, **OPTIONS) if step.index < 3]
    assert all(isinstance(step.latents, DeviceArray) for step in steps)
    looked_at = np.asarray(steps[0].denoised)  # a preview, long after
    assert np.isfinite(looked_at).all()
    loop = runtime.steps(SUBJECT_PROMPT, subject, **OPTIONS)
    waits = cuda.waits
    for _ in range(3):
        next(loop)
    assert cuda.waits == waits


def test_a_call_that_no_plan_was_compiled_for_says_which_there_is(nvidia, drawn_photos):
    with Runtime.open("tiny", "tensorrt") as runtime:
        with pytest.raises(NotFound, match="hyperrt compile tiny --backend tensorrt"):
            runtime.generate(PLAIN_PROMPT, **OPTIONS)
        compiled(Bundle.open("tiny"))
        with pytest.raises(Incompatible, match=r"branches=3(?s:.*)branches=2"):
            runtime.generate(PLAIN_PROMPT, **OPTIONS)  # the base model alone: two rows


def test_several_subjects_share_a_call(nvidia, drawn_photos):
    bundle = Bundle.open("tiny")
    compiled(bundle, images=2, several=True)
    compiled(bundle)
    with Runtime.open("tiny", "tensorrt") as runtime:
        a, b = subjects(runtime, drawn_photos)
        together = runtime.generate([SUBJECT_PROMPT] * 2, [a, b], **OPTIONS)
        alone = [runtime.generate(SUBJECT_PROMPT, subject, **OPTIONS) for subject in (a, b)]
    for one, own in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.latents, own.latents, rtol=1e-4, atol=1e-5)
