"""`hyperrt plans`: what is printed where, with which exit code, and what is left in the cache."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hyperrt import files
from hyperrt.cli import main
from hyperrt.plans.cache import PlanCache
from tests.hyperrt.command_line import ROOT, events, is_three_lines
from tests.hyperrt.some_plans import COMPILE, KEY, OTHER, flip, key, publish


@pytest.fixture
def cache(tmp_path, alone, monkeypatch) -> PlanCache:
    monkeypatch.setenv("HYPERRT_HOME", str(tmp_path / "home"))
    return PlanCache()


@pytest.fixture
def plans(cache):
    """Two plans of one backend, and one of another."""
    return [
        publish(cache),
        publish(cache, OTHER, bundle="robots"),
        publish(cache, key(backend="tensorrt-rtx")),
    ]


@pytest.fixture
def run(cache, capsys):
    """Run `hyperrt plans ...`: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main.run(["plans", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def is_error(found, code: int, *words: str) -> bool:
    """Whether a run ended in an error of three lines with these words, and nothing on stdout."""
    return (
        found[0] == code and not found[1] and is_three_lines(found[2]) and all(w in found[2] for w in words)
    )


# list


def test_the_list_is_a_table_with_a_line_for_each_plan(run, plans):
    code, out, err = run("list")
    head, *rows, total = out.splitlines()
    assert (code, err) == (0, "")
    words = ["ID", "BACKEND", "VERSION", "TARGET", "GRAPH", "BUNDLE", "MB", "AGE", "LAST", "USE", "SIZES"]
    assert head.split() == words
    assert [row.split()[0] for row in rows] == sorted(plan.key.id[:12] for plan in plans)
    cells = next(row.split() for row in rows if row.startswith(OTHER.id[:12]))
    assert cells[1:7] == ["tensorrt", "10.16.0.71", "sm89", "denoiser", "robots", "0.0"]
    assert cells[7:] == ["0", "min", "never", "h=64", "rows=3"]
    assert total == "3 plans, 0.0 MB"


def test_the_list_tells_age_last_use_and_what_all_take(run, plans, cache, monkeypatch):
    big = publish(cache, key(target="sm90 NVIDIA H200"), size=3_000_000)
    cache.load(KEY)
    now = plans[0].created + 3 * 86400 + 60
    monkeypatch.setattr("time.time", lambda: now)
    os.utime(plans[0].folder / "used", (now, now - 2 * 3600))
    out = run("list")[1]
    line = next(row for row in out.splitlines() if row.startswith(KEY.id[:12]))
    assert "  3 d  2 h       h=64 rows=3" in line
    assert out.splitlines()[-1] == "4 plans, 3.0 MB"
    (result,) = events(run("list", "--json")[1])
    assert result["bytes"] == big.bytes + sum(plan.bytes for plan in plans)
    found = {one["id"]: one for one in result["plans"]}
    assert found[KEY.id]["last_use"] == pytest.approx(now - 2 * 3600) and found[OTHER.id]["last_use"] is None
    assert found[KEY.id]["age_s"] == pytest.approx(now - plans[0].created)


def test_the_list_in_json_has_every_fact(run, plans, cache):
    code, out, err = run("list", "--json")
    (result,) = events(out)
    assert (code, err, result["folder"], result["damaged"]) == (0, "", str(cache.folder), [])
    facts = next(one for one in result["plans"] if one["id"] == KEY.id)
    assert facts["sizes"] == {"h": 64, "rows": 3} and facts["bytes"] == 5000
    assert facts["path"] == str(plans[0].path) and facts["sha256"] == plans[0].sha256


def test_an_empty_cache_is_no_error_and_prints_nothing_on_stdout(run):
    code, out, err = run("list")
    assert (code, out) == (0, "") and "no plans" in err and "hyperrt compile" in err
    assert run("verify")[:2] == (0, "there are no plans\n")
    assert run("prune")[:2] == (0, "") and run("rm", "--all")[:2] == (0, "")
    assert events(run("list", "--json")[1])[-1]["plans"] == []


def test_the_list_warns_of_plans_that_cannot_be_read(run, plans):
    (plans[0].folder / "plan.json").write_text("")
    code, out, err = run("list")
    assert code == 0 and len(out.splitlines()) == 4
    assert err == "warning: 1 more plan cannot be read; see: hyperrt plans verify\n"
    assert events(run("list", "--json")[1])[-1]["damaged"] == [str(plans[0].folder)]


# verify


def test_sound_plans_are_verified_one_by_one(run, plans):
    code, out, _ = run("verify")
    assert code == 0 and [line[:4] for line in out.splitlines()] == ["ok  "] * 3
    found = events(run("verify", "--json")[1])
    assert [one["event"] for one in found] == ["plan", "plan", "plan", "result"]
    assert all(one["ok"] for one in found[:3])


def test_a_damaged_plan_ends_verify_with_the_code_for_damage_and_the_way_out(run, plans):
    flip(plans[0].path, 7)
    code, out, err = run("verify")
    advice = f"hyperrt plans rm {KEY.id[:12]} && {COMPILE}"
    assert code == 8 and is_three_lines(err) and advice in err and "sha256" in err
    assert out.count("ok  ") == 2 and f"FAIL  {KEY.id[:12]}" in out and f"do: {advice}" in out
    found = events(run("verify", "--json")[1])
    assert [one.get("ok") for one in found].count(False) == 1
    assert (found[-1]["event"], found[-1]["code"]) == ("error", 8)


def test_several_damaged_plans_are_counted_and_prune_is_advised(run, plans):
    flip(plans[0].path, 7)
    (plans[1].folder / "plan.json").unlink()
    code, _, err = run("verify")
    assert code == 8 and "2 plans of 3" in err and "hyperrt plans prune" in err


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
def test_a_cache_that_others_may_write_is_refused_by_every_command(run, plans, cache):
    cache.folder.chmod(0o777)
    for arguments in (["list"], ["verify"], ["rm", "--all"], ["prune"]):
        assert is_error(run(*arguments), 8, "others can write", f"chmod go-w {cache.folder}")
    cache.folder.chmod(0o700)
    assert len(cache.list()) == 3


# rm


def test_plans_are_removed_by_the_beginnings_of_their_ids(run, plans, cache):
    code, out, _ = run("rm", KEY.id[:8], OTHER.id)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["removed", plan.key.id[:12]] for plan in plans[:2]
    ]
    assert cache.list() == plans[2:]


def test_all_plans_are_removed_on_request_damaged_ones_too(run, plans, cache):
    (plans[0].folder / "plan.json").unlink()
    code, out, _ = run("rm", "--all", "--json")
    assert code == 0 and len(events(out)[-1]["removed"]) == 3
    assert os.listdir(cache.folder) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "no plan was given"),
        (["--all", KEY.id], 2, "ids and --all were given"),
        (["nothing"], 4, "no plan has the id 'nothing'"),
        ([KEY.id, "../home"], 4, "no plan has the id '../home'"),
        ([""], 4, "no plan has the id ''"),
        (["--al"], 2, "--al"),
    ],
    ids=str,
)
def test_what_names_no_plan_removes_none(run, plans, cache, arguments, code, words):
    assert is_error(run("rm", *arguments), code, words)
    assert len(cache.list()) == 3


