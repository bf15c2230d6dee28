"""A plan comes out of the cache as it went in, for the very key that is asked for."""

from __future__ import annotations

import os
import stat
import time

import pytest

from hyperrt import files
from hyperrt.bundle.manifest import Graph
from hyperrt.errors import Incompatible, IntegrityError, NotFound, UsageError
from hyperrt.plans.cache import PlanCache, graph_hash
from hyperrt.plans.messages import compile_command, rebuild_command
from tests.hyperrt.some_plans import COMPILE, KEY, OTHER, content, flip, key, publish, three_lines


def test_the_hash_of_a_graph_covers_its_file_and_its_data():
    graph, data = "1" * 64, "2" * 64
    hashes = {
        graph_hash(Graph("a.onnx", graph, (), ())),
        graph_hash(Graph("a.onnx", graph, (), (), "a.data", data)),
        graph_hash(Graph("a.onnx", data, (), (), "a.data", graph)),
    }
    assert len(hashes) == 3
    assert graph_hash(Graph("b.onnx", graph, (), ())) in hashes


def test_the_command_that_rebuilds_can_be_pasted_into_a_shell():
    """TensorRT takes no target: it compiles for the GPU of its machine alone."""
    wanted = key(target="sm90 NVIDIA H200")
    assert compile_command(wanted, "my bundle") == "hyperrt compile 'my bundle' --backend tensorrt"
    rtx = key(backend="tensorrt-rtx")
    assert compile_command(rtx, "tiny") == "hyperrt compile tiny --backend tensorrt-rtx --target sm89"


def test_without_its_bundle_words_stand_where_a_command_would_not_run():
    assert compile_command(key()) == "compile its bundle with --backend tensorrt"
    assert rebuild_command(key()) == f"hyperrt plans rm {key().id[:12]}"


def test_the_command_that_rebuilds_has_the_sizes_of_the_call():
    sizes = {"branches": 2, "images": 4, "rows": 8, "subjects": 8}
    command = compile_command(key(sizes=tuple(sizes.items())), "tiny")
    assert command == "hyperrt compile tiny --backend tensorrt --pictures 4 --branches 2 --several-subjects"
    assert compile_command(key(sizes=(("branches", 3), ("images", 1))), "tiny") == COMPILE


# In and out


def test_what_is_published_is_found_and_loaded(cache, plan):
    assert plan.path == cache.folder / KEY.id / "plan"
    assert plan.path.read_bytes() == content(KEY)
    assert cache.find(KEY) == cache.load(KEY) == plan
    assert (plan.bundle, plan.graph_name, plan.weights) == ("tiny", "denoiser", ("unet.a", "unet.b"))
    assert cache.list() == [plan]
    assert list(cache.verify()) == [(plan, None)]


def test_an_empty_cache_has_no_plan_and_makes_no_folder(cache):
    assert cache.find(KEY) is None and cache.list() == [] and list(cache.verify()) == []
    assert cache.remove(None) == [] and cache.prune() == []
    assert not cache.folder.exists()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
@pytest.mark.parametrize("umask", [0, 0o077, 0o022])
def test_nobody_else_can_read_or_write_a_plan_whatever_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        plan = publish(PlanCache(tmp_path / "home" / "plans"))
    finally:
        os.umask(old)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (plan.folder.parent, plan.folder, plan.path)]
    assert modes == [0o700, 0o700, 0o600]
    assert stat.S_IMODE((plan.folder / "plan.json").stat().st_mode) == 0o600
    assert PlanCache(tmp_path / "home" / "plans").load(KEY) == plan


def test_a_second_plan_of_a_key_replaces_the_first_whole(cache, plan):
    (plan.folder / "stray").write_text("of the first")
    second = publish(cache, mark="1")
    assert sorted(os.listdir(plan.folder)) == ["plan", "plan.json"]
    assert os.listdir(cache.folder) == [KEY.id]
    assert cache.load(KEY) == second != plan


def test_a_plan_that_is_of_no_use_does_not_keep_its_place(cache, plan):
    for damage in ("no plan.json", "a file", "a link", "an empty folder"):
        files.remove(plan.folder)
        if damage == "a file":
            plan.folder.write_text("")
        elif damage == "a link":
            plan.folder.symlink_to("nowhere")
        else:
            plan.folder.mkdir()
            if damage == "no plan.json":
                plan.path.write_text("")
        assert publish(cache) == cache.load(KEY)
        assert os.listdir(cache.folder) == [KEY.id]


