"""A change of subject between pictures, and a first step that was prepared."""

from __future__ import annotations

import numpy as np

from tests.hyperrt import fake_bundle

PROMPT = "a [V] robot on the beach"


def test_another_subject_runs_no_graph_but_the_denoiser(runtime, subject, other):
    first = runtime.generate(PROMPT, subject, steps=1)
    fake_bundle.calls.clear()
    second = runtime.generate(PROMPT, other, steps=1)
    again = runtime.generate(PROMPT, subject, steps=1)
    assert set(fake_bundle.calls) == {"denoiser", "vae_decoder"}
    assert not np.array_equal(first.latents, second.latents)
    np.testing.assert_array_equal(first.latents, again.latents)


def test_after_prepare_the_first_step_is_a_call_of_the_denoiser(runtime, subject):
    runtime.prepare(runtime.request(PROMPT, subject, steps=2))
    fake_bundle.calls.clear()
    uploads = len(runtime._graphs.engine("denoiser").uploads)
    next(runtime.sample(runtime.request(PROMPT, subject, steps=2)))
    assert fake_bundle.calls == ["denoiser"]
    assert len(runtime._graphs.engine("denoiser").uploads) == uploads
