"""A published file or folder is there whole or not at all, whatever stops the writer."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from hyperrt import files
from hyperrt.errors import NotFound, ResourceError, UsageError

MARKER = "bundle.json"


def text(content: str):
    return lambda file: file.write(content.encode())


def bundle(content: str):
    def write(folder: Path) -> None:
        (folder / MARKER).write_text(content)
        (folder / "graphs").mkdir()
        (folder / "graphs" / "unet.onnx").write_text(content)

    return write


def read_bundle(folder: Path) -> tuple[str, str]:
    return (folder / MARKER).read_text(), (folder / "graphs" / "unet.onnx").read_text()


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(files.PREFIX)]


def stop(error: BaseException):
    def write(target) -> None:
        if isinstance(target, Path):
            (target / MARKER).write_text("half")
        else:
            target.write(b"half")
        raise error

    return write


def publish_either(kind: str, path: Path, write, force: bool = False) -> Path:
    if kind == "file":
        return files.publish(path, write, force=force)
    return files.publish_folder(path, write, marker=MARKER, force=force)


def old_content(kind: str):
    return text("old") if kind == "file" else bundle("old")


def new_content(kind: str):
    return text("new") if kind == "file" else bundle("new")


def read_either(kind: str, path: Path) -> str:
    if kind == "file":
        return path.read_text()
    manifest, graph = read_bundle(path)
    assert manifest == graph
    return graph


either = pytest.mark.parametrize("kind", ["file", "folder"])


# Files


def test_a_file_appears_with_what_was_written(tmp_path):
    path = files.publish(tmp_path / "out.png", text("picture"))
    assert path == tmp_path / "out.png"
    assert path.read_text() == "picture"
    assert os.listdir(tmp_path) == ["out.png"]


def test_a_file_has_not_its_name_before_it_is_whole(tmp_path):
    def write(file) -> None:
        file.write(b"half")
        file.flush()
        assert not (tmp_path / "out.png").exists()

    files.publish(tmp_path / "out.png", write)


def test_a_file_that_exists_is_kept_unless_forced(tmp_path):
    path = tmp_path / "out.png"
    path.write_text("old")
    with pytest.raises(UsageError, match=r"out\.png exists\n.*\n.*--force"):
        files.publish(path, text("new"))
    assert path.read_text() == "old"
    files.publish(path, text("new"), force=True)
    assert path.read_text() == "new"


def test_a_file_that_appears_while_writing_is_kept(tmp_path):
    path = tmp_path / "out.png"
    with pytest.raises(UsageError, match="exists"):
        files.publish(path, lambda file: path.write_text("of another run"))
    assert path.read_text() == "of another run"
    assert not leftovers(tmp_path)


def test_without_hard_links_a_file_is_published_by_rename(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    assert files.publish(tmp_path / "out.png", text("picture")).read_text() == "picture"
    with pytest.raises(UsageError, match="exists"):
        files.publish(tmp_path / "out.png", text("new"))
    assert os.listdir(tmp_path) == ["out.png"]


@either
def test_a_name_of_255_bytes_is_fine_and_a_longer_one_is_refused_before_the_work(kind, tmp_path):
    path = publish_either(kind, tmp_path / ("a" * 255), new_content(kind))
    assert read_either(kind, path) == "new"
    with pytest.raises(UsageError, match="too long"):
        publish_either(kind, tmp_path / ("a" * 256), stop(AssertionError("the work was begun")))


def test_a_file_has_the_rights_that_the_umask_leaves(tmp_path):
    old = os.umask(0o027)
    try:
        path = files.publish(tmp_path / "out.png", text("picture"))
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out.png").symlink_to("precious")
    files.publish(tmp_path / "out.png", text("new"), force=True)
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "out.png").read_text() == "new"


@pytest.mark.parametrize("special", ["folder", "pipe", "socket", "broken link", "device"])
def test_what_is_no_plain_file_is_refused_even_when_forced(special, tmp_path):
    path = tmp_path / "out"
    if special == "folder":
        path.mkdir()
    elif special == "pipe":
        os.mkfifo(path)
    elif special == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(path))  # an absolute name may be too long for a socket
    elif special == "broken link":
        path.symlink_to("nowhere")
    else:
        path = Path(os.devnull)
    with pytest.raises(UsageError, match=r"is a folder|not a plain file"):
        files.publish(path, text("x"), force=True)


# Both


@either
def test_a_missing_parent_is_named_with_the_command_that_makes_it(kind, tmp_path):
    with pytest.raises(NotFound, match=r"\n.*\n  do:  mkdir -p .*new"):
        publish_either(kind, tmp_path / "new" / "out", text("x"))


@either
def test_a_parent_that_is_a_file_is_refused(kind, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is not a folder"):
        publish_either(kind, tmp_path / "file" / "out", text("x"))


@either
def test_a_parent_without_write_permission_is_refused_before_the_work(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UsageError, match=r"cannot be written\n.*is not writable"):
        publish_either(kind, tmp_path / "out", stop(AssertionError("the work began")))


@either
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug"), SystemExit(3), MemoryError()])
def test_a_writer_that_stops_leaves_the_old_contents_and_nothing_else(kind, error, tmp_path):
    path = tmp_path / "out"
    publish_either(kind, path, old_content(kind))
    with pytest.raises(type(error)):
        publish_either(kind, path, stop(error), force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert read_either(kind, path) == "old"


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        *(("file", call) for call in ("open", "write", "fsync", "replace")),
        *(("folder", call) for call in ("mkdir", "write", "fsync", "rename")),
    ],
)
@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.ENOSPC, ResourceError, r"could not be written\n.*No space left.*bytes are free\n.*make room"),
        (errno.EIO, ResourceError, r"could not be written\n.*\n.*check the disk"),
        (errno.EROFS, UsageError, r"cannot be written\n.*not writable"),
    ],
    ids=["disk full", "disk broken", "read-only"],
)
def test_a_failing_disk_is_explained_and_leaves_the_old_contents(
    kind, call, number, error, message, tmp_path, monkeypatch
):
    publish_either(kind, tmp_path / "out", old_content(kind))

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if call != "write":
            patch.setattr(os, call, fail)
        with pytest.raises(error, match=message):
            publish_either(kind, tmp_path / "out", fail if call == "write" else new_content(kind), force=True)
    assert read_either(kind, tmp_path / "out") == "old"
    assert os.listdir(tmp_path) == ["out"]


@either
@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
@pytest.mark.parametrize("when", range(1, 7))
def test_a_fault_at_any_one_call_leaves_old_or_new(kind, call, when, tmp_path, monkeypatch):
    publish_either(kind, tmp_path / "out", old_content(kind))
    count = 0
    real = getattr(os, call)

    def fail_once(*args):
        nonlocal count
        count += 1
        if count == when:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    with monkeypatch.context() as patch, contextlib.suppress(ResourceError):
        patch.setattr(os, call, fail_once)
        publish_either(kind, tmp_path / "out", new_content(kind), force=True)
    assert read_either(kind, tmp_path / "out") in ("old", "new")
    assert os.listdir(tmp_path) == ["out"]


@either
def test_an_error_about_a_file_that_the_writer_reads_passes_as_it_is(kind, tmp_path):
    with pytest.raises(FileNotFoundError):
        publish_either(kind, tmp_path / "out", lambda _: Path("/nowhere/checkpoint").read_bytes())


@either
def test_what_killed_runs_left_is_swept_and_what_lives_is_not(kind, tmp_path):
    names = [f"{files.PREFIX}{number}{files.SUFFIX}" for number in range(2)]
    (tmp_path / names[0]).write_text("of a killed run")
    (tmp_path / names[1]).mkdir()
    (tmp_path / names[1] / "unet.onnx").write_text("of a killed run")

    def write_while_another_run_publishes(target) -> None:
        files.publish(tmp_path / "other", text("x"))
        new_content(kind)(target)

    assert sorted(files.sweep(tmp_path, dry_run=True)) == [tmp_path / name for name in names]
    path = publish_either(kind, tmp_path / "out", write_while_another_run_publishes)
    assert read_either(kind, path) == "new"
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_a_sweep_does_not_follow_links_or_touch_other_names(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    (tmp_path / f"{files.PREFIX}a{files.SUFFIX}").symlink_to("precious")
    os.mkfifo(tmp_path / f"{files.PREFIX}b{files.SUFFIX}")
    (tmp_path / ".tmpAbCdEf").write_text("")
    before = sorted(os.listdir(tmp_path))
    files.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "precious" / "file").exists()


def test_what_another_run_sweeps_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    mkdir, swept = Path.mkdir, []

    def mkdir_and_sweep(self, *args, **kwargs):
        mkdir(self, *args, **kwargs)
        if self.name.startswith(files.PREFIX) and not swept:
            swept.append(self)
            files.sweep(self.parent)

    monkeypatch.setattr(Path, "mkdir", mkdir_and_sweep)
    assert read_bundle(files.publish_folder(tmp_path / "robot", bundle("new"), marker=MARKER))[0] == "new"
    assert len(swept) == 1


def test_a_sweep_of_a_folder_that_is_gone_is_quiet(tmp_path):
    files.sweep(tmp_path / "gone")


# Folders


def test_a_folder_appears_with_what_was_written(tmp_path):
    path = files.publish_folder(tmp_path / "robot", bundle("new"), marker=MARKER)
    assert read_bundle(path) == ("new", "new")
    assert os.listdir(tmp_path) == ["robot"]


def test_a_folder_that_exists_is_kept_unless_forced(tmp_path):
    path = files.publish_folder(tmp_path / "robot", bundle("old"), marker=MARKER)
    (path / "extra").write_text("of the old bundle")
    with pytest.raises(UsageError, match="exists"):
        files.publish_folder(path, bundle("new"), marker=MARKER)
    assert read_bundle(path) == ("old", "old")
    files.publish_folder(path, bundle("new"), marker=MARKER, force=True)
    assert read_bundle(path) == ("new", "new")
    assert not (path / "extra").exists()
    assert not leftovers(tmp_path)


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "robot").mkdir()
    files.publish_folder(tmp_path / "robot", bundle("new"), marker=MARKER)
    assert read_bundle(tmp_path / "robot") == ("new", "new")


def test_a_folder_of_another_kind_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").write_text("precious")
    with pytest.raises(UsageError, match=r"holds no bundle\.json\n.*same kind"):
        files.publish_folder(tmp_path / "home", bundle("new"), marker=MARKER, force=True)
    assert (tmp_path / "home" / "letters").read_text() == "precious"


def test_the_current_folder_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="current folder"):
        files.publish_folder(".", bundle("new"), marker=MARKER, force=True)


@pytest.mark.parametrize("special", ["file", "link"])
def test_what_is_no_plain_folder_is_refused_even_when_forced(special, tmp_path):
    files.publish_folder(tmp_path / "real", bundle("old"), marker=MARKER)
    path = tmp_path / "robot"
    path.symlink_to("real") if special == "link" else path.write_text("")
    with pytest.raises(UsageError, match="is not a folder"):
        files.publish_folder(path, bundle("new"), marker=MARKER, force=True)
    assert read_bundle(tmp_path / "real") == ("old", "old")


def test_a_folder_that_appears_while_writing_is_kept(tmp_path):
    path = tmp_path / "robot"

    def write(folder: Path) -> None:
        bundle("mine")(folder)
        path.mkdir()
        (path / "letters").write_text("of another run")

    with pytest.raises(UsageError, match="exists"):
        files.publish_folder(path, write, marker=MARKER)
    assert os.listdir(tmp_path) == ["robot"]
    assert (path / "letters").read_text() == "of another run"


def test_two_runs_that_replace_one_folder_take_turns(tmp_path):
    path = files.publish_folder(tmp_path / "robot", bundle("old"), marker=MARKER)

    def write(folder: Path) -> None:
        bundle("second")(folder)
        files.publish_folder(path, bundle("first"), marker=MARKER, force=True)

    files.publish_folder(path, write, marker=MARKER, force=True)
    assert read_bundle(path) == ("second", "second")
    assert os.listdir(tmp_path) == ["robot"]


# Removing


def test_a_removed_file_link_or_folder_is_gone_and_what_a_link_leads_to_is_not(tmp_path):
    files.publish_folder(tmp_path / "robot", bundle("old"), marker=MARKER)
    (tmp_path / "link").symlink_to("robot")
    (tmp_path / "file").touch()
    files.remove(tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["file", "robot"]
    files.remove(tmp_path / "file")
    files.remove(tmp_path / "robot")
    assert os.listdir(tmp_path) == []
    with pytest.raises(NotFound, match="robot does not exist"):
        files.remove(tmp_path / "robot")
