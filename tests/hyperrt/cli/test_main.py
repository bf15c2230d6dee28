from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from hyperrt.cli import configs, main
from hyperrt.cli.commands import hyperrt as group
from hyperrt.cli.training import COMMANDS
from hyperrt.cli.user_config import MAX_BYTES
from hyperrt.lora import names
from hyperrt.sampling import options, recipe
from tests.hyperrt import fake_bundle
from tests.hyperrt.command_line import PROMPT, ROOT, events, is_three_lines

pytestmark = pytest.mark.usefixtures("alone")


# generate


def test_photos_and_a_prompt_become_a_picture_whose_path_is_printed(run, photos):
    code, out, err = run("generate", "--images", photos, "--prompt", PROMPT)
    assert code == 0, err
    assert out == "a-v-robot-on-the-beach-0.png\n"
    assert recipe.read(out.strip())["prompt"] == PROMPT


def test_a_subject_file_gives_the_same_bytes_as_its_photos(run, photos, subject_file):
    run("generate", "--images", photos, "-p", PROMPT, "-o", "a.png")
    run("generate", "--subject", subject_file, "-p", PROMPT, "-o", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_several_pictures_are_those_of_their_seeds(run, subject_file):
    code, out, _ = run("generate", "-s", subject_file, "-p", PROMPT, "-n", 3, "--seed", 4, "-o", "many")
    run("generate", "-s", subject_file, "-p", PROMPT, "--seed", 6, "-o", "one.png")
    assert code == 0
    assert [Path(line).name[-5:] for line in out.splitlines()] == ["4.png"[-5:], "5.png", "6.png"]
    assert Path(out.splitlines()[2]).read_bytes() == Path("one.png").read_bytes()


def test_plain_guidance_is_asked_for_and_is_in_the_recipe(run, subject_file):
    code, out, err = run("generate", "-s", subject_file, "-p", PROMPT, "--cfg", "-g", 5)
    assert code == 0, err
    found = recipe.read(out.strip())
    assert (found["cfg"], found["kappa"], found["guidance_scale"]) == (True, None, 5)
    assert found["branches"] == {"subject_uncond": -4, "subject": 5}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_picture_of_a_batch_is_written_with_its_own_seed(run, batch_size):
    _, out, _ = run("generate", "-p", "a robot", "-n", 5, "--batch-size", batch_size)
    assert [recipe.read(line)["seed"] for line in out.splitlines()] == [0, 1, 2, 3, 4]


def test_one_picture_goes_to_stdout_on_request(capsysbinary, pretend):
    code = main.run(["generate", "-p", "a robot", "--bundle", str(pretend), "--backend", "fake", "-o", "-"])
    assert code == 0
    assert capsysbinary.readouterr().out.startswith(b"\x89PNG")


def test_progress_is_a_line_per_ten_percent_and_on_stderr(run):
    _, out, err = run("generate", "-p", "a robot", "--steps", 20)
    assert [line for line in err.splitlines() if "drawing" in line] == [
        f"drawing: {k * 10} % ({2 * k} of 20)" for k in range(1, 11)
    ]
    assert "drawing" not in out


def test_the_noun_after_the_placeholder_names_the_subject(run, photos):
    _, out, _ = run("generate", "--images", photos, "-p", "a [V] mug on the beach")
    assert recipe.read(out.strip())["class_noun"] == "mug"


def test_a_class_of_the_users_own_wins_over_the_files(run, subject_file):
    _, out, _ = run("generate", "-s", subject_file, "-p", "a [V] on the beach", "--class", "cat")
    assert recipe.read(out.strip())["generic_prompt"] == "a cat on the beach"


def test_a_bad_photo_is_said_and_left_out(run, photos, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "good.png").write_bytes((photos / "photo 0.png").read_bytes())
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    code, _, err = run("generate", "--images", folder, "-p", PROMPT)
    assert code == 0
    assert "warning: left out bad.png" in err and "1 photo" in err
    assert run("generate", "--images", folder, "-p", PROMPT, "--strict-images", "--force")[0] == 3


@pytest.mark.parametrize("seed", [[], ["--seed", -1]], ids=str)
def test_a_random_seed_is_on_stderr_and_in_the_name_and_recipe(run, monkeypatch, seed):
    monkeypatch.setattr(options, "random_seed", lambda pictures: 1234)
    code, out, err = run("generate", "-p", "a robot", "-n", 2, *seed)
    assert (code, out) == (0, "a-robot-1234.png\na-robot-1235.png\n") and "seeds: 1234 to 1235\n" in err
    assert recipe.read("a-robot-1235.png")["seed"] == 1235
    run("generate", "-p", "a robot", "--seed", 1235, "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("a-robot-1235.png").read_bytes()


# what is refused


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-p", ""], 3, "prompt is empty"),
        (["-p", PROMPT, "--images", "nowhere"], 4, "nowhere"),
        (["-p", "a robot", "--images", ""], 2, "empty name"),
        (["-p", PROMPT, "--subject", "nowhere.safetensors"], 4, "nowhere.safetensors"),
        (["-p", "a robot", "--images", "nowhere"], 3, "does not say where the subject is"),
        (["-p", "a robot", "--kappa", "0.5"], 2, "kappa is 0.5, but there is no subject"),
        (["-p", "a robot", "--cfg"], 2, "cfg is on, but there is no subject"),
        (["-p", PROMPT, "--images", "x", "--cfg", "--kappa", "1"], 2, "cfg is on, but kappa is 1"),
        (["-p", "a robot", "--image-scale", "1"], 2, "image scale is 1, but there is no subject"),
        (["-p", PROMPT, "--images", "x", "--image-scale", "1"], 2, "has no image prompt"),
        (["-p", PROMPT, "--images", "x", "--combine", "concat"], 2, "mean"),
        (["-p", PROMPT, "--subject", "x", "--combine", "product"], 2, "there are no photos"),
        (["-p", "a robot", "--kappa", "3"], 2, "kappa is 3.0"),
        (["-p", "a robot", "--kappa", "nan"], 2, "kappa is nan"),
        (["-p", "a robot", "--steps", "0"], 2, "from 1 to 1000"),
        (["-p", "a robot", "--steps", "many"], 2, "many"),
        (["-p", "a robot", "--solver", "magic"], 2, "dpmpp_2m"),
        (["-p", "a robot", "--sed", "1"], 2, "--seed"),
        (["-p", "a robot", "--images", "x", "--subject", "y"], 2, "leave one out"),
        (["-p", "a robot", "-o", "picture.jpg"], 2, "PNG"),
        (["-p", "a robot", "-o", "no/where/x.png"], 4, "no/where"),
        (["-p", "a robot", "-n", "2", "-o", "-"], 2, "a pipe takes one PNG"),
        (["-p", "a robot", "--backend", "abacus"], 4, "abacus"),
        (["-p", "a robot", "--threads", "0"], 2, "threads is 0"),
        (["-p", "a robot", "--backend", "onnxruntime", "--device", "1"], 2, "runs on the processor"),
        (["-p", "x" * 1_000_000], 3, "too long"),
        (["-p", "a\0robot"], 3, "U+0000"),
        ([], 2, "--prompt"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_what_is_wrong_is_said_in_three_lines_with_its_exit_code(run, arguments, code, words):
    found, out, err = run("generate", *arguments)
    assert (found, out) == (code, "")
    assert is_three_lines(err) and words in err
    assert not list(Path().glob("**/*.png"))


def test_an_unknown_bundle_is_not_found(run):
    code, _, err = run("generate", "-p", "a robot", "--bundle", "nothing")
    assert code == 4 and "nothing" in err


def test_a_file_that_exists_is_not_overwritten_unasked(run):
    Path("a.png").write_bytes(b"mine")
    code, _, err = run("generate", "-p", "a robot", "-o", "a.png")
    assert code == 2 and "--force" in err
    assert Path("a.png").read_bytes() == b"mine"
    assert run("generate", "-p", "a robot", "-o", "a.png", "--force")[0] == 0


def test_the_same_command_twice_makes_two_pictures(run):
    outs = [run("generate", "-p", "ロボット", "-n", 2, "--json")[1] for _ in range(2)]
    paths = [picture["path"] for out in outs for picture in events(out)[-1]["pictures"]]
    assert paths == [f"ロボット-{name}.png" for name in ("0", "1", "0-2", "1-2")]
    assert [recipe.read(path)["seed"] for path in paths] == [0, 1, 0, 1]


def test_a_picture_that_another_command_writes_meanwhile_is_kept(run):
    def meanwhile(tensors):
        Path("a-robot-0.png").write_bytes(b"theirs")
        return fake_bundle.GRAPHS["denoiser"](tensors)

    fake_bundle.register(denoiser=meanwhile)
    assert run("generate", "-p", "a robot")[:2] == (0, "a-robot-0-2.png\n")
    assert Path("a-robot-0.png").read_bytes() == b"theirs"


def test_a_folder_is_not_replaced_by_a_picture(run):
    Path("a.png").mkdir()
    assert run("generate", "-p", "a robot", "-o", "a.png")[:2] == (0, "a.png/a-robot-0.png\n")
    Path("b").mkdir()
    assert run("personalize", "--images", "x", "-o", "b", "--force")[0] == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_replaced_by_a_picture(run):
    os.mkfifo("a.png")
    assert run("generate", "-p", "a robot", "-o", "a.png", "--force")[0] == 2


def test_a_damaged_bundle_is_refused_with_the_file_s_name(run, tmp_path):
    folder = fake_bundle.write(tmp_path / "damaged")
    (folder / "denoiser.onnx").write_bytes(b"other")
    code, _, err = run("generate", "-p", "a robot", "--bundle", folder)
    assert code == 8 and "denoiser.onnx" in err


def test_nan_ends_with_the_exit_code_for_numbers_and_no_file(run):
    def broken(tensors):
        return {
            name: value * np.float32(np.nan)
            for name, value in fake_bundle.GRAPHS["denoiser"](tensors).items()
        }

    fake_bundle.register(denoiser=broken)
    code, _, err = run("generate", "-p", "a robot")
    assert code == 9 and is_three_lines(err)
    assert not list(Path().iterdir())


def test_a_bug_asks_to_be_reported_and_shows_its_traceback_only_on_request(run, monkeypatch):
    def broken(tensors):
        raise ZeroDivisionError("oh")

    fake_bundle.register(denoiser=broken)
    code, _, err = run("generate", "-p", "a robot")
    assert code == 1 and is_three_lines(err) and "report" in err and "ZeroDivisionError" in err
    monkeypatch.setenv("HYPERRT_DEBUG", "1")
    assert "Traceback" in run("generate", "-p", "a robot")[2]


@pytest.mark.parametrize(
    ("error", "code"),
    [(MemoryError(), 6), (OSError(errno.ENOSPC, "No space left on device"), 6), (KeyboardInterrupt(), 130)],
    ids=["memory", "disk", "Ctrl-C"],
)
def test_what_the_system_refuses_has_an_exit_code(run, error, code):
    def broken(tensors):
        raise error

    fake_bundle.register(denoiser=broken)
    found, _, err = run("generate", "-p", "a robot")
    assert found == code and is_three_lines(err)


# where values come from


def test_a_value_comes_from_flag_then_environment_then_file_then_default(run, monkeypatch, tmp_path):
    def steps(*arguments):
        path = run("generate", "-p", "a robot", "--force", *arguments)[1].strip()
        return recipe.read(path)["steps"]

    assert steps() == 4
    (tmp_path / "settings" / "hyperrt").mkdir(parents=True)
    (tmp_path / "settings" / "hyperrt" / "config.toml").write_text("[generate]\nsteps = 5\n")
    assert steps() == 5
    monkeypatch.setenv("HYPERRT_GENERATE_STEPS", "6")
    assert steps() == 6
    assert steps("--steps", "7") == 7


@pytest.mark.parametrize("value", ["many", "0"])
def test_a_bad_value_of_the_environment_is_reported_with_the_variable(run, monkeypatch, value):
    monkeypatch.setenv("HYPERRT_GENERATE_STEPS", value)
    code, _, err = run("generate", "-p", "a robot")
    assert code == 2 and "HYPERRT_GENERATE_STEPS" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[generate]\nstps = 5", "'stps' in [generate]"),
        ("steps = 5", "'steps' at its top"),
        ("[generate", "cannot be read"),
        ("[generate]\nsteps = 'many'", "mine.toml"),
        ("[generate]\nsteps = 0", "mine.toml"),
    ],
    ids=["unknown option", "no table", "no TOML", "wrong type", "out of range"],
)
def test_a_bad_config_file_is_reported_with_its_name(run, capsys, text, words):
    Path("mine.toml").write_text(text)
    code = main.run(["--config", "mine.toml", "generate", "-p", "a robot"])
    err = capsys.readouterr().err
    assert code == 2 and is_three_lines(err) and words in err and "mine.toml" in err


@pytest.mark.parametrize("name", ["/dev/zero", "large.toml", "pipe.toml", "."])
def test_a_config_file_that_is_large_or_not_a_plain_file_is_refused(run, capsys, name):
    Path("large.toml").write_bytes(b"#" * (MAX_BYTES + 1))
    os.mkfifo("pipe.toml")
    assert main.run(["--config", name, "generate", "-p", "a robot"]) == 2
    err = capsys.readouterr().err
    assert is_three_lines(err) and ("not a plain file" in err or "more than 1,048,576 bytes" in err)


def test_a_config_file_may_begin_with_a_byte_order_mark(run, capsys):
    Path("mine.toml").write_text("[generate]\nsteps = 0", encoding="utf-8-sig")
    assert main.run(["--config", "mine.toml", "generate", "-p", "a robot"]) == 2
    assert "steps is 0" in capsys.readouterr().err


def test_a_config_file_of_the_current_folder_is_not_read(run):
    Path("config.toml").write_text("[generate")
    Path("hyperrt.toml").write_text("[generate")
    assert run("generate", "-p", "a robot")[0] == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("generate", configs.GenerateConfig),
        ("personalize", configs.PersonalizeConfig),
        ("export", configs.ExportConfig),
    ],
)
def test_every_option_is_a_field_of_the_config_with_the_same_default(name, kind):
    asked = {option.name for option in group.commands[name].params} - {"json"}
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    assert asked == set(fields)
    needed = {field: "x" for field, default in fields.items() if default is dataclasses.MISSING}
    flags = [part for field, value in needed.items() for part in (f"--{field}", value)]
    parsed = group.commands[name].make_context(name, flags).params
    assert kind(**parsed) == kind(**{**needed, "images": ("x",)} if "images" in needed else needed)


