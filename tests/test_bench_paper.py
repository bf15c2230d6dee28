"""The measurements of training: orderings, scores, plain CFG, and the plain loop."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hyperrt.bundle.bundle import packaged
from hyperrt.training.evaluation.drawn import WHITE

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def load(monkeypatch):
    """A function: name of a script -> the module."""
    for package in ("torch", "diffusers", "peft", "scipy", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.fixture
def rows(load):
    """A function: one list of values per row -> rows with them as likeness."""
    paper_rows = load("paper_rows")

    def make(*values):
        return [paper_rows.Row(str(k), {}, {"subject": np.array(one)}) for k, one in enumerate(values)]

    return make


LOW, MIDDLE, HIGH = [0.1, 0.2, 0.15, 0.12], [0.3, 0.1, 0.2, 0.25], [0.8, 0.9, 0.85, 0.8]


def test_a_sweep_rises_when_means_do_and_its_ends_do_not_touch(load, rows):
    rises, falls = load("paper_rows").rises, load("paper_rows").falls
    assert rises("", rows(LOW, MIDDLE, HIGH), "subject").held
    assert falls("", rows(HIGH, MIDDLE, LOW), "subject").held
    assert not rises("", rows(MIDDLE, LOW, HIGH), "subject").held  # not in order
    assert not rises("", rows(LOW, MIDDLE), "subject").held  # in order, but the ends touch
    assert not falls("", rows(LOW, MIDDLE, HIGH), "subject").held


def test_a_sweep_holds_in_pairs_when_the_differences_are_above_zero(load, rows):
    rises = load("paper_rows").rises
    subjects = np.array([0.1, 0.9, 0.3, 0.7])
    small = rises("", rows(subjects, subjects + np.array([0.01, 0.02, 0.01, 0.03])), "subject")
    assert small.in_pairs and not small.held  # subjects differ by more than they rise
    one_of_them = rises("", rows(subjects, subjects + np.array([0.2, 0, 0, -0.01])), "subject")
    assert not one_of_them.in_pairs
    assert not rises("", rows(subjects, subjects + 0.02, subjects + 0.01), "subject").in_pairs  # not in order
    assert rises("", rows(LOW, MIDDLE, HIGH), "subject").in_pairs


def test_not_below_holds_if_the_difference_reaches_zero(load, rows):
    not_below = load("paper_rows").not_below
    low, middle, high = rows(LOW, MIDDLE, HIGH)
    assert not_below("", high, low, "subject").held and not_below("", low, low, "subject").held
    assert not_below("", low, middle, "subject").held  # lower on average, but one subject decides
    assert not not_below("", low, high, "subject").held


def test_a_table_is_kept_with_intervals_and_drawn(load, rows, tmp_path):
    paper_rows, scoring = load("paper_rows"), load("scoring")
    scores = {name: np.array(LOW) for name in scoring.NAMES}
    table = paper_rows.Table(
        "table9", "Table 9", [paper_rows.Row("κ 1", {"kappa": 1}, scores)] * 2,
        [paper_rows.Ordering("table9_rises", False, True)], {"photos": 1},
    )  # fmt: skip
    kept = json.loads(json.dumps(table.to_json()))
    assert kept["orderings"] == {"table9_rises": False}
    assert kept["orderings_in_pairs"] == {"table9_rises": True}
    found = kept["rows"][0]["scores"]["prompt"]
    assert found["low"] < found["mean"] < found["high"] and kept["rows"][0]["kappa"] == 1
    load("paper_plots").write(table, tmp_path / "plots" / "table9.png")
    assert (tmp_path / "plots" / "table9.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def tiny():
    """An open runtime on the bundle in the wheel."""
    if "tiny" not in packaged():
        pytest.skip("the default bundle is not in this checkout")
    pytest.importorskip("onnxruntime")
    from hyperrt import Runtime

    with Runtime.open("tiny", "onnxruntime", threads=1) as runtime:
        yield runtime


def subject_of(runtime, scale: float):
    from hyperrt.lora.layout import VECTORS
    from hyperrt.lora.subject import Subject

    rng = np.random.default_rng(0)
    size = runtime.bundle.layout.size
    lora = {name: (scale * rng.standard_normal(size(name))).astype(np.float32) for name in VECTORS}
    return Subject(lora, "robot", 1, {})


def test_plain_cfg_runs_the_personalised_model_on_both_rows(load, tiny, monkeypatch):
    drawing = load("small_drawing")

    def latents(guidance, scale):
        requests = []
        sample = type(tiny).sample
        with monkeypatch.context() as patch:
            patch.setattr(tiny, "sample", lambda one: requests.append(one) or sample(tiny, one))
            subject = subject_of(tiny, scale)
            picture = drawing.draw(tiny, "a [V] robot in a forest", subject, guidance, steps=2, seed=3)
        rows = requests[0].rows
        gate, texts = ([getattr(row, name) for row in rows] for name in ("gate", "text"))
        return picture, (gate, texts, requests[0].weights)

    plain, (gate, texts, weights) = latents(drawing.Guidance(3.0, None), 0.1)
    assert (gate, texts, weights) == ([1, 1], ["", "a sks robot in a forest"], (-2, 3))
    hybrid, (gate, _, weights) = latents(drawing.Guidance(1.5, 2.0), 0.1)
    assert (gate, weights) == ([0, 1], (-2, 3))
    assert (plain != hybrid).any()  # the LoRA also changes what the empty prompt gives
    nothing = [latents(g, 0.0)[0] for g in (drawing.Guidance(3.0, None), drawing.Guidance(1.5, 2.0))]
    assert np.array_equal(*nothing)


def test_real_pictures_score_high_and_others_low(load, tiny):
    scoring = load("scoring")
    cases = scoring.cases(seed=7, count=2)
    assert [case.noun for case in cases] == ["robot", "fish"]
    assert len(cases[0].photos) == len(cases[0].photo_scenes) == 4
    assert WHITE not in cases[0].photo_scenes
    scorer = scoring.Scorer(scoring.encoder(tiny.bundle, quick=True), cases)
    assert all(places[0] == WHITE and len(places) == 2 for places in scorer.places)
    real = scorer.real()
    swapped = scorer([[c.view(scene, 900) for scene in scorer.places[k][::-1]] for k, c in enumerate(cases)])
    for name in ("identity", "identity_colours", "background"):
        assert real[name].tolist() == [1, 1]
    assert min(real["subject"]) > 0.8 and min(real["prompt"]) > 0.5 and min(real["colours"]) > 0.9
    assert max(swapped["prompt"]) < 0 and not swapped["background"].any()  # each in the other's scene
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert max(scorer([[noise, noise]] * 2)["subject"]) < min(real["subject"])


@pytest.mark.slow
def test_the_plain_loop_takes_the_same_steps_as_ours(load, tmp_path):
    """Equal losses and equal gradients; then what is compared is time alone."""
    torch = pytest.importorskip("torch")
    small_world, speed = load("small_world"), load("training_speed")
    from hyperrt.training.run.trainer import Trainer

    world = small_world.make(tmp_path, identities=8)
    settings = {"batch_size": 4, "photos": 2, "holdout": 2, "dim": 16, "lambda_": 3.0, "threads": 1}
    trainer = Trainer(world.training(tmp_path / "run", **settings))
    with torch.no_grad():  # a fresh decoder predicts no change
        for vector in trainer.decoder.offsets.values():
            vector.add_(torch.randn_like(vector), alpha=0.05)
    plain = speed.Plain(trainer)
    batch = trainer.batches.at(0)
    ours = trainer.losses(batch, None)["loss"]
    ours.backward()
    wanted = {name: p.grad.clone() for name, p in trainer.decoder.named_parameters() if p.grad is not None}
    tolerance = 0.05 if load("hyperrt.training.run.device").has_bf16(trainer.device) else 1e-3
    for way in (plain.alone, plain.shared):
        plain.decoder.zero_grad(set_to_none=True)
        assert way(batch) == pytest.approx(ours.item(), rel=tolerance)
        found = {name: p.grad for name, p in plain.decoder.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        for name in ("project.weight", "offsets.lora_kv", "offsets.lora_q"):
            assert (found[name] - wanted[name]).norm() < tolerance * wanted[name].norm()


def test_a_hypernetwork_of_table_3_is_trained_once(load, monkeypatch, tmp_path):
    subjects, small_world = load("paper_subjects"), load("small_world")
    runs: dict[str, int] = {}

    def run(config, resume, allow_changes):
        assert not allow_changes
        runs[Path(config.output).name] = config.steps
        assert resume and config.data.endswith("captioned_by_noun")

    def load_hypernet(out):
        if out.name not in runs:
            raise FileNotFoundError(out)
        return None, {"step": runs[out.name]}

    monkeypatch.setattr(subjects.train, "run", run)
    monkeypatch.setattr(subjects.checkpoint, "load_hypernet", load_hypernet)
    monkeypatch.setattr(subjects.weight_hash, "hash_of", lambda unet: "hash")
    monkeypatch.setattr(subjects.bases, "opened", lambda folder: SimpleNamespace(unet=None))
    monkeypatch.setattr(
        small_world, "captioned_by_noun", lambda world, folder: small_world.World(world.base, folder)
    )
    world = small_world.World(tmp_path / "base", tmp_path / "cache")

    def trained(lambda_, **settings):
        return subjects.trained(world, settings, lambda_, tmp_path)

    first = trained(1.0, steps=5, threads=1)
    assert first == trained(1.0, steps=5, threads=2) and len(runs) == 1
    others = trained(10.0, steps=5), trained(1.0, steps=6), trained(1.0, steps=5, batch_size=8)
    assert len({first, *others}) == 4
    assert len(runs) == 4


def test_a_cache_is_captioned_by_noun(load, tmp_path):
    small_world = load("small_world")
    from hyperrt.training.data import cache as data

    data.build(tmp_path / "cache", 9, 2, 64, workers=1)
    np.save(tmp_path / "cache" / data.LATENTS, np.zeros((9, 2, 1), np.float16))
    (tmp_path / "cache" / "text-1.npy").write_bytes(b"of other captions")
    world = small_world.World(tmp_path / "base", tmp_path / "cache")
    for _ in range(2):  # the second time it is there
        found = small_world.captioned_by_noun(world, tmp_path / "work" / "nouns")
    assert found == small_world.World(world.base, tmp_path / "work" / "nouns")
    cache = data.PictureCache.open(found.cache)
    assert np.array_equal(cache.images, data.PictureCache.open(world.cache).images)
    assert cache.latents.shape == (9, 2, 1) and not (found.cache / "text-1.npy").exists()
    texts = json.loads((found.cache / "captions.json").read_text())["texts"]
    assert [len(of_one) for of_one in texts] == [2] * 9
    assert texts[0][1] == ["a [V] robot", "a robot"] and texts[1][0] == ["a [V] fish", "a fish"]


@pytest.mark.parametrize("script", ["against_dreambooth", "paper_small", "training_speed"])
def test_a_missing_base_model_is_one_message_with_the_command_that_makes_it(
    load, script, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(sys, "argv", [script, "--base", str(tmp_path), "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        load(script).main()
    assert ended.value.code == 4
    assert "hyperrt pretrain --output RUN" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["against_dreambooth", "paper_small"])
def test_a_missing_option_is_one_message(load, script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as ended:
        load(script).main()
    assert ended.value.code == 4 and "--base or --data is missing" in capsys.readouterr().err


def test_a_bundle_of_another_base_model_is_refused(load, tiny, tmp_path):
    from hyperrt.errors import Incompatible

    drawing = load("small_drawing")
    args = argparse.Namespace(hypernet=None, bundle="tiny", quick=False)
    assert drawing.bundle_of(args, None, lambda: tiny.bundle.hashes.base_model, tmp_path).name
    with pytest.raises(Incompatible, match="--hypernet RUN"):
        drawing.bundle_of(args, None, lambda: "another", tmp_path)
    args.hypernet = tmp_path
    with pytest.raises(FileNotFoundError, match=r"hyperrt train"):
        drawing.bundle_of(args, None, lambda: "another", tmp_path)


def test_a_margin_is_from_minus_one_to_one(load):
    scoring, classifiers = load("scoring"), importlib.import_module("hyperrt.training.evaluation.classifiers")
    red, blue = (np.full((64, 64, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200)))
    judge = classifiers.SceneClassifier([red] * 5 + [blue] * 5, ["red"] * 5 + ["blue"] * 5)
    assert scoring.margin(judge, red, "red") == pytest.approx(1)
    assert scoring.margin(judge, red, "blue") == pytest.approx(-1)
    half = (red // 2 + blue // 2).astype(np.uint8)
    assert math.isclose(scoring.margin(judge, half, "red"), 0, abs_tol=1e-6)
