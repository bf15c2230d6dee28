"""Which files of a bundle's folder are read, and where they may lie."""

from __future__ import annotations

import errno
import os

import pytest

from hyperrt.bundle import bundle as bundles
from hyperrt.bundle.bundle import MANIFEST, TOKENIZER, Bundle
from hyperrt.errors import BundleError
from tests.hyperrt import fake_bundle


@pytest.fixture
def folder(tmp_path):
    return fake_bundle.write(tmp_path / "bundles" / "mine")


def moved_out(path):
    """The file moved out of its folder, and a link to it left behind."""
    target = path.parents[2] / path.name
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("name", [MANIFEST, TOKENIZER, "denoiser.onnx"])
def test_a_link_that_leaves_the_folder_is_refused_although_the_bytes_are_right(folder, name):
    moved_out(folder / name)
    with pytest.raises(BundleError, match=rf"{name} is a link\n.*not in the bundle's folder"):
        Bundle.open(folder)


def test_a_file_that_becomes_a_link_after_opening_is_refused_when_it_is_used(folder):
    opened = Bundle.open(folder)
    moved_out(folder / "denoiser.onnx")
    with pytest.raises(BundleError, match="is a link"):
        opened.graph("denoiser")


def test_links_inside_the_folder_and_to_the_folder_are_followed(folder, tmp_path):
    (folder / "denoiser.onnx").rename(folder / "other.onnx")
    (folder / "denoiser.onnx").symlink_to("other.onnx")
    (tmp_path / "link").symlink_to(folder)
    Bundle.open(tmp_path / "link").verify()


def test_a_package_manager_may_link_the_files_of_a_packaged_bundle(folder, monkeypatch):
    monkeypatch.setattr(bundles, "PACKAGED", folder.parent)
    moved_out(folder / "denoiser.onnx")
    Bundle.open("mine").verify()


def test_other_files_and_folders_in_a_bundle_are_ignored(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden").mkdir()
    (folder / "other.onnx").write_bytes(b"not a graph")
    Bundle.open(folder).verify()


def test_a_bundle_opens_without_its_licences(folder):
    (folder / "LICENSES").unlink()
    Bundle.open(folder).verify()


def test_memory_that_runs_out_is_no_fault_of_the_bundle(pretend, monkeypatch):
    def scarce(path):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path))

    monkeypatch.setattr(bundles, "sha256_of", scarce)
    with pytest.raises(OSError, match="allocate memory"):
        Bundle.open(pretend).graph("denoiser")
