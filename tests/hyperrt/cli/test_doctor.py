"""`hyperrt doctor` finds what is wrong with a machine, each check for itself, and changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest

from hyperrt.cli import doctor
from hyperrt.engines.backends import BACKENDS
from tests.hyperrt import fake_bundle
from tests.hyperrt.command_line import events, is_three_lines

pytestmark = pytest.mark.usefixtures("alone")


def checks(bundle, backend="fake"):
    return {check.name: check for check in doctor.run(str(bundle), backend)}


def test_a_sound_machine_passes_every_check(pretend):
    found = checks(pretend)
    assert "fail" not in {check.status for check in found.values()}
    assert {"hyperrt", "dependencies", "one ONNX Runtime", "test run"} <= set(found)
    assert "base model comes back" in found["test run"].detail


def test_the_command_prints_a_line_a_check_and_ends_with_0(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert all(line[:4] in ("ok  ", "WARN") or line.startswith("      do: ") for line in out.splitlines())


def test_with_json_a_check_is_an_event(run):
    code, out, _ = run("doctor", "--json")
    *found, last = events(out)
    assert code == 0 and last["event"] == "result" and last["ok"] is True
    assert {event["event"] for event in found} == {"check"}
    assert {event["status"] for event in found} <= {"ok", "warn"}


def test_a_damaged_bundle_fails_with_its_code_and_is_not_run(run, tmp_path):
    folder = fake_bundle.write(tmp_path / "damaged")
    (folder / "denoiser.onnx").write_bytes(b"other")
    code, out, err = run("doctor", "--bundle", folder)
    assert code == 8 and is_three_lines(err)
    assert "FAIL" in out and "denoiser.onnx" in out and "test run" not in out
    code, out, _ = run("doctor", "--bundle", folder, "--json")
    assert code == 8 and events(out)[-1]["event"] == "error"


def test_a_bundle_that_is_not_there_hides_no_other_check(run):
    code, out, err = run("doctor", "--bundle", "nothing")
    assert code == 4 and "nothing" in err
    assert "ok    dependencies" in out


def test_a_backend_that_is_not_installed_fails_only_when_it_is_wanted(pretend, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    unwanted = checks(pretend)["backend onnxruntime"]
    assert (unwanted.status, unwanted.detail) == ("ok", "not installed")
    wanted = checks("nothing", "onnxruntime")["backend onnxruntime"]
    assert (wanted.status, wanted.code) == ("fail", 4) and "pip install" in wanted.do


def test_two_onnx_runtimes_in_one_environment_are_a_failure(pretend, monkeypatch):
    version, packages = importlib.metadata.version, BACKENDS["onnxruntime"].packages
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.0" if name in packages else version(name)
    )
    check = checks(pretend)["one ONNX Runtime"]
    assert (check.status, check.code) == ("fail", 5) and "pip uninstall" in check.do


def test_a_missing_dependency_is_named(pretend, monkeypatch):
    version = importlib.metadata.version

    def without_pillow(name):
        if name == "pillow":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["numpy>=1", "pillow>=11", "x; extra == 'y'"]
    )
    monkeypatch.setattr(importlib.metadata, "version", without_pillow)
    check = checks(pretend)["dependencies"]
    assert (check.status, check.code, check.detail) == ("fail", 4, "missing: pillow")


def test_a_base_model_that_does_not_come_back_is_found(pretend):
    drift = iter(range(1000))

    def drifting(tensors):
        found = fake_bundle.GRAPHS["denoiser"](tensors)
        return {name: value + next(drift) for name, value in found.items()}

    fake_bundle.register(denoiser=drifting)
    check = checks(pretend)["test run"]
    assert (check.status, check.code) == ("fail", 8) and "does not come back" in check.detail


def test_nothing_of_the_environment_is_shown(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-token")
    assert "a-secret-token" not in "".join(map(str, run("doctor")))
