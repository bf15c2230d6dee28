"""`hyperrt lora`: what it says of files, what it writes, and how it refuses what is wrong."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hyperrt.cli import main
from tests.hyperrt import fake_bundle
from tests.hyperrt.command_line import ROOT, events, is_three_lines
from tests.hyperrt.lora_files import change, random_pairs, read, sites, write, write_kohya

pytestmark = pytest.mark.usefixtures("alone")
ATTN1 = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
RANKS = dict.fromkeys(sites(), 2)


@pytest.fixture
def lora(capsys):
    """Run `hyperrt lora ...`: (exit code, stdout, stderr)."""

    def lora(*arguments):
        code = main.run(["lora", *map(str, arguments)])
        return code, *capsys.readouterr()

    return lora


@pytest.fixture
def other(tmp_path):
    """A LoRA of another program, for another model than the fake bundle's."""
    return write(tmp_path / "other.safetensors", random_pairs(RANKS), ss_sd_model_name="a mix")


# inspect


def test_a_subject_is_told_in_full(lora, subject_file):
    code, out, _ = lora("inspect", subject_file, "--json")
    found = events(out)[-1]
    assert (code, found["kind"], found["format"], found["names"]) == (0, "subject", "diffusers", "diffusers")
    assert (found["rank"], found["alpha"], found["sites"]) == (2, 2, {"to_q": 2, "to_k": 2, "to_v": 2})
    assert found["weights"] == fake_bundle.NQ + fake_bundle.NKV and found["tensors"] == 12
    assert found["base_model"]["sha256"] == fake_bundle.BASE_MODEL and found["finite"]
    assert found["origin"]["trigger"] == "sks" and found["origin"]["class_noun"] == "robot"
    assert found["origin"]["layout"] == fake_bundle.LAYOUT.hash
    tensors, _ = read(subject_file)
    norms = [
        np.linalg.norm(tensors[name.replace("lora_A", "lora_B")] @ tensor)
        for name, tensor in tensors.items()
        if name.endswith("to_q.lora_A.weight")
    ]
    assert found["norms"]["to_q"]["max"] == pytest.approx(max(norms), rel=1e-3)
    assert found["norms"]["to_q"]["mean"] == pytest.approx(np.mean(norms), rel=1e-3)


def test_info_says_the_same_of_a_subject(subject_file, lora, capsys):
    told = lora("inspect", subject_file)[1]
    assert main.run(["info", str(subject_file)]) == 0
    assert capsys.readouterr().out == told


def test_the_scale_that_an_ip_adapter_should_have_is_told(run, lora, photos, tmp_path):
    open_bundle = fake_bundle.write(tmp_path / "open", open_category=True)
    here = ("--bundle", str(open_bundle), "--backend", "fake")
    assert run("personalize", "-i", photos, "-o", "s.safetensors", here=here)[0] == 0
    found = events(lora("inspect", "s.safetensors", "--json")[1])[-1]
    assert found["origin"]["image_scale"] == "0.55" and found["image_tokens"] == [1, 2, 4]
    assert "0.55" in found["metadata"]["modelspec.usage_hint"]


def test_a_lora_of_another_program_is_told_with_what_is_odd_in_it(lora, other):
    change(other, {ATTN1: np.ones((2, 2), np.float32)})
    tensors, _ = read(other)
    name = next(name for name in tensors if "to_k" in name)
    change(other, {name: tensors[name] * np.nan})
    code, out, _ = lora("inspect", other, "--json")
    found = events(out)[-1]
    assert code == 0 and found["other_modules"] == {"self-attention": 1}
    assert not found["finite"] and name in found["faults"][0]
    assert found["base_model"] == {"family": "unknown", "sha256": "unknown", "in_words": "a mix"}


def test_mixed_ranks_and_alphas_are_counted(lora, tmp_path):
    first, *others = sites()
    path = write_kohya(tmp_path / "x.s", random_pairs({**RANKS, first: 3}), {others[0]: 1})
    found = events(lora("inspect", path, "--json")[1])[-1]
    assert found["rank"] == {"2": 8, "3": 1} and found["alpha"] == {"2": 7, "3": 1, "1": 1}


def test_no_text_of_a_file_is_a_command_to_the_terminal(lora, other):
    change(other, {"unet.\x1b[2Jattn1": np.ones(1, np.float32)}, {"ss_output_name": "\x1b]0;x\x07\n"})
    code, out, _ = lora("inspect", other)
    assert code == 0 and "\x1b" not in out and "\x07" not in out


