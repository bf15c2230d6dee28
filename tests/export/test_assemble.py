import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from hyperrt.bundle import bundle, memory
from hyperrt.bundle.bundle import Bundle
from hyperrt.errors import NotFound, ResourceError, UsageError
from hyperrt.export import export_bundle, onnx_graph, read_source, verify
from hyperrt.export.errors import ExportError, ParityError
from hyperrt.training.model import base_model
from hyperrt.training.run import checkpoint
from tests.export.command_line import config, config_of

ROOT = Path(__file__).resolve().parents[2]

KILLED = """
import os, signal, sys
from hyperrt.export import export_bundle, onnx_graph, verify
from hyperrt.cli.configs import ExportConfig
from hyperrt.bundle import bundle

def write(graph, skeletons, modules, folder, *options):
    (folder / f"{graph.name}.onnx").write_bytes(b"half")
    reached(graph.name)
    return onnx_graph.Written(0, 0)

def reached(now):
    if now == moment:
        os.kill(os.getpid(), signal.SIGKILL)

onnx_graph.write = write
verify.run_checks = lambda *_: {}
bundle.write_manifest = lambda *_: reached("manifest")
moment, *paths = sys.argv[1:]
base, hypernet, output = paths
export_bundle(ExportConfig(model="tiny", base=base, hypernet=hypernet, output=output, force=True))
"""


@pytest.fixture
def ready_graphs(monkeypatch, exported):
    """Copies the graphs of `exported` instead of exporting them, and checks nothing."""
    described = Bundle.open(exported).graphs

    def copy(graph, skeletons, modules, folder, *options):
        shutil.copy(exported / f"{graph.name}.onnx", folder)
        return onnx_graph.Written(described[graph.name].weight_bytes, described[graph.name].row_bytes)

    monkeypatch.setattr(onnx_graph, "write", copy)
    figures = dict.fromkeys(verify.TOLERANCE, 0.0)
    monkeypatch.setattr(verify, "run_checks", lambda *_: figures)


def test_the_runtime_opens_what_was_exported(exported, source):
    opened = Bundle.open(exported)
    opened.verify()
    assert opened.layout == source.layout
    assert opened.prediction_type == "v_prediction"
    assert (opened.image_size, opened.latent.channels, opened.latent.size) == (64, 8, 8)


def test_the_hash_of_the_base_model_is_that_of_training(exported, trained):
    about = json.loads((trained.hypernet / "hypernet.json").read_text())
    assert Bundle.open(exported).hashes.base_model == about["base_model"]


def test_the_tokenizer_in_the_bundle_counts_tokens_as_the_text_encoder_expects(exported, source):
    from hyperrt.sampling.tokenizer import Tokenizer

    bundle = Bundle.open(exported)
    text = "a sks robot on a beach"
    expected = source.tokenizer(text, padding="max_length").input_ids
    assert Tokenizer(bundle.tokenizer, bundle.prompts.max_tokens).encode(text).ids.tolist() == expected


def test_two_exports_of_one_model_differ_in_nothing_but_measured_figures(
    exported, trained, tmp_path, ready_graphs
):
    again = export_bundle(config_of(trained, tmp_path / exported.name))
    first, second = (json.loads((folder / "bundle.json").read_text()) for folder in (exported, again))
    assert first | {"parity": 0} == second | {"parity": 0}


def test_progress_counts_the_stages(trained, tmp_path, monkeypatch, ready_graphs):
    seen = []
    export_bundle(config_of(trained, tmp_path / "new"), lambda *stage: seen.append(stage))
    stages = 1 + len(bundle.GRAPHS) + len(verify.TOLERANCE)
    assert seen[0] == (0, stages, "check")
    assert [done for done, _, _ in seen] == list(range(len(seen)))


@pytest.mark.parametrize("level", ["none", "full"])
def test_each_part_is_read_once_and_the_unet_twice_to_check_its_hash_before_the_work(
    level, trained, tmp_path, monkeypatch, ready_graphs
):
    reads = Counter()
    read_part, read = base_model.read_part, checkpoint.read

    def counted_part(folder, name, dtype):
        reads[name] += 1
        return read_part(folder, name, dtype)

    def counted(path, values=True):
        reads["weight_decoder"] += values
        return read(path, values)

    monkeypatch.setattr(base_model, "read_part", counted_part)
    monkeypatch.setattr(checkpoint, "read", counted)
    export_bundle(config_of(trained, tmp_path / "new", verify=level))
    once = dict.fromkeys(("image_encoder", "text_encoder", "vae", "weight_decoder"), 1)
    assert reads == {"unet": 2, **once}


