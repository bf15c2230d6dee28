"""One prompt becomes those of the branches, and text that is no prompt is refused by name."""

from __future__ import annotations

import re

import pytest

from hyperrt.errors import BadPrompt
from hyperrt.lora.metadata import triggers_in
from hyperrt.sampling.prompts import (
    MAX_CHARACTERS,
    Prompts,
    check_text,
    noun_of_trigger,
    split_for_trigger,
    split_prompt,
    warnings_of_trigger,
)


def test_the_placeholder_becomes_the_token_and_is_left_out_for_the_base_model():
    assert split_prompt("a [V] cat on a beach", "cat") == Prompts(
        "a sks cat on a beach", "a cat on a beach", ""
    )


@pytest.mark.parametrize(
    ("prompt", "subject", "generic"),
    [
        ("a [V] on a beach", "a sks cat on a beach", "a cat on a beach"),
        ("a [V]", "a sks cat", "a cat"),
        ("[V]", "sks cat", "cat"),
        ("a [V], watercolour", "a sks cat, watercolour", "a cat, watercolour"),
        ("the [V]'s bowl", "the sks cat's bowl", "the cat's bowl"),
        ("the cat [V] in snow", "the cat sks in snow", "the cat in snow"),
        ("a [V] tiger in snow", "a sks tiger in snow", "a tiger in snow"),
        ("a [V] old cat", "a sks old cat", "a old cat"),
        ("a [V]cat", "a sks cat", "a cat"),
        ("a [V] wearing a hat", "a sks cat wearing a hat", "a cat wearing a hat"),
        ("a [V] sitting between trees", "a sks cat sitting between trees", "a cat sitting between trees"),
        ("a [V] that sleeps", "a sks cat that sleeps", "a cat that sleeps"),
        ("[V]、雪", "sks cat、雪", "cat、雪"),
    ],
)
def test_the_class_noun_is_put_in_where_no_noun_stands(prompt, subject, generic):
    prompts = split_prompt(prompt, "cat")
    assert (prompts.subject, prompts.generic) == (subject, generic)


@pytest.mark.parametrize("noun", ["", None])
def test_without_a_class_noun_nothing_is_put_in(noun):
    assert split_prompt("a [V], in snow", noun) == Prompts("a sks, in snow", "a, in snow")


def test_every_placeholder_is_replaced():
    prompts = split_prompt("a [V] cat beside a [v] dog [V][V]", "cat")
    assert prompts.subject == "a sks cat beside a sks dog sks sks cat"
    assert prompts.generic == "a cat beside a dog cat"


def test_token_and_placeholder_are_the_bundles():
    prompts = split_prompt("a <me> cat (.*)", "cat", token="xyz", placeholder="<me>")
    assert prompts == Prompts("a xyz cat (.*)", "a cat (.*)")


def test_a_token_that_looks_like_a_group_reference_is_only_text():
    assert split_prompt("a [V] cat", "cat", token=r"\1\g<0>").subject == r"a \1\g<0> cat"


def test_emoji_and_other_scripts_are_text():
    family = "👨‍👩‍👧"  # joined by U+200D, a format character
    assert split_prompt(f"ein [V] Kätzchen 猫 {family}", "cat").subject == f"ein sks Kätzchen 猫 {family}"


def test_white_space_is_made_plain():
    assert split_prompt("  a [V]\n\tcat　on a beach ", "cat").generic == "a cat on a beach"


def test_tags_of_other_programs_are_only_text():
    assert split_prompt("a [V] cat <lora:x:1> (big:1.5)", "cat").generic == "a cat <lora:x:1> (big:1.5)"


@pytest.mark.parametrize(
    ("prompt", "subject", "generic"),
    [
        ("a [V] mug on a beach", "a ohwx mug on a beach", "a mug on a beach"),
        ("a [V] on a beach", "a ohwx mug on a beach", "a mug on a beach"),
        ("a [V] cup on a beach", "a ohwx mug on a beach", "a cup on a beach"),
        ("a [V] red mug on a beach", "a ohwx red mug on a beach", "a red mug on a beach"),
        ("a [V] red cup on a beach", "a ohwx red cup on a beach", "a red cup on a beach"),
        ("two [v] Mugs, sleeping", "two ohwx Mugs, sleeping", "two Mugs, sleeping"),
        ("the mug [V] in snow", "the mug ohwx in snow", "the mug in snow"),
        ("a mug in the [V]", "a mug in the ohwx mug", "a mug in the mug"),
        ("the [V]'s handle", "the ohwx mug's handle", "the mug's handle"),
        ("a [V] mug beside a [V]", "a ohwx mug beside a ohwx mug", "a mug beside a mug"),
        ("a [V] ohwx mug", "a ohwx mug", "a ohwx mug"),
        ("[V]", "ohwx mug", "mug"),
        ("[V][V]", "ohwx mug ohwx mug", "mug"),
    ],
)
def test_a_trigger_stands_for_the_placeholder_and_its_noun(prompt, subject, generic):
    assert split_for_trigger(prompt, "ohwx mug", "mug") == Prompts(subject, generic)


