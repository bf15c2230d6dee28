"""Code is run from this user's own folder alone, and only where nobody else can have written it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hyperrt.errors import IntegrityError, NotFound
from hyperrt.plans.cache import PlanCache
from tests.hyperrt.some_plans import KEY, publish, refused

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
PLACES = {
    "the cache": "",
    "the entry": KEY.id,
    "the record": f"{KEY.id}/plan.json",
    "the plan": f"{KEY.id}/plan",
}
places = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


@pytest.fixture
def cache(tmp_path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


@pytest.fixture
def plan(cache):
    return publish(cache)


def test_the_users_own_cache_is_in_their_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERRT_HOME", str(tmp_path / "mine"))
    assert PlanCache().folder == tmp_path / "mine" / "plans"
    monkeypatch.delenv("HYPERRT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert PlanCache().folder == tmp_path / "hyperrt" / "plans"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("HYPERRT_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(NotFound, match=r"\n.*\n.*HYPERRT_HOME"):
        PlanCache()


@posix
@places
@pytest.mark.parametrize("bits", [0o020, 0o002, 0o022])
def test_what_others_may_write_is_refused(cache, plan, place, bits):
    path = cache.folder / place
    path.chmod(stat.S_IMODE(path.stat().st_mode) | bits)
    refused(cache, "not private to you\n.*others can write to it: its mode is")
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)
    assert cache.load(KEY) == plan


@posix
@places
def test_what_another_user_owns_is_refused(cache, plan, place, monkeypatch):
    inode, real = (cache.folder / place).stat().st_ino, os.fstat

    def fstat(descriptor):
        found = real(descriptor)
        foreign = [*found[:4], found.st_uid + 1, *found[5:]]
        return os.stat_result(foreign) if found.st_ino == inode else found

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fstat)
        refused(cache, "not private to you\n.*it belongs to user")
    assert cache.load(KEY) == plan


@posix
@places
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "the other kind"])
def test_what_is_no_plain_file_or_folder_of_its_place_is_refused(cache, plan, place, kind, tmp_path):
    path, elsewhere = cache.folder / place, tmp_path / "elsewhere"
    was_folder = path.is_dir()
    path.rename(elsewhere)
    if kind.endswith("link"):
        path.symlink_to("nowhere" if kind == "dangling link" else elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    elif was_folder:
        path.write_text("")
    else:
        path.mkdir()
    refused(cache, r"is a link\n.*links are not followed|cannot be opened|not a plain file")


@posix
def test_a_cache_that_others_may_write_gets_no_plan_and_the_work_is_not_begun(cache, plan):
    cache.folder.chmod(0o777)
    with pytest.raises(IntegrityError, match=r"others can write(.*\n)+.*chmod go-w"):
        cache.publish(KEY, lambda path: pytest.fail("it began"), bundle="tiny", graph_name="denoiser")
    for reading in (cache.list, cache.prune, lambda: cache.remove(None), lambda: list(cache.verify())):
        with pytest.raises(IntegrityError, match=r"others can write(.*\n)+.*chmod go-w"):
            reading()
    assert cache.find(KEY) is None


def test_a_shortage_of_descriptors_is_no_damage(cache, plan, monkeypatch):
    real = os.open

    def scarce(path, *arguments, **options):
        if str(path).endswith("plan.json"):
            raise OSError(24, "Too many open files")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", scarce)
    with pytest.raises(OSError, match="Too many open files"):
        cache.load(KEY)
