"""What a command does to the machine, seen from outside: files written, names looked up, sockets.

A patched Python sees nothing of what native code does, so the process and its children run under strace.
Where strace is not installed, only the files are seen that they leave in the home folder and among temporary
files; both folders are new and empty.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STRACE = shutil.which("strace")
WRITING = (
    "open", "openat", "creat", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "link", "linkat",
    "symlink", "symlinkat", "truncate",
)  # fmt: skip
CALL = re.compile(
    r"^\d+ +(?P<name>\w+)\((?P<arguments>.*?)(?:\) += (?P<result>-?\d+).*| <unfinished \.\.\.>)$"
)
PATHS = re.compile(r'(?:(?P<folder>AT_FDCWD|\d+)<(?P<at>[^>]*)>, )?"(?P<path>[^"]*)"')
FOR_WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")
RESOLVER = {"/etc/resolv.conf", "/etc/hosts", "/etc/gai.conf"}
NO_FILES = ("/dev/", "/proc/", "/sys/")
SENDING = {"connect", "sendto", "sendmsg", "sendmmsg"}


@dataclass
class Seen:
    """What a command did.

    Attributes:
        code: its exit code.
        output: stdout and stderr.
        written: files and folders that it made, wrote or renamed outside what it may write to.
        looked_up: what it did to turn a host's name into an address.
        sockets: those for a network that it opened.
        sent: calls by which it connected to a network, or sent something to one.
    """

    code: int
    output: str
    written: set[str] = field(default_factory=set)
    looked_up: set[str] = field(default_factory=set)
    sockets: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)


def watch(command: list[str], folder: Path, allowed: tuple[Path, ...] = ()) -> Seen:
    """Run Python with these arguments in FOLDER/work, with a new home and a new folder for temporary files.

    It may write to FOLDER/work, to `allowed`, to HyperRT's own folder at home (~/.cache/hyperrt), and to
    temporary files that it removes.
    """
    home, work, temporary = (folder / name for name in ("home", "work", "tmp"))
    for path in (home, work, temporary):
        path.mkdir(exist_ok=True)
    env = {name: text for name, text in os.environ.items() if not name.startswith(("XDG_", "HYPERRT", "HF_"))}
    for name in ("CI", "ORT_DISABLE_TELEMETRY"):  # with which vendors may report less than they do for users
        env.pop(name, None)
    env |= {"HOME": str(home), "TMPDIR": str(temporary)}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    trace, calls = folder / "trace", ",".join(("%network", *WRITING))
    options = ["-f", "-q", "-y", "-s", "300", "-e", f"trace={calls}", "-o", str(trace)]
    tracer = [STRACE, *options] if STRACE else []
    result = subprocess.run(
        [*tracer, sys.executable, *command], cwd=work, env=env, capture_output=True, text=True, check=False
    )
    seen = Seen(result.returncode, result.stdout + result.stderr)
    own = (work, home / ".cache" / "hyperrt", *allowed)
    if STRACE:
        _read(trace.read_text(errors="replace").splitlines(), seen, (*own, temporary), work)
    left = [path for place in (home, temporary) for path in place.rglob("*")]
    seen.written |= {str(path) for path in left if not _within(path, own) and not _above(path, own)}
    return seen


def _read(lines: list[str], seen: Seen, own: tuple[Path, ...], work: Path) -> None:
    """Add to `seen` what the lines of a trace say; `work`: the folder that paths without one are in."""
    for line in lines:
        call = CALL.match(line)
        if call is None or (call["result"] or "0").startswith("-"):
            continue
        name, arguments = call["name"], call["arguments"]
        if name == "socket" and arguments.startswith(("AF_INET", "AF_PACKET")):
            seen.sockets.append(line)
        elif name in SENDING and "AF_INET" in arguments:
            seen.sent.append(line)
        found = [work / (path["at"] or "") / path["path"] for path in PATHS.finditer(arguments)]
        paths = [Path(os.path.normpath(path)) for path in found]
        if name.startswith("open") and not FOR_WRITING.search(arguments):
            seen.looked_up |= {str(path) for path in paths if str(path) in RESOLVER}
        elif name in WRITING:
            seen.written |= {str(path) for path in paths if _is_elsewhere(path, own)}


def _is_elsewhere(path: Path, own: tuple[Path, ...]) -> bool:
    return not str(path).startswith(NO_FILES) and not _within(path, own) and not _above(path, own)


def _within(path: Path, folders: tuple[Path, ...]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _above(path: Path, folders: tuple[Path, ...]) -> bool:
    """Whether it is a folder on the way to one of them: ~/.cache."""
    return any(folder.is_relative_to(path) for folder in folders)
