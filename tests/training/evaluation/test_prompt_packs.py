from __future__ import annotations

import re

import pytest

from hyperrt.training.evaluation import prompt_packs
from hyperrt.training.evaluation.prompt_packs import PACKS


@pytest.mark.parametrize(
    ("name", "count"),
    [("dreambench-objects", 25), ("dreambench-live", 25), ("hyperrt-faces-v1", 30), ("drawn-v1", 12)],
)
def test_a_pack_has_distinct_prompts_that_name_the_subject(name, count):
    pack = PACKS[name]
    assert len(set(pack.templates)) == len(pack.templates) == count
    assert all("[V] {noun}" in template for template in pack.templates)
    assert pack.source


def test_dreambench_has_21_objects_and_9_live_subjects():
    live = [name for name, noun in prompt_packs.DREAMBENCH.items() if noun in prompt_packs.LIVE]
    assert (len(prompt_packs.DREAMBENCH), len(live)) == (30, 9)


def test_subjects_and_prompts_equal_the_published_file(shared_data):
    text = (shared_data / "dreambench" / "prompts_and_classes.txt").read_text()
    assert dict(re.findall(r"^(\w+),([\w ]+)$", text, re.M)) == {
        "subject_name": "class",
        **prompt_packs.DREAMBENCH,
    }
    objects, live = text.split("Live Subject Prompts")
    for published, name in ((objects, "dreambench-objects"), (live, "dreambench-live")):
        templates = re.findall(r"^'(.*)'\.format", published, re.M)
        assert (
            tuple(template.replace("{0} {1}", "[V] {noun}") for template in templates)
            == PACKS[name].templates
        )


def test_plain_prompts_lack_only_the_placeholder():
    assert PACKS["dreambench-objects"].prompts("stuffed animal")[0] == "a [V] stuffed animal in the jungle"
    assert PACKS["dreambench-objects"].plain("stuffed animal")[0] == "a stuffed animal in the jungle"
    assert PACKS["dreambench-live"].plain("dog")[-1] == "a cube shaped dog"
    assert PACKS["hyperrt-faces-v1"].plain("face")[0] == "a face as a Minecraft character"
    for pack in PACKS.values():
        assert not [prompt for prompt in pack.plain("toy") if "[V]" in prompt or "  " in prompt]


def test_packs_that_no_paper_has_say_so():
    assert not PACKS["dreambench-live"].note
    assert "not published" in PACKS["hyperrt-faces-v1"].note
    assert PACKS["drawn-v1"].note