def test_a_failed_check_leaves_nothing(trained, tmp_path, monkeypatch, ready_graphs):
    def fails(*_):
        raise ParityError("a check failed")

    monkeypatch.setattr(verify, "run_checks", fails)
    with pytest.raises(ParityError):
        export_bundle(config_of(trained, tmp_path / "new"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("old", "moment"), [(True, "context"), (False, "manifest")],
    ids=["at a graph, over an old bundle", "at the end, into a new folder"],
)  # fmt: skip
def test_a_killed_export_leaves_the_old_bundle_or_none(old, moment, trained, tmp_path):
    output = tmp_path / "bundle"
    if old:
        output.mkdir()
        (output / "bundle.json").write_text("old")
    arguments = [moment, str(trained.base), str(trained.hypernet), str(output)]
    command = [sys.executable, "-c", KILLED, *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [path.read_text() for path in output.glob("*")] == ["old"] * old


def test_a_bundle_that_exists_is_refused_before_the_work(trained, tmp_path, monkeypatch):
    (tmp_path / "bundle.json").write_text("{}")
    monkeypatch.setattr(read_source, "read", lambda *_: pytest.fail("it started to work"))
    with pytest.raises(UsageError, match="exists"):
        export_bundle(config_of(trained, tmp_path))


def test_an_unknown_family_is_refused_and_the_families_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"no model family 'sd9'(?s:.*)tiny"):
        export_bundle(config("sd9", tmp_path / "new"))


@pytest.mark.parametrize("missing", ["base", "hypernet"])
def test_a_missing_input_is_named(missing, trained, tmp_path):
    folders = vars(trained) | {missing: tmp_path / "nowhere"}
    with pytest.raises(NotFound, match="nowhere"):
        export_bundle(config("tiny", tmp_path / "new", **folders))


def test_an_export_without_a_hypernetwork_asks_for_it(trained, tmp_path):
    with pytest.raises(UsageError, match="--hypernet is not given"):
        export_bundle(config("tiny", tmp_path / "new", base=trained.base))


def test_the_default_base_model_is_that_of_the_training(trained, source):
    other = read_source.read(config("tiny", hypernet=trained.hypernet))
    assert other.parts["unet"].hash(half=False) == source.parts["unet"].hash(half=False)


def test_a_base_model_that_moved_after_the_training_is_asked_for(trained, tmp_path):
    hypernet = edited_hypernet(trained, tmp_path, lambda about: about["training"].update(base="moved"))
    with pytest.raises(NotFound, match=r"trained on moved, which is not there(?s:.*)--base BASE"):
        read_source.read(config("tiny", hypernet=hypernet))


@pytest.mark.parametrize("given", ["base", "hypernet"])
def test_random_weights_and_trained_ones_exclude_each_other(given, trained):
    with pytest.raises(UsageError, match=f"--{given} and --random-weights"):
        read_source.read(config("tiny", **{given: getattr(trained, given)}, random_weights=0))


def test_a_hypernetwork_of_another_base_model_is_refused(trained, tmp_path):
    hypernet = edited_hypernet(trained, tmp_path, lambda about: about.update(base_model="0" * 64))
    with pytest.raises(ExportError, match="of another base model"):
        export_bundle(config("tiny", tmp_path / "new", base=trained.base, hypernet=hypernet))


def test_a_hypernetwork_for_another_image_encoder_is_refused(trained, source, monkeypatch):
    monkeypatch.setattr(source.parts["image_encoder"].skeleton.config, "hidden_size", 48)
    monkeypatch.setattr(read_source, "_source", lambda *_: source)
    with pytest.raises(ExportError, match="features of 32 numbers, the image encoder makes 48"):
        read_source.read(config_of(trained))


def test_a_hypernetwork_of_another_layout_is_refused(trained, tmp_path):
    def renamed(about):
        site = about["layout"]["sites"][0]
        site["path"] = "elsewhere." + site["path"]

    with pytest.raises(ExportError, match="their LoRA layouts differ"):
        read_source.read(config("tiny", hypernet=edited_hypernet(trained, tmp_path, renamed)))


@pytest.mark.parametrize(
    ("available", "free", "match"),
    [
        (10**6, 10**12, "not enough memory(?s:.*)GB are available"),
        (10**12, 1000, "no room(?s:.*)0 MB are free"),
    ],
    ids=["memory", "disk"],
)  # fmt: skip
def test_too_little_disk_or_memory_is_refused_before_the_work(
    available, free, match, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory, "available", lambda: available)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(onnx_graph, "write", lambda *_: pytest.fail("it started to work"))
    with pytest.raises(ResourceError, match=match):
        export_bundle(config_of(trained, tmp_path / "new"))


def edited_hypernet(trained, tmp_path, edit):
    """A copy of the hypernetwork's folder, with hypernet.json as `edit` changes it in place."""
    folder = shutil.copytree(trained.hypernet, tmp_path / "edited")
    about = json.loads((folder / "hypernet.json").read_text())
    edit(about)
    (folder / "hypernet.json").write_text(json.dumps(about))
    return folder
