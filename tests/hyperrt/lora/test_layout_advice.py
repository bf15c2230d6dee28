"""What errors about LoRA files tell their reader to do: it fits the file, and commands run as they stand."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shlex
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save

from hyperrt.bundle.bundle import Bundle
from hyperrt.cli import main
from tests.hyperrt import fake_bundle
from tests.hyperrt.command_line import PROMPT, ROOT, events, is_three_lines
from tests.hyperrt.lora_files import change, random_pairs, read, sites, write, write_kohya
from tests.pasting import commands_in

ATTN1 = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
RANKS = dict.fromkeys(sites(), 2)
HOME = "it's a folder"
NAME = "My  LoRA (v2).safetensors"


@pytest.fixture
def path(tmp_path):
    """A file in a folder, both with names that a shell takes apart."""
    folder = tmp_path / HOME
    folder.mkdir()
    return folder / NAME


def pairs_of(layout, rank):
    rng = np.random.default_rng(0)
    return {
        site.path: [x.astype(np.float32) for x in (rng.standard_normal((rank, site.d_in)),
                                                   rng.standard_normal((site.d_out, rank)))]
        for site in layout.sites
    }  # fmt: skip


@pytest.fixture
def wide(path):
    """A LoRA of the fake bundle's sites, of a rank that is too large, that adapts other modules, too."""
    write(path, pairs_of(fake_bundle.LAYOUT, 3))
    extra = np.ones((2, 2), np.float32)
    return change(path, {ATTN1: extra, ATTN1.replace("lora_A", "lora_B"): extra}) or path


def advice_of(err):
    error = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("warning: "))
    assert is_three_lines(error)
    return error.splitlines()[-1].removeprefix("  do:  ")


def paste(text):
    """Run the one command of a message; its exit code."""
    [(program, *arguments)] = commands_in(text)
    assert program == "hyperrt"
    return main.run(arguments)


# commands


def test_the_rank_is_reduced_with_the_options_that_were_given(run, wide, capsys):
    code, _, err = run("generate", "-s", wide, "-p", PROMPT, "--partial", "-o", "x.png")
    assert code == 5 and "the rank of My  LoRA (v2).safetensors is 3" in err
    assert paste(advice_of(err)) == 0
    reduced = wide.with_name("My  LoRA (v2)-rank2.safetensors")
    assert capsys.readouterr().out == f"{reduced}\n"
    assert run("generate", "-s", reduced, "-p", PROMPT, "-o", "x.png")[0] == 0
    assert advice_of(err) != advice_of(run("generate", "-s", wide, "-p", PROMPT, "--partial")[2])


def test_verify_tells_the_same_command(run, pretend, wide, capsys):
    found = ["lora", "verify", str(wide), "--bundle", str(pretend), "--partial"]
    assert main.run(found) == 5
    assert paste(advice_of(capsys.readouterr().err)) == 0
    capsys.readouterr()
    assert main.run([*found, "--json"]) == 5
    assert paste(events(capsys.readouterr().out)[-1]["do"]) == 0


def test_a_relative_name_that_looks_like_an_option_is_no_option(run, wide):
    os.rename(wide, "-x.safetensors")
    _, _, err = run("generate", "-s", "./-x.safetensors", "-p", PROMPT, "--partial")
    assert paste(advice_of(err)) == 0 and os.path.exists("-x-rank2.safetensors")


def test_a_conversion_for_a_bundle_is_told_the_option_that_it_lacks(run, pretend, wide, capsys):
    convert = ["lora", "convert", str(wide), "x.safetensors", "--partial", "--bundle", str(pretend)]
    assert main.run(convert) == 5
    assert "add --rank 2" in advice_of(capsys.readouterr().err)
    assert main.run([*convert, "--rank", "2"]) == 0


def test_what_a_file_adapts_that_cannot_be_used_is_shown(run, path):
    write(path, {})
    change(path, {ATTN1: np.ones((2, 2), np.float32)})
    code, _, err = run("generate", "-s", path, "-p", PROMPT)
    assert code == 3 and paste(advice_of(err)) == 0


def test_a_file_that_is_not_there_leads_to_how_one_is_made(run, path):
    code, _, err = run("generate", "-s", path, "-p", PROMPT)
    assert code == 4 and paste(advice_of(err)) == 0


