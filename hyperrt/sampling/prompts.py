"""Prompts: from the one that the user writes to those of the guidance branches.

    "a [V] cat on a beach"  ->  subject "a sks cat on a beach", generic "a cat on a beach", empty ""

The subject prompt goes to the personalised model, the generic one to the base model: c_S and c_G of
arXiv 2511.03156, eq. 20. Text is checked here; how much of it fits the text encoder is the tokenizer's word.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from hyperrt.errors import BadPrompt
from hyperrt.lora.metadata import triggers_in
from hyperrt.text import short_repr

MAX_CHARACTERS = 10_000  # some 30 times what fits a text encoder

# What follows "a [V]" in a prompt that leaves the noun out: "a [V] on a beach", "a [V], watercolour".
_PUNCTUATION = ".,;:!?)'’、。，！？"
_NO_NOUNS = (
    "above|across|against|along|among|and|are|around|as|at|before|behind|below|beneath|beside|between|by|during|"
    "for|from|has|in|inside|into|is|near|next|of|on|onto|or|outside|over|that|through|to|toward|towards|under|"
    "underwater|upon|was|were|which|while|who|with|without|"
    "climbing|cooking|dancing|dressed|drinking|driving|eating|floating|flying|holding|hugging|jumping|laughing|"
    "looking|lying|made|painted|playing|posing|reading|resting|riding|running|sitting|sleeping|smiling|standing|"
    "surrounded|swimming|talking|walking|watching|wearing|working"
)
_NO_NOUN_FOLLOWS = re.compile(rf"\s*(?:$|[{_PUNCTUATION}]|\b(?:{_NO_NOUNS})\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Prompts:
    """The texts of the guidance branches.

    Attributes:
        subject: for the personalised model, with the token for the subject; empty where there is no subject.
        generic: for the base model: the same scene, with any member of the class for the subject.
        empty: for the unconditional branch; a negative prompt takes its place.
    """

    subject: str
    generic: str
    empty: str = ""


def split_prompt(
    prompt: str,
    class_noun: str | None,
    token: str = "sks",
    placeholder: str = "[V]",
    has_subject: bool = True,
) -> Prompts:
    """The prompts of all branches.

    Every placeholder, in capitals or not, becomes the token (for the base model: nothing); where no noun
    stands beside it, the class noun is put in. White space is made plain, see `check_text`.

    Args:
        prompt: what the user wrote.
        class_noun: what the subject is, such as "cat"; None or empty: nothing is put in.
        token: the word that the text encoder knows the subject by.
        placeholder: what stands for the subject in `prompt`.
        has_subject: whether there is a subject. Without one the placeholder may be absent.

    Raises:
        BadPrompt: the prompt is empty, is not text (see `check_text`), has no words but the placeholder, or
            lacks it although there is a subject.
    """
    text, noun = check_text(prompt, "prompt"), check_text(class_noun or "", "class noun")
    example = f'write for example "a {placeholder} {noun or "cat"} on a beach"'
    mark = re.compile(" ?" + re.escape(placeholder), re.IGNORECASE)
    if not text:
        raise BadPrompt("the prompt is empty", "a picture needs words", example)
    if has_subject and not mark.search(text):
        raise BadPrompt(
            f"the prompt does not say where the subject is: {short_repr(text)}",
            f"{placeholder} stands for the subject, and it is not in the prompt",
            example,
        )
    generic = _replace(text, mark, "", noun)
    if not generic:
        raise BadPrompt(
            f"the prompt is nothing but {placeholder}",
            "the base model, which does not know the subject, needs words too",
            example,
        )
    return Prompts(_replace(text, mark, token, noun) if has_subject else "", generic)


def split_for_trigger(
    prompt: str, trigger: str, class_noun: str | None, token: str = "sks", placeholder: str = "[V]"
) -> Prompts:
    """The prompts for a LoRA of another program, whose prompts must hold its trigger.

    The first of the triggers stands for the placeholder and the noun beside it: with "ohwx mug", both "a [V]
    mug on a beach" and "a [V] on a beach" become "a ohwx mug on a beach".  A prompt without the placeholder
    is used as it is, by both models.

    Args:
        prompt: what the user wrote.
        trigger: what the file says to write, `triggers_in`; "": it says nothing, and `token` is used.
        class_noun, token, placeholder: as for `split_prompt`.

    Raises:
        BadPrompt: as `split_prompt`, but for the placeholder.
    """
    has_placeholder = placeholder.lower() in prompt.lower()
    plain = split_prompt(prompt, class_noun, token, placeholder, has_subject=has_placeholder)
    if not has_placeholder:
        return Prompts(plain.generic, plain.generic)
    first = next(iter(triggers_in(trigger)), "")
    text = check_text(prompt, "prompt")
    return Prompts(_with_trigger(text, first, placeholder), plain.generic) if first else plain


def noun_of_trigger(trigger: str, nouns: Collection[str], otherwise: str) -> str:
    """The noun that the first trigger ends in: one of `nouns`, else the last of several words."""
    words = next(iter(triggers_in(trigger)), "").split()
    endings = [" ".join(words[start:]) for start in range(len(words))]
    last = words[-1] if len(words) > 1 else otherwise
    return next((ending for ending in endings if ending.lower() in nouns), last)


def warnings_of_trigger(prompt: str, subject_prompt: str, trigger: str, placeholder: str) -> list[str]:
    """What the user should know of the prompt that `split_for_trigger` made, for people."""
    asked = re.sub(re.escape(placeholder), " ", prompt, flags=re.IGNORECASE).split()
    found = []
    if lost := _lacking(subject_prompt, asked):
        found.append(f"the subject's trigger takes the place of {short_repr(' '.join(lost))} in the prompt")
    if missing := _lacking(subject_prompt, triggers_in(trigger)):
        found.append(f"the subject's file asks for words that the prompt lacks: {', '.join(missing)}")
    return found


def check_text(text: str, name: str) -> str:
    """The text with its white space made plain: no margins, one space between words.

    Args:
        text: a prompt; may be empty.
        name: what to call it in an error, such as "negative prompt".

    Raises:
        BadPrompt: it is longer than `MAX_CHARACTERS`, or has a control character or half of a surrogate pair.
    """
    if len(text) > MAX_CHARACTERS:
        raise BadPrompt(
            f"the {name} is too long: {len(text):,} characters",
            f"at most {MAX_CHARACTERS:,} are taken, and a text encoder reads only a few hundred",
            "shorten it; what the subject looks like comes from the photos",
        )
    plain = " ".join(text.split())
    for character in plain:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise BadPrompt(
                f"the {name} has a character that is no text: U+{ord(character):04X} after "
                f"{short_repr(plain[: plain.index(character)])}",
                "control characters and halves of surrogate pairs mean nothing to a text encoder",
                "remove it, and check that the text is UTF-8",
            )
    return plain


def _with_trigger(text: str, trigger: str, placeholder: str) -> str:
    """`text` with the trigger for every placeholder and the noun beside it."""
    parts = re.split(" ?" + re.escape(placeholder), text, flags=re.IGNORECASE)
    written = parts[:1]
    for before, after in itertools.pairwise(parts):
        words, rest = _words_of_trigger(trigger, before, after)
        written.append(f" {words}{'' if rest[:1] in tuple(_PUNCTUATION) else ' '}{rest}")
    return " ".join("".join(written).split())


def _words_of_trigger(trigger: str, before: str, after: str) -> tuple[str, str]:
    """The words of the trigger that the text between `before` and `after` lacks, and what then follows."""
    words, beside = trigger.split(), _NO_NOUN_FOLLOWS.split(after, maxsplit=1)[0].split()
    for size in range(len(words), 0, -1):  # its end may be there: "a [V] mug", "a [V] red mug", "the mug [V]"
        places = [beside[start : start + size] for start in range(len(beside))] or [before.split()[-size:]]
        if _plain_words(" ".join(words[-size:])) in [_plain_words(" ".join(place)) for place in places]:
            return " ".join(words[:-size]), after
    if len(words) == 1 or not beside:
        return trigger, after
    if len(beside) == 1:  # another noun: "a [V] cup"
        return trigger, after.lstrip().removeprefix(beside[0])
    return " ".join(words[:-1]), after  # "a [V] red cup": which of the words is the noun?


def _lacking(prompt: str, phrases: Iterable[str]) -> list[str]:
    """The phrases of which a word is not in the prompt."""
    known = set(_plain_words(prompt))
    return [phrase for phrase in phrases if not known.issuperset(_plain_words(phrase))]


def _plain_words(text: str) -> list[str]:
    """The words without capitals and without the s of a plural."""
    return [word.removesuffix("s") for word in re.findall(r"[\w-]+", text.lower())]


def _replace(text: str, mark: re.Pattern[str], word: str, noun: str) -> str:
    """`text` with `word` for every mark, and `noun` after it where no noun stands beside it."""

    def replacement(found: re.Match[str]) -> str:
        before, after = text[: found.start()], text[found.end() :]
        lacks_noun = _NO_NOUN_FOLLOWS.match(after) and not before.lower().endswith(noun.lower())
        words = f" {word} {noun if lacks_noun else ''}".rstrip()
        return words if after[:1] in tuple(_PUNCTUATION) else words + " "

    return " ".join(mark.sub(replacement, text).split())