@pytest.mark.parametrize("written", ["nothing", "an empty file", "a folder", "a link"])
def test_a_backend_that_leaves_no_plan_is_an_error_and_the_old_one_stays(cache, plan, written, tmp_path):
    (tmp_path / "elsewhere").write_text("elsewhere")

    def write(path):
        if written == "an empty file":
            path.touch()
        elif written == "a folder":
            path.mkdir()
        elif written == "a link":
            path.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(IntegrityError, match="the compiler wrote no plan"):
        cache.publish(KEY, write, bundle="tiny", graph_name="denoiser")
    assert cache.load(KEY) == plan
    assert os.listdir(cache.folder) == [KEY.id]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), NotFound("no GPU")])
def test_a_build_that_stops_leaves_the_old_plan_and_nothing_else(cache, plan, error):
    def write(path):
        path.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        cache.publish(KEY, write, bundle="tiny", graph_name="denoiser")
    assert cache.load(KEY) == plan
    assert os.listdir(cache.folder) == [KEY.id]


def test_names_that_could_not_be_read_back_are_refused_before_the_work(cache):
    with pytest.raises(ValueError, match="control characters"):
        publish(cache, bundle="two\nlines")
    assert not cache.folder.exists()


def test_a_home_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be made\n.*\n.*HYPERRT_HOME"):
        publish(PlanCache(tmp_path / "file" / "plans"))
    assert PlanCache(tmp_path / "file" / "plans").find(KEY) is None


def test_the_last_use_is_that_of_the_last_load(cache, plan):
    assert plan.last_use is None and cache.find(KEY).last_use is None
    before = time.time()
    cache.load(KEY)
    assert plan.last_use == pytest.approx(before, abs=5)
    os.utime(plan.folder / "used", (1, 1))
    assert cache.find(KEY).last_use == 1
    cache.load(KEY)
    assert plan.last_use == pytest.approx(before, abs=60)
    assert publish(cache, mark="1").last_use is None


