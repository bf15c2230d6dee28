"""Plans that are not to be trusted, TensorRT that fails, memory that runs out, no GPU: from the command line.

CUDA, TensorRT and its compiler are stand-ins; what would be handed to the deserialiser is counted.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys

import pytest

from hyperrt import Runtime
from hyperrt.bundle.bundle import Bundle
from hyperrt.cli import main
from hyperrt.engines import EngineMemoryError
from hyperrt.plans import build, private_folder
from hyperrt.plans.cache import PlanCache
from tests.engines import fake_cuda, fake_nvidia
from tests.engines.fake_cuda import H100, NEW, OLD
from tests.engines.fake_nvidia import Code
from tests.hyperrt.command_line import is_three_lines
from tests.hyperrt.some_plans import COMPILE, flip

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("alone")
PROMPT = "a [V] mug on a beach"


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """A folder with plans of three branches and of two, compiled once."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        fake_nvidia.machine(patch, folder)
        bundle = Bundle.open("tiny")
        for branches in (3, 2):
            sizes = build.sizes_of(bundle, 1, branches)
            list(build.compile_bundle(bundle, "tensorrt", ["current"], sizes))
    return folder


@pytest.fixture
def nvidia(plans, monkeypatch, tmp_path):
    """Stand-ins for CUDA and TensorRT, and a cache with these plans."""
    shutil.copytree(plans, tmp_path / "home")
    return fake_nvidia.machine(monkeypatch, tmp_path / "home")


@pytest.fixture
def generate(nvidia, capsys):
    """Draw the base model: (exit code, stderr, how often something was handed to the deserialiser)."""

    def run():
        capsys.readouterr()
        before = nvidia[1].loaded
        arguments = ["--backend", "tensorrt", "-p", "a mug", "--steps", "1", "-o", "mug.png", "-f"]
        code = main.run(["generate", *arguments])
        return code, last_lines(capsys.readouterr().err), nvidia[1].loaded - before

    return run


def last_lines(error):
    """Of what was written to stderr the error, without the progress before it."""
    return error[error.rfind("error: ") :] if "error: " in error else error


@pytest.fixture
def first(nvidia):
    """The plan that drawing loads first."""
    return next(plan for plan in PlanCache().list() if plan.graph_name == "text_encoder")


def advice_of(error):
    return next(line for line in error.splitlines() if line.startswith("  do:")).removeprefix("  do:").strip()


def follow(advice):
    """Do what an error says, command by command."""
    for command in advice.split(" && "):
        if command.startswith("hyperrt "):
            assert main.run(command.split()[1:]) == 0
        else:
            subprocess.run(command, shell=True, check=True)


# Plans that are never handed to the deserialiser


def truncated(plan, elsewhere):
    os.truncate(plan.path, plan.bytes - 1)


