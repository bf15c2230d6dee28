"""`--images` takes what a shell makes of photos/*.jpg; what cannot be taken is refused with what to write."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperrt.cli.images import one_name_each
from tests.hyperrt.command_line import PROMPT, events, is_three_lines


def command_in(err: str) -> list[str]:
    """The arguments of the command that an error tells to write, without the program's name."""
    assert is_three_lines(err)
    words = shlex.split(err.splitlines()[-1].removeprefix("  do:  ").removeprefix("name the files: "))
    assert words[0] == "hyperrt"
    return words[1:]


@pytest.mark.parametrize("option", ["-i", "--images"])
def test_every_name_after_images_is_a_photo(run, photos, option):
    names = sorted(photos.iterdir())
    code, out, _ = run("generate", "--json", option, *names, "-p", PROMPT)
    assert code == 0 and events(out)[0]["photos"] == 3
    code, out, _ = run("personalize", "-o", "a.safetensors", "--json", option, *names)
    assert code == 0 and events(out)[-1]["photos"] == 3


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["-i", "a", "b", "-p", "x"], ["--images", "a", "--images", "b", "-p", "x"]),
        (["--images=a", "b"], ["--images", "a", "--images", "b"]),
        (["-ia", "b"], ["--images", "a", "--images", "b"]),
        (["-i", "-a", "b"], ["--images", "-a", "--images", "b"]),
        (["-i", "a", "--", "b"], ["--images", "a", "--", "b"]),
        (["-p", "x", "b"], ["-p", "x", "b"]),
        (["-i"], ["-i"]),
    ],
    ids=str,
)
def test_each_name_gets_an_option_of_its_own(args, wanted):
    assert one_name_each(args) == wanted


@given(st.lists(st.sampled_from(["-i", "--images", "--images=a", "-ib", "c", "-p", "--", "-", ""])))
def test_names_that_each_have_an_option_stay_as_they_are(args):
    once = one_name_each(args)
    assert one_name_each(once) == once
    assert "c" not in args or "c" in once


@pytest.mark.parametrize("command", ["generate", "personalize"])
def test_photos_without_images_are_refused_with_the_command_to_write(run, photos, command):
    rest = ["-p", PROMPT] if command == "generate" else ["-o", "a.safetensors"]
    code, _, err = run(command, photos, *rest)
    assert code == 2 and "no option takes" in err
    right = command_in(err)
    assert right[:3] == [command, "--images", str(photos)]
    assert run(*right, here=())[0] == 0


def test_a_prompt_without_quotes_is_refused_with_the_command_to_write(run, photos):
    code, _, err = run("generate", "-i", photos, "-p", *PROMPT.split(), "--seed", "7")
    assert code == 2 and "no option takes '[V]' and 4 more" in err
    right = command_in(err)
    assert right[right.index("-p") + 1] == PROMPT
    assert run(*right, here=())[0] == 0


@pytest.mark.parametrize("stray", ["gone.png", "out.png"])
def test_a_stray_argument_that_is_no_photo_or_an_options_value_leads_to_the_help(run, photos, stray):
    _, _, err = run("generate", "-p", PROMPT, "-o", "out.png", stray)
    assert command_in(err) == ["generate", "--help"]


def test_other_mistakes_are_explained_as_before(run):
    code, _, err = run("personalize", "-o", "a.safetensors")
    assert code == 2 and "Missing option '--images'" in err
    code, _, err = run("generate", "--imagse", "a.png", "-p", PROMPT)
    assert code == 2 and "there is no option --imagse" in err


@pytest.mark.parametrize("given_by", ["option", "environment"])
def test_a_folder_of_links_is_refused_with_the_command_that_names_the_files(
    run, photos, monkeypatch, tmp_path, given_by
):
    folder = tmp_path / ("my links" if given_by == "option" else "links")
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).symlink_to(path)
    named = ["-i", f"{folder}/"] if given_by == "option" else []
    monkeypatch.setenv("HYPERRT_GENERATE_IMAGES", str(folder))
    code, _, err = run("generate", *named, "-p", PROMPT)
    assert code == 3 and "symbolic link" in err
    code, _, err = run(*command_in(err), here=())
    assert code == 0 and "3 photos" in err
