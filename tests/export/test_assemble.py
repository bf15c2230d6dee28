import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from export import assemble, export_bundle, families, onnx_graph, verify
from export.errors import ExportError, ParityError
from hyperrt.bundle import Bundle
from hyperrt.errors import NotFound, UsageError
from training import checkpoint

ROOT = Path(__file__).resolve().parents[2]

KILLED = """
import os, signal, sys
from pathlib import Path
from export import export_bundle, onnx_graph, verify
from hyperrt import bundle

def write(graph, folder):
    (folder / f"{graph.name}.onnx").write_bytes(b"half")
    reached(graph.name)

def reached(now):
    if now == moment:
        os.kill(os.getpid(), signal.SIGKILL)

onnx_graph.write = write
verify.ladder = lambda *_: {}
bundle.write_manifest = lambda *_: reached("manifest")
moment, *paths = sys.argv[1:]
base, hypernet, output = map(Path, paths)
export_bundle("tiny", base, hypernet, output, force=True)
"""


@pytest.fixture
def ready_graphs(monkeypatch, exported):
    """Graphs are copied from the bundle `exported` in place of being exported; parity is believed."""
    copy = lambda graph, folder: shutil.copy(exported / f"{graph.name}.onnx", folder)  # noqa: E731
    monkeypatch.setattr(onnx_graph, "write", copy)
    figures = dict.fromkeys(verify.TOLERANCE, 0.0)
    monkeypatch.setattr(verify, "ladder", lambda *_: figures)


def test_the_runtime_opens_what_was_exported(exported, source):
    bundle = Bundle.open(exported)
    bundle.verify()
    assert bundle.layout == source.decoder.layout
    assert bundle.prediction_type == "v_prediction"
    assert (bundle.image_size, bundle.latent.channels, bundle.latent.size) == (64, 8, 8)


def test_the_base_model_is_known_by_the_hash_that_training_uses(exported, trained):
    about = json.loads((trained.hypernet / "hypernet.json").read_text())
    assert Bundle.open(exported).hashes.base_model == about["base_model"]


def test_the_tokenizer_in_the_bundle_counts_tokens_as_the_text_encoder_expects(exported, source):
    from hyperrt.tokenizer import Tokenizer

    bundle = Bundle.open(exported)
    text = "a sks robot on a beach"
    expected = source.base.tokenizer(text, padding="max_length").input_ids
    assert Tokenizer(bundle.tokenizer, bundle.prompts.max_tokens).encode(text).ids.tolist() == expected


def test_two_exports_of_one_model_differ_in_nothing_but_measured_figures(
    exported, trained, tmp_path, ready_graphs
):
    again = export_bundle("tiny", trained.base, trained.hypernet, tmp_path / exported.name)
    first, second = (json.loads((folder / "bundle.json").read_text()) for folder in (exported, again))
    assert first | {"parity": 0} == second | {"parity": 0}


def test_progress_counts_the_stages(trained, tmp_path, monkeypatch, ready_graphs):
    seen = []
    export_bundle(
        "tiny", trained.base, trained.hypernet, tmp_path / "new", progress=lambda *now: seen.append(now)
    )
    assert seen[0] == (0, assemble.STAGES, "load")
    assert [done for done, _, _ in seen] == list(range(len(seen)))


def test_a_failed_rung_leaves_nothing(trained, tmp_path, monkeypatch, ready_graphs):
    def fails(*_):
        raise ParityError("a rung failed")

    monkeypatch.setattr(verify, "ladder", fails)
    with pytest.raises(ParityError):
        export_bundle("tiny", trained.base, trained.hypernet, tmp_path / "new")
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
    monkeypatch.setattr(assemble, "load", lambda *_: pytest.fail("it started to work"))
    with pytest.raises(UsageError, match="exists"):
        export_bundle("tiny", trained.base, trained.hypernet, tmp_path)


def test_an_unknown_family_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(UsageError, match=r"no model family 'sd9'(?s:.*)tiny"):
        export_bundle("sd9", None, None, tmp_path / "new")


@pytest.mark.parametrize("missing", ["base", "hypernet"])
def test_a_source_that_is_not_there_is_named(missing, trained, tmp_path):
    folders = vars(trained) | {missing: tmp_path / "nowhere"}
    with pytest.raises(NotFound, match="nowhere"):
        export_bundle("tiny", folders["base"], folders["hypernet"], tmp_path / "new")


def test_a_hypernetwork_that_is_not_given_is_asked_for(trained, tmp_path):
    with pytest.raises(UsageError, match="--hypernet is not given"):
        export_bundle("tiny", trained.base, None, tmp_path / "new")


def test_without_a_base_it_is_that_of_the_hypernetworks_training(trained):
    assert assemble.load(families.get("tiny"), None, trained.hypernet).folder == trained.base


def test_a_base_that_has_moved_since_the_training_is_asked_for(trained, tmp_path):
    hypernet = edited_hypernet(trained, tmp_path, lambda about: about["training"].update(base="moved"))
    with pytest.raises(NotFound, match=r"trained on moved, which is not there(?s:.*)--base BASE"):
        assemble.load(families.get("tiny"), None, hypernet)


@pytest.mark.parametrize("given", ["base", "hypernet"])
def test_random_weights_and_trained_ones_exclude_each_other(given, trained):
    folders = dict.fromkeys(("base", "hypernet")) | {given: getattr(trained, given)}
    with pytest.raises(UsageError, match=f"--{given} and --random-weights"):
        assemble.load(families.get("tiny"), **folders, random_weights=0)


def test_a_hypernetwork_of_another_base_model_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "hash_of", lambda module: "0" * 64)
    with pytest.raises(ExportError, match="of another base model"):
        export_bundle("tiny", trained.base, trained.hypernet, tmp_path / "new")


def test_a_hypernetwork_for_another_image_encoder_is_refused(trained):
    source = assemble.load(families.get("tiny"), trained.base, trained.hypernet)
    source.base.image_encoder.config.hidden_size = 48
    with pytest.raises(ExportError, match="features of 32 numbers, the image encoder makes 48"):
        families._check_fit(source.base, source.decoder, checkpoint.hash_of(source.base.unet))


def test_a_hypernetwork_of_another_layout_is_refused(trained, tmp_path):
    def renamed(about):
        site = about["layout"]["sites"][0]
        site["path"] = "elsewhere." + site["path"]

    with pytest.raises(ExportError, match="their LoRA layouts differ"):
        assemble.load(families.get("tiny"), None, edited_hypernet(trained, tmp_path, renamed))


def edited_hypernet(trained, tmp_path, edit):
    """A copy of the hypernetwork's folder, its hypernet.json changed in place by `edit`."""
    folder = shutil.copytree(trained.hypernet, tmp_path / "edited")
    about = json.loads((folder / "hypernet.json").read_text())
    edit(about)
    (folder / "hypernet.json").write_text(json.dumps(about))
    return folder
