"""Prompts: from the one that the user writes to those of the guidance branches.

    "a [V] cat on a beach"  ->  subject "a sks cat on a beach", generic "a cat on a beach", empty ""

The subject prompt goes to the personalised model, the generic one to the base model: c_S and c_G of
arXiv 2511.03156, eq. 20. Text is checked here; how much of it fits the text encoder is the tokenizer's word.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from hyperrt.errors import BadPrompt

MAX_CHARACTERS = 10_000  # some 30 times what fits a text encoder

# What follows "a [V]" in a prompt that leaves the noun out: "a [V] on a beach", "a [V], watercolour".
_NO_NOUN_FOLLOWS = re.compile(
    r"\s*(?:$|[.,;:!?)'’]|(?:above|against|and|as|at|behind|below|beside|by|for|from|in|inside|is|near|next|of|on|or|"
    r"over|under|underwater|while|with|without)\b)",
    re.IGNORECASE,
)


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
            f"the prompt does not say where the subject is: {shortened(text)}",
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
                f"{shortened(plain[: plain.index(character)])}",
                "control characters and halves of surrogate pairs mean nothing to a text encoder",
                "remove it, and check that the text is UTF-8",
            )
    return plain


def shortened(text: str, most: int = 60) -> str:
    """The text in quotes, its end left out where it is long: for messages."""
    return repr(text if len(text) <= most else text[: most - 1] + "…")


def _replace(text: str, mark: re.Pattern[str], word: str, noun: str) -> str:
    """`text` with `word` for every mark, and `noun` after it where no noun stands beside it."""

    def replacement(found: re.Match[str]) -> str:
        before, after = text[: found.start()], text[found.end() :]
        lacks_noun = _NO_NOUN_FOLLOWS.match(after) and not before.lower().endswith(noun.lower())
        words = f" {word} {noun if lacks_noun else ''}".rstrip()
        return words if after[:1] in tuple(".,;:!?)'’") else words + " "

    return " ".join(mark.sub(replacement, text).split())