# --json


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (["generate", "-p", "a robot", "--steps", "3"], "result"),
        (["generate", "-p", ""], "error"),
        (["generate", "--nonsense"], "error"),
        (["doctor"], "result"),
        (["personalize", "--images", "nowhere", "-o", "x.safetensors"], "error"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_with_json_every_line_of_stdout_is_an_event_and_the_last_tells_the_end(run, arguments, last):
    code, out, _ = run(arguments[0], *arguments[1:], "--json")
    found = events(out)
    assert found[-1]["event"] == last and found[-1]["schema"] == 1
    assert (code == 0) == (last == "result")
    assert all(event["event"] not in ("result", "error") for event in found[:-1])


def test_json_tells_steps_pictures_and_warnings(run):
    _, out, err = run("generate", "-p", PROMPT, "--steps", 2, "--json")
    found = events(out)
    assert [event["done"] for event in found if event["event"] == "progress"] == [1, 2]
    assert any(event["event"] == "warning" and "no subject" in event["message"] for event in found)
    assert found[-1]["pictures"] == [{"path": "a-v-robot-on-the-beach-0.png", "seed": 0}]
    assert err == ""


# personalize, export


@pytest.mark.parametrize("format", names.FORMATS)
def test_a_subject_file_of_every_format_is_read_back(run, photos, format):
    code, out, err = run("personalize", "-i", photos, "-o", "s.safetensors", "--format", format)
    assert (code, out) == (0, "s.safetensors\n"), err
    assert run("generate", "-s", "s.safetensors", "-p", PROMPT)[0] == 0


def test_personalize_takes_files_one_by_one(run, photos):
    files = [part for path in sorted(photos.iterdir()) for part in ("-i", path)]
    code, out, _ = run("personalize", *files, "-o", "s.safetensors", "--class", "mug", "--json")
    assert code == 0
    assert (events(out)[-1]["photos"], events(out)[-1]["class_noun"]) == (3, "mug")


@pytest.mark.parametrize("combine", names.COMBINED)
def test_photos_combined_as_asked_draw_what_their_subject_file_draws(run, photos, combine):
    run("generate", "-i", photos, "--combine", combine, "-p", PROMPT, "-o", "a.png")
    run("personalize", "-i", photos, "--combine", combine, "-o", "s.safetensors")
    run("generate", "-s", "s.safetensors", "-p", PROMPT, "-o", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert recipe.read("a.png")["combine"] == combine


def test_photos_side_by_side_are_a_file_for_other_programs(run, photos):
    code, out, err = run("personalize", "-i", photos, "--combine", "concat", "-o", "s.safetensors")
    assert (code, out) == (0, "s.safetensors\n") and "rank 6: for other programs" in err
    tensors = safetensors.numpy.load_file("s.safetensors")
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {6}
    code, _, err = run("generate", "-s", "s.safetensors", "-p", PROMPT)
    assert code == 5 and is_three_lines(err) and "--combine concat" in err and "its rank is 6" in err


def test_export_without_pytorch_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code = main.run(["export", "--model", "tiny", "-o", "b"])
    err = capsys.readouterr().err
    assert code == 5 and is_three_lines(err) and "pip install 'hyperrt[export]'" in err


def test_help_of_every_command_has_examples_and_needs_no_numpy():
    code = "import sys; from hyperrt.cli.main import run; run(sys.argv[1:]); print('numpy' in sys.modules)"
    for arguments in ([], *([name] for name in group.commands if name not in COMMANDS)):
        command = [sys.executable, "-c", code, *arguments, "--help"]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "Examples:" in out and out.endswith("False\n")