@pytest.mark.slow
def test_a_shell_runs_the_command_as_it_is_printed(path, tmp_path):
    write(path, pairs_of(Bundle.open("tiny").layout, 9))
    hyperrt = [sys.executable, "-m", "hyperrt"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*hyperrt, "lora", "verify", path, "--bundle", "tiny"], env=env, capture_output=True, text=True
    )
    command = advice_of(done.stderr).partition(": ")[2]
    function = f'hyperrt() {{ {shlex.join(hyperrt)} "$@"; }}\n'
    done = subprocess.run(["sh", "-c", function + command], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("-rank")) == (0, 1)


# words


def fp8(path):
    name = next(iter(read(path)[0]))
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start, end = header[name]["data_offsets"]
    tensor = {"dtype": "F8_E4M3", "shape": [(end - start)], "data_offsets": [start, end]}
    text = json.dumps({**header, name: tensor}).encode()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def nan(path):
    name = next(iter(read(path)[0]))
    change(path, {name: read(path)[0][name] * np.nan})


def cut(path):
    os.truncate(path, path.stat().st_size - 100)


def holds(content):
    return lambda path: path.write_bytes(content)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FAULTS = {
    "fp8": (fp8, "is F8_E4M3", "version of the file in one of these types"),
    "a web page": (holds(b"\n<!DOCTYPE html><html>"), "is a web page", "download the file itself"),
    "a PNG": (holds(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "is a picture", "with --images"),
    "a JPEG": (holds(b"\xff\xd8\xff\xe0\0\x10JFIF"), "is a picture", "with --images"),
    "HTML": (holds(b"<html><head>"), "is a web page", "download the file itself"),
    "a refusal": (holds(b"<?xml version='1.0'?><Error>"), "is a server's answer", "download the file again"),
    "Git LFS": (holds(LFS), "is a Git LFS pointer", "with Git LFS"),
    "cut": (cut, "a download or a copy was not finished", "get a correct file"),
    "empty": (holds(b""), "it has 0 bytes", "get a correct file"),
    "pickle": (holds(pickle.dumps({"a": 1})), "is a pickle", "convert a pickle"),
    "gzip": (holds(gzip.compress(b"x")), "is an archive", "unpack it"),
    "zip": (holds(b"PK\3\4" + bytes(60)), "is a pickle or an archive", "unpack"),
    "NaN": (nan, "cannot be used", "get a correct file from where this one came from"),
    "no shape": (
        lambda path: change(path, {next(iter(read(path)[0])): np.ones((3, 3), np.float32)}),
        "is (3, 3)", "get a correct file from where this one came from",
    ),
    "alpha": (
        lambda path: write_kohya(path, random_pairs(RANKS), dict.fromkeys(RANKS, 0)),
        "alpha is 0", "get a correct file from where this one came from",
    ),
    "text": (holds(b'{"error": "Invalid username or password."}'), "not a safetensors file", "get a correct"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_the_advice_fits_another_programs_file_and_is_no_command(run, path, what):
    spoil, words, do = FAULTS[what]
    write(path, pairs_of(fake_bundle.LAYOUT, 2))
    spoil(path)
    code, out, err = run("generate", "-s", path, "-p", PROMPT)
    assert (code, out) == (3, "") and words in err and do in advice_of(err)
    assert "personalize" not in err and commands_in(advice_of(err)) == []


@pytest.mark.parametrize("spoil", [nan, lambda path: change(path, {next(iter(read(path)[0])): None})])
def test_a_fault_in_a_subject_of_ours_leads_to_its_photos(run, subject_file, spoil):
    spoil(subject_file)
    code, _, err = run("generate", "-s", subject_file, "-p", PROMPT)
    assert code == 3 and advice_of(err) == "make the subject again from its photos"


@pytest.mark.parametrize("start", [b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"PK\3\4"])
def test_a_length_of_a_header_that_looks_like_another_file_is_no_fault(run, path, start):
    content = save({"x": np.zeros(1, np.float32)})
    path.write_bytes(start + bytes(8 - len(start)) + content[8:])
    _, _, err = run("generate", "-s", path, "-p", PROMPT)
    assert "archive" not in err
