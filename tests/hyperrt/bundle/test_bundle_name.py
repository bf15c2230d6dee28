"""A bundle is called what it is opened by: its folder, whatever it was called when it was exported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hyperrt.bundle import bundle as bundles
from hyperrt.bundle.bundle import Bundle
from tests.hyperrt import fake_bundle


def test_a_bundle_has_the_name_by_which_it_is_opened_again(tmp_path, monkeypatch):
    folder = fake_bundle.write(tmp_path / "renamed", name="bundle")
    monkeypatch.chdir(folder)
    for path in (folder, ".", "../renamed/", f"../../{tmp_path.name}/renamed"):
        assert Bundle.open(path).name == "renamed"
    monkeypatch.chdir("..")
    assert Bundle.open(Bundle.open(folder).name).path == Path("renamed")


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_a_folder_s_name_that_is_no_text_makes_a_name_that_is(pretend_folder, tmp_path):
    folder = shutil.copytree(pretend_folder, os.fsdecode(os.fsencode(tmp_path) + b"/a\xff\nb"))
    assert Bundle.open(folder).name == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("name", bundles.packaged())
def test_a_bundle_in_the_wheel_says_the_name_by_which_it_is_asked_for(name):
    assert Bundle.open(name).name == bundles.read_manifest(bundles.PACKAGED / name).name == name
