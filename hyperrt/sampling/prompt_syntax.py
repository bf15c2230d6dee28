"""Recognises prompt syntax of other programs, which is drawn as plain text here, and names replacements.

Sources: AUTOMATIC1111's web UI (weights, LoRAs, BREAK, AND), its "dynamic prompts" ({a|b}, __list__), and
compel, InvokeAI's parser: (word)1.3.  Ordinary parentheses and the placeholder are not reported.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

NO_WEIGHTS = "words have no weights here; write it without the parentheses and the number"
# Every repetition is bounded, so that a prompt of ten thousand brackets takes no longer than others.
KINDS = (
    (r"<(?:lora|lyco):([^<>:]{1,200})(?::([^<>]{0,40}))?>", ""),  # see `_lora`
    (r"<(?!lora:|lyco:)[a-z]{2,20}:[^<>]{1,200}>", "nothing is loaded by a prompt here; leave it out"),
    # but not "(at 4:30)"
    (r"\([^()]{1,200}(?:: ?[-+]?[0-9]?\.[0-9]{1,9}|(?<![0-9]): ?[-+]?[0-9]) ?\)", NO_WEIGHTS),
    (r"\([^()]{1,200}\)(?:\++|[0-9]?\.[0-9]+)", NO_WEIGHTS),
    (r"\(\([^()]{1,200}\)\)", "words have no weights here; write it without the parentheses"),
    (r"\[[^][]{1,200}\]", "brackets have a meaning only around V; write the words without them"),
    (r"\{[^{}|]{0,200}\|[^{}]{0,200}\}", "nothing is chosen here; write one of the words"),
    (r"(?<!\w)__[A-Za-z0-9][\w/*-]{0,100}?__(?!\w)", "no list of words is read here; write the word itself"),
    (r"\\[()]", "a backslash is drawn, too; write the parentheses alone"),
    (r"\bBREAK\b", "a prompt cannot be split here; write a comma instead"),
    (r"\bAND\b", "prompts are not combined here; write one sentence"),
)
IN_CAPITALS = (r"\bBREAK\b", r"\bAND\b")  # ordinary words in a prompt that is all capitals


def advice(texts: Iterable[str], placeholder: str = "[V]") -> list[str]:
    """Advice about these prompts: a line for each kind of syntax that is drawn as text.

    Args:
        texts: all prompts, also negative ones.
        placeholder: stands for the subject.
    """
    lines: dict[str, str] = {}
    for text in (" ".join(text.split()) for text in texts):
        for kind, instead in KINDS:
            if kind in IN_CAPITALS and text == text.upper():
                continue
            matches = (match for match in re.finditer(kind, text) if match[0].lower() != placeholder.lower())
            if first := next(matches, None):
                lines.setdefault(kind, f"{first[0]} is drawn as text: {instead or _lora(*first.groups())}")
    return list(lines.values())


def _lora(name: str, weight: str | None) -> str:
    file = name if name.endswith(".safetensors") else f"{name}.safetensors"
    strength = weight if weight and re.fullmatch(r"-?[0-9]{1,2}(?:\.[0-9]{1,9})?", weight) else "1"
    return "a LoRA is given as " + shlex.join(["--subject", file, "--strength", strength])
