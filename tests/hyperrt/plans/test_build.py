"""Which plans a bundle has, when they are compiled, how they are found; the compiler is a stand-in."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from hyperrt import engines
from hyperrt.bundle.bundle import Bundle
from hyperrt.cli import main
from hyperrt.engines import EngineLoadError, EngineMemoryError, TensorSpec
from hyperrt.engines.fake import FakeEngine
from hyperrt.engines.nvidia.tensorrt_build import Built
from hyperrt.errors import Incompatible, IntegrityError, NotFound, NumericError, UsageError
from hyperrt.plans import build
from hyperrt.plans.cache import PlanCache

RTX = "tensorrt-rtx"


@pytest.fixture
def bundle():
    return Bundle.open("tiny")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERRT_HOME", str(tmp_path / "home"))
    return PlanCache()


@pytest.fixture
def compiler(monkeypatch):
    """Recipes that the stand-in was given, in `asked`; it fails with `error` at graph `at`."""

    class Compiler:
        error, at = None, ""

        def __init__(self):
            self.asked = []

        def build(self, recipe, progress=None):
            self.asked.append(recipe)
            if self.error and self.at in recipe.onnx:
                raise self.error
            progress(0.5)
            with open(recipe.output, "wb") as file:
                file.write(b"plan of " + recipe.onnx.encode())
            return Built(1.0, 10, 20, ("x",))

    found = Compiler()
    monkeypatch.setattr(build.tensorrt_build, "build", found.build)
    monkeypatch.setattr(build, "version", lambda backend: "1.7.1")
    return found


def compiled(bundle, cache, targets=("sm89",), names=(), **options):
    sizes = build.sizes_of(bundle, 1, 3)
    return list(build.compile_bundle(bundle, RTX, targets, sizes, names, cache=cache, **options))


def test_every_graph_is_compiled_for_every_target_and_once(bundle, cache, compiler):
    done = compiled(bundle, cache, ("sm86", "sm89"))
    assert [(one.plan.key.target, one.plan.graph_name) for one in done] == [
        (target, name) for target in ("sm86", "sm89") for name in bundle.graphs
    ]
    assert all(one.built for one in done)
    assert not any(one.built for one in compiled(bundle, cache, ("sm86", "sm89")))
    assert all(one.built for one in compiled(bundle, cache, force=True))
    assert len(compiler.asked) == 3 * len(bundle.graphs)


def test_the_step_has_fixed_sizes_and_what_runs_once_has_a_range(bundle, cache, compiler):
    compiled(bundle, cache)
    by_graph = {os.path.basename(recipe.onnx): recipe for recipe in compiler.asked}
    assert by_graph["denoiser.onnx"].sizes == {"images": 1, "branches": 3, "rows": 3, "subjects": 1}
    assert by_graph["vae_decoder.onnx"].sizes == {"images": 1}
    assert by_graph["context.onnx"].sizes == {}
    assert by_graph["context.onnx"].ranges["rows"] == (1, 3, 48)


def test_other_branches_are_another_plan_of_the_step_alone(bundle, cache, compiler):
    three, two = (
        {
            name: build.key_of(bundle, name, RTX, "sm89", build.sizes_of(bundle, 1, branches)).id
            for name in bundle.graphs
        }
        for branches in (3, 2)
    )
    assert [name for name in three if three[name] != two[name]] == ["denoiser"]
    assert len({*three.values()}) == len(three)


def test_several_subjects_are_a_plan_with_a_lora_for_every_row(bundle, cache, compiler):
    sizes = build.sizes_of(bundle, 2, 3, several=True)
    key = build.key_of(bundle, "denoiser", RTX, "sm89", sizes)
    assert dict(key.sizes) == {"images": 2, "branches": 3, "rows": 6, "subjects": 6}


def test_what_was_compiled_before_a_failure_stays(bundle, cache, compiler):
    compiler.error, compiler.at = EngineMemoryError("memory ran out"), "denoiser"
    with pytest.raises(EngineMemoryError):
        compiled(bundle, cache)
    before = list(bundle.graphs)[: list(bundle.graphs).index("denoiser")]
    assert sorted(plan.graph_name for plan in cache.list()) == sorted(before)
    assert {path.name for path in cache.folder.iterdir()} == {plan.folder.name for plan in cache.list()}


def test_a_failure_leaves_the_old_plan(bundle, cache, compiler):
    old = compiled(bundle, cache, names=("denoiser",))[0].plan
    compiler.error = EngineLoadError("no")
    with pytest.raises(EngineLoadError):
        compiled(bundle, cache, names=("denoiser",), force=True)
    assert cache.load(old.key) == old


@pytest.mark.parametrize(
    ("options", "said"),
    [({"names": ("unet",)}, "no graph 'unet'"), ({"backend": "openvino"}, "the backend is 'openvino'")],
)
def test_an_unknown_graph_or_backend_is_refused(bundle, cache, options, said):
    asked = {"backend": RTX, "names": (), **options}
    with pytest.raises(UsageError, match=said):
        next(build.compile_bundle(bundle, asked["backend"], ["sm89"], {}, asked["names"], cache=cache))


@pytest.fixture
def here(monkeypatch):
    """As if there were a GPU of sm89, and a second one of sm120."""
    module = SimpleNamespace(target=lambda vendor, device=0: ("sm89", "sm120")[device])
    monkeypatch.setattr(build.engines, "load", lambda backend: module)


def test_a_plan_is_found_for_the_gpu_that_is_here(bundle, cache, compiler, here):
    sizes = build.sizes_of(bundle, 1, 3)
    with pytest.raises(NotFound, match=r"hyperrt compile tiny --backend tensorrt-rtx --target sm89"):
        build.find(bundle, "denoiser", RTX, sizes)
    made = compiled(bundle, cache, names=("denoiser",))[0].plan
    assert build.find(bundle, "denoiser", RTX, sizes) == made
    with pytest.raises(Incompatible, match=r"rows=3(?s:.*)rows=2"):
        build.find(bundle, "denoiser", RTX, build.sizes_of(bundle, 1, 2))
    made.path.write_bytes(made.path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"damaged(?s:.*)hyperrt compile"):
        build.find(bundle, "denoiser", RTX, sizes)


def test_a_plan_for_another_gpu_is_named_with_both(bundle, cache, compiler, here):
    made = compiled(bundle, cache, ("sm120",), ("denoiser",))[0].plan
    sizes = build.sizes_of(bundle, 1, 3)
    with pytest.raises(Incompatible, match=r"sm120(?s:.*)sm89"):
        build.find(bundle, "denoiser", RTX, sizes)
    assert build.find(bundle, "denoiser", RTX, sizes, device=1) == made


@pytest.mark.parametrize(("gain", "kept"), [(1.0, True), (1.2, False)])
def test_a_plan_that_computes_something_else_is_not_kept(
    bundle, cache, compiler, here, monkeypatch, gain, kept
):
    inputs, outputs = bundle.graphs["context"].inputs, [TensorSpec("y", (3,), "float32")]

    def opened(path, backend, **options):
        factor = gain if "plan" in options else 1.0
        return FakeEngine(lambda tensors: {"y": factor * np.ones(3, np.float32)}, inputs, outputs)

    monkeypatch.setattr(engines, "open", opened)
    if kept:
        assert compiled(bundle, cache, ("current",), ("context",))[0].plan.key.target == "sm89"
    else:
        with pytest.raises(NumericError, match=r"something else(?s:.*)0.2; allowed is 0.01"):
            compiled(bundle, cache, ("current",), ("context",))
    assert len(cache.list()) == kept


def test_the_command_tells_of_every_plan(cache, compiler, capsys):
    assert main.run(["compile", "tiny", "--target", "sm86, sm89", "--graph", "context", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    plans = [event for event in events if event["event"] == "plan"]
    assert [plan["target"] for plan in plans] == ["sm86", "sm89"]
    assert len(events[-1]["plans"]) == 2 and events[-1]["event"] == "result"
    assert main.run(["compile", "tiny", "--target", "sm89", "--graph", "context"]) == 0
    assert "in the cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--branches", "4"], 2), (["--pictures", "0"], 2), (["--graph", "unet", "--target", "sm89"], 2),
        (["--backend", "openvino"], 2), (["--target", ","], 2), (["nowhere"], 4),
    ],
)  # fmt: skip
def test_a_bad_option_of_the_command_is_an_error_of_its_own(cache, compiler, capsys, options, code):
    assert main.run(["compile", *options]) == code
    assert capsys.readouterr().err.splitlines()[0].startswith("error: ")
    assert not compiler.asked
