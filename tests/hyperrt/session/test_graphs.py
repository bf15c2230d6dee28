"""Graphs are opened when they are needed, for the sizes of the call where the backend compiles them."""

from __future__ import annotations

import dataclasses
import os
import stat

import pytest

from hyperrt import engines
from hyperrt.engines.backends import BACKENDS
from hyperrt.errors import UsageError
from hyperrt.runtime import Runtime
from hyperrt.session import graphs
from tests.hyperrt import fake_bundle

PROMPT = "a [V] robot on the beach"


@pytest.fixture
def opened(monkeypatch):
    """(graph, sizes) of every opening."""
    found = []
    true = engines.open

    def spy(path, backend, threads=None, sizes=None, **options):
        found.append((path.stem, dict(sizes) if sizes else None))
        return true(path, backend, threads=threads, sizes=sizes, **options)

    monkeypatch.setattr(engines, "open", spy)
    return found


def denoisers(opened):
    return [sizes for name, sizes in opened if name == "denoiser"]


@pytest.fixture
def compiling(monkeypatch, pretend):
    fake = dataclasses.replace(BACKENDS["fake"], fixed_sizes=True)
    monkeypatch.setitem(BACKENDS, "fake", fake)
    with Runtime.open(pretend, "fake") as runtime:
        yield runtime


def test_a_backend_that_compiles_gets_the_sizes_and_another_engine_when_they_change(
    compiling, photos, opened
):
    subject = compiling.personalize(photos)
    for kappa in (None, None, 2, None):
        compiling.generate(PROMPT, subject, kappa=kappa)
    sizes = denoisers(opened)
    assert [one["rows"] for one in sizes] == [3, 2, 3]
    assert sizes[0] == {"images": 1, "branches": 3, "rows": 3, "subjects": 1}
    assert {"images": 1, "h": 4, "w": 4} in [one for name, one in opened if name == "vae_decoder"]


def test_pairs_and_batches_have_sizes_of_their_own(compiling, photos, opened):
    one, two = compiling.personalize(photos), compiling.personalize(photos)
    compiling.generate([PROMPT, PROMPT], [one, two], n=3, batch_size=2)
    assert denoisers(opened) == [
        {"images": 4, "branches": 3, "rows": 12, "subjects": 12},
        {"images": 2, "branches": 3, "rows": 6, "subjects": 6},
    ]


def test_a_picture_is_the_same_compiled_for_its_sizes_or_for_any(compiling, photos):
    subject = compiling.personalize(photos)
    with Runtime.open(compiling.bundle.path, "fake") as any_size:
        for kappa in (0, 1, 2):
            ours, theirs = (one.generate(PROMPT, subject, kappa=kappa) for one in (compiling, any_size))
            assert (ours.images == theirs.images).all()


def test_a_backend_that_does_not_compile_gets_no_sizes_and_opens_once(pretend, photos, opened):
    with Runtime.open(pretend, "fake") as runtime:
        for batch_size in (1, 2):
            runtime.generate("a robot", n=2, batch_size=batch_size)
    assert denoisers(opened) == [None]


def test_auto_is_the_backend_that_engines_choose(pretend, monkeypatch):
    monkeypatch.setattr(engines, "resolve", lambda name: "fake" if name == "auto" else name)
    with Runtime.open(pretend) as runtime:
        assert runtime.backend == runtime.generate("a robot").recipe["backend"] == "fake"


def test_a_backend_that_does_not_exist_is_known_before_anything_is_opened(pretend):
    with pytest.raises(engines.BackendMissing, match="abacus"):
        Runtime.open(pretend, "abacus")


def test_a_closed_set_of_graphs_opens_no_more(pretend):
    runtime = Runtime.open(pretend, "fake")
    runtime.close()
    with pytest.raises(UsageError, match="closed"):
        runtime._graphs.engine("denoiser")
    assert fake_bundle.calls == []


# compile_cache


def test_compiled_graphs_are_kept_in_a_folder_of_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("HYPERRT_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = graphs.compile_cache()
    assert folder == tmp_path / "hyperrt" / "compiled"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setenv("HYPERRT_HOME", str(tmp_path / "mine"))
    assert graphs.compile_cache() == tmp_path / "mine" / "compiled"


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
def test_a_folder_that_others_may_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERRT_HOME", str(tmp_path))
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled").chmod(0o777)
    assert graphs.compile_cache() is None


def test_where_no_folder_can_be_made_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYPERRT_HOME", str(tmp_path / "file"))
    assert graphs.compile_cache() is None


def test_openvino_decodes_in_fp32_unless_it_is_told_otherwise(monkeypatch):
    pytest.importorskip("openvino")
    chosen = {}
    true = engines.open

    def spy(path, *arguments, **options):
        chosen[path.stem] = options.get("precision")
        return true(path, *arguments, **options)

    monkeypatch.setattr(engines, "open", spy)
    with Runtime.open("tiny", "openvino") as runtime:
        runtime.generate("a mug in the snow", steps=1)
    assert chosen["vae_decoder"] == "f32" and chosen["denoiser"] is None
    with Runtime.open("tiny", "openvino", backend_options={"precision": "auto"}) as runtime:
        runtime.generate("a mug in the snow", steps=1)
    assert set(chosen.values()) == {"auto"}


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERRT_HOME", str(tmp_path))
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "compiled").symlink_to(tmp_path / "mine")
    assert graphs.compile_cache() is None


@pytest.mark.parametrize("name", ["threads", "sizes", "device", "plan"])
def test_what_hyperrt_sets_itself_is_no_backend_option(pretend, name):
    with pytest.raises(UsageError, match=f"'{name}' is no backend option"):
        Runtime.open(pretend, "fake", backend_options={name: 1})
