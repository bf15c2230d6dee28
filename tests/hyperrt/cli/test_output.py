"""Results on stdout, the rest on stderr; with `--json` one event a line."""

from __future__ import annotations

import logging

import pytest

from hyperrt.cli.output import Output
from hyperrt.errors import UsageError
from tests.hyperrt.command_line import events

pytestmark = pytest.mark.usefixtures("alone")


def output(json=False, stopped=False):
    return Output(json=json, stopped=lambda: stopped)


def test_results_go_to_stdout_and_everything_else_to_stderr(capsys):
    out = output()
    out.note("a note")
    out.event("check", status="ok")
    logging.getLogger("hyperrt").warning("a %s", "warning")
    out.error(UsageError("what", "why", "do"))
    out.result("the result", path="x")
    assert tuple(capsys.readouterr()) == (
        "the result\n",
        "a note\nwarning: a warning\nerror: what\n  why: why\n  do:  do\n",
    )


def test_with_json_everything_is_an_event_on_stdout(capsys):
    out = output(json=True)
    out.note("a note", photos=3)
    out.warning("careful")
    out.result("the result", path="x")
    out.error(UsageError("what", "why", "do"))
    printed, err = capsys.readouterr()
    assert err == ""
    assert events(printed) == [
        {"event": "note", "message": "a note", "photos": 3},
        {"event": "warning", "message": "careful"},
        {"event": "result", "schema": 1, "path": "x"},
        {
            "event": "error",
            "schema": 1,
            "code": 2,
            "type": "UsageError",
            "what": "what",
            "why": "why",
            "do": "do",
        },
    ]


def test_an_error_has_one_line_for_each_part_whatever_it_quotes(capsys):
    output().error(UsageError("what\n  do: rm -rf", "\x1b[31m", ""))
    assert capsys.readouterr().err == "error: what do: rm -rf\n  why: \\x1b[31m\n"


def test_a_command_in_an_error_keeps_its_spaces(capsys):
    output().error(UsageError("what", "", "run: rm 'two  spaces'"))
    assert "  do:  run: rm 'two  spaces'\n" in capsys.readouterr().err


def test_a_warning_is_said_once(capsys):
    output()
    for _ in range(3):
        logging.getLogger("hyperrt").warning("careful: %s", "x")
    assert capsys.readouterr().err == "warning: careful: x\n"


@pytest.mark.parametrize(("total", "lines"), [(1, 1), (3, 3), (10, 10), (1000, 10)])
def test_progress_is_at_most_ten_lines(capsys, total, lines):
    with output().progress("drawing", total) as advance_to:
        for done in range(1, total + 1):
            advance_to(done)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == lines
    assert err.splitlines()[-1] == f"drawing: 100 % ({total} of {total})"


def test_a_signal_that_was_lost_is_seen_at_the_next_step():
    with pytest.raises(KeyboardInterrupt), output(stopped=True).progress("drawing", 2) as advance_to:
        advance_to(1)


def test_other_libraries_do_not_write_on_stderr(capsys):
    output()
    logging.getLogger("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded")
    assert capsys.readouterr().err == ""