def test_an_ambiguous_id_is_refused_with_what_it_could_be(run, cache):
    for end in "12":
        (cache.folder / ("0" * 31 + end)).mkdir(parents=True)
    assert is_error(run("rm", "00"), 2, "2 plans", "hyperrt plans list")


def test_the_environment_alone_removes_nothing(run, plans, cache, monkeypatch):
    monkeypatch.setenv("HYPERRT_PLANS_RM_ALL", "1")
    assert is_error(run("rm"), 2, "no plan was given")


# prune


def test_prune_says_what_it_removes_and_why(run, plans, cache):
    publish(cache, key(backend="tensorrt-rtx", version="10.20.0"))
    (cache.folder / f"{files.PREFIX}1{files.SUFFIX}").mkdir()
    flip(plans[1].path, 9)
    code, would, _ = run("prune", "--dry-run")
    assert code == 0 and would.count("would remove") == 3 and len(cache.list()) == 4
    code, out, _ = run("prune")
    assert code == 0 and out == would.replace("would remove", "removed")
    assert "newest here is of TensorRT-RTX 10.20.0" in out and "is damaged" in out and "killed" in out
    assert len(os.listdir(cache.folder)) == 2
    assert run("prune") == (0, "", "there is nothing to remove\n")


def test_prune_by_age_takes_days_from_flag_environment_and_file(run, plans, cache, monkeypatch, tmp_path):
    now = plans[0].created + 10 * 86400
    monkeypatch.setattr("time.time", lambda: now)
    assert run("prune", "--older-than", 11)[1] == ""
    assert run("prune", "--older-than", 9, "--dry-run")[1].count("built 10 days ago") == 3
    monkeypatch.setenv("HYPERRT_PLANS_PRUNE_OLDER_THAN", "9")
    assert run("prune", "--dry-run")[1].count("built 10 days ago") == 3
    monkeypatch.setenv("HYPERRT_PLANS_PRUNE_OLDER_THAN", "old")
    assert is_error(run("prune"), 2, "HYPERRT_PLANS_PRUNE_OLDER_THAN")
    monkeypatch.delenv("HYPERRT_PLANS_PRUNE_OLDER_THAN")
    (tmp_path / "settings" / "hyperrt").mkdir(parents=True)
    (tmp_path / "settings" / "hyperrt" / "config.toml").write_text("[plans.prune]\nolder-than = 9\n")
    assert run("prune", "--json")[1].count("built 10 days ago") == 3
    assert cache.list() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[plans.prun]\n", "'prun' in [plans]"),
        ("[plans]\nolder-than = 9", "'older-than' in [plans]"),
        ("[plans.prune]\nolder = 9", "'older' in [plans.prune]"),
    ],
)
def test_a_config_file_that_names_no_option_of_a_command_is_refused(run, tmp_path, text, words):
    (tmp_path / "settings" / "hyperrt").mkdir(parents=True)
    (tmp_path / "settings" / "hyperrt" / "config.toml").write_text(text)
    assert is_error(run("list"), 2, words)


@pytest.mark.parametrize("days", ["-1", "nan", "many"])
def test_an_age_that_is_none_is_refused(run, plans, cache, days):
    assert is_error(run("prune", "--older-than", days), 2, "older-than")
    assert len(cache.list()) == 3


# all


def test_names_that_a_terminal_would_obey_cannot_get_into_the_cache(run, cache):
    with pytest.raises(ValueError, match="control characters"):
        publish(cache, bundle="\x1b[2J")


def test_help_of_every_command_has_examples_and_loads_nothing_slow():
    code = "import sys; from hyperrt.cli import main as cli; cli.run(sys.argv[1:]); "
    code += "print({'numpy', 'hyperrt.plans.cache'} & sys.modules.keys())"
    for arguments in ([], ["--help"], *([name, "--help"] for name in ("list", "verify", "rm", "prune"))):
        command = [sys.executable, "-c", code, "plans", *arguments]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "Examples:" in out and out.endswith("set()\n")


def test_the_plans_are_listed_without_numpy(cache, plans):
    code = "import sys; from hyperrt.cli.main import run; run(sys.argv[1:]); print('numpy' in sys.modules)"
    command = [sys.executable, "-c", code, "plans", "list"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False" and len(out.splitlines()) == 6