@pytest.mark.parametrize(
    ("trigger", "prompt", "subject"),
    [
        ("ohwx", "a [V] mug in snow", "a ohwx mug in snow"),
        ("ohwx", "a [V] in snow", "a ohwx in snow"),
        ("mug", "a [V] mug in snow", "a mug in snow"),
        ("Mug", "a [V] in snow", "a Mug in snow"),
        ("ohwx teddy bear", "a [V] teddy bear in snow", "a ohwx teddy bear in snow"),
        ("ohwx mug, blue glaze", "a [V] mug in snow", "a ohwx mug in snow"),
        (r"\1 <x>", "a [V] in snow", r"a \1 <x> in snow"),
        ("", "a [V] in snow", "a sks toy in snow"),
    ],
)
def test_other_triggers_are_put_in_once(trigger, prompt, subject):
    assert split_for_trigger(prompt, trigger, "toy").subject == subject


def test_thousands_of_placeholders_are_no_hang():
    found = split_for_trigger("[V]" * (MAX_CHARACTERS // 3), " ".join("abcdefghijklmnop"), "toy")
    assert found.subject.count("a b c d") == MAX_CHARACTERS // 3


def test_without_the_placeholder_a_prompt_for_another_programs_lora_is_used_as_it_is():
    assert split_for_trigger("a mug  in snow", "ohwx", "toy") == Prompts("a mug in snow", "a mug in snow")
    with pytest.raises(BadPrompt, match="empty"):
        split_for_trigger(" ", "ohwx", "toy")


@pytest.mark.parametrize(
    ("trigger", "noun"),
    [
        ("ohwx mug, blue", "mug"),
        ("ohwx Teddy Bear", "Teddy Bear"),
        ("ohwx dog", "dog"),
        ("ohwx", "toy"),
        ("mug", "mug"),
        ("", "toy"),
    ],
)
def test_the_noun_of_a_trigger_is_its_end(trigger, noun):
    assert noun_of_trigger(trigger, ("mug", "teddy bear"), "toy") == noun


def test_triggers_are_between_commas():
    assert triggers_in(" a  b,, c ,") == ["a b", "c"]


@pytest.mark.parametrize(
    ("prompt", "subject", "words"),
    [
        ("a [V] mug", "a ohwx mug, blue", []),
        ("a mug", "a mug", ["lacks: ohwx mug, blue"]),
        ("a [V] cup", "a ohwx mug", ["place of 'cup'", "lacks: blue"]),
        ("blue [V] mugs", "blue ohwx mugs", []),
    ],
)
def test_what_a_trigger_lacks_or_replaces_is_told(prompt, subject, words):
    found = warnings_of_trigger(prompt, subject, "ohwx mug, blue", "[V]")
    assert len(found) == len(words) and all(part in text for part, text in zip(words, found, strict=True))


def test_without_a_subject_the_placeholder_may_be_absent():
    assert split_prompt("a cat in snow", "cat", has_subject=False) == Prompts("", "a cat in snow")
    assert split_prompt("a [V] in snow", "cat", has_subject=False) == Prompts("", "a cat in snow")


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
@pytest.mark.parametrize("has_subject", [True, False])
def test_an_empty_prompt_is_refused(prompt, has_subject):
    with pytest.raises(BadPrompt, match="empty"):
        split_prompt(prompt, "cat", has_subject=has_subject)


def test_a_prompt_that_does_not_name_the_subject_is_refused_with_an_example():
    with pytest.raises(BadPrompt) as caught:
        split_prompt("a photo of my dog", "dog")
    assert "[V] stands for the subject" in caught.value.why
    assert '"a [V] dog on a beach"' in caught.value.do
    assert caught.value.code == 3


def test_a_prompt_of_nothing_but_the_placeholder_is_refused_where_there_is_no_noun():
    with pytest.raises(BadPrompt, match=re.escape("nothing but [V]")):
        split_prompt("[V] [V]", "")


def test_a_megabyte_is_refused_in_a_short_message():
    with pytest.raises(BadPrompt, match="1,000,004 characters") as caught:
        split_prompt("[V] " + "x" * 1_000_000, "cat")
    assert len(str(caught.value)) < 300


def test_the_longest_prompt_is_taken():
    assert split_prompt("[V] cat" + "!" * (MAX_CHARACTERS - 7), "cat").generic.startswith("cat!!!")


@pytest.mark.parametrize("character", ["\0", "\x1b", "\x7f", "\x9b", "\ud83d", "\udcff"])
def test_a_character_that_is_no_text_is_refused_and_not_printed(character):
    with pytest.raises(BadPrompt, match=f"U\\+{ord(character):04X}") as caught:
        split_prompt(f"a [V] cat{character}", "cat")
    assert character not in str(caught.value)
    with pytest.raises(BadPrompt, match="negative prompt"):
        check_text(character, "negative prompt")
    with pytest.raises(BadPrompt, match="class noun"):
        split_prompt("a [V]", f"cat{character}")


def test_an_empty_negative_prompt_is_text():
    assert check_text("", "negative prompt") == ""
