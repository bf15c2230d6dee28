"""Whatever stops a writer, and however many there are, a reader gets a whole plan of its key or none."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hyperrt.errors import NotFound, ResourceError
from hyperrt.plans.cache import Plan, PlanCache
from tests.hyperrt.some_plans import KEY, OTHER, content, publish

ROOT = Path(__file__).resolve().parents[3]
SIZE = 300_000
FAILING = ("open", "write", "mkdir", "chmod", "fsync", "rename", "replace")

START = """
import itertools, os, signal, sys, time
from pathlib import Path
from hyperrt.errors import NotFound
from hyperrt.plans.cache import PlanCache, PlanKey

folder, mark, seconds, *keys = sys.argv[1:]
cache = PlanCache(Path(folder))
keys = [PlanKey(graph, "tensorrt", "10.16.0.71", "sm89", (("h", 64), ("rows", 3))) for graph in keys]
def content(key, mark, size=300_000):
    name = f"{key.id}{mark}".encode()
    return (name * (size // len(name) + 1))[:size]
def publish(key, mark):
    def write(path):
        data = content(key, mark)
        with path.open("wb") as file:
            for start in range(0, len(data), 30_000):
                file.write(data[start : start + 30_000])
    return cache.publish(key, write, bundle="tiny", graph_name="denoiser")
print("ready", flush=True)
end = time.monotonic() + float(seconds)
"""
WRITE = """
for number in itertools.count():
    publish(keys[number % len(keys)], mark)
    if time.monotonic() > end:
        break
"""
READ = """
while time.monotonic() < end:
    for key in keys:
        plan = cache.load(key)
        assert plan.key == key and cache.find(key).key == key
        try:
            data = plan.path.read_bytes()
        except FileNotFoundError:  # replaced after it was checked
            continue
        assert data == content(key, chr(data[32]))
        print("read", flush=True)
"""
REMOVE = """
while time.monotonic() < end:
    cache.remove(None)
    cache.prune()
"""
# Dies at the given call, counted over all of those that change the disk.
DIE = """
left = int(mark)
def dying(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
for name in ("open", "mkdir", "chmod", "fsync", "rename", "unlink", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
publish(keys[0], "1")
"""


def start(
    code: str, folder: Path, mark: str = "1", seconds: float = 60, keys=(KEY,)
) -> subprocess.Popen[str]:
    """A process that works on the cache, and has begun."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [str(folder), mark, str(seconds), *(key.graph for key in keys)]
    command = [sys.executable, "-S", "-c", START + code, *arguments]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def whole(plan: Plan) -> str:
    """Who wrote the plan, which is of one writer from its beginning to its end."""
    data = plan.path.read_bytes()
    mark = chr(data[32])
    assert data == content(plan.key, SIZE, mark)
    return mark


def old_new_or_none(cache: PlanCache) -> str:
    try:
        return whole(cache.load(KEY))
    except NotFound:
        return "none"


def test_fifty_kills_at_random_leave_old_or_new_or_none_and_the_next_run_repairs_it(cache):
    moments, seen = random.Random(0), set()
    for _ in range(50):
        publish(cache, mark="0", size=SIZE)
        assert os.listdir(cache.folder) == [KEY.id]
        with start(WRITE, cache.folder) as writer:
            time.sleep(moments.uniform(0, 0.03))
            writer.send_signal(signal.SIGKILL)
        seen.add(old_new_or_none(cache))
    assert {"1"} <= seen <= {"0", "1", "none"}


def test_a_kill_at_any_call_that_changes_the_disk_leaves_old_or_new_or_none(cache):
    seen = []
    for call in itertools.count(1):
        publish(cache, mark="0", size=SIZE)
        assert os.listdir(cache.folder) == [KEY.id]
        with start(DIE, cache.folder, mark=str(call)) as writer:
            _, errors = writer.communicate()
        seen.append(old_new_or_none(cache))
        if writer.returncode == 0:
            break
        assert writer.returncode == -signal.SIGKILL, errors
    assert set(seen) == {"0", "1", "none"} and seen == sorted(seen, key=["0", "none", "1"].index)
    assert os.listdir(cache.folder) == [KEY.id]


def test_four_writers_beside_readers_tear_nothing_and_mix_up_no_plans(cache):
    keys = (KEY, OTHER)
    for key in keys:
        publish(cache, key, size=SIZE)
    seconds = 4
    writers = [start(WRITE, cache.folder, mark, seconds, keys) for mark in "1234"]
    readers = [start(READ, cache.folder, "0", seconds, keys) for _ in range(2)]
    reads = 0
    for process in (*writers, *readers):
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        reads += out.count("read")
    assert reads > 20
    assert {whole(cache.load(key)) for key in keys} <= set("1234")
    assert sorted(os.listdir(cache.folder)) == sorted(key.id for key in keys)


def test_a_reader_beside_one_who_removes_and_one_who_writes_gets_a_whole_plan_or_none(cache):
    others = [start(WRITE, cache.folder, "1", 2), start(REMOVE, cache.folder, "0", 2)]
    seen = set()
    while any(process.poll() is None for process in others):
        try:
            plan = cache.load(KEY)
            seen.add(whole(plan))
        except (NotFound, FileNotFoundError):
            seen.add("none")
    for process in others:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert "1" in seen <= {"1", "none"}


def write_in_pieces(path: Path) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        for piece in (b"new",) * 3:
            os.write(descriptor, piece)
    finally:
        os.close(descriptor)


def fail_at(call: int, number: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Let the disk refuse one of the calls that change it; returns the names of those that were made."""
    made: list[str] = []

    def failing(name, real):
        def maybe(*arguments, **options):
            takes_room = arguments[1] & os.O_CREAT if name == "open" else not os.path.isdir(arguments[0])
            if takes_room or name in ("chmod", "rename"):
                made.append(name)
                if len(made) == call:
                    raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return maybe

    for name in FAILING:
        patch.setattr(os, name, failing(name, getattr(os, name)))
    return made


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=["full", "broken", "over quota"]
)
@pytest.mark.parametrize("before", ["nothing", "a plan"])
def test_a_disk_that_fails_at_any_one_call_is_explained_and_leaves_old_or_new(tmp_path, before, number):
    for call in itertools.count(1):
        cache = PlanCache(tmp_path / str(call) / "plans")
        old = publish(cache) if before == "a plan" else None
        with pytest.MonkeyPatch.context() as patch:
            made = fail_at(call, number, patch)
            try:
                cache.publish(KEY, write_in_pieces, bundle="tiny", graph_name="denoiser")
                error = None
            except ResourceError as found:
                error = found
        if len(made) < call:
            break
        assert error and error.what and error.why and error.do, (call, made[call - 1 :])
        if made[: call - 1].count("rename") < 2:  # the old one away, and the new one in its place
            assert cache.find(KEY) == old, made
        else:
            assert cache.load(KEY).path.read_bytes() == b"newnewnew"
        assert (os.listdir(cache.folder) if cache.folder.exists() else []) in ([], [KEY.id]), made
        assert publish(cache) == cache.load(KEY)
    assert error is None and cache.load(KEY).bytes == 9
    assert {"open", "write", "mkdir", "chmod", "fsync", "rename"} == set(made)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_when_the_record_is_written_leaves_the_old_plan(cache, monkeypatch):
    old, real = publish(cache), os.open

    def full(path, flags, *arguments, **options):
        full_now = flags & os.O_CREAT and str(path).endswith("plan.json")
        return real(
            "/dev/full" if full_now else path, flags & ~os.O_CREAT & ~os.O_EXCL if full_now else flags
        )

    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="No space left"):
        patch.setattr(os, "open", full)
        cache.publish(KEY, write_in_pieces, bundle="tiny", graph_name="denoiser")
    assert cache.load(KEY) == old
    assert os.listdir(cache.folder) == [KEY.id]