def test_a_cache_that_cannot_be_written_is_read(cache, plan, monkeypatch):
    def refuse(self, *_, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    assert cache.load(KEY) == plan and plan.last_use is None


# A plan that is not the one


def test_where_there_is_no_plan_the_command_that_builds_it_is_said(cache):
    with pytest.raises(NotFound) as caught:
        cache.load(KEY, bundle="tiny", graph_name="denoiser")
    assert three_lines(caught.value) and caught.value.code == 4
    assert caught.value.do == COMPILE
    assert caught.value.what == "there is no plan of denoiser of tiny by TensorRT 10.16.0.71 for sm89"


@pytest.mark.parametrize(
    ("changes", "there", "here"),
    [
        ({"version": "10.9.0.34"}, "TensorRT 10.9.0.34 for sm89", "TensorRT 10.16.0.71 for sm89"),
        ({"target": "sm90 NVIDIA H200"}, "71 for sm90 NVIDIA H200", "71 for sm89"),
        ({"backend": "tensorrt-rtx"}, "TensorRT-RTX 10", "TensorRT 10"),
        ({"sizes": (("h", 64), ("rows", 2))}, "sm89, h=64 rows=2", "sm89, h=64 rows=3"),
        ({"sizes": ()}, "sm89, any size", "sm89, h=64 rows=3"),
        ({"flags": ("refit",)}, "sm89, refit", "sm89, no flags"),
        ({"graph": "cd" * 32}, "sm89, graph cdcdcdcdcdcd", "sm89, graph abababababab"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_plan_of_another_key_is_refused_and_both_are_named(cache, changes, there, here):
    publish(cache, key(**changes))
    with pytest.raises(Incompatible) as caught:
        cache.load(KEY, bundle="tiny", graph_name="denoiser")
    assert three_lines(caught.value) and caught.value.code == 5
    left, right = caught.value.why.split("; this is ")
    assert there in left and here in right
    assert caught.value.do == COMPILE


def test_a_plan_of_another_bundle_is_refused_and_both_bundles_are_named(cache):
    publish(cache, OTHER, bundle="robots")
    with pytest.raises(Incompatible, match=r"denoiser of robots was built .*; this is denoiser of tiny"):
        cache.load(KEY, bundle="tiny", graph_name="denoiser")


def test_another_bundle_is_noticed_without_its_name(cache):
    publish(cache, OTHER, bundle="robots")
    with pytest.raises(Incompatible, match=r"of robots .*; this is this graph, .*\n.*compile its bundle"):
        cache.load(KEY)


def test_plans_of_other_graphs_are_not_near(cache):
    publish(cache, OTHER, graph_name="context")
    assert cache.nearest(KEY, bundle="tiny", graph_name="denoiser") is None
    with pytest.raises(NotFound):
        cache.load(KEY, bundle="tiny", graph_name="denoiser")


def test_the_nearest_plan_is_that_which_differs_least(cache):
    publish(cache, key(version="9", target="sm75", graph="ef" * 32), bundle="robots")
    nearer_and_nearer = [{"target": "sm75", "graph": "cd" * 32}, {"target": "sm75"}, {}]
    for changes in nearer_and_nearer:
        near = publish(cache, key(version="9", **changes))
        assert cache.nearest(KEY, bundle="tiny", graph_name="denoiser") == near


# Removing


def test_a_plan_is_removed_by_the_beginning_of_its_id(cache, plan):
    other = publish(cache, OTHER)
    assert cache.remove([KEY.id[:6].upper(), KEY.id]) == [plan]
    assert cache.list() == [other]
    assert os.listdir(cache.folder) == [OTHER.id]


@pytest.mark.parametrize(
    ("beginning", "error", "words"),
    [
        ("0" * 6, UsageError, "2 plans have ids .*\n.*it could be .*\n.*hyperrt plans list"),
        ("f", NotFound, "no plan has the id 'f'"),
        ("", NotFound, "no plan has the id ''"),
        ("../..", NotFound, "no plan has the id"),
        ("*", NotFound, "no plan has the id"),
    ],
)
def test_an_id_that_is_not_one_plans_removes_nothing(cache, plan, beginning, error, words):
    for end in "12":
        (cache.folder / ("0" * 31 + end)).mkdir()
    with pytest.raises(error, match=words):
        cache.remove([KEY.id, beginning])
    assert len(os.listdir(cache.folder)) == 3


def test_everything_that_is_an_entry_can_be_removed_whatever_its_state(cache, plan, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (cache.folder / ("0" * 31 + "1")).symlink_to(tmp_path / "precious")
    (cache.folder / ("0" * 31 + "2")).write_text("")
    (cache.folder / ("0" * 31 + "3")).mkdir(mode=0o777)
    (cache.folder / "letters").write_text("precious")
    assert len(cache.remove(None)) == 4
    assert os.listdir(cache.folder) == ["letters"]
    assert (tmp_path / "precious" / "file").exists()


def test_prune_keeps_what_the_newest_version_of_each_backend_built(cache):
    old = publish(cache, key(version="10.9.0.34"))
    new = publish(cache, key(version="10.16.0.71"))
    also_new = publish(cache, key(version="10.16.0.71", target="sm75"))
    of_another = publish(cache, key(backend="tensorrt-rtx", version="1.7.1.116"))
    gone = cache.prune(dry_run=True)
    assert gone == [(old, "built by TensorRT 10.9.0.34; the newest here is of TensorRT 10.16.0.71")]
    assert len(cache.list()) == 4
    assert cache.prune() == gone
    assert {plan.key for plan in cache.list()} == {new.key, also_new.key, of_another.key}


def test_prune_removes_damage_and_what_killed_runs_left_and_nothing_else(cache, plan):
    other, sound = publish(cache, OTHER), publish(cache, key(target="sm75"))
    flip(other.path, 0)
    (plan.folder / "plan.json").unlink()
    left = cache.folder / f"{files.PREFIX}1{files.SUFFIX}"
    left.mkdir()
    (cache.folder / "letters").write_text("precious")
    before = sorted(os.listdir(cache.folder))
    reasons = dict(cache.prune(dry_run=True))
    assert sorted(os.listdir(cache.folder)) == before
    assert dict(cache.prune()) == reasons
    assert set(reasons) == {other, plan.folder, left}
    assert "damaged" in reasons[other] and "killed" in reasons[left] and "not whole" in reasons[plan.folder]
    assert sorted(os.listdir(cache.folder)) == sorted([sound.key.id, "letters"])


def test_prune_takes_plans_of_a_certain_age_and_none_of_the_future(cache, monkeypatch):
    now = 1_800_000_000.0
    for days, wanted in ((100, KEY), (10, OTHER), (-10, key(target="sm75"))):
        monkeypatch.setattr("time.time", lambda days=days: now - days * 86400)
        publish(cache, wanted)
    monkeypatch.setattr("time.time", lambda: now)
    assert cache.prune() == []
    assert [(plan.key, why) for plan, why in cache.prune(older_than=90)] == [(KEY, "built 100 days ago")]
    assert [plan.key for plan, _ in cache.prune(older_than=0)] == [OTHER]


def test_what_another_run_removes_meanwhile_is_no_error(cache, plan, monkeypatch):
    real = files.remove

    def twice(path):
        real(path)
        real(path)

    monkeypatch.setattr(files, "remove", twice)
    assert cache.remove([KEY.id]) == [plan]
    assert cache.prune() == []


def test_a_plan_that_came_inside_a_bundle_is_not_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERRT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    plan = publish(PlanCache(tmp_path / "bundle" / "plans"))
    assert plan.path.is_file() and PlanCache().find(KEY) is None
    publish(PlanCache())
    assert PlanCache().find(KEY).path.is_relative_to(tmp_path / "home")
