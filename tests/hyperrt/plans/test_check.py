"""A plan that was compiled for another machine is compared with its graph when it is first opened, and once.

GPU, TensorRT-RTX and compiler are stand-ins, in which ONNX Runtime computes what the graph does, or not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging

import numpy as np
import pytest

from hyperrt import engines, files
from hyperrt.bundle import memory
from hyperrt.bundle.bundle import Bundle
from hyperrt.cli import main
from hyperrt.errors import NumericError, UsageError
from hyperrt.plans import build, check
from hyperrt.plans.cache import PlanCache
from hyperrt.session.graphs import Graphs
from tests.engines import fake_nvidia

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("alone")
RTX, GRAPH = "tensorrt-rtx", "weight_decoder"


@pytest.fixture
def trt(monkeypatch, tmp_path):
    """A machine with a GPU of sm89."""
    return fake_nvidia.machine(monkeypatch, tmp_path / "home", "tensorrt_rtx")[1]


@pytest.fixture
def compared(monkeypatch):
    """Names of the graphs that were run to compare a plan with them."""
    names = []
    really = check._expected

    def expected(bundle, name, *arguments):
        names.append(name)
        return really(bundle, name, *arguments)

    monkeypatch.setattr(check, "_expected", expected)
    return names


def compiled(target="sm89", force=False):
    bundle = Bundle.open("tiny")
    sizes = build.sizes_of(bundle, 1, 3)
    (one,) = build.compile_bundle(bundle, RTX, [target], sizes, [GRAPH], force=force)
    return one.plan


def opened():
    """A graph on the plan, as a new process opens it."""
    return Graphs(Bundle.open("tiny"), RTX, 1)


def test_a_sound_plan_is_compared_when_it_is_first_opened_and_never_again(trt, compared):
    plan = compiled()
    assert compared == [] and check.known(plan) is None
    graphs = opened()
    for _ in range(2):  # a graph of a subject is opened for each
        graphs.open(GRAPH).close()
    assert compared == [GRAPH]
    found = check.known(plan)
    assert found.against.startswith("onnxruntime 1.") and 0 <= found.error < 1e-5
    opened().open(GRAPH).close()
    assert compared == [GRAPH]


def test_a_plan_for_this_machine_was_compared_before_it_was_published(trt, compared):
    plan = compiled("current")
    assert compared == [GRAPH] and check.known(plan).error < 1e-5
    opened().open(GRAPH).close()
    assert compared == [GRAPH]


def test_another_plan_in_its_place_is_compared_again(trt, compared, monkeypatch):
    plan = compiled()
    opened().open(GRAPH).close()
    note = (plan.folder / check.NOTE).read_bytes()
    monkeypatch.setattr(build.tensorrt_build, "build", functools.partial(fake_nvidia.build, factor=1.0))
    other = compiled(force=True)
    assert other.folder == plan.folder and other.sha256 != plan.sha256
    (other.folder / check.NOTE).write_bytes(note)
    assert check.known(other) is None
    opened().open(GRAPH).close()
    assert compared == [GRAPH] * 2 and check.known(other)


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[" * 9999, "writable", "a link"], ids=lambda damage: str(damage)[:10]
)
def test_a_note_that_is_not_as_it_was_written_counts_for_nothing(trt, compared, damage, tmp_path):
    plan = compiled()
    opened().open(GRAPH).close()
    note = plan.folder / check.NOTE
    if damage == "writable":
        note.chmod(0o666)
    elif damage == "a link":
        (tmp_path / "note").write_bytes(note.read_bytes())
        note.unlink()
        note.symlink_to(tmp_path / "note")
    else:
        note.write_bytes(damage)
    opened().open(GRAPH).close()
    assert compared == [GRAPH] * 2
    opened().open(GRAPH).close()
    assert compared == [GRAPH] * 2


@pytest.mark.parametrize("factor", [1.2, np.nan])
def test_a_plan_that_computes_something_else_is_refused_every_time(trt, monkeypatch, factor):
    wrong = functools.partial(fake_nvidia.build, factor=factor)
    monkeypatch.setattr(build.tensorrt_build, "build", wrong)
    plan = compiled()
    advice = (
        f"hyperrt plans rm {plan.key.id[:12]} && hyperrt compile tiny --backend tensorrt-rtx --target sm89"
    )
    for _ in range(2):
        with pytest.raises(NumericError, match="weight_decoder computes something else") as caught:
            opened().open(GRAPH)
        assert caught.value.code == 9 and caught.value.do == advice
        assert check.known(plan) is None
    with pytest.raises(NumericError, match="use another version"):
        compiled("current", force=True)
    assert PlanCache().list() == [plan]  # the old one stays

    monkeypatch.setattr(build.tensorrt_build, "build", fake_nvidia.build)
    for command in advice.split(" && "):
        assert main.run(command.split()[1:]) == 0
    opened().open(GRAPH).close()


def test_in_a_cache_that_is_read_only_a_plan_is_compared_by_every_process(trt, compared, monkeypatch):
    plan = compiled()

    def refuse(path, *_, **options):
        raise UsageError(f"{path} cannot be written", "Read-only file system")

    monkeypatch.setattr(files, "publish", refuse)
    for process in (1, 2):
        graphs = opened()
        for _ in range(2):
            with graphs.open(GRAPH) as engine:
                assert engine.outputs
        assert compared == [GRAPH] * process
    assert check.known(plan) is None


@pytest.mark.parametrize("why", ["no ONNX Runtime", "no memory"])
def test_where_the_graph_cannot_be_run_the_plan_is_used_with_a_warning(trt, monkeypatch, caplog, why):
    plan, bundle = compiled(), Bundle.open("tiny")
    if why == "no memory":
        monkeypatch.setattr(memory, "available", lambda: 10**9)
        bundle.graphs[GRAPH] = dataclasses.replace(bundle.graphs[GRAPH], weight_bytes=2 * 10**9)
        said = "it takes about 2.0 GB of memory, and 1.0 GB are left"
    else:
        really = engines.load

        def load(backend):
            if backend == "onnxruntime":
                raise engines.BackendMissing("the backend 'onnxruntime' is not installed")
            return really(backend)

        monkeypatch.setattr("hyperrt.engines.base.load", load)
        said = "the backend 'onnxruntime' is not installed"
    with caplog.at_level(logging.WARNING, "hyperrt"):
        graphs = Graphs(bundle, RTX, 1)
        for _ in range(2):
            graphs.open(GRAPH).close()
    assert caplog.messages == [f"the plan of {GRAPH} is not compared with its graph: {said}"]
    assert check.known(plan) is None


def test_a_whole_picture_on_plans_of_another_machine(trt, compared, tmp_path, photos, capsys):
    """From the command line: compiled for sm89, drawn on sm89, compared graph by graph; then drawn again."""
    assert main.run(["compile", "tiny", "--target", "sm89"]) == 0
    arguments = ["--backend", RTX, "--images", str(photos), "-p", "a [V] mug", "--steps", "1", "-f"]
    for _ in range(2):
        assert main.run(["generate", *arguments, "-o", str(tmp_path / "mug.png")]) == 0
    assert sorted(compared) == sorted(Bundle.open("tiny").graphs)
    capsys.readouterr()
    assert main.run(["plans", "list", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert len(plans) == 6 and all(plan["last_use"] for plan in plans)
