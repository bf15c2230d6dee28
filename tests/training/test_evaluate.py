"""Whole evaluations with the default bundle, one step, three prompts and small scorers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from click.testing import CliRunner
from PIL import Image

from hyperrt.bundle.bundle import packaged
from hyperrt.errors import BadInput, NotFound
from hyperrt.photos import load
from hyperrt.training import evaluate
from hyperrt.training.data import scenes
from hyperrt.training.evaluation import drawn, identity_encoder, prompt_packs
from hyperrt.training.evaluation.results import SubjectResult
from hyperrt.training.evaluation.scorers import ClipScorer, DinoScorer
from hyperrt.training.run import contrastive

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NUMBER = 3  # prompts


@pytest.fixture(autouse=True, scope="module")
def few_prompts():
    if "tiny" not in packaged():
        pytest.skip("the default bundle is not in this checkout")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dreambench-objects", "dreambench-live", "hyperrt-faces-v1"):
            pack = prompt_packs.PACKS[name]
            shorter = dataclasses.replace(pack, templates=pack.templates[:NUMBER])
            patch.setitem(prompt_packs.PACKS, name, shorter)
        yield


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> Path:
    """`can` (a drawn mug, three photos and a broken one), `dog` (a drawn bird, one photo), `vase` (empty)."""
    folder = tmp_path_factory.mktemp("subjects")
    for name, noun, count in (("can", "mug", 3), ("dog", "bird", 1), ("vase", "fish", 0)):
        (folder / name).mkdir()
        for k in range(count):
            rng = np.random.default_rng(k)
            photo = scenes.scene(scenes.drawn_subject(noun, "test", 5), scenes.BACKGROUNDS[k], rng, 96)
            Image.fromarray(photo).save(folder / name / f"{k}.png")
    (folder / "can" / "3.png").write_bytes(b"broken")
    (folder / "thing").mkdir()
    return folder


def ended(*options: object) -> tuple[int, str]:
    result = CliRunner().invoke(evaluate.main, [*map(str, options)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def options(subjects, networks) -> list[object]:
    return [
        "--protocol", "dreambench", "--subjects", subjects, "--steps", 1, "--cpu", "--guidance-scale", 3.5,
        "--clip", networks.clip, "--dino", networks.dino, "--threads", 1,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def out(options, tmp_path_factory) -> Path:
    """The output of a finished evaluation with two pictures of each prompt."""
    folder = tmp_path_factory.mktemp("out") / "here"
    code, output = ended("tiny", *options, "--pictures", 2, "--output", folder)
    assert code == 0, output
    assert output.splitlines()[-1] == str(folder / "report.json")
    return folder


def test_the_scores_equal_those_of_a_plain_loop_over_the_files(out, subjects, networks):
    report = report_of(out)
    clip, dino = ClipScorer(str(networks.clip), CPU), DinoScorer(str(networks.dino), CPU)
    means = {"clip_i": [], "clip_t": [], "dino": []}
    for name, noun in (("can", "can"), ("dog", "dog")):
        photos = load.load_folder(subjects / name).images
        pictures = {path: load.load_image(path) for path in sorted((out / "pictures" / name).iterdir())}
        assert len(pictures) == 2 * NUMBER
        scores = {key: [] for key in means}
        for path, picture in pictures.items():
            for key, scorer in (("clip_i", clip), ("dino", dino)):
                feature = scorer.features([picture])[0]
                scores[key].append(np.mean([feature @ scorer.features([photo])[0] for photo in photos]))
            place = ("in the jungle", "in the snow", "on the beach")[int(path.name[:2])]
            text = clip.text_features([f"a {noun} {place}"])[0]
            scores["clip_t"].append(clip.features([picture])[0] @ text)
        for key, values in scores.items():
            means[key].append(np.mean(values))
    for key, values in means.items():
        assert report["figures"][key]["mean"] == pytest.approx(np.mean(values), abs=1e-5)
        assert report["figures"][key]["subjects"] == 2
    average = np.mean([report["figures"][key]["mean"] for key in means])
    assert report["figures"]["avg"]["mean"] == pytest.approx(average)


def test_the_report_lists_settings_and_what_is_missing(out):
    report = report_of(out)
    assert report["absent"] == {} and set(report["scorers"]) == {"clip", "dino"}
    settings = report["settings"]
    assert (settings["steps"], settings["images"], settings["seed"], settings["kappa"]) == (1, 2, 42, 1.0)
    assert settings["setting"].startswith("custom")
    assert [name.partition(":")[0] for name in settings["settings_known"]] == ["official", "fast"]
    assert not report["comparable"]
    assert any("2 subjects of the 30" in reason for reason in report["not_comparable_because"])
    assert any("clip is not a network of the size" in reason for reason in report["not_comparable_because"])
    assert any("1 steps, not 30" in reason for reason in report["not_comparable_because"])
    assert len(report["missing_subjects"]) == 27
    assert [name for name, _ in report["left_out"]] == ["thing"]
    results = {result["name"]: result for result in report["subjects"]}
    assert [name for name, _ in results["can"]["left_out"]] == ["3.png"]
    assert "holds no photos" in results["vase"]["reason"] and not results["vase"]["scores"]
    assert [(item["number"], item["image"], item["seed"]) for item in results["dog"]["pictures"]] == [
        (number, k, 42 + k) for number in range(NUMBER) for k in range(2)
    ]
    assert report["bundle"]["family"] == "tiny" and report["commit"]
    assert [prompt["pictures"] for prompt in report["prompts"]] == [4] * NUMBER
    cfg, hm_cfg = report["paper"]["tables"]
    assert cfg["rows"][-1][2:] == [0.739, 0.846, 0.293, 0.626]
    assert cfg["doubt"].endswith("HM-CFG at w + 1 = 3.5, κ = 1, and the table with CFG at w + 1 = 5")
    assert hm_cfg["doubt"] == ""


def test_the_error_names_the_output_if_the_protocol_has_no_folder(tmp_path):
    config = evaluate.EvaluateConfig(protocol="drawn", output=tmp_path / "out", bundle="tiny")
    with pytest.raises(BadInput, match=r"nothing in .*out can be scored"):
        evaluate._check_any_scored(config, [SubjectResult("robot", "robot", "drawn-v1", reason="flat")])


def test_real_photos_are_compared_with_the_published_scores(out, subjects, networks):
    calibration = report_of(out)["calibration"]
    assert (calibration["dino"]["published"], calibration["clip_i"]["published"]) == (0.774, 0.885)
    for key, scorer in (
        ("dino", DinoScorer(str(networks.dino), CPU)),
        ("clip_i", ClipScorer(str(networks.clip), CPU)),
    ):
        features = scorer.features(load.load_folder(subjects / "can").images)
        pairs = [features[i] @ features[j] for i in range(3) for j in range(3) if i != j]
        assert calibration[key]["leave_self_out"] == pytest.approx(
            np.mean(pairs), abs=1e-6
        )  # dog has one photo
        everything = (np.mean(features @ features.T) + 1) / 2
        assert calibration[key]["with_self"] == pytest.approx(everything, abs=1e-6)
        assert calibration[key]["difference"] == pytest.approx(
            np.mean(pairs) - calibration[key]["published"], abs=1e-6
        )
        assert calibration[key]["agrees"] is None and "not all 30" in calibration[key]["note"]


def test_real_photos_can_be_scored_without_pictures(out, options, tmp_path):
    code, output = ended(*options, "--calibrate", "--output", tmp_path)
    assert code == 0, output
    report = report_of(tmp_path)
    assert report["calibration"] == report_of(out)["calibration"]
    assert (report["figures"], report["pictures"], report["missing_pictures"]) == ({}, 0, 0)


def test_every_link_of_the_page_leads_to_a_file(out):
    page = (out / "index.html").read_text()
    links = set(links_of(page))
    assert len(links) == 2 * 2 * NUMBER + 4 + 1  # pictures, photos, the plot
    assert all((out / link).is_file() for link in links)
    assert "PatchDPO" in page and page.count("<td>This run</td>") == 1
    assert "This run has no row here: it was drawn with HM-CFG at w + 1 = 3.5" in page


def links_of(page: str) -> list[str]:
    return [part.partition('"')[0] for part in page.split('src="')[1:]]


def test_existing_pictures_get_the_same_scores_and_nothing_is_drawn(out, options, tmp_path):
    pictures = ["--score", out / "pictures", "--pictures", 2]
    code, output = ended(*options, *pictures, "--output", tmp_path / "again")
    assert code == 0, output
    report = report_of(tmp_path / "again")
    assert report["figures"] == report_of(out)["figures"]
    assert report["bundle"] is None
    assert not (tmp_path / "again" / "pictures").exists()
    links = links_of((tmp_path / "again" / "index.html").read_text())
    assert all((tmp_path / "again" / link).is_file() for link in links)


def test_a_second_run_needs_resume_and_then_draws_nothing(out, options):
    before = report_of(out)
    code, output = ended("tiny", *options, "--pictures", 2, "--output", out)
    assert code == 2 and "--resume" in output
    code, output = ended("tiny", *options, "--pictures", 2, "--output", out, "--resume")
    assert code == 0, output
    after = report_of(out)
    assert after["figures"] == before["figures"]
    assert [result["kept"] for result in after["subjects"]] == [2 * NUMBER, 2 * NUMBER, 0]


def test_a_scorer_without_weights_is_unavailable_and_never_zero(options, tmp_path):
    without = [option for option in options if "dino" not in str(option) and "clip" not in str(option)]
    face = ["--protocol", "faces", "--scorers", "clip,dino,face", "--face", "--limit", 1, "--fast"]
    code, output = ended(
        "tiny", *without, *face, "--dino", "nobody/nothing", "--offline", "--output", tmp_path
    )
    assert code == 0, output
    report = report_of(tmp_path)
    assert set(report["absent"]) == {"clip", "dino", "face"}
    assert "no weights were given" in report["absent"]["clip"]
    assert "hub" in report["absent"]["dino"]
    assert report["figures"] == {} and report["pictures"] == NUMBER
    assert any("hyperrt-faces-v1" in reason for reason in report["not_comparable_because"])
    assert "Nothing was scored" in (tmp_path / "index.html").read_text()


def test_drawn_subjects_have_their_own_scorers(tmp_path, monkeypatch):
    monkeypatch.setattr(identity_encoder, "SCHEDULE", dataclasses.replace(identity_encoder.SCHEDULE, steps=2))
    monkeypatch.setattr(identity_encoder, "SUBJECTS", 24)
    monkeypatch.setattr(contrastive, "VALIDATION", 8)
    monkeypatch.setattr(drawn, "PHOTO_SIZE", 64)
    common = [
        "--protocol",
        "drawn",
        "--fast",
        "--steps",
        1,
        "--cpu",
        "--encoders",
        tmp_path / "encoders",
    ]
    code, output = ended("tiny", *common, "--limit", 2, "--output", tmp_path / "out", "--batch-size", 12)
    assert code == 0, output
    report = report_of(tmp_path / "out")
    assert set(report["figures"]) == {"identity", "identity_similarity", "identity_hist", "background"}
    assert all(
        0 <= report["figures"][key]["mean"] <= 1 for key in ("identity", "identity_hist", "background")
    )
    assert report["real"]["identity_hist"]["mean"] == 1
    assert report["pictures"] == 2 * len(scenes.BACKGROUNDS)
    pictures = report["subjects"][0]["pictures"]
    white = [picture for picture in pictures if picture["scores"]["identity_hist"] is not None]
    assert len(white) == 1


@pytest.mark.parametrize(
    ("wrong", "code", "message"),
    [
        (["tiny", "--protocol", "imagenet"], 2, "no protocol 'imagenet'"),
        (["tiny", "--scorers", "clip,taste"], 2, "no scorer 'taste'"),
        (["tiny", "--scorers", "identity"], 2, "drawn subjects only"),
        ([], 2, "no source of pictures"),
        (["tiny", "--score", "."], 2, "a bundle and --score were given"),
        (["tiny", "--fast", "-n", "2"], 2, "do not go together"),
        (["tiny", "--kappa", "3"], 2, "kappa is 3"),
        (["tiny", "--kappa", "1", "--cfg"], 2, "cfg is on, but kappa is 1"),
        (["tiny", "--solver", "magic"], 2, "solver is 'magic'"),
        (["nothing-like-it"], 4, "nothing-like-it"),
        (["tiny", "--subjects", "nowhere"], 4, "there is no folder nowhere"),
        (["tiny", "--only", "rex"], 4, "no subject 'rex'"),
        (["tiny", "--only", "vase"], 3, "can be scored"),
        (["tiny", "--clip", "./nowhere"], 4, "there is no folder ./nowhere"),
        (["tiny", "--backend", "magic"], 4, "magic"),
        (["--score", "nowhere"], 3, "can be scored"),
    ],
)
def test_an_impossible_evaluation_ends_with_a_message_and_a_code(
    options, tmp_path, wrong, code, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    actual, output = ended(*options, *wrong, "--output", tmp_path / "out")
    assert (actual, message in output) == (code, True), output
    assert "Traceback" not in output


def test_a_folder_that_is_not_a_bundle_is_refused(options, subjects, tmp_path):
    code, output = ended(subjects, *options, "--output", tmp_path / "out")
    assert code in (4, 8) and "Traceback" not in output


def test_a_signal_leaves_the_pictures_for_the_next_run(options, tmp_path, monkeypatch):
    import signal

    whole = evaluate.drawing._draw_call

    def draw_and_signal(*arguments):
        whole(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.drawing, "_draw_call", draw_and_signal)
        code, _ = ended("tiny", *options, "--fast", "--batch-size", 1, "--output", tmp_path / "out")
    assert code == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "out" / "pictures").rglob("*.png")] == ["00-0.png"]
    code, output = ended(
        "tiny", *options, "--fast", "--batch-size", 1, "--output", tmp_path / "out", "--resume"
    )
    assert code == 0, output
    can = report_of(tmp_path / "out")["subjects"][0]
    assert (can["kept"], can["drawn"]) == (1, NUMBER - 1)


def test_a_subject_that_comes_from_two_processes_counts_once(out, options, tmp_path, monkeypatch):
    """With fewer subjects than processes, accelerate gives the last one to every idle process."""
    monkeypatch.setattr(evaluate, "gather_object", lambda rows: rows + rows)
    pictures = ["--score", out / "pictures", "--pictures", 2, "--only", "can"]
    code, output = ended(*options, *pictures, "--output", tmp_path)
    assert code == 0, output
    report = report_of(tmp_path)
    assert [result["name"] for result in report["subjects"]] == ["can"]
    assert report["figures"]["dino"]["subjects"] == 1


@pytest.mark.parametrize(("backend", "device"), [("onnxruntime-cuda", 3), ("tensorrt", 3), ("auto", 0)])
def test_each_process_of_a_machine_draws_on_its_own_gpu(subjects, tmp_path, monkeypatch, backend, device):
    def opened(bundle, backend, threads, device):
        raise NotFound(f"{backend} on the device {device}")

    monkeypatch.setattr("hyperrt.engines.backends._suits_cuda", lambda: False)
    monkeypatch.setattr(evaluate.Runtime, "open", opened)
    monkeypatch.setattr(PartialState(cpu=True), "local_process_index", 3)
    options = ["tiny", "--protocol", "dreambench", "--subjects", subjects, "--cpu", "--scorers", "face"]
    code, output = ended(*options, "--backend", backend, "--output", tmp_path)
    assert code == 4 and f"{backend} on the device {device}" in output


def are_close(one, other):
    """Whether values are equal up to the last bits, which depend on the alignment of tensors in memory."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_close(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(are_close, one, other))
    return math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) else one == other


@pytest.mark.slow
def test_two_processes_give_the_same_scores_as_one(out, options, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hyperrt.training.evaluate", *options, "--score", out / "pictures"]
    command += ["--pictures", 2, "--output", tmp_path / "two"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    shared |= {"PYTHONPATH": ROOT, "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    shared |= {"OMP_NUM_THREADS": 1}  # as in this process: the order of sums changes the last bits
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {name: str(value) for name, value in shared.items()}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    logs = [process.communicate(timeout=900)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    evaluated = [{name for name in ("can", "dog", "vase") if f"{name}: " in log} for log in logs]
    assert evaluated == [{"can", "dog"}, {"vase"}]  # each its share
    one, two = report_of(out), report_of(tmp_path / "two")
    for key in ("figures", "real", "calibration", "prompts"):
        assert are_close(two[key], one[key]), key
    assert are_close(*([result["pictures"] for result in report["subjects"]] for report in (one, two)))


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_folder_with_other_files_is_left_alone(options, tmp_path, more):
    (tmp_path / "index.html").write_text("mine")
    code, output = ended("tiny", *options, "--output", tmp_path, *more)
    assert code == 2 and "holds no evaluation" in output
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
