from __future__ import annotations

import numpy as np

from hyperrt.bundle import memory
from hyperrt.runtime import Runtime

PROMPT = "a [V] robot on the beach"
DRAWING = {"text_encoder", "context", "denoiser", "vae_decoder"}


def test_the_engines_of_a_subject_wait_for_the_next_until_something_is_drawn(pretend, photos):
    with Runtime.open(pretend, "fake") as runtime:
        subject = runtime.personalize(photos)
        assert runtime.open_graphs == {"image_encoder", "weight_decoder"}
        runtime.generate(PROMPT, subject)
        assert runtime.open_graphs == DRAWING
        again = runtime.personalize(photos)
        assert runtime.open_graphs == DRAWING
    for name in ("lora_q", "lora_kv"):
        np.testing.assert_array_equal(again.lora[name], subject.lora[name])


def test_subjects_that_are_made_in_a_row_are_those_of_runtimes_of_their_own(pretend, photos):
    other = [np.full((40, 40, 3), 200, np.uint8)]
    with Runtime.open(pretend, "fake") as runtime:
        found = [runtime.personalize(one) for one in (photos, other, photos)]
    for one, subject in zip((photos, other, photos), found, strict=True):
        with Runtime.open(pretend, "fake") as alone:
            expected = alone.personalize(one).lora
        for name in ("lora_q", "lora_kv"):
            np.testing.assert_array_equal(subject.lora[name], expected[name])


def test_without_room_for_all_each_is_closed_before_the_next_is_opened(pretend, photos, monkeypatch):
    monkeypatch.setattr(memory, "fits", lambda needed: False)
    monkeypatch.setattr(memory, "check", lambda *given: None)
    with Runtime.open(pretend, "fake") as runtime:
        runtime.personalize(photos)
        assert not runtime.open_graphs
