"""Vendors are imported without their telemetry; what they do then is watched by tests/test_promises.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

from hyperrt.engines import telemetry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A vendor's package that imports its telemetry where it can, as OpenVINO does."""
    (tmp_path / "openvino_telemetry.py").touch()
    code = "try: import openvino_telemetry\nexcept ImportError: reports = False\nelse: reports = True"
    (tmp_path / "somevendor.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    monkeypatch.delitem(sys.modules, "somevendor", raising=False)


@pytest.mark.usefixtures("package")
def test_a_vendor_is_imported_as_if_its_telemetry_were_not_installed():
    assert telemetry.import_vendor("somevendor").reports is False


@pytest.mark.usefixtures("package")
def test_other_programs_can_import_it_afterwards():
    telemetry.import_vendor("somevendor")
    import openvino_telemetry

    assert openvino_telemetry in sys.modules.values()


@pytest.mark.usefixtures("package")
def test_a_package_that_is_not_there_is_the_error_of_an_import():
    with pytest.raises(ModuleNotFoundError, match="no_such_vendor"):
        telemetry.import_vendor("no_such_vendor")
    assert telemetry.OPENVINO not in sys.modules


def test_what_is_left_on_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    assert telemetry.left_on() == []
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", object())
    assert telemetry.left_on() == ["ORT_DISABLE_TELEMETRY=0", "openvino_telemetry"]


@pytest.mark.parametrize("module", ["hyperrt.engines", "hyperrt.training", "hyperrt.export"])
def test_importing_a_package_that_loads_vendors_switches_it_off(module):
    code = f"import {module}, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    env = os.environ | {"PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"


@pytest.mark.usefixtures("package")
def test_telemetry_that_is_imported_already_is_hidden_and_then_back(monkeypatch):
    theirs = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", theirs)
    assert telemetry.import_vendor("somevendor").reports is False
    assert sys.modules["openvino_telemetry"] is theirs


@pytest.mark.usefixtures("package")
def test_two_threads_that_import_vendors_do_not_undo_each_others_hiding(tmp_path, monkeypatch):
    code = (tmp_path / "somevendor.py").read_text()
    (tmp_path / "slowvendor.py").write_text(f"import time; time.sleep(0.2)\n{code}")
    (tmp_path / "quickvendor.py").write_text("import time; time.sleep(0.1)")
    threads = [Thread(target=telemetry.import_vendor, args=(name,)) for name in ("quickvendor", "slowvendor")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.modules.pop("slowvendor").reports is False
