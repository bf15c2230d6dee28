"""How the command's process ends: signals, readers that go away, closed and full streams, terminals."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from hyperrt.sampling import recipe
from tests.hyperrt.command_line import PROMPT, ROOT, is_three_lines, start

pytestmark = pytest.mark.usefixtures("alone")
SIGNALS = [signal.SIGINT, signal.SIGTERM]
MOMENTS = random.Random(0)


def fake(pretend, *arguments):
    where = ["--bundle", pretend, "--backend", "fake", "--seed", "0"]
    prompt = [] if "-p" in arguments else ["-p", "a robot"]
    return ["generate", *where, *prompt, *arguments]


@pytest.mark.parametrize("number", SIGNALS, ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("moment", [0.0, *(round(MOMENTS.uniform(0, 0.6), 3) for _ in range(4)), "drawing"])
def test_a_signal_before_the_picture_is_drawn_ends_with_its_code_and_no_file(pretend, photos, number, moment):
    arguments = fake(pretend, "-i", photos, "-p", PROMPT, "--steps", 1000)
    process = start(arguments, stdout=subprocess.PIPE)
    if moment == "drawing":
        while "drawing" not in process.stderr.readline():
            pass
    else:
        time.sleep(moment)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    assert "Traceback" not in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("moment", [round(MOMENTS.uniform(0, 1.0), 3) for _ in range(8)])
def test_an_interrupt_while_pictures_are_written_leaves_only_whole_ones(pretend, moment):
    process = start(fake(pretend, "-n", 1000, "--steps", 1), "0", stdout=subprocess.PIPE)
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    for path in Path().glob("*.png"):
        with Image.open(path) as image:
            image.load()  # raises where the file is cut short
            assert "hyperrt" in image.info


def test_a_second_interrupt_does_not_wait(pretend):
    process = start(fake(pretend), "100", stdout=subprocess.PIPE)
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    process.communicate()


def test_an_interrupt_with_json_is_the_last_event(pretend):
    process = start(fake(pretend, "--steps", 1000, "--json"), stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert '"error"' in out.splitlines()[-1] and "interrupted" in out.splitlines()[-1]
    assert err == ""


def test_a_reader_that_goes_away_is_no_error(pretend):
    process = start(["info", pretend], stdout=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_is_an_error_of_resources(pretend):
    with open("/dev/full", "w") as full:
        process = start(["info", pretend], stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 6 and is_three_lines(err)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes streams")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_stop_the_drawing(pretend, closed):
    code = "import sys; from tests.hyperrt import fake_bundle; from hyperrt.cli import main as cli; "
    code += "fake_bundle.register(); sys.exit(cli.main())"
    command = [sys.executable, "-c", code, *map(str, fake(pretend, "-o", "a.png"))]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    result = subprocess.run(shell, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert result.returncode == 0, result.stderr
    with Image.open("a.png") as image:
        image.load()


def test_a_terminal_without_colours_and_a_locale_without_letters_are_fine(pretend, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("TERM", "dumb")
    process = start(fake(pretend, "-p", "a robot é", "-o", "ü"), "0", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == "\\xfc/a-robot-\\xe9-0.png\n"
    assert "\x1b" not in err


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns", ["20", "80"])
def test_a_terminal_gets_a_bar_and_stdout_only_the_path(pretend, monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    ours, terminal = os.openpty()
    process = start(fake(pretend, "--steps", 6), "0.1", stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how Linux tells that the other side is closed
        pass
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    assert out == "a-robot-0.png\n"
    assert b"\x1b[" in shown and b"drawing" in shown and b"%" not in shown


def test_commands_that_run_at_once_do_not_overwrite_each_other(pretend):
    running = [start(fake(pretend, "-n", 5), stdout=subprocess.PIPE) for _ in range(3)]
    outs = [process.communicate(timeout=60)[0] for process in running]
    names = sorted(name for out in outs for name in out.splitlines())
    assert len(set(names)) == 15 and names == sorted(path.name for path in Path().glob("*.png"))
    assert [recipe.read(name)["seed"] for name in names] == [seed for seed in range(5) for _ in range(3)]


@pytest.mark.parametrize("home", [None, "/nowhere/at/all", "/proc"])
def test_a_home_that_is_not_there_is_not_needed(pretend, monkeypatch, home):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.delenv("HOME")
    if home:
        monkeypatch.setenv("HOME", home)
    process = start(fake(pretend), "0", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "a-robot-0.png\n"), err


def test_almost_nothing_is_imported_before_the_signal_handlers_are_installed():
    """Ctrl-C prints a traceback during Python's own start and during these imports."""
    code = "import os, signal, sys; before = set(sys.modules); import hyperrt.cli.main; "
    code += "print(*sorted(set(sys.modules) - before))"
    command = [sys.executable, "-S", "-c", code]  # without `site`, which may load anything
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.split() == [
        "__future__", "hyperrt", "hyperrt.cli", "hyperrt.cli.main", "hyperrt.version",
    ]  # fmt: skip


def test_an_interrupt_inside_exec_leaves_the_exit_code_alone():
    """CPython kills itself with SIGINT after a plain KeyboardInterrupt has left an `exec`, caught or not."""
    code = "import os, signal, sys; from hyperrt.cli import main as cli\n"
    code += "def run(arguments): exec('import os, signal; os.kill(os.getpid(), signal.SIGINT)')\n"
    code += "cli.run = run; sys.exit(cli.main())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 130


def test_help_loads_neither_numpy_nor_anything_slow():
    slow = {"numpy", "PIL", "rich", "tokenizers", "safetensors", "onnxruntime", "asyncio", "hyperrt.runtime"}
    code = "import sys; from hyperrt.cli import main as cli; cli.run(['--help']); "
    code += f"print(*sorted({slow!r} & sys.modules.keys()), file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "generate" in result.stdout and result.stderr == "\n"


def test_generate_loads_no_network_no_huggingface_and_no_bar_where_there_is_no_terminal(pretend):
    unneeded = {"huggingface_hub", "httpx", "requests", "ssl", "asyncio", "rich", "unittest", "onnxruntime"}
    code = "import sys; from tests.hyperrt import fake_bundle; from hyperrt.cli import main as cli; "
    code += f"fake_bundle.register(); cli.main(); print(*sorted({unneeded!r} & sys.modules.keys()))"
    command = [sys.executable, "-c", code, *map(str, fake(pretend))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert out == "a-robot-0.png\n\n"


def test_a_current_folder_that_was_removed_is_said(tmp_path):
    (tmp_path / "gone").mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); from hyperrt.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "generate", "-p", "a mug", "--backend", "onnxruntime"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path / "gone", env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "the current folder does not exist any more" in result.stderr
