"""Checks are printed one by one; the first failure gives the exit code."""

from __future__ import annotations

import pytest

from hyperrt.cli.checks import Check, guarded, report
from hyperrt.cli.output import Output
from hyperrt.errors import HyperRTError, NotFound

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def output():
    output = Output(json=False, stopped=lambda: False)
    yield output
    output.release()


def test_several_failures_are_counted_and_the_first_gives_the_code(output, capsys):
    checks = [Check("c", "warn", "hm"), Check("a", "fail", "oh", "do it", 4), Check("b", "fail", "oh", "", 8)]
    with pytest.raises(HyperRTError, match="2 checks failed") as caught:
        report(checks, output)
    assert (caught.value.code, caught.value.why, caught.value.do) == (4, "a: oh", "do it")
    assert capsys.readouterr().out == "WARN  c: hm\nFAIL  a: oh\n      do: do it\nFAIL  b: oh\n"


def test_warnings_are_no_failure(output):
    report([Check("c", "warn", "hm")], output)


def test_an_error_becomes_a_failure():
    def check():
        raise NotFound("no file", "gone", "look")

    assert guarded("file", check) == Check("file", "fail", "no file; gone", "look", NotFound.code)