# convert


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya"])
def test_a_converted_subject_draws_the_same_picture(run, lora, subject_file, format):
    code, out, _ = lora("convert", subject_file, "x.safetensors", "--format", format)
    assert (code, out) == (0, "x.safetensors\n")
    for name, path in (("a.png", subject_file), ("b.png", "x.safetensors")):
        assert run("generate", "-s", path, "-p", "a [V] robot", "-o", name)[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_folder_of_peft_is_written_and_replaced_only_by_force(lora, subject_file):
    convert = ("convert", subject_file, "folder", "--format", "peft")
    assert lora(*convert)[0] == 0
    assert sorted(os.listdir("folder")) == ["adapter_config.json", "adapter_model.safetensors"]
    code, out, err = lora(*convert)
    assert (code, out) == (2, "") and is_three_lines(err) and "exists" in err
    assert lora(*convert, "--force")[0] == 0


def test_a_conversion_can_be_held_to_a_bundle(lora, subject_file, other, pretend, tmp_path):
    assert lora("convert", subject_file, "a.safetensors", "--bundle", pretend)[0] == 0
    code, out, err = lora("convert", other, "b.safetensors", "--bundle", pretend)
    assert (code, out) == (5, "") and is_three_lines(err) and not Path("b.safetensors").exists()
    another = fake_bundle.write(tmp_path / "another", hashes={"base_model": "d" * 64, "hypernet": "c" * 64})
    code, _, err = lora("convert", subject_file, "c.safetensors", "--bundle", another)
    assert code == 5 and "another base model" in err


def test_a_rank_is_reduced_to_the_bundles_and_what_is_lost_is_said(lora, pretend, tmp_path):
    rng = np.random.default_rng(0)
    pairs = {
        site.path: (rng.standard_normal((3, site.d_in)), rng.standard_normal((site.d_out, 3)))
        for site in fake_bundle.LAYOUT.sites
    }
    pairs = {site: [x.astype(np.float32) for x in pair] for site, pair in pairs.items()}
    wide = write(tmp_path / "wide.s", pairs)
    code, _, err = lora("verify", wide, "--bundle", pretend)
    assert code == 5 and "--rank 2" in err
    reduce = ("convert", wide, "a.safetensors", "--bundle", pretend, "--rank")
    code, _, err = lora(*reduce, 3)
    assert code == 2 and is_three_lines(err) and "--rank 2" in err
    found = events(lora(*reduce, 2, "--json")[1])[-1]
    assert 0.01 < found["lost"] < 1 and found["path"] == "a.safetensors"
    assert lora("verify", "a.safetensors", "--bundle", pretend)[0] == 0


def test_a_reduction_shows_how_far_it_is(lora, other):
    code, _, err = lora("convert", other, "a.safetensors", "--rank", 1)
    assert code == 0 and err.splitlines()[-2] == "reducing: 100 % (9 of 9)"
    found = events(lora("convert", other, "b.safetensors", "--rank", 1, "--json")[1])
    assert [event["done"] for event in found if event["event"] == "progress"] == list(range(1, 10))
    assert "reducing" not in lora("convert", other, "c.safetensors")[2]


def test_a_conversion_computes_on_one_thread_unless_told_otherwise(other):
    show = "print(os.getenv('OMP_NUM_THREADS'))"
    code = f"import os, sys; from hyperrt.cli import main as cli; cli.run(sys.argv[1:]); {show}"
    command = [sys.executable, "-c", code, "lora", "convert", str(other), "a.safetensors", "--force"]
    env = {name: text for name, text in os.environ.items() if name != "OMP_NUM_THREADS"}
    for more, number in (({}, "1"), ({"OMP_NUM_THREADS": "2"}, "2")):
        env |= {"PYTHONPATH": str(ROOT), **more}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == ["a.safetensors", number]


def test_other_modules_are_left_out_on_request(lora, other):
    change(other, {ATTN1: np.ones((2, 2), np.float32)})
    code, _, err = lora("convert", other, "a.safetensors", "--format", "kohya")
    assert code == 5 and "--partial" in err
    assert lora("convert", other, "a.safetensors", "--format", "kohya", "--partial")[0] == 0
    assert len(read(Path("a.safetensors"))[0]) == 3 * len(RANKS)


def test_a_file_is_not_written_onto_itself(lora, subject_file):
    before = subject_file.read_bytes()
    code, _, err = lora("convert", subject_file, subject_file, "--force")
    assert code == 2 and is_three_lines(err) and subject_file.read_bytes() == before


def test_image_tokens_are_lost_in_kohyas_format_and_that_is_said(run, lora, photos, tmp_path):
    open_bundle = fake_bundle.write(tmp_path / "open", open_category=True)
    here = ("--bundle", str(open_bundle), "--backend", "fake")
    run("personalize", "-i", photos, "-o", "s.safetensors", here=here)
    code, _, err = lora("convert", "s.safetensors", "k.safetensors", "--format", "kohya")
    assert code == 0 and "cannot hold image tokens" in err
    assert lora("convert", "s.safetensors", "p.safetensors", "--format", "peft")[0] == 0
    assert lora("convert", "p.safetensors", "d.safetensors")[0] == 0
    assert Path("d.safetensors").read_bytes() == Path("s.safetensors").read_bytes()


# verify


def test_a_sound_subject_passes_every_check(lora, subject_file, pretend):
    code, out, err = lora("verify", subject_file, "--bundle", pretend)
    assert (code, err) == (0, "")
    assert [line[:4] for line in out.splitlines()] == ["ok  "] * 5
    assert "6 of 6 sites" in out and "6 sites (2 to_q, 2 to_k, 2 to_v), rank 2" in out


def test_a_lora_of_another_program_passes_alone_with_a_warning(lora, other, pretend):
    code, out, _ = lora("verify", other)
    assert code == 0 and "WARN  origin: made by another program for a mix" in out
    code, out, err = lora("verify", other, "--bundle", pretend)
    assert code == 5 and "FAIL  bundle" in out and is_three_lines(err)


def test_a_lora_of_few_sites_fits_with_a_warning(lora, pretend, tmp_path):
    first = fake_bundle.LAYOUT.sites[0]
    pair = np.ones((1, first.d_in), np.float32), np.ones((first.d_out, 1), np.float32)
    code, out, _ = lora("verify", write(tmp_path / "x.s", {first.path: pair}), "--bundle", pretend)
    assert code == 0 and "1 of 6 sites; the others keep" in out


def test_a_lora_that_is_zero_is_warned_of(lora, tmp_path):
    pairs = {site: (a, 0 * b) for site, (a, b) in random_pairs(RANKS).items()}
    code, out, _ = lora("verify", write(tmp_path / "x.s", pairs))
    assert code == 0 and "WARN  numbers: " in out and "changes nothing" in out


def test_every_fault_is_an_event_and_the_first_gives_the_code(lora, subject_file, pretend):
    tensors, _ = read(subject_file)
    name = next(name for name in tensors if "to_v" in name)
    change(subject_file, {name: tensors[name] * np.nan}, {"hyperrt.photos": "many"})
    code, out, err = lora("verify", subject_file, "--bundle", pretend, "--json")
    found = events(out)
    assert (code, err) == (3, "") and found[-1]["code"] == 3
    failed = [event for event in found if event["event"] == "check" and event["status"] == "fail"]
    assert [event["name"] for event in failed] == ["numbers", "origin"]


# what is wrong is refused in three lines, by every command


def huge_header(path):
    path.write_bytes((2**24 + 1).to_bytes(8, "little"))
    os.truncate(path, 2**25)


WRONG = {
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), 3, "pickle"),
    "empty": (lambda path: path.write_bytes(b""), 3, "damaged"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 10), 3, "damaged"),
    "huge header": (huge_header, 3, "too large"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), 4, "no subject file in the folder"),
    "gone": (lambda path: path.unlink(), 4, "no subject file"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), 3, "not a plain file"),
    "odd rank": (
        lambda path: change(path, {next(iter(read(path)[0])): np.ones((3, 3), np.float32)}), 3, "is (3, 3)"
    ),
    "type": (lambda path: change(path, {next(iter(read(path)[0])): np.ones((2, 4), np.int8)}), 3, "is I8"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_a_file_that_is_wrong_is_refused_in_three_lines(lora, other, command, what):
    spoil, code, words = WRONG[what]
    spoil(other)
    target = ("out.safetensors",) if command == "convert" else ()
    found, out, err = lora(command, other, *target)
    assert (found, out) == (code, "")
    assert is_three_lines(err) and words in err
    assert not Path("out.safetensors").exists()


def test_nan_is_not_converted(lora, other):
    tensors, _ = read(other)
    name = next(iter(tensors))
    change(other, {name: tensors[name] * np.nan})
    code, out, err = lora("convert", other, "out.safetensors")
    assert (code, out) == (3, "") and is_three_lines(err) and "NaN" in err
    assert not Path("out.safetensors").exists()


def test_help_of_every_subcommand_has_examples_and_needs_no_numpy():
    code = "import sys; from hyperrt.cli.main import run; run(sys.argv[1:]); print('numpy' in sys.modules)"
    for name in ("inspect", "convert", "verify"):
        command = [sys.executable, "-c", code, "lora", name, "--help"]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "Examples:" in out and out.endswith("False\n")
