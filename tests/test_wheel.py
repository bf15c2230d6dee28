"""The wheel: what it holds, and that it lies beside any other package without touching its files."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engines", "hyperrt", "training", "export")
WHEEL_MB = 25
# Top-level names of open_clip_torch 2.19.0 and of other packages, which are those of our folders.
THEIRS = ("training/__init__.py", "training/train.py", "training/data.py", "export/__init__.py", "engines.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy: a build in the checkout would leave a build/ behind."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77: pip install '.[test]'")
    copy = tmp_path_factory.mktemp("source")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", "dist", ".", folder=copy)
    with zipfile.ZipFile(next((copy / "dist").glob("*.whl"))) as archive:
        yield archive


def pip(*arguments: object, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def files_of(folder: Path) -> set[str]:
    return {name(path) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def installed(path: Path) -> str:
    """Where a file of the repository lies in site-packages: engines/base.py => hyperrt/engines/base.py."""
    return name(path) if name(path).startswith("hyperrt/") else f"hyperrt/{name(path)}"


def test_the_wheel_holds_every_module(wheel):
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert set(map(installed, modules)) <= set(wheel.namelist())


def test_the_wheel_holds_the_default_bundle(wheel):
    bundles = files_of(ROOT / "hyperrt" / "bundles")
    assert "hyperrt/bundles/tiny/bundle.json" in bundles
    assert bundles <= set(wheel.namelist())


def test_the_wheel_holds_the_licence_and_the_command(wheel):
    members = wheel.namelist()
    assert any(member.endswith("licenses/LICENSE") for member in members)
    entry_points = next(member for member in members if member.endswith("entry_points.txt"))
    assert "hyperrt = hyperrt.cli.main:main" in wheel.read(entry_points).decode()


def test_the_wheel_installs_one_name(wheel):
    """`engines`, `training` and `export` are names that others install, too (open_clip_torch 2.19.0)."""
    assert {member.split("/")[0] for member in wheel.namelist() if "dist-info" not in member} == {"hyperrt"}


def test_the_wheel_holds_no_tests_and_is_small(wheel):
    assert not [member for member in wheel.namelist() if "test" in member]
    assert Path(wheel.filename).stat().st_size <= WHEEL_MB * 1e6


@pytest.fixture
def others(tmp_path) -> Path:
    """A wheel whose top-level names are those of our folders."""
    path = tmp_path / "others-1.0-py3-none-any.whl"
    members = {
        **{member: f"whose = {member!r}\n" for member in THEIRS},
        "others-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: others\nVersion: 1.0\n",
        "others-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{member},{digest(text.encode())},{len(text)}" for member, text in members.items()]
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
        archive.writestr("others-1.0.dist-info/RECORD", "\n".join([*record, "others-1.0.dist-info/RECORD,,"]))
    return path


def digest(content: bytes) -> str:
    """As RECORD has it (PEP 376)."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def changed(site: Path) -> Iterator[str]:
    """Installed files that are not what their distribution says; without commands, which lie elsewhere."""
    for distribution in importlib.metadata.distributions(path=[str(site)]):
        for file in distribution.files:
            path = Path(distribution.locate_file(file))
            content = path.read_bytes() if path.is_file() else b""
            if file.hash and ".." not in file.parts and digest(content) != f"sha256={file.hash.value}":
                yield str(file)


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "theirs first"])
def test_beside_packages_called_as_our_folders_every_file_of_both_is_whole(
    wheel, others, tmp_path, ours_first
):
    wheels = [wheel.filename, others] if ours_first else [others, wheel.filename]
    for file in wheels:
        pip("install", "--no-deps", "--no-index", "--no-compile", "--target", "site", file, folder=tmp_path)
    site = tmp_path / "site"
    assert {"hyperrt", "others"} == {d.name for d in importlib.metadata.distributions(path=[str(site)])}
    assert not list(changed(site))
    (site / THEIRS[0]).write_text("something else")
    assert list(changed(site)) == [THEIRS[0]]


def test_modules_of_the_user_called_as_our_folders_are_never_run(wheel, tmp_path):
    """A user's engines.py, or the package `training` of their project, on the path before ours."""
    site, project = tmp_path / "site", tmp_path / "project"
    with zipfile.ZipFile(wheel.filename) as archive:
        archive.extractall(site)
    for member in THEIRS:
        path = project / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('the file of the user was run')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(project), str(site)])}
    code = "from hyperrt import engines, training, export; print(engines.__file__, training.__file__)"
    for command in (["-c", code], ["-m", "hyperrt", "--help"], ["-m", "hyperrt.training.data.scenes"]):
        result = subprocess.run(
            [sys.executable, *command], cwd=project, env=env, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