def flipped(plan, elsewhere):
    flip(plan.path, 8 * plan.bytes // 2)


def of_a_flipped_record(plan, elsewhere):
    flip(plan.folder / "plan.json", 800)


def writable_by_a_group(plan, elsewhere):
    plan.path.chmod(0o620)


def in_a_folder_that_a_group_may_write(plan, elsewhere):
    plan.folder.chmod(0o770)


def in_a_cache_that_a_group_may_write(plan, elsewhere):
    plan.folder.parent.chmod(0o770)


def a_link(plan, elsewhere):
    plan.path.rename(elsewhere)
    plan.path.symlink_to(elsewhere)


def of_a_folder_that_is_a_link(plan, elsewhere):
    plan.folder.rename(elsewhere)
    plan.folder.symlink_to(elsewhere)


def of_another_graph(plan, elsewhere):
    other = next(one for one in PlanCache().list() if one.graph_name == "context")
    shutil.rmtree(plan.folder)
    shutil.copytree(other.folder, plan.folder)


DAMAGE = [
    truncated, flipped, of_a_flipped_record, writable_by_a_group, in_a_folder_that_a_group_may_write,
    in_a_cache_that_a_group_may_write, a_link, of_a_folder_that_is_a_link, of_another_graph,
]  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_plan_not_to_be_trusted_is_refused_with_8_and_what_it_says_helps(damage, generate, first, tmp_path):
    damage(first, tmp_path / "elsewhere")
    code, error, loaded = generate()
    assert (code, loaded) == (8, 0) and is_three_lines(error)
    advice = advice_of(error)
    assert advice.endswith(COMPILE)
    follow(advice)
    assert generate()[0] == 0


def test_a_plan_of_another_user_is_refused_with_8(generate, first, monkeypatch):
    stranger = os.geteuid() + 1
    judged = private_folder._judge

    def judge(path, found):
        if path == first.path:
            found = os.stat_result([*found[:4], stranger, *found[5:10]])
        judged(path, found)

    monkeypatch.setattr(private_folder, "_judge", judge)
    code, error, loaded = generate()
    assert (code, loaded) == (8, 0) and is_three_lines(error)
    assert f"belongs to user {stranger}" in error
    assert advice_of(error) == f"hyperrt plans rm {first.key.id[:12]} && {COMPILE}"


def of_another_version(monkeypatch):
    monkeypatch.setattr(build, "version", lambda backend: "11.5.0.1")
    return "TensorRT 11.4.0.106", "TensorRT 11.5.0.1"


def of_another_card(monkeypatch):
    monkeypatch.setattr("hyperrt.engines.nvidia.tensorrt.target", lambda vendor, device=0: "sm90 NVIDIA H200")
    return "sm89 Fake RTX", "sm90 NVIDIA H200"


def of_another_bundle(monkeypatch):
    monkeypatch.setattr(build, "graph_hash", lambda graph: "cd" * 32)
    return "of tiny was built by", "graph cdcdcdcdcdcd"


OTHERS = [of_another_version, of_another_card, of_another_bundle]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
def test_a_plan_for_something_else_is_refused_with_5_and_both_are_named(other, generate, first, monkeypatch):
    there, here = other(monkeypatch)
    code, error, loaded = generate()
    assert (code, loaded) == (5, 0) and is_three_lines(error)
    assert there in error and here in error and advice_of(error) == COMPILE


def test_the_command_for_other_sizes_builds_what_was_missing(generate):
    for plan in PlanCache().list():
        if dict(plan.key.sizes).get("branches") == 2:
            shutil.rmtree(plan.folder)
    code, error, _ = generate()
    assert code == 5 and advice_of(error) == f"{COMPILE} --branches 2"
    follow(advice_of(error))
    assert generate()[0] == 0


def test_without_any_plan_it_ends_with_4(generate):
    assert main.run(["plans", "rm", "--all"]) == 0
    code, error, loaded = generate()
    assert (code, loaded) == (4, 0) and is_three_lines(error) and advice_of(error) == COMPILE


# TensorRT that fails


def test_a_plan_that_tensorrt_does_not_load_ends_with_5_and_the_way_to_another(generate, first, nvidia):
    _, trt = nvidia
    trt.fail.add("deserialize")
    code, error, loaded = generate()
    assert (code, loaded) == (5, 1) and is_three_lines(error) and "it is damaged" in error
    assert advice_of(error) == f"hyperrt plans rm {first.key.id[:12]} && {COMPILE}"
    trt.fail.clear()
    follow(advice_of(error))
    assert generate()[0] == 0


@pytest.mark.parametrize("fault", ["context", "execute", "deserialize"])
def test_a_gpu_that_is_full_ends_with_6(generate, nvidia, fault):
    _, trt = nvidia
    trt.fail.add(fault)
    trt.says = "OutOfMemory (Requested size was 9 bytes.)"
    code, error, _ = generate()
    assert code == 6 and is_three_lines(error) and "OutOfMemory" in error and "--low-memory" in error
    trt.fail.clear()
    assert generate()[0] == 0


def test_a_graph_that_fails_to_run_ends_with_7(generate, nvidia):
    nvidia[1].fail.add("execute")
    code, error, _ = generate()
    assert code == 7 and is_three_lines(error) and "an illegal memory access" in error


# Memory


def test_memory_that_runs_out_while_compiling_leaves_the_old_plans(generate, monkeypatch, capsys):
    def full(recipe, progress=None):
        with open(recipe.output, "wb") as file:
            file.write(b"half")
        raise EngineMemoryError("compiling failed", "memory ran out", "end other programs")

    before = {plan.key: plan.sha256 for plan in PlanCache().list()}
    names = sorted(os.listdir(PlanCache().folder))
    monkeypatch.setattr(build.tensorrt_build, "build", full)
    assert main.run(["compile", "tiny", "--backend", "tensorrt", "--force"]) == 6
    assert is_three_lines(last_lines(capsys.readouterr().err))
    assert {plan.key: plan.sha256 for plan in PlanCache().list()} == before
    assert sorted(os.listdir(PlanCache().folder)) == names
    assert generate()[0] == 0


def test_wherever_memory_runs_out_the_old_subject_is_drawn_to_the_bit(nvidia, drawn_photos):
    cuda, _ = nvidia

    def latents(runtime, subject):
        return runtime.generate(PROMPT, subject, steps=1, seed=3).latents.tobytes()

    with Runtime.open("tiny", "tensorrt") as runtime:
        old = runtime.personalize(drawn_photos[:1], "mug")
        expected = latents(runtime, old)
        for room in itertools.count():
            cuda.room = room
            try:
                found = latents(runtime, runtime.personalize(drawn_photos[1:2], "mug"))
                break
            except EngineMemoryError as error:
                assert error.code == 6 and error.why and error.do
            cuda.room = 10_000
            assert latents(runtime, old) == expected
    assert room > 10 and found != expected


# No GPU


MACHINES = {  # GPUs or no driver, CUDA of the driver, what is said
    "no driver": (None, NEW, ("there is no NVIDIA driver", "install NVIDIA's driver")),
    "no GPU visible": ((), NEW, ("no NVIDIA GPU is visible", "nvidia-smi")),
    "an old driver": ((H100,), OLD, ("driver version is insufficient", "hyperrt doctor")),
}


@pytest.mark.parametrize(("gpus", "version", "said"), MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("command", ["generate", "compile", "doctor"])
def test_without_a_driver_that_shows_a_gpu_it_ends_with_7_and_says_so(
    nvidia, capsys, monkeypatch, tmp_path, command, gpus, version, said
):
    cuda, trt = nvidia
    cuda.no_gpu = Code.cudaErrorInsufficientDriver if gpus else Code.cudaErrorNoDevice
    if gpus is None:
        fake_cuda.uninstall(monkeypatch)
    else:
        fake_cuda.install(monkeypatch, tmp_path, *gpus, cuda=version)
    arguments = {"generate": ["-p", "a mug", "-o", "mug.png"], "compile": ["tiny"], "doctor": []}[command]
    assert main.run([command, *arguments, "--backend", "tensorrt"]) == 7
    out, error = capsys.readouterr()
    assert is_three_lines(last_lines(error)) and trt.loaded == 0
    assert all(words in out + error for words in said)


def test_without_the_library_of_cuda_it_ends_with_7(nvidia, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.delitem(sys.modules, "cuda.bindings")
    assert main.run(["generate", "-p", "a mug", "-o", "mug.png", "--backend", "tensorrt"]) == 7
    error = last_lines(capsys.readouterr().err)
    assert is_three_lines(error) and "does not start" in error and "pip install 'hyperrt[tensorrt]'" in error
