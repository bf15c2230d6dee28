"""A warning is logged once for a request, however many pictures it has."""

from __future__ import annotations

import numpy as np
import pytest

from hyperrt.runtime import Runtime
from tests.hyperrt import fake_bundle

PROMPT = "a [V] robot on the beach"


@pytest.fixture
def runtime(pretend):
    with Runtime.open(pretend, "fake") as runtime:
        yield runtime


def test_a_placeholder_without_a_subject_is_logged_once(runtime, caplog):
    result = runtime.generate(PROMPT, n=3)
    assert [message for message in caplog.messages if "there is no subject" in message] == caplog.messages
    assert len(caplog.messages) == 1
    np.testing.assert_array_equal(result.latents, runtime.generate("a robot on the beach", n=3).latents)


def test_what_is_dropped_of_a_prompt_that_does_not_fit_is_logged_once(runtime, caplog):
    runtime.generate("a red robot on the beach in snow , blurry", n=3)
    assert caplog.messages == ["prompt cut to 8 tokens; dropped: 'in snow , blurry'"]


def test_a_warning_about_several_pairs_is_logged_once(runtime, caplog):
    runtime.generate([PROMPT, "(cat:2)", PROMPT], [None, None, None], n=2)
    assert len(caplog.messages) == len(set(caplog.messages)) == 2


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_command_prints_a_warning_once(pretend, tmp_path, monkeypatch, capfd, low_memory):
    from hyperrt.cli.main import run

    monkeypatch.chdir(tmp_path)
    fake_bundle.register()
    flags = ["--low-memory"] if low_memory else []
    command = ["generate", "-p", PROMPT, "-n", "3", "--bundle", str(pretend), "--backend", "fake"]
    assert run([*command, *flags]) == 0
    assert capfd.readouterr().err.count("there is no subject") == 1
