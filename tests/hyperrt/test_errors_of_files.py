"""Errors about a file that cannot be written: impossible names, and commands that can be pasted."""

from __future__ import annotations

import subprocess

import pytest

from hyperrt import files
from hyperrt.errors import NotFound, UsageError


@pytest.mark.parametrize("name", ["a\0b", "\ud800.png"], ids=["NUL", "half of a surrogate pair"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    for check in (files.check_file, lambda path: files.check_folder(path, "bundle.json")):
        with pytest.raises(UsageError, match="is not a file name"):
            check(tmp_path / name)


def test_the_command_that_makes_a_missing_folder_can_be_pasted(tmp_path):
    target = tmp_path / "my 'new' folder; $(x)" / "out.png"
    with pytest.raises(NotFound) as caught:
        files.check_file(target)
    subprocess.run(caught.value.do, shell=True, check=True)
    assert files.check_file(target) == target
